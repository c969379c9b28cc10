"""The contract of all memories, for memory slots."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from memory_adapters import Fact, Memory, WriteReport
from memory_adapters.memory_slots import MemorySlots, MemorySlotsConfig, SlotMemory
from tests.support.contract import MemoryContract


class TestSlotMemory(MemoryContract):
    learns_in_place = False
    files: ClassVar[list[str]] = ["README.md", "adapter_config.json", "adapter_model.safetensors", "slots.safetensors"]

    def make_config(self, **settings: Any) -> MemorySlotsConfig:
        small: dict[str, Any] = dict(read="all", num_slots=4, span_length=16, lora_rank=2, refine_steps=2)
        return MemorySlotsConfig(**small | settings)

    def fill(self, memory: Memory) -> None:
        assert isinstance(memory, SlotMemory)
        width = memory.encoder.decoder.embedding_size
        vectors = 0.3 * torch.randn(5, width, generator=torch.Generator().manual_seed(1))
        fingerprint = memory.config.base_fingerprint or {}
        memory.use(MemorySlots(vectors, (3, 2), 18, fingerprint, memory.encoder.fingerprint(), "0" * 64))

    def write(self, memory: Memory) -> WriteReport:
        fact = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
        return memory.write(fact, progress=False)  # type: ignore[call-arg]
