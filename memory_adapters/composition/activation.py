"""Activate a subset of adapters temporarily, or one per batch row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.inject import BASE_ROW, memories
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers, saved_activation

__all__ = ["BASE_ROW", "use_adapters", "use_adapters_by_row"]


@contextmanager
def use_adapters(model: PreTrainedModel | PeftModel, adapter_names: Sequence[str]) -> Iterator[None]:
    """Use exactly these adapters within this context: memories of any method, and PEFT's own adapters.

    Where two add to the same place, they do so in this order. Nothing is loaded, moved or made trainable.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: Names, for instance one request's; empty for the base model.

    Raises:
        ValueError: If a name is no adapter of the model.
        RuntimeError: If another thread uses the model: which adapters are active is the model's state, not a thread's.
    """
    base = base_model(model)
    found = memories(base)
    _check_names(adapter_names, set(getattr(base, "peft_config", {})) | set(found))
    layers = adapter_layers(base)
    places = {name: {id(layer) for layer in found[name].tuner_layers()} for name in adapter_names if name in found}
    with exclusive_use(base), saved_activation(layers):
        for layer in layers:
            own = layer._get_available_adapters()
            layer._active_adapter = [
                name for name in adapter_names if (id(layer) in places[name] if name in places else name in own)
            ]
        yield


@contextmanager
def use_adapters_by_row(model: PreTrainedModel | PeftModel, adapter_names: Sequence[str]) -> Iterator[None]:
    """Use, within this context, the adapter `adapter_names[i]` for row i of a batch, or none for `"__base__"`.

    Memories that are not named are inactive. Adapters of PEFT that are not named stay active for every row.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: One name a row, of memories of any method or LoRA adapters; beam search repeats them over its
            beams.

    Raises:
        ValueError: If a name is no adapter of the model, or an adapter that is not named is on the same matrix as one
            that is, or memories are routed.
        RuntimeError: As `use_adapters`.
    """
    base = base_model(model)
    found = memories(base)
    named = set(adapter_names) - {BASE_ROW}
    layers = adapter_layers(base)
    loras = {name for layer in layers if isinstance(layer, LoraLayer) for name in layer.lora_A}
    _check_names(named, set(found) | loras)
    by_row = [layer for layer in layers if isinstance(layer, MemoryLayer)]
    if any(layer.router is not None for layer in by_row):
        raise ValueError("`model` is within `route_memories`, which chooses for each row: leave that context first.")
    with exclusive_use(base), saved_activation(layers), ExitStack() as stack:
        for lora in _lora_layers_by_row(layers, found, named):
            hook = lora.register_forward_pre_hook(_AdapterNames(adapter_names), with_kwargs=True)
            stack.callback(hook.remove)
        for layer in layers:
            layer._active_adapter = [name for name in layer._active_adapter if name not in found]
        for layer in by_row:
            stack.callback(setattr, layer, "rows", layer.rows)
            layer.rows = list(adapter_names)
        yield


class _AdapterNames:
    """Give a LoRA layer, as a forward pre-hook, its `adapter_names`, repeated over beams."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        beams, rest = divmod(len(args[0]), len(self.names))
        if rest:
            raise ValueError(
                f"`adapter_names` has {len(self.names)} entries for a batch of {len(args[0])} rows: give one a row."
            )
        return args, {**kwargs, "adapter_names": [name for name in self.names for _ in range(beams)]}


def _lora_layers_by_row(
    layers: Sequence[BaseTunerLayer], found: dict[str, Memory[Any]], named: set[str]
) -> list[nn.Module]:
    """Return the LoRA layers in which a row may need an adapter of its own."""
    places = {name: {id(layer) for layer in found[name].tuner_layers()} for name in named & set(found)}
    mixed: list[nn.Module] = []
    for layer in layers:
        if not isinstance(layer, LoraLayer):
            continue
        wanted = {name for name in named & set(layer.lora_A) if id(layer) in places.get(name, {id(layer)})}
        others = set(layer._active_adapter) & set(layer.lora_A) - named - set(found)
        if wanted and others and not layer.disable_adapters:
            raise ValueError(
                f"`adapter_names` has {sorted(wanted)}, but {sorted(others)} is active on the same matrices, and a row "
                "can have one adapter there: switch it off, or merge it with `merge_lora`."
            )
        if wanted:
            mixed.append(cast(nn.Module, layer))
    return mixed


def _check_names(names: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`adapter_names` has {unknown}, but the adapters are {sorted(known)} (or {BASE_ROW!r}).")
