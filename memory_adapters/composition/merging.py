"""Merging one LoRA into the base weights while everything else on the model stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.inject import base_model, memories
from memory_adapters.memory import forget_adapter
from memory_adapters.peft_layers.layers import adapter_layers, remove_lora
from memory_adapters.peft_layers.rollback import rollback_on_error

__all__ = ["merge_lora"]


def merge_lora(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Add a LoRA's B A to the base weights for good, and take the adapter off.

    PEFT's own `merge_and_unload` merges every active LoRA, edits too, and drops all others. Here every other adapter
    stays as it is. Memories that stay belong to the merged model from then on: their fingerprint becomes its own.
    Meanwhile the matrices that the LoRA is on are kept in main memory too, so that an interruption is undone exactly.

    Args:
        model: A model with the LoRA, or a PeftModel around one (which is of no use afterwards).
        adapter_name: The LoRA; an edit's name merges the edit, and ends the memory.

    Returns:
        The Hugging Face model.

    Raises:
        ValueError: If the adapter is none of the model's LoRAs, something is merged for a while, it trained whole
            modules beside its matrices (`modules_to_save`), or merging gives NaN. The model is unchanged then.
        RuntimeError: If another thread uses the model.
    """
    base: Any = base_model(model)
    with exclusive_use(base):
        return _merge(base, adapter_name)


def _merge(base: Any, adapter_name: str) -> nn.Module:
    found = memories(base)
    own = found.get(adapter_name)
    held: list[Any] = own.tuner_layers() if own is not None else adapter_layers(base, adapter_name)
    layers = [layer for layer in held if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError(
            f"`adapter_name={adapter_name!r}` is no LoRA that can be merged; the model's adapters are "
            f"{sorted(getattr(base, 'peft_config', {}))}."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged into these weights for a while: call `unmerge_adapter()` first.")
    whole = [m for m in base.modules() if isinstance(m, AuxiliaryTrainingWrapper) and adapter_name in m._adapters]
    if whole or len(layers) < len(held):
        raise ValueError(f"`adapter_name={adapter_name!r}` trained whole modules too: merge it with PEFT, on its own.")
    if not all(torch.isfinite(layer.get_delta_weight(adapter_name)).all() for layer in layers):
        raise ValueError(f"`adapter_name={adapter_name!r}` holds NaN or infinity: nothing was merged.")
    books = [memory._config for memory in found.values()]
    with rollback_on_error(base, *books, tensors=_weights(layers)):
        for layer in layers:
            layer.merge(adapter_names=[adapter_name])
        _take_off(base, adapter_name, layers)
        for name, memory in found.items():
            if name != adapter_name:
                memory._rebase(base_fingerprint(base, memory.config.layers_path))
    return base


def _weights(layers: Sequence[LoraLayer]) -> Iterator[torch.Tensor]:
    """What merging writes into; quantised weights are replaced, and those on disk are written back whole."""
    for layer in layers:
        for parameter in layer.get_base_layer().parameters():
            if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not parameter.is_meta:
                yield parameter


def _take_off(base: Any, adapter_name: str, layers: Sequence[LoraLayer]) -> None:
    """Take a merged LoRA off, and leave its product in the weights."""
    for layer in layers:
        layer.merged_adapters.remove(adapter_name)
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
    names = {id(module): name for name, module in base.named_modules()}
    remove_lora(base, {i: names[id(layer)] for i, layer in enumerate(layers)}, adapter_name)
    forget_adapter(base, adapter_name)
