"""PEFT's adapter layers on a model: find them, read and set their tensors, activate and remove adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

__all__ = [
    "ForwardHook",
    "MemoryLayer",
    "RowRouter",
    "adapter_layers",
    "adapter_tensors",
    "lora_layers",
    "lora_linears",
    "own_tensors",
    "remove_adapter",
    "saved_activation",
    "set_own_tensors",
    "used_adapters",
]


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

    def get_base_layer(self) -> nn.Module:
        """Return the layer itself: it replaces no base module."""
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there is no weight to merge into. Trainers that merge while they generate still work, because an
        unmerged memory takes part in every forward pass."""

    def unmerge(self) -> None:
        """Do nothing, as `merge` did nothing."""


def used_adapters(layer: BaseTunerLayer) -> list[str]:
    """Return the adapters that take part in a layer's passes, in order."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


@contextmanager
def saved_activation(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
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
            base = module._modules.get("base_layer")
            if base is not None:  # what else it has are adapters, of which there may be many
                visit(module, "base_layer", base)

    visit(model, "", model)
    return list(found.values())


def lora_layers(model: nn.Module, names: Mapping[int, str]) -> dict[int, LoraLayer]:
    """Return the LoRA layers at these places (block index to dotted name)."""
    found: dict[int, LoraLayer] = {}
    for index, name in names.items():
        module = model.get_submodule(name)
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
            layer._active_adapter = [other for other in layer.active_adapters if other != adapter_name]
            layer.delete_adapter(adapter_name)
        if layer._get_available_adapters():
            continue
        if isinstance(layer, MemoryLayer):
            layer.detach(parent)
        elif layer.get_base_layer() is not layer:
            setattr(parent, name, layer.get_base_layer())
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's parameters and buffers by their names on the model, without the adapter's name."""
    found = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        parts = name.split(".")
        if adapter_name in parts:
            parts.remove(adapter_name)
            found[".".join(parts)] = tensor.detach()
    return found


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
    return get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter_name, save_embedding_layers=False)
