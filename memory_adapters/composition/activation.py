"""Activate a subset of adapters temporarily, or one per batch row."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.exclusive import ExclusiveUse, exclusive_use
from memory_adapters.inject import BASE_ROW, memories
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import MemoryLayer, adapter_layers, saved_activation, whole_copies

__all__ = ["BASE_ROW", "use_adapters", "use_adapters_by_row"]


def use_adapters(
    model: PreTrainedModel | PeftModel, adapter_names: Sequence[str], *, wait: bool = False
) -> ExclusiveUse:
    """Use exactly these adapters within this context: memories of any method, and PEFT's own adapters.

    Where two add to the same place, they do so in this order. Nothing is loaded, moved or made trainable. The context
    belongs to the thread or asyncio task that enters it, to the tasks that start in it, and to `asyncio.to_thread`.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: Names, for instance one request's; empty for the base model.
        wait: Whether to wait while another thread or task uses the model, first come, first served. In asyncio, `async
            with` lets other tasks go on meanwhile.

    Raises:
        ValueError: If a name is no adapter of the model, adapters are merged into the weights, or the model is within
            `use_adapters_by_row`.
        RuntimeError: If another thread or task uses the model: which adapters are active is the model's state, not a
            thread's. With `wait=True`, only if `with` would have to wait for another task of its own thread.
    """
    return exclusive_use(model, partial(_activate, base_model(model), list(adapter_names)), wait=wait)


def _activate(base: PreTrainedModel, adapter_names: list[str], undo: ExitStack) -> None:
    found = memories(base)
    _check_names(adapter_names, set(getattr(base, "peft_config", {})) | set(found))
    layers = _switchable(base)
    places = {name: {id(layer) for layer in found[name].tuner_layers()} for name in adapter_names if name in found}
    wanted = []
    for layer in layers:
        own = layer._get_available_adapters()
        names = [name for name in adapter_names if (id(layer) in places[name] if name in places else name in own)]
        if isinstance(layer, ModulesToSaveWrapper) and len(names) > 1:
            raise ValueError(f"`adapter_names` has {names}, which trained the same whole module: give one of them.")
        wanted.append(names)
    undo.enter_context(saved_activation(layers))
    for layer, names in zip(layers, wanted, strict=True):
        layer._active_adapter = names


def use_adapters_by_row(
    model: PreTrainedModel | PeftModel, adapter_names: Sequence[str], *, wait: bool = False
) -> ExclusiveUse:
    """Use, within this context, the adapter `adapter_names[i]` for row i of a batch, or none for `"__base__"`.

    A row `"__base__"` is the base model's. Memories that are not named are inactive. Adapters of PEFT that are active
    and not named stay so for every other row.

    Args:
        model: A model with adapters, or a PeftModel around one.
        adapter_names: One name a row, of memories of any method or LoRA adapters; beam search repeats them over its
            beams.
        wait: As `use_adapters`.

    Raises:
        ValueError: If a name is no adapter of the model, a row would need two adapters on one matrix, or PEFT cannot
            give a row of some active adapter nothing of it; as `use_adapters`; or memories are routed.
        RuntimeError: As `use_adapters`.
    """
    return exclusive_use(model, partial(_activate_by_row, base_model(model), list(adapter_names)), wait=wait)


def _activate_by_row(base: PreTrainedModel, adapter_names: list[str], undo: ExitStack) -> None:
    found = memories(base)
    layers = _switchable(base)
    loras = {name for layer in layers if isinstance(layer, LoraLayer) for name in layer.lora_A}
    _check_names(set(adapter_names) - {BASE_ROW}, set(found) | loras)
    by_row = [layer for layer in layers if isinstance(layer, MemoryLayer)]
    if any(layer.router is not None for layer in by_row):
        raise ValueError("`model` is within `route_memories`, which chooses for each row: leave that context first.")
    mixed = _rows_by_layer(layers, found, adapter_names)
    undo.enter_context(saved_activation(layers))
    for layer, rows in mixed:
        hook = layer.register_forward_pre_hook(_AdapterNames(rows), with_kwargs=True)
        undo.callback(hook.remove)
    only_base = set(adapter_names) == {BASE_ROW}
    for layer in layers:
        layer._active_adapter = [name for name in layer.active_adapters if name not in found and not only_base]
    for layer in by_row:
        undo.callback(setattr, layer, "rows", layer.rows)
        layer.rows = adapter_names


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


def _switchable(base: PreTrainedModel) -> list[Any]:
    """Return what has active adapters: PEFT's layers, and the wrappers of modules that an adapter trained whole.

    Raises:
        ValueError: If adapters are merged into the weights, or rows have adapters of their own.
    """
    layers: list[Any] = [*adapter_layers(base)]
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged into these weights temporarily: call `unmerge_adapter()` first.")
    if any(getattr(config, "modules_to_save", None) for config in getattr(base, "peft_config", {}).values()):
        layers += whole_copies(base)  # looked for only if there are any: a search through all modules
    hooks = [hook for layer in layers for hook in layer._forward_pre_hooks.values()]
    if any(isinstance(hook, _AdapterNames) for hook in hooks) or any(getattr(x, "rows", None) for x in layers):
        raise ValueError("`model` is within `use_adapters_by_row`: leave that context first.")
    return layers


def _rows_by_layer(
    layers: Sequence[Any], found: Mapping[str, Memory[Any]], adapter_names: list[str]
) -> list[tuple[nn.Module, list[str]]]:
    """Return the layers of PEFT's in which rows differ, and the adapter of each row there."""
    named = set(adapter_names) - {BASE_ROW}
    places = {name: {id(layer) for layer in found[name].tuner_layers()} for name in named & set(found)}
    mixed = []
    for layer in layers:
        if isinstance(layer, MemoryLayer) or layer.disable_adapters:
            continue
        own = layer._get_available_adapters()
        wanted = sorted(name for name in named & own if id(layer) in places.get(name, {id(layer)}))
        others = [name for name in layer.active_adapters if name in own - named - set(found)]
        if wanted and others:
            raise ValueError(
                f"`adapter_names` has {wanted}, but {sorted(others)} is active on the same matrices, and a row "
                "can have one adapter there: switch it off, or merge it with `merge_lora`."
            )
        if wanted:
            rows = [name if name in wanted else BASE_ROW for name in adapter_names]
        elif others and named and BASE_ROW in adapter_names:
            if len(others) > 1:
                raise ValueError(
                    f"`adapter_names` has rows of {BASE_ROW!r}, but {sorted(others)} are active on the same matrices, "
                    "and PEFT can leave out one adapter for a row: switch one off, or merge it with `merge_lora`."
                )
            rows = [BASE_ROW if name == BASE_ROW else others[0] for name in adapter_names]
        else:
            continue
        if not _takes_rows(layer, wanted or others):
            raise ValueError(
                f"`adapter_names` gives rows different adapters, but PEFT cannot run {sorted(wanted or others)} (in a "
                f"{type(layer).__name__}) for single rows: switch it off, or run these rows in a batch of their own."
            )
        mixed.append((layer, rows))
    return mixed


def _takes_rows(layer: Any, names: Sequence[str]) -> bool:
    """Return whether a layer of PEFT's can run these adapters for some rows of a batch alone."""
    if isinstance(layer, ModulesToSaveWrapper):
        return isinstance(layer.original_module, (nn.Linear, nn.Embedding))
    if not isinstance(layer, LoraLayer) or isinstance(layer, (MultiheadAttention, ParamWrapper)):
        return False
    given = inspect.signature(cast(Any, layer).forward).parameters.values()
    return any(one.kind is one.VAR_KEYWORD for one in given) and not any(layer.use_dora.get(name) for name in names)


def _check_names(names: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(names) - known):
        raise ValueError(f"`adapter_names` has {unknown}, but the adapters are {sorted(known)} (or {BASE_ROW!r}).")
