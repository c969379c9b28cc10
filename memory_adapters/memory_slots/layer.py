"""The PEFT layer of memory slots: what the model reads before every prompt, in plain `model(...)` and `generate(...)`.

A child of the model's decoder stack holds the slots of all memories, and two hooks on that stack use them. Whatever the
caller gives and gets has the prompt's length; the prompt's positions are behind the slots.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.memory_slots.placement import check_length, inserted, leading_padding, removed, slot_positions
from memory_adapters.memory_slots.slot_cache import FILLED, MARK, SlotCache
from memory_adapters.peft_layers.layers import ForwardHook, MemoryLayer

__all__ = ["Entry", "SlotReader"]


def read_slots(  # noqa: C901  # the cases of one call, one after another
    stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let a pass read the slots: the forward pre-hook of the decoder stack."""
    reader = SlotReader.of(stack)
    slots = reader.read()
    names = list(inspect.signature(stack.forward).parameters)
    given = {**{names[i]: value for i, value in enumerate(args)}, **kwargs}
    cache = given.get(CACHE)
    # A cache that holds slots goes on with them, whatever is active now; one that holds none goes on without.
    continued = getattr(cache, MARK, None)
    if continued is FILLED:
        return None
    if continued is None and (slots is None or (cache is not None and cache.get_seq_length() > 0)):
        return None
    if isinstance(cache, StaticCache):
        raise ValueError(
            f"`{CACHE}` is a static cache, which is made for the prompt alone while slots stand before it: use the "
            "default (dynamic) cache with slots."
        )
    ids: Any = given.get("input_ids")
    embedded: Any = given.get("inputs_embeds")
    batch, tokens = (ids if embedded is None else embedded).shape[:2]
    vectors: Any  # (rows, slots, embedding_size)
    own: Any  # (rows, slots)
    vectors, own = slots or (None, None)
    mask, leading = continued or (own, None)
    repeats, rest = divmod(batch, len(mask))
    if rest:
        raise ValueError(f"Slots of {len(mask)} rows are read, but the batch has {batch}: give one prompt a row.")
    mask = mask.repeat_interleave(repeats, 0)  # (batch, slots)
    count = mask.shape[1]
    past = 0 if cache is None else cache.get_seq_length() - (0 if continued is None else count)
    check_length(stack, count, past + tokens)

    prompt_mask = given.get("attention_mask")
    if prompt_mask is not None and (not isinstance(prompt_mask, Tensor) or prompt_mask.ndim != 2):
        raise ValueError("`attention_mask` must be (batch, tokens) while slots are read; static caches make another.")
    if prompt_mask is None:
        prompt_mask = mask.new_ones(batch, past + tokens)
    if continued is None:
        leading = leading_padding(stack, prompt_mask, count)
    positions: Any = given.get("position_ids")
    if "position_ids" in names:
        if positions is None:
            positions = torch.arange(past, past + tokens, device=prompt_mask.device)[None]
        positions = given["position_ids"] = positions.expand(batch, -1) + mask.sum(1, keepdim=True)
    given["attention_mask"] = inserted(prompt_mask, mask.to(prompt_mask.dtype), leading)  # (batch, slots + tokens)

    recomputing = stack.training and any(getattr(m, "gradient_checkpointing", False) for m in stack.modules())
    if recomputing:
        # Blocks that are computed again in the backward pass must not find their keys in a cache already.
        cache, given[CACHE], given["use_cache"] = None, None, False
    elif cache is None and given.get("use_cache", stack.config.use_cache):
        # The stack would make an empty cache itself; made here, it can hold the slots first.
        cache = given[CACHE] = DynamicCache(config=stack.config)
    if cache is not None and continued is not None:
        # The cache holds the slots, and maybe a part of the prompt: the pass is that of the new tokens alone.
        return (), given
    if cache is not None:
        setattr(cache, MARK, (own, leading))
    if cache is not None and leading is None:
        # The usual start: the slots' keys and values, known from an earlier pass, go into the empty cache.
        reader.cache.fill(stack, cache, vectors, own, repeats, reader.sources())
        return (), given
    # No cache, or slots that must stand behind a row's padding: their embeddings are put in among the prompt's, and
    # `cut_off` takes their outputs off again.
    if embedded is None:
        embedded = stack.get_input_embeddings()(ids)
    before = vectors.repeat_interleave(repeats, 0).to(embedded)
    given["input_ids"], given["inputs_embeds"] = None, inserted(embedded, before, leading)
    if "position_ids" in names:
        given["position_ids"] = inserted(positions, slot_positions(mask), leading)
    return (), given


def cut_off(stack: PreTrainedModel, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Remove the slots' outputs where their embeddings were part of the pass: the decoder stack's forward hook."""
    slots, embedded = SlotReader.of(stack).read(), kwargs.get("inputs_embeds")
    if slots is None or embedded is None or embedded.shape[1] != kwargs["attention_mask"].shape[1]:
        return output
    count = slots[0].shape[1]
    leading = leading_padding(stack, kwargs["attention_mask"], 0)
    output.last_hidden_state = removed(output.last_hidden_state, count, leading)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(removed(state, count, leading) for state in output.hidden_states)
    if output.get("attentions") is not None:  # each (batch, heads, queries, keys): queries are the model's outputs
        output.attentions = tuple(
            removed(weights.transpose(1, 2), count, leading).transpose(1, 2) for weights in output.attentions
        )
    return output


class Entry(nn.Module):
    """Store the slots that one memory lets the model read.

    Attributes:
        vectors: (rows, slots, embedding_size); one row serves every row of a batch.
        mask: (rows, slots), 0 where a row has fewer slots (on the left); buffers, so that they move with the model.
    """

    vectors: Tensor
    mask: Tensor

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(1, 0, embedding_size), persistent=False)
        self.register_buffer("mask", torch.zeros(1, 0, dtype=torch.long), persistent=False)


class SlotReader(MemoryLayer):
    """Hold the slots of all memories on a model, by adapter name.

    Attributes:
        cache: Keys and values of the slots that were read last.
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

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Do nothing: slots are put where the embeddings are."""

    def _entries(self) -> list[Entry | None]:
        """Return the entry of each row of a batch (None for a row without), or those of the active memories."""
        known = {name: cast(Entry, entry) for name, entry in self.slot_entries.items()}
        if self.rows is not None:
            return [known.get(name) for name in self.rows]
        return [known[name] for name in self._active_adapter if name in known and known[name].vectors.shape[1]]

    def sources(self) -> list[Tensor | None]:
        """Return the tensors that `read` puts together, which stay the same as long as nothing is written."""
        return [None if entry is None else entry.vectors for entry in self._entries()]

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return the slots that are read now, and their mask.

        Returns:
            (rows, slots, embedding_size) and (rows, slots): the active memories' one after the other, or each row's
            own; None if there are none.
        """
        if self._disable_adapters:
            return None
        if self.rows is not None:
            return self._read_rows(self.rows, self._entries())
        entries = [entry for entry in self._entries() if entry is not None]
        if not entries:
            return None
        rows = max(len(entry.vectors) for entry in entries)
        vectors = torch.cat([entry.vectors.expand(rows, -1, -1) for entry in entries], 1)
        return vectors, torch.cat([entry.mask.expand(rows, -1) for entry in entries], 1)

    def _read_rows(self, names: list[str], entries: list[Entry | None]) -> tuple[Tensor, Tensor] | None:
        longest = max((entry.vectors.shape[1] for entry in entries if entry is not None), default=0)
        if longest == 0:
            return None
        some = next(entry for entry in entries if entry is not None)
        vectors = some.vectors.new_zeros(len(entries), longest, some.vectors.shape[2])
        mask = some.mask.new_zeros(len(entries), longest)
        for i, entry in enumerate(entries):
            if entry is not None:
                if len(entry.vectors) > 1:
                    raise ValueError(
                        f"`adapter_names` has {names[i]!r}, which reads {len(entry.vectors)} rows of slots of its own: "
                        "let it `use` one, or leave rows to it alone."
                    )
                count = entry.vectors.shape[1]
                vectors[i, longest - count :], mask[i, longest - count :] = entry.vectors[0], entry.mask[0]
        return vectors, mask
