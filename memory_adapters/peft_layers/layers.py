"""PEFT's adapter layers on a model: find them, read and set their tensors, activate and remove adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

__all__ = [
    "SWITCHED_OFF",
    "ForwardHook",
    "MemoryLayer",
    "RowRouter",
    "adapter_layers",
    "adapter_tensors",
    "key_parts",
    "lora_layers",
    "lora_linears",
    "own_tensors",
    "remove_adapter",
    "remove_empty_layers",
    "saved_activation",
    "set_own_tensors",
    "used_adapters",
    "watch_switching",
    "whole_copies",
]

SWITCHED_OFF = "PEFT activates only the adapters that it is told to, or adds, and so has switched off the memory"
WRAPPED = "base_layer"  # PEFT's name, in a layer that stands in a base module's place, for what stood there


class ForwardHook(NamedTuple):
    """Describe a hook that a `MemoryLayer` needs on its parent: the function, and how it is registered.

    Hooks keep no state: they find the layer on the module that they are called with, so a copied model works.
    """

    function: Callable[..., Any]
    before: bool = False
    prepend: bool = False
    with_kwargs: bool = False


class RowRouter(Protocol):
    """Choose, in each pass, the adapter of each row of a batch."""

    def read(self, layer: MemoryLayer, x: Tensor) -> tuple[tuple[str, ...], list[str] | None]:
        """Return the adapters that are routed, and the one of each row at `layer`, whose input is `x`."""


class MemoryLayer(nn.Module, BaseTunerLayer):
    """Hold one method's adapters at one place of a model: a child of a base module, run by hooks on that module.

    Shared code asks a memory's layers through this class and nothing else. PEFT's own layers replace a base module;
    this one stands beside it, so the base's parameters keep their names.

    Attributes:
        rows: The adapter of each row of a batch; None where every row uses the active ones.
        router: What chooses the rows' adapters in each pass; None for nothing.
        weights: Factor on what an adapter adds, by adapter name, for methods that have one.
    """

    child_name: ClassVar[str]  # in the parent; must not contain the tuner's prefix, which PEFT looks for when deleting
    hooks: ClassVar[tuple[ForwardHook, ...]]
    adds_virtual_tokens: ClassVar[bool] = False  # whether the model reads more than the tokens that it is given
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] | None = None
        self.router: RowRouter | None = None
        self.weights: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    @classmethod
    def attach(cls, parent: nn.Module, *args: Any) -> Self:
        """Return the layer of `parent`; the first call makes it, from `args`, and registers its hooks."""
        if cls.child_name not in parent._modules:
            parent.add_module(cls.child_name, cls(*args))
            for hook in cls.hooks:
                register: Any = parent.register_forward_pre_hook if hook.before else parent.register_forward_hook
                register(hook.function, prepend=hook.prepend, with_kwargs=hook.with_kwargs)
        return cls.of(parent)

    @classmethod
    def of(cls, parent: nn.Module) -> Self:
        """Return the layer of `parent`."""
        layer = parent._modules[cls.child_name]
        assert isinstance(layer, cls)
        return layer

    def num_virtual_tokens(self) -> int:
        """Return how many virtual tokens the model reads with a prompt at most, as a rule."""
        return 0

    def detach(self, parent: nn.Module) -> None:
        """Remove the layer and its hooks from `parent`."""
        delattr(parent, self.child_name)
        own = [hook.function for hook in self.hooks]
        for hooks, flags in (
            (parent._forward_pre_hooks, parent._forward_pre_hooks_with_kwargs),
            (parent._forward_hooks, parent._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in own]:
                del hooks[key]
                flags.pop(key, None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose among the layer's adapters, as PEFT does. If others are named, as when `add_adapter` adds a LoRA, this
        layer's stay as active as they are."""
        before, named = self._active_adapter, {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        super().set_adapter(adapter_names, inference_mode)
        if named and not named & self._get_available_adapters():
            self._active_adapter = before

    def get_base_layer(self) -> nn.Module:
        """Return the layer itself: it replaces no base module."""
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there is no weight to merge into. Trainers that merge while they generate still work, because an
        unmerged memory takes part in every forward pass."""

    def unmerge(self) -> None:
        """Do nothing, as `merge` did nothing."""


def watch_switching(layer: LoraLayer, adapter_name: str) -> None:
    """Let a LoRA layer warn whenever PEFT switches off this adapter, which is a memory's; one layer of it is enough."""
    watched = vars(layer).get("set_adapter") or partial(_set_adapter, layer, [])
    vars(layer)["set_adapter"] = partial(_set_adapter, layer, [*watched.args[1], adapter_name])


def _set_adapter(
    layer: LoraLayer, watched: list[str], adapter_names: str | list[str], inference_mode: bool = False
) -> None:
    """Do as `LoraLayer.set_adapter`, and warn; a function of the module, so that the model can be pickled."""
    before = layer.active_adapters
    type(layer).set_adapter(layer, adapter_names, inference_mode)
    for name in watched:
        if name in before and name not in layer.active_adapters:
            remedy = f"switch it on again with `memories(model)[{name!r}].active = True`."
            warnings.warn(f"{SWITCHED_OFF} {name!r}: {remedy}", stacklevel=3)


def _stop_watching(layer: BaseTunerLayer, adapter_name: str) -> None:
    watched = vars(layer).pop("set_adapter", None)
    for name in [] if watched is None else watched.args[1]:
        if name != adapter_name:
            watch_switching(cast(LoraLayer, layer), name)


def used_adapters(layer: BaseTunerLayer) -> list[str]:
    """Return the adapters that take part in a layer's passes, in order."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


@contextmanager
def saved_activation(layers: Iterable[BaseTunerLayer | AuxiliaryTrainingWrapper]) -> Iterator[None]:
    """Put back afterwards which adapters are active in `layers`.

    PEFT's `set_adapter` will not do for switching a few adapters for a while: it makes the adapters that it names
    trainable and all others not, and it knows one tuner's layers alone.
    """
    before = [(layer, layer._active_adapter) for layer in layers]
    try:
        yield
    finally:
        for layer, names in before:
            layer._active_adapter = names


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> list[BaseTunerLayer]:
    """Return PEFT's layers of all methods, lowest block first; only those that hold the adapter, if one is named."""
    layers = [layer for _, _, layer in _placed_layers(model)]
    return [layer for layer in layers if adapter_name is None or adapter_name in layer._get_available_adapters()]


def key_parts() -> set[str]:
    """Return what PEFT puts into the names of adapters' tensors: no adapter can be called so."""
    classes: list[Any] = [BaseTunerLayer, AuxiliaryTrainingWrapper]
    for one in classes:
        classes += one.__subclasses__()
    known = {name for one in classes for name in getattr(one, "adapter_layer_names", ())}
    return known | {WRAPPED, "lora_magnitude_vector", "original_module", "token_adapter"}


def whole_copies(model: nn.Module) -> list[Any]:
    """Return PEFT's wrappers of modules that adapters have whole copies or rows of (`modules_to_save`)."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _placed_layers(model: nn.Module) -> list[tuple[nn.Module, str, BaseTunerLayer]]:
    """Return each adapter layer once, with its parent and its name there."""
    found: dict[int, tuple[nn.Module, str, BaseTunerLayer]] = {}

    def visit(parent: nn.Module, name: str, module: nn.Module) -> None:
        if not isinstance(module, BaseTunerLayer):
            for child_name, child in module._modules.items():
                if child is not None:
                    visit(module, child_name, child)
        elif id(module) not in found:
            found[id(module)] = (parent, name, module)
            base = module._modules.get(WRAPPED)
            if base is not None:  # what else it has are adapters, of which there may be many
                visit(module, WRAPPED, base)

    visit(model, "", model)
    return list(found.values())


def lora_layers(model: nn.Module, names: Mapping[int, str]) -> dict[int, LoraLayer]:
    """Return the LoRA layers at these places (block index to dotted name)."""
    found: dict[int, LoraLayer] = {}
    for index, name in names.items():
        module: Any = model.get_submodule(name)
        while isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):  # another kind stands around it
            module = getattr(module, WRAPPED)
        assert isinstance(module, LoraLayer)
        found[index] = module
    return found


def lora_linears(layer: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear]:
    """Return the modules that hold A (rank, in_features) and B (out_features, rank) of a LoRA."""
    return cast(nn.Linear, layer.lora_A[adapter_name]), cast(nn.Linear, layer.lora_B[adapter_name])


def remove_adapter(model: PreTrainedModel, adapter_name: str) -> None:
    """Remove an adapter from a model: its modules, its hooks and PEFT's bookkeeping.

    Where no other adapter is left, base modules and hooks are as they were before the first one. Other adapters stay
    as active as they are; PEFT's `delete_adapter` would activate one in the removed one's place.
    """
    for parent, name, layer in _placed_layers(model):
        if adapter_name in layer._get_available_adapters():
            _stop_watching(layer, adapter_name)
            layer._active_adapter = [other for other in layer.active_adapters if other != adapter_name]
            layer.delete_adapter(adapter_name)
        if layer._get_available_adapters():
            continue
        if isinstance(layer, MemoryLayer):
            layer.detach(parent)
        elif (wrapped := layer._modules.get(WRAPPED)) is not None:  # type: ignore[attr-defined]  # it is a module too
            setattr(parent, name, wrapped)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)


def remove_empty_layers(model: nn.Module) -> None:
    """Remove the layers of memories that hold no adapter, and their hooks."""
    for parent, _, layer in _placed_layers(model):
        if isinstance(layer, MemoryLayer) and not layer._get_available_adapters():
            layer.detach(parent)


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return what a memory's layers hold for it, parameters and buffers, by their names on the model.

    The names are those on a model without other adapters, without the memory's own name.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer in adapter_layers(model, adapter_name):
        place = _without_wrappers(paths[id(layer)])
        for kind in layer.adapter_layer_names:
            held: Any = getattr(layer, kind)
            if adapter_name not in held:
                continue
            own = held[adapter_name]
            if isinstance(own, Tensor):
                found[f"{place}.{kind}"] = own.detach()
            else:
                for name, tensor in chain(own.named_parameters(), own.named_buffers()):
                    found[f"{place}.{kind}.{name}"] = tensor.detach()
    return found


def _without_wrappers(name: str) -> str:
    """Return a dotted name as it is where no other adapter stands around the module."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


@torch.no_grad()
def set_own_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy into an adapter what `own_tensors` returned of one with the same settings."""
    for name, own in own_tensors(model, adapter_name).items():
        own.copy_(tensors[name])


def adapter_tensors(model: PreTrainedModel, adapter_name: str) -> dict[str, Tensor]:
    """Return a PEFT adapter's tensors under PEFT's checkpoint names (without the adapter's name)."""
    # Not the whole model's state dict: asked for it, bitsandbytes' 4-bit layers on a CPU compute something else then.
    every = chain(model.named_parameters(), model.named_buffers())
    own = {name: tensor.detach() for name, tensor in every if adapter_name in name.split(".")}
    found = get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False)
    return {_without_wrappers(name): tensor for name, tensor in found.items()}
