"""Gradients through bitsandbytes' 4-bit layers on a CPU.

In evaluation mode such a layer packs its weight for a fast kernel on its first pass without gradients. That kernel has
no backward pass: from then on, gradients through the layer are missing, without an error. Unpacked, a layer dequantises
its weight in every pass, which takes far longer than the product itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["differentiable", "keep_unpacked"]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through 4-bit layers on a CPU within this context; afterwards weights are packed as they were.

    Weights are dequantised once, if twice the memory that this takes is free.
    """
    layers = _four_bit_layers(model)
    before = [(layer, layer.training, layer.weight.data, layer.weight.quant_state) for layer in layers]
    needed = sum(state.shape.numel() * state.dtype.itemsize for *_, state in before)
    dense = 2 * needed < psutil.virtual_memory().available
    try:
        for layer, _, data, state in before:
            if getattr(state, "packing_format_for_cpu", False):
                layer.weight.data, layer.weight.quant_state = _unpacked(data, state)
            if dense:
                layer.forward = partial(_linear, layer, _dequantised(layer))
        keep_unpacked(model)
        yield
    finally:
        for layer, training, data, state in before:
            layer.training, layer.weight.data, layer.weight.quant_state = training, data, state
            layer.__dict__.pop("forward", None)


def keep_unpacked(model: nn.Module) -> None:
    """Keep layers unpacked after a change of the model's mode within `differentiable`: those in training mode are."""
    for layer in _four_bit_layers(model):
        layer.training = True


def _dequantised(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _linear(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Return weight and state as before packing, but for the rounding of absmax, which is left unquantised."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False
    absmax = state.absmax.T.reshape(-1).float()
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = absmax
    return data, state


def _four_bit_layers(model: nn.Module) -> list[Any]:  # bitsandbytes' layers, which need not be installed
    found = []
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if getattr(weight, "quant_state", None) is not None and weight.device.type == "cpu":
            found.append(module)
    return found
