"""Train the LoRAs of many things at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.gated_lora.layer import TrainedRows, gated_matrices, thing_gate
from memory_adapters.keys.thing_memory import Values, reader_of
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import lora_linears, saved_activation
from memory_adapters.training.thing_trainer import ThingRows, train_things

__all__ = ["train"]


def train(
    memory: Memory[GatedLoraConfig], decoder: Decoder, things: Sequence[ThingRows], *, progress: bool
) -> tuple[dict[str, Values], list[float]]:
    """Train a LoRA for each thing; returns them by matrix, in the order of `things`, and each pass's mean loss."""
    config, dtype = memory.config, memory.model.dtype
    tensors, losses = train_things(
        memory,
        decoder,
        things,
        config,
        lambda count: _TrainedLoras(memory, count),
        first_block=config.blocks[0],
        progress=progress,
    )
    return {
        matrix: Values(tensors[2 * i].to(dtype), (tensors[2 * i + 1] * config.scale).to(dtype))
        for i, matrix in enumerate(gated_matrices(memory))
    }, losses


class _TrainedLoras:
    """Hold LoRAs that change nothing as they begin: all A alike and random, B zero, in float32."""

    def __init__(self, memory: Memory[GatedLoraConfig], count: int) -> None:
        self.memory = memory
        generator = torch.Generator().manual_seed(memory.config.seed)
        self.factors = {}
        for matrix, layer in gated_matrices(memory).items():
            down, up = lora_linears(layer, memory.adapter_name)
            bound = 1 / math.sqrt(down.in_features)  # as PEFT's
            A = torch.empty(1, memory.config.lora_rank, down.in_features).uniform_(-bound, bound, generator=generator)
            B = torch.zeros(count, up.out_features, memory.config.lora_rank)
            device = down.weight.device
            self.factors[matrix] = Values(
                A.repeat(count, 1, 1).to(device).requires_grad_(), B.to(device).requires_grad_()
            )

    @property
    def tensors(self) -> list[Tensor]:
        """A and B of each matrix."""
        return [tensor for factors in self.factors.values() for tensor in (factors.inner, factors.outer)]

    @contextmanager
    def acting(self, owners: Tensor, mask: Tensor | None) -> Iterator[None]:
        """See `ThingValues`."""
        gate, reader = thing_gate(self.memory), reader_of(self.memory)
        gate.trained = TrainedRows(self.factors, owners, mask, self.memory.config.scale)
        try:
            with saved_activation([reader]):
                reader._active_adapter = []  # where LoRAs act is known
                yield
        finally:
            gate.trained = None
