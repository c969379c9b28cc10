"""Adapter layers of PEFT on a model, and how one adapter among others is taken out of LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["adapter_layers", "lora_layers", "take_out"]


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> list[Any]:
    """PEFT's layers of all methods, lowest block first; only those that hold the adapter, if one is named."""
    found: dict[int, Any] = {}

    def visit(module: nn.Module) -> None:
        if not isinstance(module, BaseTunerLayer):
            for child in module._modules.values():
                if child is not None:
                    visit(child)
        elif id(module) not in found:
            found[id(module)] = module
            base = module._modules.get("base_layer")
            if base is not None:  # what else it has are adapters, of which there may be many
                visit(base)

    visit(model)
    return [x for x in found.values() if adapter_name is None or adapter_name in x._get_available_adapters()]


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
