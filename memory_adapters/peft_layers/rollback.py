"""Roll a model back if an operation on it fails or is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.peft_layers.layers import adapter_layers, remove_adapter, remove_empty_layers, whole_copies

__all__ = ["Restore", "rollback_on_error", "saved_adapters", "saved_attributes", "saved_tensors"]

Restore: TypeAlias = Callable[[], None]


@contextmanager
def rollback_on_error(*restore: Restore) -> Iterator[None]:
    """Call each of `restore` if the block fails or is interrupted (Ctrl-C), and raise what was raised.

    An operation restores what it touches itself: see `saved_adapters`, `saved_attributes` and `saved_tensors`.
    """
    try:
        yield
    except BaseException:
        for one in restore:
            one()
        raise


def saved_adapters(model: PreTrainedModel) -> Restore:
    """Return a function that removes the adapters that were added since, and makes active and trainable what was."""
    names = set(getattr(model, "peft_config", {}))
    active = [(layer, list(layer.active_adapters)) for layer in (*adapter_layers(model), *whole_copies(model))]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flag = {name: value for name, value in vars(model).items() if name == "_hf_peft_config_loaded"}

    def restore() -> None:
        held = {name for layer in adapter_layers(model) for name in layer._get_available_adapters()}
        for name in sorted(held | set(getattr(model, "peft_config", {}))):
            if name not in names:
                remove_adapter(model, name)
        remove_empty_layers(model)  # of an adapter that failed before it was put into its layer
        for layer, actives in active:
            layer._active_adapter = actives
        for parameter in trainable:
            parameter.requires_grad_(True)
        vars(model).pop("_hf_peft_config_loaded", None)
        vars(model).update(flag)

    return restore


def saved_attributes(*owners: object) -> Restore:
    """Return a function that gives each object the attributes that it has now; what they hold is not copied."""
    before = [(owner, dict(vars(owner))) for owner in owners]

    def restore() -> None:
        for owner, attributes in before:
            vars(owner).clear()
            vars(owner).update(attributes)

    return restore


def saved_tensors(tensors: Iterable[Tensor]) -> Restore:
    """Return a function that gives tensors the values that they have now, of which a copy is kept in main memory."""
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in before:
            tensor.copy_(value)

    return restore
