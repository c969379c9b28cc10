"""The contract of all memories, for the gated LoRA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from memory_adapters import Fact, GatedLoraConfig, GatedLoraMemory, Memory, WriteReport
from memory_adapters.gated_lora.layer import factors_of, set_factors
from memory_adapters.keys.thing_memory import Values
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
        small: dict[str, Any] = dict(key_layer=1, lora_rank=2, num_train_epochs=2, steps_per_epoch=2, num_prefixes=1)
        return GatedLoraConfig(**small | settings)

    def fill(self, memory: Memory) -> None:
        """Open every row to one thing or to both from a token on that most texts have, and let them change much."""
        assert isinstance(memory, GatedLoraMemory)
        generator = torch.Generator().manual_seed(1)
        keys, config, shapes = memory._keys(), memory._config, factors_of(memory)
        weights = torch.randn(2, keys.keys.shape[1], generator=generator)
        keys.keep([])
        keys.add(weights, torch.tensor([-2.0, -3.0]), [0, 1], [[], []], [0, 0])
        config.things, config.names, config.windows = ["one", "other"], keys.names, keys.windows
        config.key_owners = keys.owners
        set_factors(
            memory,
            {
                matrix: Values(
                    torch.randn(2, *own.inner.shape[1:], generator=generator),
                    torch.randn(2, *own.outer.shape[1:], generator=generator),
                )
                for matrix, own in shapes.items()
            },
        )

    def write(self, memory: Memory) -> WriteReport:
        return memory.write(FACT, progress=False, unrelated=UNRELATED)
