"""Which adapters speak: any subset for a while, or another for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.inject import base_model, memories
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import adapter_layers

__all__ = ["BASE_ROW", "use_adapters", "use_adapters_by_row"]

BASE_ROW = "__base__"


@contextmanager
def use_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within this context exactly these adapters take part: memories of any method, and PEFT's own adapters.

    Where two add to the same place, they do so in this order. Nothing is loaded, moved or made trainable.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: Names, for instance one request's; empty for the base model.

    Raises:
        ValueError: If a name is no adapter of the model.
        RuntimeError: If another thread uses the model: who speaks is the model's state, not a thread's.
    """
    base = base_model(model)
    found = memories(base)
    _check_names(adapter_names, set(getattr(base, "peft_config", {})))
    layers = adapter_layers(base)
    places = {name: {id(x) for x in found[name].tuner_layers()} for name in adapter_names if name in found}
    with exclusive_use(base):
        before = [layer._active_adapter for layer in layers]
        try:
            for layer in layers:
                own = layer._get_available_adapters()
                layer._active_adapter = [
                    name for name in adapter_names if (id(layer) in places[name] if name in places else name in own)
                ]
            yield
        finally:
            for layer, names in zip(layers, before, strict=True):
                layer._active_adapter = names


@contextmanager
def use_adapters_by_row(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within this context row i of a batch uses the adapter `adapter_names[i]`, or none for `"__base__"`.

    Memories that are not named are silent. Adapters of PEFT that are not named stay on for every row.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: One name a row, of memories of any method or LoRA adapters; beam search repeats them over its
            beams.

    Raises:
        ValueError: If a name is no adapter of the model, or an adapter that is not named is on the same matrix as one
            that is, or the model has a router.
        RuntimeError: As `use_adapters`.
    """
    base = base_model(model)
    found = memories(base)
    named = set(adapter_names) - {BASE_ROW}
    layers = adapter_layers(base)
    _check_names(
        named, set(found) | {name for layer in layers if isinstance(layer, LoraLayer) for name in layer.lora_A}
    )
    by_row = [layer for layer in layers if hasattr(layer, "rows")]
    if any(getattr(layer, "router", None) is not None for layer in by_row):
        raise ValueError("`model` has a router, which chooses for each row: `remove` it first.")
    with exclusive_use(base), ExitStack() as stack:
        mixed = _mixed_layers(layers, found, named)
        before = [(layer, layer._active_adapter) for layer in layers]
        rows_before = [layer.rows for layer in by_row]
        for layer in mixed:
            stack.callback(layer.register_forward_pre_hook(_Rows(adapter_names), with_kwargs=True).remove)
        try:
            for layer in layers:
                layer._active_adapter = [name for name in layer._active_adapter if name not in found]
            for layer in by_row:
                layer.rows = list(adapter_names)
            yield
        finally:
            for layer, names in before:
                layer._active_adapter = names
            for layer, rows in zip(by_row, rows_before, strict=True):
                layer.rows = rows


class _Rows:
    """Pre-hook that gives a LoRA layer its `adapter_names`, repeated over beams."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, _layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        beams, rest = divmod(len(args[0]), len(self.names))
        if rest:
            raise ValueError(
                f"`adapter_names` has {len(self.names)} entries for a batch of {len(args[0])} rows: give one a row."
            )
        return args, {**kwargs, "adapter_names": [name for name in self.names for _ in range(beams)]}


def _mixed_layers(layers: Sequence[Any], found: dict[str, Memory], named: set[str]) -> list[Any]:
    """LoRA layers that a row may want of its own."""
    places = {name: {id(layer) for layer in found[name].tuner_layers()} for name in named & set(found)}
    mixed = []
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
            mixed.append(layer)
    return mixed


def _check_names(names: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`adapter_names` has {unknown}, but the adapters are {sorted(known)} (or {BASE_ROW!r}).")
