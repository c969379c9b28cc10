"""The gated residual MLP as a PEFT tuner: a child of the decoder block, driven by a stateless forward hook."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from memory_adapters.activation import speaking_by_row
from memory_adapters.checkpoint import base_fingerprint, check_fingerprint
from memory_adapters.config import MemoryPeftType
from memory_adapters.decoder import execution_device, find_decoder, resolve_layers
from memory_adapters.forward_passes import hidden_state
from memory_adapters.lora import adapter_layers
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.gated_mlp import GatedMLP

if TYPE_CHECKING:
    from memory_adapters.residual_mlp.router import MemoryRouter

__all__ = ["MemoryLayer", "MemoryTuner", "memory_layers"]

PREFIX = "memory_adapter_"
CHILD = "residual_memory"  # must not contain the prefix: PEFT skips such modules when it deletes an adapter


class MemoryLayer(nn.Module, BaseTunerLayer):
    """All residual memories of one decoder block, by adapter name."""

    adapter_layer_names = ("memory_adapter_mlp",)
    other_param_names = ()

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.memory_adapter_mlp = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.rows: list[str] | None = None
        self.router: MemoryRouter | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self._device: torch.device | None = None

    def update_layer(self, name: str, config: MemoryAdapterConfig, seed: int, device: torch.device) -> None:
        """Add the memory `name`, in float32, on the device of the block."""
        self._device = device
        mlp = GatedMLP(self.hidden_size, config)
        if not mlp.up.is_meta:
            mlp.reset_parameters(torch.Generator().manual_seed(seed))
        self.memory_adapter_mlp[name] = mlp
        self.weights[name] = config.weight
        self._move_adapter_to_device_of_base_layer(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.memory_adapter_mlp and not self.memory_adapter_mlp[adapter_name].up.is_meta:
            self.memory_adapter_mlp[adapter_name].to(device or self._device, torch.float32)

    def delete_adapter(self, adapter_name: str) -> None:
        self.weights.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, hidden_size) plus what the active memories add; x itself if there are none."""
        if self._disable_adapters:
            return x
        routed, rows = ((), self.rows) if self.router is None else self.router.read(self, x)
        total = None
        for name in self._active_adapter:
            if name in self.memory_adapter_mlp and name not in routed:
                delta = self.weights[name] * self.memory_adapter_mlp[name](x)
                total = delta if total is None else total + delta
        out = x if total is None else (x.float() + total).to(x.dtype)
        return out if rows is None else self._forward_rows(x, out, rows)

    def _forward_rows(self, x: Tensor, out: Tensor, rows: list[str]) -> Tensor:
        """`out` plus what each row's own memory adds at x."""
        beams, rest = divmod(x.shape[0], len(rows))
        if rest:
            raise ValueError(
                f"`adapter_names` has {len(rows)} entries for a batch of {x.shape[0]} rows: give one a row."
            )
        named = set(rows) & set(self.memory_adapter_mlp)
        out = out.clone() if named else out
        for name in named:
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            index = (index[:, None] * beams + torch.arange(beams, device=x.device)).flatten()
            delta = self.weights[name] * self.memory_adapter_mlp[name](x[index])
            out[index] = (out[index].float() + delta).to(x.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: an MLP has no place in a weight matrix. Trainers that merge while generating still work,
        because an unmerged memory takes part in every forward pass."""

    def unmerge(self) -> None:
        """Does nothing, as `merge` did nothing."""


def speak(block: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook of a block: pass its output through the block's memories."""
    state = hidden_state(output)
    changed = getattr(block, CHILD)(state)
    if changed is state:
        return output
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def memory_layers(model: nn.Module) -> list[MemoryLayer]:
    """The memory layers of `model`, lowest block first."""
    return [layer for layer in adapter_layers(model) if isinstance(layer, MemoryLayer)]


def discard_empty_layers(model: nn.Module) -> None:
    """Take the child and the hook off every block whose last memory is gone."""
    for block in list(model.modules()):
        layer = getattr(block, CHILD, None) if CHILD in block._modules else None
        if layer is not None and len(layer.memory_adapter_mlp) == 0:
            delattr(block, CHILD)
            for key in [key for key, hook in block._forward_hooks.items() if hook is speak]:
                del block._forward_hooks[key]


class MemoryTuner(BaseTuner):
    """Injects `MemoryLayer`s; `get_peft_model`, `add_adapter` and `inject_memory` all come through here."""

    prefix = PREFIX
    tuner_layer_cls = MemoryLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """A copy of the config with block indices, module names and the base's fingerprint filled in."""
        assert isinstance(peft_config, MemoryAdapterConfig)
        decoder = find_decoder(self.model, peft_config.layers_path)
        prepared = copy.deepcopy(peft_config)
        prepared.layers = resolve_layers(peft_config.depths, decoder.num_layers)
        prepared.target_modules = [decoder.block_name(layer) for layer in prepared.layers]
        fingerprint = base_fingerprint(self.model, peft_config.layers_path)
        if prepared.base_fingerprint is None:
            prepared.base_fingerprint = fingerprint
        else:
            check_fingerprint(prepared.base_fingerprint, fingerprint)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = prepared
        return prepared

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MemoryAdapterConfig)
        if CHILD not in target._modules:
            hidden_size = find_decoder(self.model, peft_config.layers_path).hidden_size
            target.add_module(CHILD, MemoryLayer(hidden_size))
            target.register_forward_hook(speak, prepend=True)
        layer = getattr(target, CHILD)
        if adapter_name in layer.memory_adapter_mlp:
            raise ValueError(f"`adapter_name={adapter_name!r}` is taken; choose another or remove that memory first.")
        position = peft_config.target_modules.index(current_key)
        layer.update_layer(adapter_name, peft_config, peft_config.seed + position, execution_device(target))
        layer.train(target.training)  # else its dropout would be on in a model that generates

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way to pass `adapter_names` to `forward` and `generate`."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
        else:
            with speaking_by_row(self.model, names):
                yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        discard_empty_layers(self.model)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            _refuse_merge()
        for name in list(self.peft_config):
            for layer in memory_layers(self.model):
                if name in layer.memory_adapter_mlp:
                    del layer.memory_adapter_mlp[name]
        discard_empty_layers(self.model)
        del self.model.peft_config
        return self.model


def _refuse_merge() -> NoReturn:
    raise NotImplementedError(
        "A residual memory is a nonlinear MLP and cannot be merged into the base weights. Keep it as an adapter "
        "(`save_pretrained`, `load_memory`), or write the facts with a method whose edit is a weight change."
    )


def register_with_peft() -> None:
    """Teach PEFT the memory's type, config, tuner and prefix."""
    kind: Any = MemoryPeftType.MEMORY_ADAPTER
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MemoryAdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = MemoryTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = PREFIX
