"""Merge one LoRA into the base weights while every other adapter stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.inject import memories
from memory_adapters.peft_layers.attached import forget_memory
from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers, remove_adapter
from memory_adapters.peft_layers.rollback import Restore, rollback_on_error, saved_attributes, saved_tensors

__all__ = ["merge_lora"]


def merge_lora(model: PreTrainedModel | PeftModel, adapter_name: str = "default") -> PreTrainedModel:
    """Merge a LoRA into the base weights for good, and remove the adapter.

    PEFT's own `merge_and_unload` merges every active LoRA, edits too, and drops all others. Here every other adapter
    stays as it is. Memories that stay belong to the merged model from then on: their fingerprint becomes its own.
    Meanwhile the matrices that the LoRA is on are kept in main memory too, so that an interruption is undone exactly.

    Args:
        model: A model with the LoRA, or a PeftModel around one (which is of no use afterwards).
        adapter_name: The LoRA; an edit's name merges the edit, and ends the memory. A gate is lost: what it kept shut
            acts in every text.

    Returns:
        The Hugging Face model.

    Raises:
        ValueError: If the adapter is none of the model's LoRAs, adapters are merged temporarily, it trained whole
            modules beside its matrices (`modules_to_save`), or it holds NaN. The model is unchanged then.
        RuntimeError: If another thread uses the model.
    """
    base = base_model(model)
    with exclusive_use(base):
        found = memories(base)
        own = found.pop(adapter_name, None)
        held = own.tuner_layers() if own is not None else adapter_layers(base, adapter_name)
        layers = [layer for layer in held if isinstance(layer, LoraLayer)]
        _check(base, adapter_name, held, layers)
        configs = [memory._config for memory in found.values()]
        with rollback_on_error(saved_tensors(_weights(layers)), saved_attributes(*configs), _saved_merges(layers)):
            for layer in layers:
                layer.merge(adapter_names=[adapter_name])
                layer.merged_adapters.remove(adapter_name)  # else removing the adapter would take it out again
            # From here on nothing fails: the adapter is removed, and the memories that stay belong to the merged model.
        remove_adapter(base, adapter_name)
        forget_memory(base, adapter_name)
        for memory in found.values():
            memory._rebase(base_fingerprint(base, memory._config.layers_path))
    return base


def _check(
    base: PreTrainedModel, adapter_name: str, held: Sequence[BaseTunerLayer], layers: Sequence[LoraLayer]
) -> None:
    if not layers:
        raise ValueError(
            f"`adapter_name={adapter_name!r}` is no LoRA that can be merged; the model's adapters are "
            f"{sorted(getattr(base, 'peft_config', {}))}."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged into these weights temporarily: call `unmerge_adapter()` first.")
    whole = [m for m in base.modules() if isinstance(m, AuxiliaryTrainingWrapper) and adapter_name in m._adapters]
    gates = [layer for layer in held if isinstance(layer, MemoryLayer)]  # a gate is not merged: it goes
    if whole or len(layers) + len(gates) < len(held):
        raise ValueError(f"`adapter_name={adapter_name!r}` trained whole modules too: merge it with PEFT, on its own.")
    deltas = (layer.get_delta_weight(adapter_name) for layer in layers)  # type: ignore[attr-defined]  # all but the base
    if not all(torch.isfinite(delta).all() for delta in deltas):
        raise ValueError(f"`adapter_name={adapter_name!r}` holds NaN or infinity: nothing was merged.")


def _weights(layers: Sequence[LoraLayer]) -> Iterator[torch.Tensor]:
    """Yield what merging writes into; quantised weights are replaced, and those on disk are written back whole."""
    for layer in layers:
        for parameter in layer.get_base_layer().parameters():
            if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not parameter.is_meta:
                yield parameter


def _saved_merges(layers: Sequence[LoraLayer]) -> Restore:
    """Return a function that gives layers the weights and the list of merged adapters that they have now."""
    before = [(layer, dict(layer.get_base_layer()._parameters), list(layer.merged_adapters)) for layer in layers]

    def restore() -> None:
        for layer, parameters, merged in before:
            layer.get_base_layer()._parameters.update(parameters)
            layer.merged_adapters[:] = merged

    return restore
