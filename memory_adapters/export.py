"""Memories as files that other programs load: vLLM, llama.cpp, plain transformers, plain PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from memory_adapters.files.atomic import atomic_directory
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.memory import Memory
from memory_adapters.registry import method_of_type

__all__ = ["Exporter", "Write", "check_finite", "export"]

Write: TypeAlias = Callable[[Path], Path]
"""Writes an export into a folder, and says what the other program is given: the folder, or a file in it."""

Exporter: TypeAlias = Callable[[Any, "torch.dtype | None"], Write]
"""Checks a memory and a dtype for one format, changing nothing, and returns what writes it."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def export(
    memory: Memory,
    save_directory: str | os.PathLike[str],
    *,
    format: str,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Save a memory in another program's format. The memory and its model stay as they are.

    Nothing more can be written to an export, nor forgotten in it: keep what `save_pretrained` saves as well.

    Args:
        memory: On its model, active or not. Other adapters on the model are left out.
        save_directory: A folder. An earlier export of the same format in it is replaced; its other files stay.
        format: What the memory's method offers. Closed-form edits: `"vllm"` (a LoRA adapter for vLLM, and for any
            program that loads PEFT's), `"gguf"` (a LoRA file for llama.cpp) and `"merged"` (the whole model, edited).
            Memory slots: `"prompt-tuning"` (a PEFT adapter). A gated residual MLP has no other format.
        dtype: Of the tensors: float32, bfloat16 or float16. By default the model's in `"vllm"` and `"merged"`, and
            float32 in the others.

    Returns:
        What the other program is given: the folder, or for `"gguf"` the file in it.

    Raises:
        ValueError: If the memory cannot be had in this format or dtype, nothing is written in it, or the folder holds
            a saved memory, or weights that would be loaded together with the export. No file is changed then.
        ModuleNotFoundError: If the format needs a package that is not installed.
        NotADirectoryError: If `save_directory` is a file.
        RuntimeError: If the memory was removed from its model.
    """
    method = memory.config.method_name
    if format not in memory.exporters:
        offered = f"It can be exported as {', '.join(map(repr, memory.exporters))}." if memory.exporters else ""
        said = " ".join(filter(None, [offered, memory.export_note]))
        raise ValueError(f"`format={format!r}` is no format for {method}. {said}")
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"`dtype` must be None or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    write = memory.exporters[format](memory, _DTYPES.get(name))
    target = Path(save_directory)
    with atomic_directory(target) as staging:
        given = write(staging).relative_to(staging)
        _check_apart(target, {file.name for file in staging.iterdir()})
    return target / given


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, just cast to the dtype of an export.

    Raises:
        ValueError: If a number in it was too large for its dtype.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"`dtype={tensor.dtype}` cannot hold the numbers of `{name}`: use torch.bfloat16.")
    return tensor


def _check_apart(folder: Path, made: set[str]) -> None:
    """Neither overwrite a saved memory, nor leave files beside the export that a program would load with it."""
    if not any(name.endswith(".safetensors") for name in made):
        return
    loaded = [file for file in folder.iterdir() if file.suffix == ".safetensors" or file.name in CONFIG_FILES]
    apart = sorted(file.name for file in loaded if file.name not in made or _is_memory(file))
    if apart:
        raise ValueError(
            f"`save_directory={str(folder)!r}` holds {', '.join(apart)} of something else, which the export would "
            "replace or be loaded together with: choose another folder."
        )


def _is_memory(file: Path) -> bool:
    if file.name not in CONFIG_FILES:
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(values, dict) and method_of_type(values.get("peft_type")) is not None
