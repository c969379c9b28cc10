"""The gate of a LoRA: where it is open is found at one block, and used by the LoRA's matrices above it.

A row opens at its first token that is near a key, and stays open, also in later passes that continue its cache. Three
hooks work together: on the decoder stack, which has the cache and the mask; on the block that the keys are compared
with; and on the LoRA's B matrices, whose outputs are set to 0 where the row is not open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import get_ident
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from memory_adapters.base_model.partial_forward import CACHE, BlockOutput, hidden_state
from memory_adapters.gated_lora.config import GatedLoraConfig
from memory_adapters.keys.fitting import BlockKeys
from memory_adapters.keys.router import KeyedLayer
from memory_adapters.memory import Memory
from memory_adapters.peft_layers.layers import ForwardHook, MemoryLayer, adapter_layers, lora_linears

__all__ = ["GateState", "KeyReader", "KeySet", "gate_lora", "lora_parameters", "loras_of", "reader_of"]

MARK = "_gated_lora"  # attribute of a cache: which of its rows are open, by adapter name
GATE = "_memory_gate"  # attribute of a LoRA's B matrix: the reader that gates it, and the adapter's name


def begin_pass(stack: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    """Note what a pass continues: the forward pre-hook of the decoder stack."""
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    opened = getattr(cache, MARK, {}) if cache is not None and cache.get_seq_length() > 0 else {}
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    GateState.of(stack).begin(_Pass(mask, dict(opened)))


def end_pass(stack: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Let the cache keep which rows are open: the forward hook of the decoder stack."""
    cache = output.get(CACHE) if hasattr(output, "get") else kwargs.get(CACHE)
    opened = GateState.of(stack).now().open
    if cache is not None and opened and not torch.compiler.is_compiling():
        setattr(cache, MARK, {name: gate[:, -1] for name, gate in opened.items()})
        cache.reorder_cache = MethodType(_reorder, cache)


def read_keys(block: nn.Module, _args: Any, output: BlockOutput) -> None:
    """Find where rows are open: the forward hook of the block that the keys are compared with."""
    KeyReader.of(block).read(hidden_state(output))


def gate_output(linear: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Leave out what a LoRA adds where its row is not open: the forward hook of its B matrix."""
    (reader, name) = vars(linear)[GATE]
    gate = reader.gate(name, output)  # (rows, tokens, 1), or flat
    return output * gate.to(output.dtype)


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    """Do as the cache's own `reorder_cache`, and reorder which rows are open."""
    type(cache).reorder_cache(cache, beam_idx)
    marked = getattr(cache, MARK)
    setattr(cache, MARK, {name: rows.index_select(0, beam_idx.to(rows.device)) for name, rows in marked.items()})


@dataclass
class _Pass:
    """Store a pass in progress: its attention mask, which rows were open before it, and where they are open in it."""

    mask: Tensor | None = None
    opened: dict[str, Tensor] = field(default_factory=dict)  # each (rows,)
    open: dict[str, Tensor] = field(default_factory=dict)  # each (rows, tokens)


class GateState(MemoryLayer):
    """Hold what gates know of the pass in progress: a child of the decoder stack."""

    child_name: ClassVar[str] = "gate_state"
    hooks: ClassVar[tuple[ForwardHook, ...]] = (
        ForwardHook(begin_pass, before=True, prepend=True, with_kwargs=True),
        ForwardHook(end_pass, with_kwargs=True),
    )
    adapter_layer_names = ("gated",)

    def __init__(self) -> None:
        super().__init__()
        self.gated = nn.ModuleDict()
        self._passes: dict[int, _Pass] = {}  # the last of each thread; kept for passes that are computed again
        self._compiled = _Pass()

    def begin(self, new: _Pass) -> None:
        """Begin a pass."""
        if torch.compiler.is_compiling():
            self._compiled = new
        else:
            self._passes[get_ident()] = new

    def now(self) -> _Pass:
        """Return the pass in progress."""
        return self._compiled if torch.compiler.is_compiling() else self._passes.setdefault(get_ident(), _Pass())


class KeySet(nn.Module):
    """Store one memory's keys (num_keys, hidden_size) and biases (num_keys,), as `BlockKeys` has them; buffers."""

    keys: Tensor
    key_bias: Tensor

    def __init__(self, hidden_size: int, num_keys: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(num_keys, hidden_size, dtype=torch.float32))
        self.register_buffer("key_bias", torch.zeros(num_keys, dtype=torch.float32))

    def add(self, new: BlockKeys) -> None:
        """Add keys to those that rows are compared with."""
        self.keys = torch.cat([self.keys, new.weights.to(self.keys)])
        self.key_bias = torch.cat([self.key_bias, new.bias.to(self.key_bias)])

    def nearness(self, x: Tensor) -> Tensor:
        """Return max_k (s_k(x) − θ_k) / ramp (...), in float32, at each token of x (..., hidden_size)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if len(self.keys) == 0:
                return x.new_full(x.shape[:-1], -1.0)
            return F.linear(F.layer_norm(x, x.shape[-1:]), self.keys.float(), self.key_bias.float()).amax(-1)


class KeyReader(KeyedLayer):
    """Hold the keys of all gated LoRAs that are read at one block."""

    child_name: ClassVar[str] = "key_reader"
    hooks: ClassVar[tuple[ForwardHook, ...]] = (ForwardHook(read_keys, prepend=True),)
    adapter_layer_names = ("key_sets",)

    def __init__(self, state: GateState) -> None:
        super().__init__()
        self.key_sets = nn.ModuleDict()
        vars(self)["state"] = (state,)  # in a tuple, so that it is no child of this one too

    @property
    def pass_state(self) -> GateState:
        return cast(GateState, vars(self)["state"][0])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: keys are put where their block is."""

    def key_set(self, adapter_name: str) -> KeySet:
        """Return the keys of a memory."""
        return cast(KeySet, self.key_sets[adapter_name])

    def has_keys(self, adapter_name: str) -> bool:
        """Return whether the memory keeps keys of what was written."""
        return adapter_name in self.key_sets

    def nearness(self, adapter_name: str, x: Tensor) -> Tensor:
        """See `KeySet.nearness`."""
        return self.key_set(adapter_name).nearness(x)

    @torch.no_grad()
    def read(self, x: Tensor) -> None:
        """Find where the rows of x (rows, tokens, hidden_size) are open to each memory that takes part."""
        now = self.pass_state.now()
        names = [] if self._disable_adapters else [*self._active_adapter, *(self.rows or [])]
        for name in dict.fromkeys(name for name in names if name in self.key_sets):
            near = self.nearness(name, x) > 0
            if now.mask is not None:
                tokens = min(now.mask.shape[1], near.shape[1])
                near = near & F.pad(now.mask[:, -tokens:].bool(), (near.shape[1] - tokens, 0)).to(near.device)
            if (before := now.opened.get(name)) is not None:
                near = near | before.to(near.device)[:, None]
            now.open[name] = near.cumsum(1) > 0

    def gate(self, adapter_name: str, output: Tensor) -> Tensor:
        """Return the gate of an adapter's `output` (rows, tokens, ...): 1 where a row is open, else 0."""
        gate = self.pass_state.now().open.get(adapter_name)
        if gate is None:
            return output.new_zeros(())
        if self.rows is not None:  # PEFT gives the rows of this adapter alone
            beams = len(gate) // len(self.rows)
            own = [i for i, row in enumerate(self.rows) for _ in range(beams) if row == adapter_name]
            places = [i * beams + j for i in dict.fromkeys(own) for j in range(beams)]
            gate = gate[places]
        gate = gate.to(output.device)
        return gate[..., None] if output.ndim > 2 else gate.reshape(-1, 1)


def gate_lora(layer: LoraLayer, adapter_name: str, reader: KeyReader) -> None:
    """Let a LoRA act only where its rows are open."""
    up = lora_linears(layer, adapter_name)[1]
    vars(up)[GATE] = (reader, adapter_name)
    up.register_forward_hook(gate_output)


def loras_of(memory: Memory[GatedLoraConfig]) -> list[LoraLayer]:
    """Return the LoRA's layers, lowest block first."""
    every = adapter_layers(memory.model, memory.adapter_name)
    return [layer for layer in every if isinstance(layer, LoraLayer)]


def lora_parameters(memory: Memory[GatedLoraConfig]) -> dict[str, nn.Parameter]:
    """Return the LoRA's parameters, by place and name."""
    return {
        f"{number}.{name}": cast(nn.Parameter, linear.weight)
        for number, layer in enumerate(loras_of(memory))
        for name, linear in zip(("A", "B"), lora_linears(layer, memory.adapter_name), strict=True)
    }


def reader_of(memory: Memory[GatedLoraConfig]) -> KeyReader:
    """Return the layer that reads a memory's keys."""
    every = adapter_layers(memory.model, memory.adapter_name)
    return next(layer for layer in every if isinstance(layer, KeyReader))
