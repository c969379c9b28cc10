"""The PEFT layer of the gated residual MLP: a child of the decoder block, run by a forward hook."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memory_adapters.base_model.partial_forward import BlockOutput, hidden_state
from memory_adapters.keys.router import KeyedLayer
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import ForwardHook
from memory_adapters.residual_mlp.config import MemoryAdapterConfig
from memory_adapters.residual_mlp.gated_mlp import GatedMLP
from memory_adapters.residual_mlp.thing_mlp import ThingMLP

__all__ = ["PREFIX", "ResidualLayer", "residual_layers"]

PREFIX = "memory_adapter_"


def apply_memories(block: nn.Module, _args: Any, output: BlockOutput) -> BlockOutput:
    """Pass a block's output through its memories: the block's forward hook."""
    state = hidden_state(output)
    changed = ResidualLayer.of(block)(state)
    if changed is state:
        return output
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


class ResidualLayer(KeyedLayer):
    """Hold all residual memories of one decoder block, by adapter name."""

    child_name: ClassVar[str] = "residual_memory"
    hooks: ClassVar[tuple[ForwardHook, ...]] = (ForwardHook(apply_memories, prepend=True),)
    adapter_layer_names = ("memory_adapter_mlp",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.memory_adapter_mlp = nn.ModuleDict()
        self._device: torch.device | None = None

    def update_layer(self, name: str, config: MemoryAdapterConfig, seed: int, device: torch.device) -> None:
        """Add the memory `name`, in float32, on the device of the block."""
        self._device = device
        if config.per_key:
            self.memory_adapter_mlp[name] = ThingMLP(self.hidden_size, config)
        else:
            mlp = GatedMLP(self.hidden_size, config)
            if not mlp.up.is_meta:
                mlp.reset_parameters(torch.Generator().manual_seed(seed))
            self.memory_adapter_mlp[name] = mlp
        self.weights[name] = config.weight
        self._move_adapter_to_device_of_base_layer(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.memory_adapter_mlp:
            module = self.memory_adapter_mlp[adapter_name]
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(device or self._device, torch.float32)

    def mlp(self, adapter_name: str) -> GatedMLP:
        """Return the MLP of a memory that has one for all that is written."""
        return cast(GatedMLP, self.memory_adapter_mlp[adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the memory of this name."""
        self.weights.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def has_keys(self, adapter_name: str) -> bool:
        """Return whether the memory keeps keys of what was written."""
        return adapter_name in self.memory_adapter_mlp and self.mlp(adapter_name).has_keys

    def nearness(self, adapter_name: str, x: Tensor) -> Tensor:
        """See `GatedMLP.nearness`."""
        return self.mlp(adapter_name).nearness(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, tokens, hidden_size) plus what the active memories add; x itself if there are none."""
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
        """Return `out` plus what each row's own memory adds at x (both batch, tokens, hidden_size)."""
        beams, rest = divmod(x.shape[0], len(rows))
        if rest:
            raise ValueError(
                f"`adapter_names` has {len(rows)} entries for a batch of {x.shape[0]} rows: give one a row."
            )
        named = set(rows) & set(self.memory_adapter_mlp)
        out = out.clone() if named else out
        for name in named:
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            index = (
                index[:, None] * beams + torch.arange(beams, device=x.device)
            ).flatten()  # beams of a row are neighbours
            delta = self.weights[name] * self.memory_adapter_mlp[name](x[index])
            out[index] = (out[index].float() + delta).to(x.dtype)
        return out


def residual_layers(memory: Memory[MemoryAdapterConfig]) -> list[ResidualLayer]:
    """Return the layers that hold a residual memory, lowest block first."""
    return [layer for layer in memory.tuner_layers() if isinstance(layer, ResidualLayer)]
