"""The contract of all memories, for the gated residual MLP."""

from __future__ import annotations

from typing import Any

import torch

from memory_adapters import Fact, Memory, MemoryAdapterConfig, WriteReport
from tests.support.contract import MemoryContract

UNRELATED = [
    "Some text about the sea, the wind and all the ships.",
    "The birds in the garden sing in the early morning.",
    "He sold the house at last and moved to town.",
]


class TestResidualMemory(MemoryContract):
    def make_config(self, **settings: Any) -> MemoryAdapterConfig:
        return MemoryAdapterConfig(
            **{"layers": [1, 2], "memory_dim": 8, "num_train_epochs": 2, "num_prefixes": 0, "min_steps": 0} | settings
        )

    def fill(self, memory: Memory) -> None:
        for layer in memory.tuner_layers():
            mlp = layer.memory_adapter_mlp[memory.adapter_name]  # type: ignore[attr-defined]
            mlp.add_keys(torch.zeros(1, mlp.up.shape[1]), torch.ones(1))
            torch.nn.init.constant_(mlp.gate, 0.5)
        memory.config.num_keys += 1  # type: ignore[attr-defined]

    def write(self, memory: Memory) -> WriteReport:
        fact = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
        return memory.write(fact, unrelated=UNRELATED, training_args={"disable_tqdm": True})  # type: ignore[call-arg]
