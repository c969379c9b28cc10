"""The contract of all memories, for closed-form edits with a gate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from memory_adapters import MemitConfig, MemitMemory, Memory
from tests.memit.test_contract import TestMemitMemory as Ungated


class TestGatedMemitMemory(Ungated):
    files: ClassVar[list[str]] = sorted([*Ungated.files, "keys.safetensors"])

    def make_config(self, **settings: Any) -> MemitConfig:
        return super().make_config(**{"gate": "keys", **settings})

    def fill(self, memory: Memory) -> None:
        """Open about half of all tokens."""
        assert isinstance(memory, MemitMemory)
        super().fill(memory)
        weights = torch.randn(1, memory._keys().keys.shape[1], generator=torch.Generator().manual_seed(1))
        memory._keys().add(weights, torch.zeros(1), [0], [[]], [0])
        memory.config.names, memory.config.key_owners = [[]], [0]


del Ungated  # it is collected where it is defined
