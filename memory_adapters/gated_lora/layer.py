"""The gate of a LoRA: where it is open is found at one block, and used by the LoRA's matrices above it.

A row opens at its first token that is near a key, and stays open, also in later passes that continue its cache. States
of things that share a part of their name are alike, so a second witness is asked: most tokens of the subject's name
must stand there. Three hooks work together: on the decoder stack, which has the tokens, the cache and the mask; on the
block that the keys are compared with; and on the LoRA's B matrices, whose outputs are set to 0 where the row is not
open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
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

MARK = "_gated_lora"  # attribute of a cache: which of its rows are open, by adapter name, and their last tokens
SHARE = 0.6  # of a name's tokens that must stand in a text
SLACK = 3  # tokens more than the name has, in which they must stand
LAST_TOKENS = 32  # of a row, that its cache keeps
CACHE_OPERATIONS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")  # on the rows of a cache
GATE = "_memory_gate"  # attribute of a LoRA's B matrix: the reader that gates it, and the adapter's name


def begin_pass(stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Note what a pass continues: the forward pre-hook of the decoder stack."""
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    ids = kwargs.get("input_ids", args[0] if args else None)
    continued = cache is not None and cache.get_seq_length() > 0
    opened, last = getattr(cache, MARK, ({}, None)) if continued else ({}, None)
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if ids is not None and last is not None and len(ids) == len(last):
        ids = torch.cat([last, ids], 1)
    GateState.of(stack).begin(_Pass(mask, dict(opened), ids))


def end_pass(stack: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Let the cache keep which rows are open: the forward hook of the decoder stack."""
    cache = output.get(CACHE) if hasattr(output, "get") else kwargs.get(CACHE)
    now = GateState.of(stack).now()
    if cache is not None and now.open and not torch.compiler.is_compiling():
        last = None if now.ids is None else now.ids[:, -LAST_TOKENS:]
        setattr(cache, MARK, ({name: gate[:, -1] for name, gate in now.open.items()}, last))
        for operation in CACHE_OPERATIONS:
            setattr(cache, operation, partial(_with_rows, cache, operation))  # copied and pickled with the cache


def read_keys(block: nn.Module, _args: Any, output: BlockOutput) -> None:
    """Find where rows are open: the forward hook of the block that the keys are compared with."""
    KeyReader.of(block).read(hidden_state(output))


def gate_output(linear: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Leave out what a LoRA adds where its row is not open: the forward hook of its B matrix."""
    (reader, name) = vars(linear)[GATE]
    gate = reader.gate(name, output)  # (rows, tokens, 1), or flat
    return output * gate.to(output.dtype)


def _with_rows(cache: Any, operation: str, rows: Any) -> None:
    """Do as the cache's own operation on its rows, and do it with what is kept of them."""
    getattr(type(cache), operation)(cache, rows)
    opened, last = getattr(cache, MARK)

    def apply(kept: Tensor) -> Tensor:
        if operation == "batch_repeat_interleave":
            return kept.repeat_interleave(rows, 0)
        return kept[torch.as_tensor(rows, device=kept.device)]

    setattr(cache, MARK, ({name: apply(kept) for name, kept in opened.items()}, None if last is None else apply(last)))


@dataclass
class _Pass:
    """Store a pass in progress.

    Attributes:
        mask: Its attention mask (rows, tokens), if it has one.
        opened: Which rows were open before it (rows,), by adapter.
        ids: Its tokens, behind the last of what it continues; None if it was given embeddings.
        open: Where rows are open in it (rows, tokens), by adapter.
    """

    mask: Tensor | None = None
    opened: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    open: dict[str, Tensor] = field(default_factory=dict)


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
    """Store one memory's keys (num_keys, hidden_size) and biases (num_keys,), as `BlockKeys` has them; buffers.

    Attributes:
        owners: For each key, the index in `names` of the subject it is of; -1 for none.
        names: For each subject, the token ids of its spellings.
    """

    keys: Tensor
    key_bias: Tensor

    def __init__(self, hidden_size: int, owners: Sequence[int], names: Sequence[Sequence[Sequence[int]]]) -> None:
        super().__init__()
        self.owners, self.names = list(owners), [[list(ids) for ids in spellings] for spellings in names]
        self.register_buffer("keys", torch.zeros(len(owners), hidden_size, dtype=torch.float32))
        self.register_buffer("key_bias", torch.zeros(len(owners), dtype=torch.float32))

    def add(self, new: BlockKeys, names: Sequence[Sequence[Sequence[int]]]) -> None:
        """Add keys to those that rows are compared with; `names` are those of the subjects that own them."""
        self.keys = torch.cat([self.keys, new.weights.to(self.keys)])
        self.key_bias = torch.cat([self.key_bias, new.bias.to(self.key_bias)])
        self.owners += [owner if owner < 0 else owner + len(self.names) for owner in new.owners]
        self.names += [[list(ids) for ids in spellings] for spellings in names]

    def similarities(self, x: Tensor) -> Tensor:
        """Return (s_k(x) − θ_k) / ramp (..., num_keys), in float32, at each token of x (..., hidden_size)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return F.linear(F.layer_norm(x, x.shape[-1:]), self.keys.float(), self.key_bias.float())

    def nearness(self, x: Tensor) -> Tensor:
        """Return max_k (s_k(x) − θ_k) / ramp (...) at each token of x (..., hidden_size)."""
        return self.similarities(x).amax(-1) if len(self.keys) else x.new_full(x.shape[:-1], -1.0)

    def opens(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Return where x (rows, tokens, hidden_size) is near a key whose subject's name stands there (rows, tokens).

        Args:
            x: The stream.
            ids: Token ids, whose last are those of x; None if they are not known: then names are not asked for.
        """
        if len(self.keys) == 0:
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        near = self.similarities(x) > 0  # (rows, tokens, keys)
        if ids is None or torch.compiler.is_compiling() or not any(self.names):
            return near.any(-1)
        opened = torch.zeros(x.shape[:-1], dtype=torch.bool)
        texts = ids.tolist()
        offset = ids.shape[1] - x.shape[1]
        for row, token, key in near.nonzero().tolist():
            if not opened[row, token]:
                opened[row, token] = self._named(self.owners[key], texts[row], offset + token)
        return opened.to(x.device)

    def _named(self, owner: int, ids: Sequence[int], place: int) -> bool:
        """Return whether most tokens of one of a subject's spellings stand up to a place in a row."""
        if owner < 0:
            return True
        for spelling in self.names[owner]:
            window = Counter(ids[max(0, place - len(spelling) - SLACK) : place + 1])
            if sum((Counter(spelling) & window).values()) >= SHARE * len(spelling):
                return True
        return not self.names[owner]


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
            near = self.key_set(name).opens(x, now.ids)
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
