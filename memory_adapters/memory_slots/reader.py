"""How a frozen model reads slots: before every prompt, in plain `model(...)` and `model.generate(...)`.

A child of the model's decoder stack holds the slots of all memories, and two stateless hooks on that stack use them.
Where the pass has a key–value cache, an empty one is first filled with the slots' own keys and values, which are
computed once; the pass then is the prompt's alone. Where it has none (training, `use_cache=False`), the slots are put
before the prompt's embeddings, and their outputs cut off again. Either way the prompt's positions are behind the slots,
and whatever the caller gives and gets has the prompt's length.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.memory_slots.layer import SlotReader

__all__ = ["CHILD", "attach", "detach", "reader_of"]

CHILD = "slot_reader"
MARK = "_memory_slots"
FILLED = "filled"  # as MARK, of a cache that a pass over the slots alone fills


def attach(stack: nn.Module) -> SlotReader:
    """The reader of a decoder stack, put there if it is the first."""
    if CHILD not in stack._modules:
        stack.add_module(CHILD, SlotReader())
        stack.register_forward_pre_hook(put_before, with_kwargs=True)
        stack.register_forward_hook(cut_off, with_kwargs=True)
    return reader_of(stack)


def reader_of(stack: nn.Module) -> SlotReader:
    reader = getattr(stack, CHILD)
    assert isinstance(reader, SlotReader)
    return reader


def detach(stack: nn.Module) -> None:
    """Take the reader and its hooks off the stack."""
    delattr(stack, CHILD)
    for hooks, own in ((stack._forward_pre_hooks, put_before), (stack._forward_hooks, cut_off)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
            for flags in (stack._forward_pre_hooks_with_kwargs, stack._forward_hooks_with_kwargs):
                flags.pop(key, None)


def put_before(
    stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: let the pass read the slots."""
    reader = reader_of(stack)
    slots: Any = reader.read()
    names = list(inspect.signature(stack.forward).parameters)
    given = {**{names[i]: value for i, value in enumerate(args)}, **kwargs}
    cache = given.get(CACHE)
    continued = getattr(cache, MARK, None)  # a cache that holds slots goes on with them, whatever is active now
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
    vectors: Any = None
    own: Any = None
    if slots is not None:
        vectors, own = slots
    mask, leading = continued or (own, None)
    repeats, rest = divmod(batch, len(mask))
    if rest:
        raise ValueError(f"Slots of {len(mask)} rows are read, but the batch has {batch}: give one prompt a row.")
    mask = mask.repeat_interleave(repeats, 0)
    count = mask.shape[1]
    past = 0 if cache is None else cache.get_seq_length() - (0 if continued is None else count)
    check_length(stack, count, past + tokens)

    asked = given.get("attention_mask")
    if asked is not None and (not isinstance(asked, Tensor) or asked.ndim != 2):
        raise ValueError("`attention_mask` must be (batch, tokens) while slots are read; static caches make another.")
    if asked is None:
        asked = mask.new_ones(batch, past + tokens)
    if continued is None:
        leading = leading_padding(stack, asked, count)
    positions: Any = given.get("position_ids")
    if "position_ids" in names:
        if positions is None:
            positions = torch.arange(past, past + tokens, device=asked.device)[None]
        positions = given["position_ids"] = positions.expand(batch, -1) + mask.sum(1, keepdim=True)
    given["attention_mask"] = inserted(asked, mask.to(asked.dtype), leading)

    recomputing = stack.training and any(getattr(m, "gradient_checkpointing", False) for m in stack.modules())
    if recomputing:
        cache, given[CACHE], given["use_cache"] = None, None, False
    elif cache is None and given.get("use_cache", stack.config.use_cache):
        cache = given[CACHE] = DynamicCache(config=stack.config)
    if cache is not None and continued is None:
        setattr(cache, MARK, (own, leading))
        if leading is None:
            fill(stack, reader, cache, vectors, own, repeats)
    elif cache is not None:
        return (), given
    if cache is None or leading is not None:
        if embedded is None:
            embedded = stack.get_input_embeddings()(ids)
        before = vectors.repeat_interleave(repeats, 0).to(embedded)
        given["input_ids"], given["inputs_embeds"] = None, inserted(embedded, before, leading)
        if "position_ids" in names:
            given["position_ids"] = inserted(positions, slot_positions(mask), leading)
    return (), given


def cut_off(stack: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: take the slots' outputs off, where they were part of the pass."""
    slots, embedded = reader_of(stack).read(), kwargs.get("inputs_embeds")
    if slots is None or embedded is None or embedded.shape[1] != kwargs["attention_mask"].shape[1]:
        return output
    count = slots[0].shape[1]
    leading = leading_padding(stack, kwargs["attention_mask"], 0)
    output.last_hidden_state = removed(output.last_hidden_state, count, leading)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(removed(state, count, leading) for state in output.hidden_states)
    if output.get("attentions") is not None:
        output.attentions = tuple(
            removed(weights.transpose(1, 2), count, leading).transpose(1, 2) for weights in output.attentions
        )
    return output


def leading_padding(stack: Any, mask: Tensor, count: int) -> Tensor | None:
    """How much padding each row starts with (rows,), where slots must stand behind it: a sliding window, which counts
    padding too, would lose them before it. None if they can stand first."""
    window = getattr(stack.config.get_text_config(), "sliding_window", None)
    if window is None or mask.shape[1] + count <= window:
        return None
    leading = (mask.cumsum(-1) == 0).sum(-1)
    return leading if bool(leading.any()) else None


def inserted(rows: Tensor, part: Tensor, leading: Tensor | None) -> Tensor:
    """`part` (batch, slots, ...) before `rows` (batch, tokens, ...), or behind the padding that rows start with."""
    joined = torch.cat([part, rows], 1)
    if leading is None:
        return joined
    count, place = part.shape[1], torch.arange(joined.shape[1], device=rows.device)[None]
    start = leading[:, None]
    source = torch.where(place < start, place + count, torch.where(place < start + count, place - start, place))
    return joined[torch.arange(len(rows), device=rows.device)[:, None], source]


def removed(rows: Tensor, count: int, leading: Tensor | None) -> Tensor:
    """Undo `inserted` for `count` slots."""
    if leading is None:
        return rows[:, count:]
    place = torch.arange(rows.shape[1] - count, device=rows.device)[None]
    source = torch.where(place < leading[:, None], place, place + count)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], source]


def slot_positions(mask: Tensor) -> Tensor:
    """Positions of the slots (rows, slots): counted from the first that is not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def check_length(stack: Any, slots: int, tokens: int) -> None:
    limit = getattr(stack.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and slots + tokens > limit:
        raise ValueError(
            f"{slots} slots and {tokens} tokens of the prompt exceed the {limit} positions of the model: "
            "shorten the prompt, or compress at a higher rate."
        )


def fill(stack: Any, reader: SlotReader, cache: Cache, vectors: Tensor, mask: Tensor, repeats: int) -> None:
    """Put the slots' keys and values into an empty cache."""
    state = reader.state(stack)
    kept_for, kept = reader.kept  # at once: another thread may replace them
    if kept_for != state:
        kept = keys_and_values(stack, vectors, mask)
        reader.kept = (state, kept)
    for index, (keys, values) in enumerate(kept):
        cache.update(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), index)


@torch.no_grad()
def keys_and_values(stack: Any, vectors: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the slots at every block, from one pass of the stack over the slots alone."""
    names = inspect.signature(stack.forward).parameters
    inputs: dict[str, Tensor] = {"position_ids": slot_positions(mask)} if "position_ids" in names else {}
    embeddings = stack.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=vectors.device))
    modes, cache = {module: module.training for module in stack.modules()}, DynamicCache()
    setattr(cache, MARK, FILLED)
    try:
        stack.eval()
        inputs |= {"inputs_embeds": vectors.to(embeddings), "attention_mask": mask}
        stack(**inputs, **{CACHE: cache}, use_cache=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [(layer.keys, layer.values) for layer in cache.layers]
