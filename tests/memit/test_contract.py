"""The contract of all memories, for closed-form edits."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from memory_adapters import Fact, MemitConfig, MemitMemory, Memory, WriteReport, inject_memory
from memory_adapters.memit.ledger import Ledger
from memory_adapters.memit.solvers import SOLVERS
from tests.support.contract import MemoryContract
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")


class TestMemitMemory(MemoryContract):
    architectures_refused: ClassVar[dict[str, str]] = {"mixtral": "mixture of experts"}
    files: ClassVar[list[str]] = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "ledger.safetensors",
        "memory_config.json",
    ]

    def make_config(self, **settings: Any) -> MemitConfig:
        small: dict[str, Any] = dict(layers=[1, 2], steps=3, num_prefixes=1, prefix_length=2, covariance_tokens=300)
        return MemitConfig(**small | settings)

    def fill(self, memory: Memory) -> None:
        assert isinstance(memory, MemitMemory)
        generator = torch.Generator().manual_seed(1)
        empty = memory.ledger
        each = memory.config.keys_per_subject
        keys = {i: torch.randn(each, k.shape[1], generator=generator) for i, k in empty.keys.items()}
        shares = {i: torch.randn(1, s.shape[1], generator=generator) for i, s in empty.shares.items()}
        entry = Ledger((FACT,), keys, shares)
        cost = SOLVERS["memit"].cost
        eye = {i: torch.eye(k.shape[1], dtype=torch.float64) for i, k in keys.items()}
        costs = {i: cost(one, memory.config.null_space) for i, one in eye.items()}
        memory.ledger = empty.plus(entry, costs)
        memory._set_factors(memory.ledger)
        memory._set_items([])

    def write(self, memory: Memory) -> WriteReport:
        return memory.write(FACT, progress=False)  # type: ignore[call-arg]

    def test_only_facts_are_taken(self) -> None:
        memory = inject_memory(tiny_model(), self.make_config(), tokenizer=byte_tokenizer())
        with pytest.raises(TypeError, match="takes Fact"):
            memory.write("a document")
