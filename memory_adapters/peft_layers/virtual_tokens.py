"""Virtual tokens, which a memory puts before a prompt: count them, and switch them off where positions matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers

__all__ = ["num_virtual_tokens", "virtual_tokens_disabled"]


def num_virtual_tokens(model: nn.Module) -> int:
    """Return how many virtual tokens the model reads with a prompt at most, as a rule."""
    layers = [x for x in adapter_layers(model) if isinstance(x, MemoryLayer) and not x._disable_adapters]
    return sum(layer.num_virtual_tokens() for layer in layers)


@contextmanager
def virtual_tokens_disabled(model: nn.Module) -> Iterator[None]:
    """Let the model read, within this context, the tokens that it is given and nothing before them."""
    layers = [x for x in adapter_layers(model) if isinstance(x, MemoryLayer) and x.adds_virtual_tokens]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
