"""Adapters of every kind with seeded weights, for tests of what composes with what."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from memory_adapters import MemitMemory, Memory, MemorySlots, SlotMemory, inject_memory
from memory_adapters.memit.ledger import Factors
from memory_adapters.peft_layers.layers import SWITCHED_OFF, adapter_layers
from tests.memit.test_contract import TestMemitMemory as _Memit
from tests.memory_slots.test_contract import TestSlotMemory as _Slots
from tests.residual_mlp.test_contract import TestResidualMemory as _Residual
from tests.support.models import byte_tokenizer

KINDS = ("lora", "residual", "memit", "slots")
SUITES: dict[str, Any] = {"residual": _Residual(), "memit": _Memit(), "slots": _Slots()}


def lora_config() -> LoraConfig:
    """On the attention, and on the matrices that edits change too."""
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def put(model: PreTrainedModel, kind: str, name: str, seed: int) -> Memory | None:
    """Add an active adapter with weights of its own; adapters that are there stay active."""
    torch.manual_seed(seed)
    if kind == "lora":
        active = [(layer, list(layer.active_adapters)) for layer in adapter_layers(model)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SWITCHED_OFF)
            model.add_adapter(lora_config(), adapter_name=name)  # makes it the only active one
        for layer, names in active:
            layer._active_adapter = names
        for layer in adapter_layers(model, name):
            layer._active_adapter = [*(n for n in layer.active_adapters if n != name), name]
        return None
    memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer(), adapter_name=name)
    SUITES[kind].fill(memory)
    vary(memory, seed)
    return memory


@torch.no_grad()
def vary(memory: Memory, seed: int) -> None:
    """Make two memories of a kind differ."""
    if isinstance(memory, SlotMemory):
        (slots,) = memory.slots
        fields = (slots.spans, slots.num_tokens, slots.base_fingerprint, slots.encoder_fingerprint, slots.text_sha256)
        memory.use(MemorySlots(slots.vectors * (1 + 0.1 * seed), *fields))
    elif isinstance(memory, MemitMemory):
        for shares in memory.ledger.shares.values():
            shares.mul_(1 + 0.1 * seed)
        memory._set_factors(factors={i: Factors(f.A, f.B) for i, f in memory.ledger.solve().items()})
    else:
        for layer in adapter_layers(memory.model, memory.adapter_name):
            layer.memory_adapter_mlp[memory.adapter_name].gate.mul_(1 + 0.1 * seed)
