"""What training must not leave behind: a model in another state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft.functional import set_requires_grad
from torch import nn

from memory_adapters.forward_passes import left_as_it_was
from memory_adapters.quantised import differentiable
from memory_adapters.residual_mlp.tuner import memory_layers

if TYPE_CHECKING:
    from memory_adapters.residual_mlp.memory import ResidualMemory

__all__ = ["speaking", "trainable_alone"]


@contextmanager
def speaking(memory: ResidualMemory) -> Iterator[None]:
    """The memory takes part within this context, whether or not it did before, and unrouted.

    Raises:
        RuntimeError: If all adapters of the model are switched off.
    """
    if any(layer.disable_adapters for layer in memory.tuner_layers()):
        raise RuntimeError("All adapters of the model are disabled; enable them (`enable_adapters()`) before writing.")
    was_active = memory.active
    routers = [(layer, layer.router) for layer in memory_layers(memory.model)]
    memory.active = True
    try:
        for layer, _ in routers:
            layer.router = None
        yield
    finally:
        memory.active = was_active
        for layer, router in routers:
            layer.router = router


@contextmanager
def trainable_alone(memory: ResidualMemory) -> Iterator[None]:
    """Only this memory's parameters require gradients; modes and flags are put back afterwards."""
    model: nn.Module = memory.model
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with left_as_it_was(model):
            model.requires_grad_(False)
            set_requires_grad(model, adapter_names=memory.adapter_name, requires_grad=True)
            with differentiable(model):
                yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None if not flag else parameter.grad
