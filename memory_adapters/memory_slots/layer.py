"""The PEFT layer of memory slots: what the model reads with a prompt, in plain `model(...)` and `generate(...)`.

A child of the model's decoder stack holds the slots of all memories, and two hooks on that stack use them. Whatever the
caller gives and gets has the prompt's length, caches too; the prompt's positions are behind the slots. Where a model
around the stack makes the attention mask, layer and hooks are on that one: see `reading_module`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from memory_adapters.base_model.decoder import Decoder, attention_window, execution_device
from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.memory_slots.cached_reading import PromptStarts, Segment
from memory_adapters.memory_slots.passes import TOKEN_TYPES, among_embeddings, make_room, pass_shape, prompt_mask_of
from memory_adapters.memory_slots.placement import (
    behind_turns,
    check_length,
    inserted,
    leading_padding,
    padding_before_slots,
    removed,
    turn_starts,
)
from memory_adapters.memory_slots.slot_cache import FILLED, MARK, SlotCache, hide_slots, num_cached, show_slots
from memory_adapters.peft_layers.layers import ForwardHook, MemoryLayer, used_adapters

__all__ = ["Entry", "SlotReader", "padded", "reading_module"]


class Choose(Protocol):
    """Return what each row of token ids reads."""

    @property
    def most_slots(self) -> int:
        """How many slots a row reads at most, as a rule."""

    def __call__(self, rows: Sequence[Sequence[int]], /) -> list[list[Segment]]: ...


LONG_TEXT = 512  # tokens, that are run once rather than in each of some rows of other lengths


def read_slots(
    stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let a pass read the slots: the forward pre-hook of the decoder stack."""
    reader = SlotReader.of(stack)
    reader.note(None)
    given = {**dict(zip(inspect.signature(stack.forward).parameters, args, strict=False)), **kwargs}
    cache = given.get(CACHE)
    # A cache that holds slots goes on with them, whatever is active now; one that holds none goes on without.
    continued = _mark_of(cache)
    if continued is FILLED or (continued is None and num_cached(cache) > 0):
        return None
    if continued is not None:
        return (), _going_on(stack, given, continued)
    ids: Any = given.get("input_ids")
    rows = _unpadded(ids, given.get("attention_mask")) if ids is not None and reader.needs_ids() else None
    read = reader.read(rows)
    if read is None:
        return None
    if isinstance(cache, StaticCache):
        raise ValueError(
            f"`{CACHE}` is a static cache, which is made for the prompt alone while slots stand before it: use the "
            "default (dynamic) cache with slots."
        )
    segments, starts = read.segments or [], reader.starts(rows)
    if _takes_keys(stack, given, rows, starts, segments):
        return (), _with_keys(stack, given, segments, starts)
    return (), _with_vectors(stack, given, read, starts)


def _going_on(stack: PreTrainedModel, given: dict[str, Any], mark: tuple[Any, ...]) -> dict[str, Any]:
    """Return a pass whose cache holds slots, and maybe a part of the prompt: it is that of the new tokens alone."""
    own, leading, taken, most = mark
    batch, tokens = pass_shape(given)
    repeats = _repeats(batch, own)
    mask, taken = own.repeat_interleave(repeats, 0), taken.repeat_interleave(repeats, 0)
    past = num_cached(given[CACHE]) - mask.shape[1]
    prompt_mask = prompt_mask_of(given.get("attention_mask"), mask, past + tokens)
    check_length(stack, taken, most, prompt_mask)
    return make_room(stack, given, prompt_mask, mask, taken, leading)


def _with_vectors(
    stack: PreTrainedModel, given: dict[str, Any], read: Read, starts: Sequence[int | None]
) -> dict[str, Any]:
    """Return a pass that reads embeddings: from its cache, or among those of the prompt."""
    reader, cache = SlotReader.of(stack), given.get(CACHE)
    batch, tokens = pass_shape(given)
    own, vectors, count = read.mask, read.vectors, read.mask.shape[1]
    repeats, positions = _repeats(batch, own), own.sum(1, keepdim=True)
    mask, taken = own.repeat_interleave(repeats, 0), positions.repeat_interleave(repeats, 0)
    prompt_mask = prompt_mask_of(given.get("attention_mask"), mask, tokens)
    check_length(stack, taken, count, prompt_mask)
    leading = padding_before_slots(stack, prompt_mask, count, reader.as_embeddings)
    leading = behind_turns(leading, prompt_mask, starts)
    given = make_room(stack, given, prompt_mask, mask, taken, leading)
    if _recomputes(stack):
        # Blocks that are computed again in the backward pass must not find their keys in a cache already.
        cache, given[CACHE], given["use_cache"] = None, None, False
    elif cache is None and _uses_cache(stack, given):
        # The stack would make an empty cache itself; made here, it can hold the slots first.
        cache = given[CACHE] = DynamicCache(config=stack.config)
    if cache is not None:
        setattr(cache, MARK, (own, leading, positions, count))
        if leading is None and not reader.as_embeddings and not torch.compiler.is_compiling():
            # The usual start: the slots' keys and values, known from an earlier pass, go into the empty cache.
            reader.cache.fill(stack, cache, vectors, own, repeats, reader.sources(vectors))
            return given
    # No cache, or one that slots cannot be put into, a pass that is compiled, or slots that must stand behind a row's
    # padding: their embeddings are put in among the prompt's, and `cut_off` takes their outputs off again.
    embedded = given.get("inputs_embeds")
    if embedded is None:
        embedded = stack.get_input_embeddings()(given["input_ids"])
    reader.note((count, leading))
    return among_embeddings(given, embedded, vectors.repeat_interleave(repeats, 0), mask, prompt_mask, leading)


def _repeats(batch: int, mask: Tensor) -> int:
    """Return how many rows of a batch read each row of slots."""
    repeats, rest = divmod(batch, len(mask))
    if rest:
        raise ValueError(f"Slots of {len(mask)} rows are read, but the batch has {batch}: give one prompt a row.")
    return repeats


def _recomputes(stack: PreTrainedModel) -> bool:
    return stack.training and any(getattr(m, "gradient_checkpointing", False) for m in stack.modules())


def _takes_keys(
    stack: PreTrainedModel,
    given: dict[str, Any],
    rows: Sequence[Sequence[int]] | None,
    starts: Sequence[int | None],
    read: Sequence[Sequence[Segment]],
) -> bool:
    """Return whether a pass reads keys and values that were kept of entries, or that are worth keeping of their texts.

    If it does not, or cannot, it reads their texts.
    """
    reader, ids, config = SlotReader.of(stack), given.get("input_ids"), stack.config.get_text_config(decoder=True)
    if torch.compiler.is_compiling() or reader.as_embeddings or reader.rows is not None or ids is None:
        return False
    kept = any(segment.kept is not None for own in read for segment in own)
    if rows is None or not (kept or _begins_alike(rows, starts, read)):
        return False
    if not reader.chooses() and all(start is None for start in starts):
        return False  # slots that stand first are in a cache of their own, for prompts of any length
    states = ("output_attentions", "output_hidden_states")  # of the tokens before the entries, too
    if _recomputes(stack) or any(given.get(one, getattr(config, one, False)) for one in states):
        return False
    taken = max(sum(len(segment.vectors) for segment in own) for own in read)
    others = (m for m in stack.modules() if isinstance(m, MemoryLayer) and m is not reader)
    # Memories that act by the prompt have to see it whole.
    return ids.shape[1] + taken <= attention_window(config) and not any(used_adapters(other) for other in others)


def _begins_alike(
    rows: Sequence[Sequence[int]], starts: Sequence[int | None], read: Sequence[Sequence[Segment]]
) -> bool:
    """Return whether all rows have the same beginning and entries: these are run once, also for the next prompts.

    Rows of other lengths need a pass each for the tokens that the shorter ones have behind the entries: that is worth
    it for long texts alone.
    """
    beginnings = {
        (tuple(row[: start or 0]), tuple(id(segment.source) for segment in own))
        for row, start, own in zip(rows, starts or [0] * len(rows), read, strict=False)
    }
    length = sum(len(segment.vectors) for segment in read[0]) if read else 0
    return len(beginnings) == 1 and (len({len(row) for row in rows}) == 1 or length >= LONG_TEXT)


def _with_keys(
    stack: PreTrainedModel, given: dict[str, Any], read: Sequence[Sequence[Segment]], starts: Sequence[int | None]
) -> dict[str, Any]:
    """Return a pass behind the keys and values of entries, and of the tokens before these."""
    reader, ids, cache = SlotReader.of(stack), given["input_ids"], given.get(CACHE)
    batch, tokens = ids.shape
    taken = [sum(len(segment.vectors) for segment in own) for own in read]
    most = max(taken)
    prompt_mask = prompt_mask_of(given.get("attention_mask"), torch.ones_like(ids[:, :0]), tokens)
    check_length(stack, torch.tensor(taken, device=ids.device)[:, None], most, prompt_mask)
    padding = leading_padding(prompt_mask)
    before = torch.tensor([start or 0 for start in starts] or [0] * batch, device=ids.device)
    leading = (padding + before).clamp(max=tokens - 1)  # (batch,); the last token is the pass's own
    begun = reader.prompt_starts.begin(stack, ids, padding, leading, read)
    done, rest = begun.tokens, slice(begun.tokens, None)
    if "position_ids" in inspect.signature(stack.forward).parameters:
        positions = (prompt_mask.cumsum(-1) - 1).clamp(min=0) + begun.positions
        of_kinds: Any = given.get("position_ids")
        shape = positions.shape if of_kinds is None else (*of_kinds.shape[:-2], *positions.shape)
        given["position_ids"] = positions.expand(shape)[..., rest]
    given["input_ids"] = ids[:, rest]
    given["attention_mask"] = inserted(prompt_mask, begun.mask.to(prompt_mask.dtype), leading)
    for kind in TOKEN_TYPES:
        if isinstance(given.get(kind), Tensor):
            given[kind] = given[kind][:, rest]
    if cache is None:
        cache = given[CACHE] = DynamicCache(config=stack.config)
        given["use_cache"] = _uses_cache(stack, given)
    for index, (keys, values) in enumerate(begun.layers):
        cache.update(keys, values, index)
    setattr(cache, MARK, (begun.mask, leading, begun.positions, most))
    reader.note(begun.states if done else None)
    return given


@torch.compiler.disable
def _unpadded(ids: Tensor, mask: Any) -> list[list[int]]:
    """Return the rows of token ids (batch, tokens) without their padding."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != ids.shape:
        return ids.tolist()
    return [
        [token for token, own in zip(*row, strict=True) if own] for row in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


def _mark_of(cache: Any) -> Any:
    """Return what a cache notes of the slots that it holds; None if it holds none. It shows its whole length now."""
    mark = getattr(cache, MARK, None)
    if not isinstance(mark, tuple):
        return mark
    show_slots(cache)
    if num_cached(cache) > 0:
        return mark
    delattr(cache, MARK)  # it was reset
    return None


def _uses_cache(stack: PreTrainedModel, given: dict[str, Any]) -> bool:
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(stack.config.get_text_config(decoder=True), "use_cache", True)
    return bool(use_cache)


def cut_off(stack: PreTrainedModel, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Remove the slots' outputs where their embeddings were part of the pass, or add those of the tokens before them.

    The decoder stack's forward hook.
    """
    reader, cache = SlotReader.of(stack), kwargs.get(CACHE)
    if isinstance(getattr(cache, MARK, None), tuple) and not torch.compiler.is_compiling():
        hide_slots(cast(Cache, cache))
        if kwargs.get("use_cache") is False and output.get(CACHE) is not None:
            output[CACHE] = None  # it is the pass's own, for the keys and values of entries
    noted = reader.noted()
    if noted is None:
        return output
    if isinstance(noted, Tensor):
        output.last_hidden_state = torch.cat([noted, output.last_hidden_state], 1)
        return output
    count, leading = noted
    output.last_hidden_state = removed(output.last_hidden_state, count, leading)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(removed(state, count, leading) for state in output.hidden_states)
    if output.get("attentions") is not None:  # each (batch, heads, queries, keys): queries are the model's outputs
        output.attentions = tuple(
            removed(weights.transpose(1, 2), count, leading).transpose(1, 2) for weights in output.attentions
        )
    return output


def reading_module(decoder: Decoder) -> PreTrainedModel:
    """Return the module whose passes read slots: the decoder stack, or the one around it that makes its mask.

    Some multimodal models make the attention mask themselves, and give their stack no (batch, tokens) any more.
    """
    model, path = decoder.model, decoder.stack_path
    stack = model.get_submodule(path)
    masks: list[Any] = []
    handle = stack.register_forward_pre_hook(
        lambda _stack, _args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    ids = torch.ones(1, 2, dtype=torch.long, device=execution_device(decoder.embeddings))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        handle.remove()
    plain = all(mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) for mask in masks)
    outer = path.rpartition(".")[0]
    return cast(PreTrainedModel, stack if plain or not outer else model.get_submodule(outer))


@dataclass(frozen=True, eq=False)
class Read:
    """Store what a pass reads.

    Attributes:
        vectors: Embeddings of slots (rows, slots, embedding_size).
        mask: 1 where a row has a slot (rows, slots).
        segments: The same of each row, entry by entry, where entries are chosen.
    """

    vectors: Tensor
    mask: Tensor
    segments: list[list[Segment]] | None = None


class Entry(nn.Module):
    """Store the slots that one memory lets the model read.

    Attributes:
        vectors: (rows, slots, embedding_size); one row serves every row of a batch.
        mask: (rows, slots), 0 where a row has fewer slots (on the left); buffers, so that they move with the model.
        opening: Tokens behind which what a user says begins, in a rendered chat.
        choose: Returns what each row of token ids reads; None where all read `vectors`.
    """

    vectors: Tensor
    mask: Tensor

    def __init__(self, embedding_size: int, opening: Sequence[int] = ()) -> None:
        super().__init__()
        self.opening = list(opening)
        self.choose: Choose | None = None
        self.register_buffer("vectors", torch.zeros(1, 0, embedding_size, dtype=torch.float32), persistent=False)
        self.register_buffer("mask", torch.zeros(1, 0, dtype=torch.long), persistent=False)

    @property
    def most_slots(self) -> int:
        """How many slots a row reads at most, as a rule."""
        return self.vectors.shape[1] if self.choose is None else self.choose.most_slots

    def read(self, ids: Sequence[Sequence[int]] | None) -> Read:
        """Return what is read now: of each row, if rows are known and read their own."""
        if self.choose is None:
            if ids is None or len(self.vectors) > 1:
                return Read(self.vectors, self.mask)
            return Read(self.vectors, self.mask, [[Segment(self.vectors, self.vectors[0])] for _ in ids])
        segments = self.choose(ids) if ids is not None else []
        like = self.vectors
        rows = [torch.cat([like[0, :0], *(own.vectors.to(like) for own in row)]) for row in segments]
        return Read(*padded(rows, like), segments)


def padded(rows: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return slots of rows (slots, embedding_size) as one tensor, shorter ones behind padding, and their mask.

    Args:
        rows: Of each row of a batch; none for one row without slots.
        like: Any slots (…, embedding_size) on the device.
    """
    longest = max(map(len, rows), default=0)
    vectors = torch.zeros(max(len(rows), 1), longest, like.shape[-1], dtype=torch.float32, device=like.device)
    mask = torch.zeros(max(len(rows), 1), longest, dtype=torch.long, device=like.device)
    for i, row in enumerate(rows):
        if len(row):
            vectors[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = 1
    return vectors, mask


class SlotReader(MemoryLayer):
    """Hold the slots of all memories on a model, by adapter name.

    Attributes:
        cache: Keys and values of the slots that were read last.
        prompt_starts: Those of prompts up to their entries.
        as_embeddings: Whether slots are put among the prompt's embeddings, behind its padding, and never into a cache:
            for models that keep more than keys and values, or count positions by the index in a row.
    """

    child_name: ClassVar[str] = "slot_reader"
    hooks: ClassVar[tuple[ForwardHook, ...]] = (
        ForwardHook(read_slots, before=True, with_kwargs=True),
        ForwardHook(cut_off, with_kwargs=True),
    )
    adds_virtual_tokens: ClassVar[bool] = True
    adapter_layer_names = ("slot_entries",)

    def __init__(self) -> None:
        super().__init__()
        self.slot_entries = nn.ModuleDict()
        self.cache = SlotCache()
        self.prompt_starts = PromptStarts()
        self.as_embeddings = False
        self._noted: dict[int, tuple[int, Tensor | None] | Tensor] = {}  # by thread
        self._compiled: tuple[int, Tensor | None] | Tensor | None = None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: slots are put where the embeddings are."""

    def _entries(self) -> list[Entry | None]:
        """Return the entry of each row of a batch (None for a row without), or those of the active memories."""
        known = {name: cast(Entry, entry) for name, entry in self.slot_entries.items()}
        if self.rows is not None:
            return [known.get(name) for name in self.rows]
        active = [known[name] for name in self._active_adapter if name in known]
        return [entry for entry in active if entry.choose is not None or entry.vectors.shape[1]]

    def num_virtual_tokens(self) -> int:
        """Return how many slots a row reads at most, as a rule."""
        return sum(entry.most_slots for entry in self._entries() if entry is not None)

    def needs_ids(self) -> bool:
        """Return whether what is read, or where, depends on the prompt's tokens."""
        return any(entry is not None and bool(entry.choose or entry.opening) for entry in self._entries())

    def chooses(self) -> bool:
        """Return whether what is read depends on the prompt's tokens."""
        return any(entry is not None and entry.choose is not None for entry in self._entries())

    def note(self, noted: tuple[int, Tensor | None] | Tensor | None) -> None:
        """Note how the outputs of the pass in progress differ from those of the prompt.

        Args:
            noted: How many slots stand among its embeddings, and behind how many tokens of each row; or the last hidden
                states of tokens that it leaves out (rows, tokens, hidden_size).
        """
        if torch.compiler.is_compiling():
            self._compiled = noted
        elif noted is None:
            self._noted.pop(get_ident(), None)
        else:
            self._noted[get_ident()] = noted

    def noted(self) -> tuple[int, Tensor | None] | Tensor | None:
        """Return what was noted, once."""
        return self._compiled if torch.compiler.is_compiling() else self._noted.pop(get_ident(), None)

    def starts(self, rows: Sequence[Sequence[int]] | None) -> list[int | None]:
        """Return where what the user says last begins in each row of token ids; None where that is not known."""
        opening = next((entry.opening for entry in self._entries() if entry is not None and entry.opening), [])
        return [] if rows is None else turn_starts(rows, opening)

    def sources(self, read: Tensor) -> list[Tensor | None]:
        """Return the tensors that `read` put together, which stay the same as long as what is read does."""
        if self.chooses():
            return [read]
        return [None if entry is None else entry.vectors for entry in self._entries()]

    def read(self, ids: Sequence[Sequence[int]] | None) -> Read | None:
        """Return the slots that are read now: the active memories' one after the other, or each row's own.

        Args:
            ids: The rows of a batch, without padding; None if they are not known.
        """
        if self._disable_adapters:
            return None
        if self.rows is not None:
            return self._read_rows(self.rows, self._entries(), ids)
        read = [entry.read(ids) for entry in self._entries() if entry is not None]
        parts = [part for part in read if part.vectors.shape[1]]
        if not parts:
            return None
        rows = max(len(part.vectors) for part in parts)
        vectors = torch.cat([part.vectors.expand(rows, -1, -1) for part in parts], 1)
        mask = torch.cat([part.mask.expand(rows, -1) for part in parts], 1)
        segments = None
        if all(part.segments for part in parts):
            segments = [[one for own in row for one in own] for row in zip(*(p.segments for p in parts), strict=True)]
        return Read(vectors, mask, segments)

    def _read_rows(
        self, names: list[str], entries: list[Entry | None], ids: Sequence[Sequence[int]] | None
    ) -> Read | None:
        beams = 1 if ids is None else max(len(ids) // len(names), 1)  # all of a row read what its first reads
        firsts = [None if ids is None else [ids[i * beams]] for i in range(len(names))]
        read = [None if one is None else one.read(own) for one, own in zip(entries, firsts, strict=True)]
        vectors = [own.vectors for own in read if own is not None]
        if not any(own.shape[1] for own in vectors):
            return None
        for name, own in zip(names, read, strict=True):
            if own is not None and len(own.vectors) > 1:
                raise ValueError(
                    f"`adapter_names` has {name!r}, which reads {len(own.vectors)} rows of slots of its own: "
                    "let it `use` one, or leave rows to it alone."
                )
        nothing = vectors[0][0, :0]
        return Read(*padded([nothing if own is None else own.vectors[0] for own in read], nothing))
