"""LoRA layers of PEFT by their place in the model, and how an adapter is taken out of them."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["lora_layers", "take_out"]


def lora_layers(model: nn.Module, names: Mapping[int, str]) -> dict[int, LoraLayer]:
    """The LoRA layers at these places (block index to dotted name)."""
    found = {}
    for index, name in names.items():
        module = model.get_submodule(name)
        assert isinstance(module, LoraLayer)
        found[index] = module
    return found


def take_out(model: nn.Module, names: Mapping[int, str], adapter_name: str) -> None:
    """Delete the adapter, and put the base's own module back where no other adapter is left."""
    for layer, name in zip(lora_layers(model, names).values(), names.values(), strict=True):
        layer.delete_adapter(adapter_name)
        if not layer._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
