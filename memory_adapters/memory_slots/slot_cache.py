"""Keys and values of the slots: computed once, and put into the empty cache of every pass that follows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.memory_slots.placement import slot_positions
from memory_adapters.peft_layers.layers import MemoryLayer, used_adapters

__all__ = [
    "FILLED",
    "MARK",
    "KeyValue",
    "SlotCache",
    "State",
    "first_tokens",
    "hide_slots",
    "joined",
    "num_cached",
    "run_behind",
    "show_slots",
    "state_of",
]

# Attribute of a cache that holds slots: their mask (rows, slots), the tokens of each row before them (rows,) or None,
# the positions that they take (rows, 1), and the most of these.
MARK = "_memory_slots"
FILLED = "filled"  # as MARK, of a cache that is filled by passes of this package
KeyValue: TypeAlias = tuple[Tensor, Tensor]  # keys and values of a block, each (rows, heads, tokens, head_dim)


def hide_slots(cache: Cache) -> None:
    """Let a cache that holds slots report its length without them: whoever continues it counts the prompt's tokens."""
    cache.get_seq_length = partial(_prompt_length, cache)  # type: ignore[method-assign]  # copied with the cache


def show_slots(cache: Cache) -> None:
    """Undo `hide_slots`, for the passes of the model itself."""
    vars(cache).pop("get_seq_length", None)


def num_cached(cache: Cache | None) -> int:
    """Return how many tokens a cache holds, slots and prompt."""
    return 0 if cache is None else type(cache).get_seq_length(cache)


def _prompt_length(cache: Cache, layer_idx: int = 0) -> int:
    return max(type(cache).get_seq_length(cache, layer_idx) - getattr(cache, MARK)[0].shape[1], 0)


class SlotCache:
    """Keep the keys and values of the slots that were read last, as long as nothing that they depend on changes."""

    def __init__(self) -> None:
        self._kept: tuple[State | None, list[KeyValue]] = (None, [])

    def fill(
        self,
        stack: PreTrainedModel,
        cache: Cache,
        vectors: Tensor,
        mask: Tensor,
        repeats: int,
        sources: Sequence[Tensor | None],
    ) -> None:
        """Put the slots' keys and values into an empty cache.

        Args:
            stack: The decoder stack.
            cache: The cache that the pass goes on with.
            vectors: Slots (rows, slots, embedding_size).
            mask: 1 where a row has a slot (rows, slots).
            repeats: Rows of the batch to each of `rows`.
            sources: The tensors that `vectors` was made of, which stay the same from pass to pass; None for a row
                without slots.
        """
        state = state_of(stack, sources)
        kept_for, kept = self._kept  # read at once: another thread may replace them
        if kept_for != state:
            kept = _keys_and_values(stack, vectors, mask)
            self._kept = (state, kept)
        for index, (keys, values) in enumerate(kept):  # each (rows, heads, slots, head_dim)
            cache.update(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0), index)


@torch.no_grad()
def _keys_and_values(stack: PreTrainedModel, vectors: Tensor, mask: Tensor) -> list[KeyValue]:
    """Return the slots' keys and values (rows, heads, slots, head_dim) at every block, from a pass over them."""
    names = inspect.signature(stack.forward).parameters
    inputs: dict[str, Tensor] = {"position_ids": slot_positions(mask)} if "position_ids" in names else {}
    embeddings = stack.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=vectors.device))
    inputs |= {"inputs_embeds": vectors.to(embeddings), "attention_mask": mask}
    cache = DynamicCache()
    setattr(cache, MARK, FILLED)
    with evaluating(stack):
        stack(**inputs, **{CACHE: cache}, use_cache=True)
    return _layers(cache)


def run_behind(
    stack: PreTrainedModel, layers: Sequence[KeyValue], position: int, **inputs: Any
) -> tuple[Any, list[KeyValue]]:
    """Run rows of tokens behind known keys and values.

    Args:
        stack: The decoder stack.
        layers: Of each block, with one row for all, or one each; none to begin with.
        position: Of the first token.
        inputs: `input_ids` or `inputs_embeds`, and what else the stack takes, such as another attention mask than that
            of rows without padding.

    Returns:
        The stack's output, and all keys and values now.
    """
    given = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs)
    cache, (rows, tokens) = DynamicCache(), given.shape[:2]
    for index, (keys, values) in enumerate(layers):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    mask = torch.ones(rows, num_cached(cache) + tokens, dtype=torch.long, device=given.device)
    if "position_ids" in inspect.signature(stack.forward).parameters:
        inputs["position_ids"] = torch.arange(position, position + tokens, device=given.device).expand(rows, -1)
    setattr(cache, MARK, FILLED)
    output = stack(**{"attention_mask": mask, **inputs}, **{CACHE: cache}, use_cache=True)
    return output, _layers(cache)


def joined(before: Sequence[KeyValue], kept: Iterable[tuple[Tensor, Tensor]]) -> list[KeyValue]:
    """Return keys and values of one row with others, each (heads, tokens, head_dim), behind them."""
    return [
        (torch.cat([k, keys[None].to(k)], 2), torch.cat([v, values[None].to(v)], 2))
        for (k, v), (keys, values) in zip(before, kept, strict=True)
    ]


def first_tokens(layers: Sequence[KeyValue], count: int) -> list[KeyValue]:
    """Return the keys and values of the first tokens alone."""
    return [(keys[:, :, :count], values[:, :, :count]) for keys, values in layers]


def _layers(cache: DynamicCache) -> list[KeyValue]:
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]  # filled by a pass


def state_of(stack: nn.Module, sources: Sequence[Tensor | None]) -> State:
    """Return what the keys and values depend on: slots, weights, and which adapters take part.

    Tensors are held, so that none that is new can be taken for one that is gone.
    """
    tensors = [tensor for tensor in sources if tensor is not None]
    settings: list[object] = [[tensor is None for tensor in sources]]
    _collect(stack, tensors, settings)
    return [_Held(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors], settings


def _collect(module: nn.Module, tensors: list[Tensor], settings: list[object]) -> None:
    """Add a module's tensors, and of each adapter layer those of its active adapters and how strongly they act."""
    if isinstance(module, MemoryLayer) and module.adds_virtual_tokens:
        return
    tensors += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    children = module._modules
    if isinstance(module, BaseTunerLayer):
        active = used_adapters(module)
        factors = module.weights if isinstance(module, MemoryLayer) else getattr(module, "scaling", {})
        rows = module.rows if isinstance(module, MemoryLayer) else None
        settings.append((active, rows, [factors.get(name) for name in active]))
        for place in module.adapter_layer_names:
            for name in active:
                part = getattr(module, place)[name] if name in getattr(module, place, {}) else None
                if isinstance(part, nn.Module):
                    _collect(part, tensors, settings)
                elif part is not None:
                    tensors.append(part)
        apart = (*module.adapter_layer_names, *module.other_param_names)  # also those of adapters that take no part
        children = {name: child for name, child in children.items() if name not in apart}
    for child in children.values():
        if child is not None:
            _collect(child, tensors, settings)


class _Held:
    """Store a tensor as it is now: equal to itself as long as nothing writes into it."""

    def __init__(self, tensor: Tensor, version: int) -> None:
        self.tensor, self.version, self.place = tensor, version, (tensor.device, tensor.dtype)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Held) and self.tensor is other.tensor
        return same and (self.version, self.place) == (other.version, other.place)  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


State: TypeAlias = tuple[list[_Held], list[object]]  # see `state_of`
