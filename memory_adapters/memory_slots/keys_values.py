"""Keys and values of a text at every block: a share of them, chosen by the attention that they receive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import execution_device
from memory_adapters.base_model.modes import evaluating
from memory_adapters.memory_slots.slot_cache import KeyValue, run_behind

__all__ = ["KeysValues", "at_places", "select_keys_values"]

CHUNK = 256  # tokens of a pass whose attention weights are held at once


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Store the keys and values of a text that were kept, in the model without adapters.

    Attributes:
        keys: Of each block (heads, kept, head_dim), with their positions as they were.
        values: Of each block (heads, kept, head_dim).
        places: Of each block (heads, kept), int32: the tokens of the text that they are of, in rising order.
        prefix: The tokens before the text; behind others, keys and values of the same places are computed anew.
        refine_steps: Most gradient steps that they were refined for.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    places: tuple[Tensor, ...] = field(repr=False)
    prefix: tuple[int, ...] = field(repr=False)
    refine_steps: int = 0

    def __post_init__(self) -> None:
        every = zip(self.keys, self.values, self.places, strict=True)
        if not self.keys or any(
            k.ndim != 3 or v.ndim != 3 or not k.shape[:2] == v.shape[:2] == at.shape or at.shape[1] != self.num_kept
            for k, v, at in every
        ):
            raise ValueError(
                "`keys`, `values` and `places` must be (heads, kept, ...), with as many kept at every block."
            )

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each block."""
        return list(zip(self.keys, self.values, strict=True))

    @property
    def num_kept(self) -> int:
        """Keys of a head."""
        return self.keys[0].shape[1]


@torch.no_grad()
def select_keys_values(
    stack: PreTrainedModel,
    prefix: Sequence[int],
    ids: Sequence[int],
    separator: Sequence[int],
    kept: int,
) -> KeysValues:
    """Return the keys and values of a text that receive most attention, an equal number for every head.

    The text is read twice. A key's score is the mean attention that the tokens behind it pay it in the first reading,
    as a share of the head's total, and the same in the second (as in KVzip, Kim et al. 2025), times the length of its
    value. The first token is always kept.

    Args:
        stack: The decoder stack, without adapters.
        prefix: Token ids that stand before the text.
        ids: The text.
        separator: What stands between the two readings.
        kept: How many to keep; at most the tokens of the text.

    Raises:
        ValueError: If the model gives no attention weights, or caches none of its keys.
    """
    first, size = len(prefix), len(ids)
    text = slice(first, first + size)
    with evaluating(stack), _eager_attention(stack):
        whole: list[KeyValue] = []
        received: list[list[Tensor]] = [[], []]  # of each reading, of each block: (heads of queries, tokens)
        for layers, start, weights in _passes(stack, [], [*prefix, *ids]):
            whole = layers
            _add(received[0], [own[:, max(first - start, 0) :, text] for own in weights], size)
        behind = torch.arange(size, 0, -1, device=received[0][0].device)  # of each token, how many can attend to it
        received[0] = [own / behind for own in received[0]]
        for _, start, weights in _passes(stack, whole, [*separator, *ids]):
            skipped = max(first + size + len(separator) - start, 0)
            _add(received[1], [own[:, skipped:, text] for own in weights], size)
    keys, values, places = [], [], []
    for i, (key, value) in enumerate((k[0, :, text], v[0, :, text]) for k, v in whole):
        chosen = _chosen(received[0][i], received[1][i], value, kept)
        keys.append(at_places(key, chosen))
        values.append(at_places(value, chosen))
        places.append(chosen.to(torch.int32))
    return KeysValues(tuple(keys), tuple(values), tuple(places), tuple(prefix))


def _passes(
    stack: PreTrainedModel, layers: list[KeyValue], ids: Sequence[int]
) -> Iterator[tuple[list[KeyValue], int, list[Tensor]]]:
    """Read tokens in chunks behind known keys and values.

    Yields:
        All keys and values up to the end of a chunk; how many there were before it; the chunk's attention weights at
        each block (heads, queries, keys).
    """
    for place in range(0, len(ids), CHUNK):
        start = layers[0][0].shape[2] if layers else 0
        tokens = torch.tensor([list(ids[place : place + CHUNK])], device=execution_device(stack.get_input_embeddings()))
        output, layers = run_behind(stack, layers, start, input_ids=tokens, output_attentions=True)
        weights = [own for own in output.attentions or () if own is not None]
        if len(weights) != len(layers):
            raise ValueError(
                "The model gives no attention weights at every block, by which keys and values are chosen: write with "
                "`compress=False`, or use `space='embeddings'`."
            )
        yield layers, start, [own[0].float() for own in weights]


def _add(sums: list[Tensor], weights: Sequence[Tensor], size: int) -> None:
    """Add the attention (heads, queries, keys) of a chunk to the sums over queries (heads, size) of each block."""
    totals = [nn.functional.pad(own.sum(1), (0, size - own.shape[2])) for own in weights]  # keys to come: none yet
    sums[:] = [old + new for old, new in zip(sums, totals, strict=True)] if sums else totals


def _chosen(first: Tensor, second: Tensor, values: Tensor, kept: int) -> Tensor:
    """Return the places (heads, kept) of the keys with the highest scores, in rising order.

    Args:
        first: Attention that keys receive in the first reading (heads of queries, tokens).
        second: In the second.
        values: (heads, tokens, head_dim).
        kept: How many.
    """
    shares = torch.zeros(values.shape[:2], device=values.device)
    for own in (first, second):
        of_group = own.view(len(values), -1, own.shape[1]).amax(1)
        shares = shares + of_group / of_group.sum(-1, keepdim=True)
    scores = shares * values.float().norm(dim=-1)
    scores[:, 0] = torch.inf  # attention rests on the first token where nothing stands before the text
    return scores.topk(kept, -1).indices.sort(-1).values


def at_places(rows: Tensor, places: Tensor) -> Tensor:
    """Return the rows (heads, kept, size) of all (heads, tokens, size) at some places (heads, kept) of each head."""
    return rows.gather(1, places.to(rows.device).long()[..., None].expand(-1, -1, rows.shape[-1]))


@contextmanager
def _eager_attention(stack: PreTrainedModel) -> Iterator[None]:
    """Let the model compute attention weights, within this context, which faster kernels do not give."""
    every: list[Any] = [getattr(module, "config", None) for module in stack.modules()]
    configs = {id(config): config for config in every if config is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
