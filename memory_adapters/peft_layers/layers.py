"""PEFT's adapter layers on a model: find them, read and set their tensors, remove one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = ["adapter_layers", "adapter_tensors", "lora_layers", "remove_lora", "set_adapter_tensors"]


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors under PEFT's checkpoint names (without the adapter's name)."""
    # Not the whole model's state dict: bitsandbytes' 4-bit layers on a CPU compute otherwise once asked for theirs.
    every = chain(model.named_parameters(), model.named_buffers())
    own = {name: tensor.detach() for name, tensor in every if adapter_name in name.split(".")}
    return get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False)


@torch.no_grad()
def set_adapter_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put into an adapter what `adapter_tensors` gave of one with the same settings.

    PEFT would ask for the whole model's state dict, which changes what bitsandbytes' 4-bit layers compute on a CPU.
    """
    for name, own in chain(model.named_parameters(), model.named_buffers()):
        parts = name.split(".")
        if adapter_name in parts:
            parts.remove(adapter_name)
            own.copy_(tensors[".".join(parts)])


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


def remove_lora(model: nn.Module, names: Mapping[int, str], adapter_name: str) -> None:
    """Delete the adapter, and put the base's own module back where no other adapter is left."""
    for layer, name in zip(lora_layers(model, names).values(), names.values(), strict=True):
        layer.delete_adapter(adapter_name)
        if not layer._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
