"""Slots for other programs: a PEFT prompt-tuning adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memory_adapters.export import Exporter, Write, check_finite

if TYPE_CHECKING:
    from memory_adapters.memory_slots.memory import SlotMemory

__all__ = ["EXPORTERS"]


def prompt_tuning(memory: SlotMemory, dtype: torch.dtype | None) -> Write:
    """See `MemorySlots.to_prompt_tuning`."""
    if len(memory.slots) != 1:
        raise ValueError(
            f"`memory` reads {len(memory.slots)} rows of slots, and a prompt-tuning adapter holds one: write a text "
            "first, or export each row with `MemorySlots.to_prompt_tuning`."
        )
    (slots,) = memory.slots
    vectors = check_finite(slots.vectors.to(dtype or torch.float32), "vectors")

    def write(folder: Path) -> Path:
        replace(slots, vectors=vectors).to_prompt_tuning(folder, memory.model)
        return folder

    return write


EXPORTERS: Mapping[str, Exporter] = {"prompt-tuning": prompt_tuning}
