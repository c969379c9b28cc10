"""Read entries as keys and values: each row's prompt is begun by itself, and its entries are put into the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import execution_device
from memory_adapters.memory_slots.keys_values import KeysValues, at_places
from memory_adapters.memory_slots.slot_cache import KeyValue, State, first_tokens, joined, run_behind, state_of

__all__ = ["Begun", "PromptStarts", "Segment"]

MOST_KEYS = 4096  # of a head, that are kept of all starts together


@dataclass(frozen=True, eq=False)
class Segment:
    """Store what a row reads of one entry.

    Attributes:
        source: What it is of: as long as this is the same object, so are its keys and values.
        vectors: Its embeddings (tokens, embedding_size).
        kept: Which keys and values of them are read; None for all.
    """

    source: object
    vectors: Tensor
    kept: KeysValues | None = None


@dataclass(frozen=True, eq=False)
class Begun:
    """Store what is known of a batch before its pass.

    Attributes:
        tokens: Columns of the prompts (padding included) that are done: the pass is of the others.
        states: Last hidden states of these (rows, tokens, hidden_size).
        layers: Keys and values of each block, with those of the entries among them: `tokens` and as many columns as
            `mask` has.
        mask: 1 where a row has a key of an entry (rows, slots), on the right.
        positions: How many positions the entries of each row take (rows, 1).
    """

    tokens: int
    states: Tensor | None
    layers: list[KeyValue]
    mask: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class _Start:
    """Store a prompt's tokens before the entries, and these: keys and values, last hidden states, next position."""

    layers: list[KeyValue]
    states: list[Tensor]
    position: int
    read: Sequence[Segment] = field(repr=False)  # held, so that what it is known by stays

    @property
    def num_keys(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


class PromptStarts:
    """Begin prompts, and keep the last starts as long as nothing that they depend on changes."""

    def __init__(self) -> None:
        self._kept: tuple[State | None, OrderedDict[object, _Start]] = (None, OrderedDict())

    def begin(
        self, stack: PreTrainedModel, ids: Tensor, padding: Tensor, leading: Tensor, read: Sequence[Sequence[Segment]]
    ) -> Begun:
        """Run the rows of a batch up to one column, each with its entries behind its first `leading` tokens.

        Args:
            stack: The decoder stack.
            ids: (rows, tokens), with padding on the left.
            padding: Tokens of padding of each row (rows,).
            leading: Tokens before the entries, with padding (rows,).
            read: The entries of each row.
        """
        starts = self._starts(stack)
        places = leading.tolist()
        done = max(places)
        rows: list[tuple[list[KeyValue], list[Tensor], int, int]] = []  # layers, states, tokens before, keys of entries
        for row, first, place, own in zip(ids, padding.tolist(), places, read, strict=True):
            start = self._start(stack, row[first:place].tolist(), own, starts)
            layers, states = start.layers, start.states
            count = start.num_keys - (place - first)
            if place < done:
                output, layers = run_behind(stack, layers, start.position, input_ids=row[None, place:done])
                states = [*states, output.last_hidden_state[0]]
            rows.append((layers, states, place, count))
        most = max(count for *_, count in rows)
        mask = torch.zeros(len(rows), most, dtype=torch.long, device=ids.device)
        for i, (*_, count) in enumerate(rows):
            mask[i, most - count :] = 1
        like = next(layers for layers, *_ in rows if layers)
        blocks: list[KeyValue] = []
        for i, of_block in enumerate(like):
            keys, values = (
                torch.stack(
                    [_placed(own[i][kind] if own else None, one, done, most, *where) for own, _, *where in rows]
                )
                for kind, one in enumerate(of_block)
            )
            blocks.append((keys, values))
        every = None
        if done:
            width = stack.config.get_text_config(decoder=True).hidden_size
            nothing = like[0][0].new_zeros(0, width)
            every = torch.stack([_padded(torch.cat([nothing, *states]), done) for _, states, *_ in rows])
        taken = [sum(len(segment.vectors) for segment in own) for own in read]
        return Begun(done, every, blocks, mask, torch.tensor(taken, device=ids.device)[:, None])

    def _starts(self, stack: PreTrainedModel) -> OrderedDict[object, _Start]:
        """Return the starts that are kept: none where gradients or dropout are asked for."""
        if torch.is_grad_enabled() or stack.training:
            return OrderedDict()
        state = state_of(stack, [])
        known, starts = self._kept  # read at once: another thread may replace them
        if known != state:
            starts = OrderedDict()
            self._kept = (state, starts)
        return starts

    def _start(
        self, stack: PreTrainedModel, prefix: list[int], read: Sequence[Segment], starts: OrderedDict[object, _Start]
    ) -> _Start:
        key = (tuple(prefix), tuple(id(segment.source) for segment in read))
        found = starts.get(key)
        if found is None:
            found = starts[key] = _begun(stack, prefix, read)
            while len(starts) > 1 and sum(start.num_keys for start in starts.values()) > MOST_KEYS:
                starts.popitem(last=False)
        return found


def _begun(stack: PreTrainedModel, prefix: list[int], read: Sequence[Segment]) -> _Start:
    embeddings = stack.get_input_embeddings()
    ids = torch.tensor([prefix], dtype=torch.long, device=execution_device(embeddings))
    embedded = embeddings(ids)
    waiting = [embedded]  # what the next pass runs (1, tokens, embedding_size): texts that follow on each other
    layers: list[KeyValue] = []
    states: list[Tensor] = []
    position = 0

    def run() -> None:
        nonlocal layers, position
        texts = torch.cat(waiting, 1)
        waiting.clear()
        if not texts.shape[1]:
            return
        output, layers = run_behind(stack, layers, position, inputs_embeds=texts)
        if position == 0:
            states.append(output.last_hidden_state[0, : len(prefix)])
        position += texts.shape[1]

    for segment in read:
        kept, text = segment.kept, segment.vectors[None].to(embedded)
        if kept is None:
            waiting.append(text)
            continue
        if waiting:
            run()
        if position == len(prefix) and kept.prefix == tuple(prefix):
            layers = joined(layers or _nothing(stack), kept.layers)
            position += text.shape[1]
        else:
            # The text itself, behind what stands before it here; of its keys and values those of the same tokens stay.
            first = layers[0][0].shape[2] if layers else 0
            waiting.append(text)
            run()
            layers = [_thinned(own, first, places) for own, places in zip(layers, kept.places, strict=True)]
    if waiting:
        run()
    return _Start(layers, states, position, tuple(read))


def _nothing(stack: PreTrainedModel) -> list[KeyValue]:
    """Return the keys and values of no token, on the device and in the dtype of each block."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=execution_device(stack.get_input_embeddings()))
    return first_tokens(run_behind(stack, [], 0, input_ids=ids)[1], 0)


def _thinned(layer: KeyValue, first: int, places: Tensor) -> KeyValue:
    """Drop all keys and values of the tokens from `first` on, but for those at some places (heads, kept) of these."""
    keys, values = (torch.cat([own[:, :, :first], at_places(own[0, :, first:], places)[None]], 2) for own in layer)
    return keys, values


def _placed(own: Tensor | None, like: Tensor, done: int, most: int, place: int, count: int) -> Tensor:
    """Return a row's keys or values in their columns (heads, done + most, size): see `inserted`.

    Args:
        own: (1, heads, tokens, size): tokens, entries, tokens; None for a row without any.
        like: Those of another row.
        done: Columns of tokens.
        most: Columns of entries.
        place: The column where entries begin.
        count: How many keys the row's entries have.
    """
    columns = like.new_zeros(like.shape[1], done + most, like.shape[-1])
    if own is None:
        return columns
    behind = done - place
    before = own.shape[2] - count - behind
    columns[:, place - before : place] = own[0, :, :before]
    columns[:, place + most - count :] = own[0, :, before:]
    return columns


def _padded(states: Tensor, length: int) -> Tensor:
    """Return states (tokens, hidden_size) behind zeros (length, hidden_size)."""
    return torch.nn.functional.pad(states, (0, 0, length - len(states), 0))
