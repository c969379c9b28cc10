"""A gated LoRA for other programs: a plain LoRA adapter for each thing, to be chosen for each request."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig

from memory_adapters.files.exports import Write, check_finite
from memory_adapters.files.vllm import vllm_adapter
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import factors_of
from memory_adapters.memory import Memory

__all__ = ["LIST_FILE", "vllm"]

LIST_FILE = "lora_modules.json"


def vllm(memory: Memory[GatedLoraConfig], dtype: torch.dtype | None) -> Write:
    """Export a folder for each thing with a plain LoRA adapter, and a list of their names as vLLM takes it."""
    things = memory.config.things
    if not things:
        raise ValueError("Nothing is written in this memory: there is nothing to export.")
    dtype = dtype or memory.model.dtype
    values = factors_of(memory)
    config = cast(LoraConfig, memory._adapter_config)
    folders: dict[str, tuple[str, Write]] = {}
    for index, thing in enumerate(things):
        factors = {
            matrix: (
                check_finite(own.inner[index].to(dtype), f"{matrix} of {thing!r}"),
                check_finite(own.outer[index].to(dtype), f"{matrix} of {thing!r}"),
            )
            for matrix, own in values.items()
        }
        readable = re.sub(r"[^\w]+", "-", thing.casefold()).strip("-")[:40]
        folders[f"{index:05d}-{readable}"] = thing, vllm_adapter(factors, config, "choose a smaller `lora_rank`.")

    def write(folder: Path) -> Path:
        for name, (_, write_adapter) in folders.items():
            (folder / name).mkdir()
            write_adapter(folder / name)
        listed = [{"name": thing, "path": name} for name, (thing, _) in folders.items()]
        (folder / LIST_FILE).write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    return write
