"""Virtual tokens, which a memory puts before a prompt: switch them off where states are found by position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers

__all__ = ["virtual_tokens_disabled"]


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
