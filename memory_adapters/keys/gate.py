"""Where a memory is open: found at one block from its keys, and kept for what continues a row.

A thing is named where its own name stands in full, if that has several tokens. Else a token must be near it, where the
block's output is near one of its keys, and most tokens of one of its spellings must stand there: states of things that
share a part of their name are alike. A gate is open at those tokens alone or, if it is held, from the first of them on,
also in later passes that continue the row's cache.
Two layers work together: one on the decoder stack, which has the tokens, the cache and the mask; and one on the block
that the keys are compared with. What uses the gate asks the second one, in later blocks of the same pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import CACHE, BlockOutput, hidden_state
from memory_adapters.keys.router import KeyedLayer
from memory_adapters.keys.spellings import Spellings
from memory_adapters.peft_layers.layers import ForwardHook, MemoryLayer
from memory_adapters.peft_layers.rollback import Restore
from memory_adapters.validation import shown

__all__ = ["GateState", "KeyReader", "KeySet", "Opened", "attach_keys", "check_keys", "key_shapes"]

MARK = "_memory_gates"  # attribute of a cache: where its rows are open, by adapter name, and their last tokens
SHARE = 0.8  # of a name's tokens that must stand in a text
LAST_TOKENS = 32  # of a row, that its cache keeps
CACHE_OPERATIONS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")  # on the rows of a cache


@dataclass(frozen=True)
class Opened:
    """Store which things rows are open to.

    Attributes:
        things: Indices of the things that any row is open to (things,), in rising order.
        mask: Where rows are open to each of them (rows, tokens, things), bool.
    """

    things: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> Opened:
        """Return the same of some rows, or of rows in another order."""
        return Opened(self.things, self.mask[index.to(self.mask.device)])

    def held(self, before: Opened | None) -> Opened:
        """Return where rows are open if they stay so: from their first open token on, or from an earlier pass on."""
        own = self.mask.cumsum(1) > 0
        if before is None or len(before.things) == 0:
            return Opened(self.things, own)
        things = torch.cat([self.things, before.things.to(self.things)]).unique()
        mask = own.new_zeros(*own.shape[:2], len(things))
        mask[..., torch.searchsorted(things, self.things)] = own
        mask[..., torch.searchsorted(things, before.things.to(things))] |= before.mask[:, -1:].to(own.device)
        return Opened(things, mask)


def begin_pass(stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Note what a pass continues: the forward pre-hook of the decoder stack."""
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    ids = kwargs.get("input_ids", args[0] if args else None)
    continued = cache is not None and cache.get_seq_length() > 0
    before, last = getattr(cache, MARK, ({}, None)) if continued else ({}, None)
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if ids is not None and ids.is_floating_point():
        ids = None  # the stack is given embeddings
    if ids is not None and last is not None and len(ids) == len(last):
        ids = torch.cat([last, ids], 1)
    GateState.of(stack).begin(_Pass(mask, dict(before), ids))


def end_pass(stack: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Let the cache keep where its rows are open: the forward hook of the decoder stack."""
    cache = output.get(CACHE) if hasattr(output, "get") else kwargs.get(CACHE)
    now = GateState.of(stack).now()
    if cache is not None and now.open and not torch.compiler.is_compiling():
        last = None if now.ids is None else now.ids[:, -LAST_TOKENS:]
        setattr(cache, MARK, ({name: Opened(o.things, o.mask[:, -1:]) for name, o in now.open.items()}, last))
        for operation in CACHE_OPERATIONS:
            setattr(cache, operation, partial(_with_rows, cache, operation))  # copied and pickled with the cache


def read_keys(block: nn.Module, _args: Any, output: BlockOutput) -> None:
    """Find where rows are open: the forward hook of the block that the keys are compared with."""
    KeyReader.of(block).read(hidden_state(output))


def _with_rows(cache: Any, operation: str, rows: Any) -> None:
    """Do as the cache's own operation on its rows, and do it with what is kept of them."""
    getattr(type(cache), operation)(cache, rows)
    kept, last = getattr(cache, MARK)
    count = len(last) if last is not None else max((len(opened.mask) for opened in kept.values()), default=0)
    repeated = operation == "batch_repeat_interleave"
    index = torch.arange(count).repeat_interleave(rows) if repeated else torch.as_tensor(rows)
    last = None if last is None else last[index.to(last.device)]
    setattr(cache, MARK, ({name: opened.rows(index) for name, opened in kept.items()}, last))


@dataclass
class _Pass:
    """Store a pass in progress.

    Attributes:
        mask: Its attention mask (rows, tokens), if it has one.
        before: Where rows were open at the end of what it continues, by adapter.
        ids: Its tokens, behind the last of what it continues; None if it was given embeddings.
        open: Where rows are open in it, by adapter.
    """

    mask: Tensor | None = None
    before: dict[str, Opened] = field(default_factory=dict)
    ids: Tensor | None = None
    open: dict[str, Opened] = field(default_factory=dict)


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
        owners: For each key, the index in `names` of the thing that it is of.
        names: For each thing, the token ids of its spellings; none of a thing that has no name.
        windows: For each thing, how many tokens more than a spelling has its tokens may be spread over.
        held: Whether the gate stays open from the first open token of a row on.
    """

    keys: Tensor
    key_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        owners: Sequence[int],
        names: Sequence[Sequence[Sequence[int]]],
        windows: Sequence[int],
        *,
        held: bool,
    ) -> None:
        super().__init__()
        self.owners, self.names = list(owners), [[list(ids) for ids in spellings] for spellings in names]
        self.windows, self.held = list(windows), held
        self._spellings: tuple[list[list[list[int]]], Spellings] = ([], Spellings([]))  # of which names they are
        self.register_buffer("keys", torch.zeros(len(owners), hidden_size, dtype=torch.float32))
        self.register_buffer("key_bias", torch.zeros(len(owners), dtype=torch.float32))

    def add(
        self,
        weights: Tensor,
        bias: Tensor,
        owners: Sequence[int],
        names: Sequence[Sequence[Sequence[int]]],
        windows: Sequence[int],
    ) -> None:
        """Add things, and their keys (keys, hidden_size) and biases (keys,), as `BlockKeys` has them.

        Args:
            weights: The keys.
            bias: Their biases.
            owners: For each key, the index in `names` of its thing.
            names: For each new thing, the token ids of its spellings.
            windows: See above.
        """
        if len(bias):
            self.keys = torch.cat([self.keys, weights.to(self.keys)])
            self.key_bias = torch.cat([self.key_bias, bias.to(self.key_bias)])
        self.owners = [*self.owners, *(owner + len(self.names) for owner in owners)]
        self.names = [*self.names, *([list(ids) for ids in spellings] for spellings in names)]
        self.windows = [*self.windows, *windows]

    def keep(self, things: Sequence[int]) -> None:
        """Drop all things but these, and their keys."""
        place = {thing: new for new, thing in enumerate(things)}
        kept = [i for i, owner in enumerate(self.owners) if owner in place]
        self.keys, self.key_bias = self.keys[kept], self.key_bias[kept]
        self.owners = [place[self.owners[i]] for i in kept]
        self.names = [self.names[thing] for thing in things]
        self.windows = [self.windows[thing] for thing in things]

    def saved(self) -> Restore:
        """Return a function that gives it the things and keys that it has now."""
        buffers, lists = dict(self._buffers), (self.owners, self.names, self.windows)

        def restore() -> None:  # all of these are replaced, not written into
            self._buffers.update(buffers)
            self.owners, self.names, self.windows = lists

        return restore

    def similarities(self, x: Tensor) -> Tensor:
        """Return (s_k(x) − θ_k) / ramp (..., num_keys), in float32, at each token of x (..., hidden_size)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return F.linear(F.layer_norm(x, x.shape[-1:]), self.keys.float(), self.key_bias.float())

    def nearness(self, x: Tensor) -> Tensor:
        """Return max_k (s_k(x) − θ_k) / ramp (...) at each token of x (..., hidden_size)."""
        return self.similarities(x).amax(-1) if len(self.keys) else x.new_full(x.shape[:-1], -1.0)

    def opened(self, x: Tensor, ids: Tensor | None, mask: Tensor | None = None) -> Opened:
        """Return where x (rows, tokens, hidden_size) is near things whose names stand there.

        Args:
            x: The output of the block.
            ids: Token ids, whose last are those of x; None if they are not known: then names are not asked for.
            mask: Which tokens count (rows, tokens); all if None.
        """
        if len(self.keys) == 0 and not self.names:
            return Opened(
                torch.zeros(0, dtype=torch.long, device=x.device), x.new_zeros(*x.shape[:2], 0, dtype=torch.bool)
            )
        near = self.similarities(x) > 0  # (rows, tokens, keys)
        if mask is not None:
            near = near & mask.bool()[..., None].to(near.device)
        if torch.compiler.is_compiling():  # what opens must not change shapes then
            of_things = F.one_hot(torch.tensor(self.owners, device=x.device), len(self.names)).float()
            return Opened(torch.arange(len(self.names), device=x.device), near.float() @ of_things > 0)
        texts, offset = (None, 0) if ids is None else (ids.tolist(), ids.shape[1] - x.shape[1])
        places = {(row, token, self.owners[key]) for row, token, key in near.nonzero().tolist()}
        open_at = {
            place for place in places if texts is None or self._named(place[2], texts[place[0]], offset + place[1])
        }
        if texts is not None:
            counts = None if mask is None else mask.bool().tolist()
            for row, text in enumerate(texts):
                for thing, _, last in self._own_names().found(text):
                    if (token := last - offset) >= 0 and (counts is None or counts[row][token]):
                        open_at.add((row, token, thing))
        things = sorted({thing for _, _, thing in open_at})
        column = {thing: i for i, thing in enumerate(things)}
        found = torch.zeros(*x.shape[:2], len(things), dtype=torch.bool)
        if open_at:
            rows, tokens, columns = zip(*((row, token, column[thing]) for row, token, thing in open_at), strict=True)
            found[list(rows), list(tokens), list(columns)] = True
        return Opened(torch.tensor(things, dtype=torch.long, device=x.device), found.to(x.device))

    def _own_names(self) -> Spellings:
        """Return the names of things as they are written, of several tokens: at the beginning of a text and within."""
        if self._spellings[0] is not self.names:
            own = [(thing, ids) for thing, spelled in enumerate(self.names) for ids in spelled[:2] if len(ids) > 1]
            self._spellings = (self.names, Spellings(own))
        return self._spellings[1]

    def _named(self, thing: int, ids: Sequence[int], place: int) -> bool:
        """Return whether most tokens of one of a thing's spellings stand up to a place in a row."""
        for spelling in self.names[thing]:
            window = Counter(ids[max(0, place - len(spelling) - self.windows[thing]) : place + 1])
            if sum((Counter(spelling) & window).values()) >= SHARE * len(spelling):
                return True
        return not self.names[thing]


class KeyReader(KeyedLayer):
    """Hold the keys of all memories that are read at one block, and find where their gates are open."""

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
        mask = now.mask
        if mask is not None:
            tokens = min(mask.shape[1], x.shape[1])
            mask = F.pad(mask[:, -tokens:], (x.shape[1] - tokens, 0))
        for name in dict.fromkeys(name for name in names if name in self.key_sets):
            keys = self.key_set(name)
            found = keys.opened(x, now.ids, mask)
            now.open[name] = found.held(now.before.get(name)) if keys.held else found

    def opened(self, adapter_name: str) -> Opened | None:
        """Return where the rows that an adapter is given are open in this pass; None if its keys were not read."""
        found = self.pass_state.now().open.get(adapter_name)
        if found is None or self.rows is None:
            return found
        beams = len(found.mask) // len(self.rows)  # PEFT gives the rows of this adapter alone
        own = [i for i, row in enumerate(self.rows) if row == adapter_name]
        return found.rows(torch.tensor([i * beams + j for i in own for j in range(beams)], dtype=torch.long))


def attach_keys(model: nn.Module, decoder: Decoder, block: int, adapter_name: str, keys: KeySet) -> KeyReader:
    """Put a memory's keys, and what finds where rows are open to them, on a model."""
    at = decoder.blocks[block]
    state = GateState.attach(model.get_submodule(decoder.stack_path))
    state.gated[adapter_name] = nn.Identity()
    reader = KeyReader.attach(at, state)
    reader.key_sets[adapter_name] = keys.to(execution_device(at))
    return reader


def key_shapes(owners: Sequence[int], hidden_size: int) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors of a `KeySet`."""
    return {"keys": torch.Size((len(owners), hidden_size)), "key_bias": torch.Size((len(owners),))}


def check_keys(names: Any, owners: Any) -> None:
    """Raise a `ValueError` unless names are lists of lists of token ids, and owners are indices of them."""
    nested = isinstance(names, list) and all(isinstance(x, list) and all(isinstance(y, list) for y in x) for x in names)
    if not nested or not all(type(i) is int and i >= 0 for own in names for ids in own for i in ids):
        raise ValueError(f"`names` must have a list of lists of token ids for each subject, got {shown(names)}.")
    if not isinstance(owners, list) or not all(type(i) is int and 0 <= i < len(names) for i in owners):
        raise ValueError(f"`key_owners` must be a list of indices of `names`, got {shown(owners)}.")
