"""Write a memory in the format of another program: vLLM, llama.cpp, transformers, plain PEFT."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from memory_adapters.files.atomic import atomic_directory
from memory_adapters.files.names import CONFIG_FILES
from memory_adapters.registry import method_of_type

__all__ = ["Exporter", "Write", "check_finite", "export_files"]

Write: TypeAlias = Callable[[Path], Path]
"""Writes an export into a folder, and returns what the other program is given: the folder, or a file in it."""

Exporter: TypeAlias = Callable[["torch.dtype | None"], Write]
"""Checks a memory and a dtype for one format, changing nothing, and returns what writes it."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def export_files(exporter: Exporter, save_directory: str | os.PathLike[str], dtype: torch.dtype | str | None) -> Path:
    """Export into a folder, all files or none; see `Memory.export`."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"`dtype` must be None or one of {', '.join(_DTYPES)}, got {dtype!r}.")
    write = exporter(_DTYPES.get(name))
    target = Path(save_directory)
    with atomic_directory(target) as staging:
        given = write(staging).relative_to(staging)
        _check_apart(target, {str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file()})
    return target / given


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor`, which was just cast to the dtype of an export.

    Raises:
        ValueError: If it holds infinity or NaN: a number was too large for its dtype.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"`dtype={tensor.dtype}` cannot hold the numbers of `{name}`: use torch.bfloat16.")
    return tensor


def _check_apart(folder: Path, made: set[str]) -> None:
    """Refuse to overwrite a saved memory, or to leave files beside the export that a program would load with it."""
    if not any(name.endswith(".safetensors") for name in made):
        return
    every = [
        file for depth in {name.count(os.sep) for name in made} for file in folder.glob("/".join("*" * (depth + 1)))
    ]
    loaded = [file for file in every if file.suffix == ".safetensors" or file.name in CONFIG_FILES]
    names = {str(file.relative_to(folder)): file for file in loaded}
    apart = sorted(name for name, file in names.items() if name not in made or _is_memory(file))
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
