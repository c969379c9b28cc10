"""Slots for other programs: a PEFT prompt-tuning adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from memory_adapters.files.exports import Write, check_finite
from memory_adapters.memory_slots.slots import MemorySlots

__all__ = ["prompt_tuning"]


def prompt_tuning(rows: Sequence[MemorySlots], model: PreTrainedModel, dtype: torch.dtype | None) -> Write:
    """Check that slots can be a prompt-tuning adapter; see `MemorySlots.to_prompt_tuning`."""
    if len(rows) != 1:
        raise ValueError(
            f"The memory reads {len(rows)} rows of slots, and a prompt-tuning adapter holds one: write a text first, "
            "or export each row with `MemorySlots.to_prompt_tuning`."
        )
    (slots,) = rows
    vectors = check_finite(slots.vectors.to(dtype or torch.float32), "vectors")

    def write(folder: Path) -> Path:
        replace(slots, vectors=vectors).to_prompt_tuning(folder, model)
        return folder

    return write
