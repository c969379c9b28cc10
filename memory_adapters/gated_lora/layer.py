"""The LoRAs of all things in one adapter: which of its ranks act at a token is what the gate says of their things.

At each matrix W of the blocks above the keys,

    W x  becomes  W x + Σ_t g_t(x) B_t A_t x,

where t goes through the things, of which all A_t are one matrix A (things · rank, in) and all B_t one matrix B
(out, things · rank), as PEFT has them, and g_t is 1 from the first token of a row that is near a key of t on, else 0.
Only the ranks of things that some row is open to are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.keys.gate import KeyReader, Opened
from memory_adapters.keys.thing_memory import Values
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import lora_linears

__all__ = [
    "ThingGate",
    "TrainedRows",
    "factors_of",
    "gate_lora",
    "gated_matrices",
    "keep_factors",
    "set_factors",
    "set_lora",
    "thing_gate",
]


@dataclass(frozen=True)
class TrainedRows:
    """Store which LoRA acts in each row of a batch while LoRAs are trained.

    Attributes:
        factors: The LoRAs that are trained, by the name of their matrix.
        owners: Index in them of each row's (rows,).
        mask: Where it acts (rows, tokens), bool; None for everywhere.
        scale: Factor on what it adds.
    """

    factors: Mapping[str, Values]
    owners: Tensor
    mask: Tensor | None
    scale: float


class ThingGate:
    """Say which LoRAs act in the pass in progress; shared by all matrices of a memory.

    Attributes:
        reader: What reads the memory's keys.
        adapter_name: The memory's name.
        rank: Of each LoRA.
        trained: What acts in place of what is written, while things are trained.
    """

    def __init__(self, reader: KeyReader, adapter_name: str, rank: int) -> None:
        self.reader, self.adapter_name, self.rank = reader, adapter_name, rank
        self.trained: TrainedRows | None = None

    def opened(self) -> Opened | None:
        """Return where rows are open, and to which things; None where they are to none."""
        found = self.reader.opened(self.adapter_name)
        return None if found is None or len(found.things) == 0 else found


class GatedA(nn.Linear):
    """Compute A x of the things that rows are open to, and 0 where they are not."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., open things · rank) for x (..., in_features)."""
        gate, matrix = _gate_of(self)
        if (trained := gate.trained) is not None:
            rows = x.reshape(len(trained.owners), -1, x.shape[-1])  # some MLPs read all tokens as one row
            A = trained.factors[matrix].inner[trained.owners].to(x.dtype)
            found = rows @ A.transpose(1, 2)
            found = found if trained.mask is None else found * trained.mask[..., None].to(x.dtype)
            return found.reshape(*x.shape[:-1], -1)
        opened = gate.opened()
        if opened is None:
            return x.new_zeros(*x.shape[:-1], 0)
        weight = self.weight.view(-1, gate.rank, self.in_features)[opened.things.to(x.device)]
        mask = opened.mask.to(x.device, x.dtype).repeat_interleave(gate.rank, -1)
        return F.linear(x, weight.flatten(0, 1)) * mask.reshape(*x.shape[:-1], -1)


class GatedB(nn.Linear):
    """Compute B A x of the things that rows are open to."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) for x (..., open things · rank); a single 0 if no row is open."""
        gate, matrix = _gate_of(self)
        if (trained := gate.trained) is not None:
            rows = x.reshape(len(trained.owners), -1, x.shape[-1])
            B = trained.factors[matrix].outer[trained.owners].to(x.dtype)
            return (rows @ B.transpose(1, 2)).reshape(*x.shape[:-1], -1) * trained.scale
        opened = gate.opened()
        if opened is None:
            return x.new_zeros(())
        weight = self.weight.view(self.out_features, -1, gate.rank)[:, opened.things.to(x.device)]
        return F.linear(x, weight.flatten(1, 2))


def _gate_of(linear: nn.Module) -> tuple[ThingGate, str]:
    return cast("tuple[ThingGate, str]", vars(linear)["gate"])


def gate_lora(layer: LoraLayer, adapter_name: str, gate: ThingGate, matrix: str) -> None:
    """Let the ranks of a LoRA act only where the gate says so."""
    for held, kind, linear in zip(
        (layer.lora_A, layer.lora_B), (GatedA, GatedB), lora_linears(layer, adapter_name), strict=True
    ):
        gated = kind(linear.in_features, linear.out_features, bias=False, device="meta")
        gated.weight = linear.weight
        gated.train(linear.training)
        vars(gated)["gate"] = (gate, matrix)  # in a tuple, so that the gate's layers are no children of this one
        held[adapter_name] = gated


def gated_matrices(memory: Memory[GatedLoraConfig]) -> dict[str, LoraLayer]:
    """Return the LoRA layers of a memory by the full names of their matrices."""
    names = memory._config.target_modules or []
    found: dict[str, LoraLayer] = {}
    for name in names:
        module: Any = memory.model.get_submodule(name)
        while not (isinstance(module, LoraLayer) and memory.adapter_name in module.lora_A):
            module = module.base_layer  # another kind of adapter stands around it
        found[name] = module
    return found


def thing_gate(memory: Memory[GatedLoraConfig]) -> ThingGate:
    """Return what says where a memory's LoRAs act."""
    layer = next(iter(gated_matrices(memory).values()))
    return _gate_of(lora_linears(layer, memory.adapter_name)[0])[0]


def factors_of(memory: Memory[GatedLoraConfig]) -> dict[str, Values]:
    """Return the LoRAs of all things, by matrix; they share the adapter's memory."""
    found, rank = {}, memory._config.lora_rank
    for name, layer in gated_matrices(memory).items():
        down, up = lora_linears(layer, memory.adapter_name)
        count = len(memory._config.things)
        A = down.weight.detach()[: count * rank].view(count, rank, down.in_features)
        B = up.weight.detach()[:, : count * rank].view(up.out_features, count, rank).transpose(0, 1)
        found[name] = Values(A, B)
    return found


def set_factors(memory: Memory[GatedLoraConfig], factors: Mapping[str, Values]) -> None:
    """Let the adapter hold these LoRAs, by matrix; without any, one of zeros, the least that PEFT knows."""
    rank, dtype = memory._config.lora_rank, memory.model.dtype
    for matrix, layer in gated_matrices(memory).items():
        down, up = lora_linears(layer, memory.adapter_name)
        A, B = factors[matrix].inner, factors[matrix].outer
        if len(A) == 0:
            A, B = A.new_zeros(1, rank, down.in_features), B.new_zeros(1, up.out_features, rank)
        A, B = A.flatten(0, 1).to(dtype), B.transpose(0, 1).flatten(1, 2).to(dtype)
        set_lora(layer, memory.adapter_name, memory._adapter_config, A, B)


def keep_factors(memory: Memory[GatedLoraConfig], things: Sequence[int]) -> None:
    """Let the adapter hold the LoRAs of these of its things alone, in rising order; copies whole runs of them."""
    rank = memory._config.lora_rank
    gaps = [i for i in range(1, len(things)) if things[i] != things[i - 1] + 1]
    bounds = zip([0, *gaps], [*gaps, len(things)], strict=True)
    runs = [(things[i] * rank, (things[j - 1] + 1) * rank) for i, j in bounds]
    for layer in gated_matrices(memory).values():
        down, up = lora_linears(layer, memory.adapter_name)
        A = torch.cat([down.weight.detach()[start:end] for start, end in runs])
        B = torch.cat([up.weight.detach()[:, start:end] for start, end in runs], 1)
        set_lora(layer, memory.adapter_name, memory._adapter_config, A, B)


def set_lora(layer: LoraLayer, adapter_name: str, config: Any, A: Tensor, B: Tensor) -> None:
    """Let a LoRA be B A, of any rank, and tell its PEFT config."""
    down, up = lora_linears(layer, adapter_name)
    for linear, tensor in ((down, A), (up, B)):
        linear.weight = nn.Parameter(tensor.detach().to(linear.weight.device).contiguous(), requires_grad=False)
    config.r = config.lora_alpha = down.out_features = up.in_features = len(A)
    layer.r[adapter_name] = layer.lora_alpha[adapter_name] = len(A)
    layer.scaling[adapter_name] = 1.0
