"""The PEFT layer of the gated residual MLP: a child of the decoder block, driven by a stateless forward hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from memory_adapters.base_model.partial_forward import hidden_state
from memory_adapters.peft_layers.layers import adapter_layers
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.gated_mlp import GatedMLP

if TYPE_CHECKING:
    from memory_adapters.keys.router import MemoryRouter


__all__ = ["ResidualLayer", "residual_layers"]

PREFIX = "memory_adapter_"
CHILD = "residual_memory"  # must not contain the prefix: PEFT skips such modules when it deletes an adapter


class ResidualLayer(nn.Module, BaseTunerLayer):
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


def apply_memories(block: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook of a block: pass its output through the block's memories."""
    state = hidden_state(output)
    changed = getattr(block, CHILD)(state)
    if changed is state:
        return output
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def residual_layers(model: nn.Module) -> list[ResidualLayer]:
    """The memory layers of `model`, lowest block first."""
    return [layer for layer in adapter_layers(model) if isinstance(layer, ResidualLayer)]


def discard_empty_layers(model: nn.Module) -> None:
    """Take the child and the hook off every block whose last memory is gone."""
    for block in list(model.modules()):
        layer = getattr(block, CHILD, None) if CHILD in block._modules else None
        if layer is not None and len(layer.memory_adapter_mlp) == 0:
            delattr(block, CHILD)
            for key in [key for key, hook in block._forward_hooks.items() if hook is apply_memories]:
                del block._forward_hooks[key]
