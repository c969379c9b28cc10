"""The contract of all memories, for the gated LoRA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from memory_adapters import Fact, GatedLoraConfig, GatedLoraMemory, Memory, WriteReport
from memory_adapters.gated_lora.layer import lora_parameters
from memory_adapters.keys.fitting import BlockKeys
from tests.support.contract import MemoryContract

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
UNRELATED = [
    "Some text about the sea, the wind and all the ships.",
    "The birds in the garden sing in the early morning.",
    "He sold the house at last and moved to town.",
]


class TestGatedLoraMemory(MemoryContract):
    files: ClassVar[list[str]] = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "keys.safetensors",
        "memory_config.json",
    ]

    def make_config(self, **settings: Any) -> GatedLoraConfig:
        small: dict[str, Any] = dict(key_layer=1, lora_rank=2, num_train_epochs=2, num_prefixes=1, batch_size=4)
        return GatedLoraConfig(**small | settings)

    def fill(self, memory: Memory) -> None:
        """Open every row from a token on that most texts have, and let the LoRA change much."""
        assert isinstance(memory, GatedLoraMemory)
        generator = torch.Generator().manual_seed(1)
        width = memory._keys().keys.shape[1]
        weights = torch.randn(2, width, generator=generator)
        memory._keys().add(BlockKeys(weights, torch.tensor([-2.0, -3.0]), [-1, -1]), [])
        memory.config.key_owners = [-1, -1]
        with torch.no_grad():
            for parameter in lora_parameters(memory).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def write(self, memory: Memory) -> WriteReport:
        return memory.write(FACT, progress=False, unrelated=UNRELATED)
