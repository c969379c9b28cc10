"""Train the hidden units of many things at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.keys.thing_memory import Values, reader_of
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import saved_activation
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.layer import residual_layers
from memory_adapters.residual_mlp.thing_mlp import ThingMLP, TrainedUnits
from memory_adapters.training.thing_trainer import ThingRows, train_things

__all__ = ["thing_mlps", "train_units"]


def thing_mlps(memory: Memory[MemoryAdapterConfig]) -> dict[str, ThingMLP]:
    """Return the modules that hold the values of a memory's things, by block."""
    layers = residual_layers(memory)
    found = {}
    for block, layer in zip(memory._config.depths, layers, strict=True):
        module = layer.memory_adapter_mlp[memory.adapter_name]
        assert isinstance(module, ThingMLP)
        found[f"block {block}"] = module
    return found


def train_units(
    memory: Memory[MemoryAdapterConfig], decoder: Decoder, things: Sequence[ThingRows], *, progress: bool
) -> tuple[dict[str, Values], list[float]]:
    """Train hidden units for each thing; returns them by block, in the order of `things`, and each pass's mean loss."""
    tensors, losses = train_things(
        memory,
        decoder,
        things,
        memory.config,
        lambda count: _TrainedUnits(memory, count),
        first_block=int(memory.config.depths[0]) + 1,
        progress=progress,
    )
    return {block: Values(tensors[2 * i], tensors[2 * i + 1]) for i, block in enumerate(thing_mlps(memory))}, losses


class _TrainedUnits:
    """Hold units that change nothing as they begin: all W_up alike and random, W_down zero."""

    def __init__(self, memory: Memory[MemoryAdapterConfig], count: int) -> None:
        self.memory, self.modules = memory, thing_mlps(memory)
        generator = torch.Generator().manual_seed(memory.config.seed)
        self.values: dict[str, Values] = {}
        for block, module in self.modules.items():
            _, units, width = module.inner.shape
            inner = torch.empty(1, units, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            outer, device = torch.zeros(count, width, units), module.inner.device
            self.values[block] = Values(
                inner.repeat(count, 1, 1).to(device).requires_grad_(), outer.to(device).requires_grad_()
            )

    @property
    def tensors(self) -> list[Tensor]:
        """W_up and W_down of each block."""
        return [tensor for values in self.values.values() for tensor in (values.inner, values.outer)]

    @contextmanager
    def acting(self, owners: Tensor, mask: Tensor | None) -> Iterator[None]:
        """See `ThingValues`."""
        reader = reader_of(self.memory)
        self._set({block: TrainedUnits(values, owners, mask) for block, values in self.values.items()})
        try:
            with saved_activation([reader]):
                reader._active_adapter = []  # where values act is known
                yield
        finally:
            self._set({})

    def _set(self, trained: Mapping[str, TrainedUnits]) -> None:
        for block, module in self.modules.items():
            module.trained = trained.get(block)
