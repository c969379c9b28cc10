"""Store what does not change in rows of tokens while something is trained from one token of each on.

Up to one block nothing changes; above it, nothing before that token. So the block's output from the token on is
computed once, and the keys and values of the tokens before it (once for all rows that begin with the same), and a step
runs the rest alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, attention_window, execution_device
from memory_adapters.base_model.partial_forward import (
    CACHE,
    block_tuple_length,
    capture,
    keeps_keys_alone,
    positioned,
    resumed,
)
from memory_adapters.base_model.tokens import batches_of, pad_rows

__all__ = ["RowSuffixes", "SuffixBatch"]


@dataclass(frozen=True)
class SuffixBatch:
    """Store a batch of rows from their starts on, padded on the right.

    Attributes:
        inputs: What to call the model with, within `RowSuffixes.resume`; `input_ids` is (rows, tokens).
        states: The output of the block there (rows, tokens, hidden_size).
        offsets: For each row, the place of its start among these tokens: above 0 where rows are read whole.
    """

    inputs: dict[str, Any]
    states: Tensor
    offsets: list[int]


class RowSuffixes:
    """Run rows from one token of each on, above one block.

    Of a model whose cache holds more than keys and values, and of rows longer than its attention looks back, whole
    rows are read above the block.

    Args:
        model: The causal LM, with what is trained switched off.
        decoder: Its parts.
        layer: The block whose output, and all below it, does not change.
        rows: Token ids.
        starts: For each row, the index of the first token at which something changes.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Decoder,
        layer: int,
        rows: Sequence[Sequence[int]],
        starts: Sequence[int],
    ) -> None:
        self.model, self.decoder, self.layer = model, decoder, layer
        self.rows = rows
        self.device = execution_device(decoder.embeddings)
        self.tuple_length = block_tuple_length(model, decoder, layer)
        self.template = self._cache_template() if starts and max(starts) > 0 else None
        self.whole = self.template is None or max(map(len, rows)) > attention_window(
            model.config.get_text_config(decoder=True)
        )
        self.starts = [0] * len(rows) if self.whole else list(starts)
        self.offsets = list(starts) if self.whole else [0] * len(rows)
        self.before = [tuple(row[:start]) for row, start in zip(rows, self.starts, strict=True)]
        self.kept = self._read_prefixes(sorted({prefix for prefix in self.before if prefix}, key=len))
        self.states = self._read_suffixes()
        self.kept = {prefix: kept[layer + 1 :].clone() for prefix, kept in self.kept.items()}

    def _cache_template(self) -> Any:
        """Return a cache of the model; None if it keeps more than keys and values, or not alike in all blocks."""
        probe = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        cache = self.model(input_ids=probe, use_cache=True).get(CACHE)
        if not keeps_keys_alone(cache) or len(cache.layers) != self.decoder.num_layers:
            return None
        if any(layer.keys is None for layer in cache.layers):  # some blocks read images alone
            return None
        shapes = {tuple(part.shape) for layer in cache.layers for part in (layer.keys, layer.values)}
        return cache if len(shapes) == 1 else None

    def _read_prefixes(self, prefixes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Return keys and values (blocks, 2, heads, tokens, head size) of what stands before starts, each once."""
        found: dict[tuple[int, ...], Tensor] = {}
        for batch in batches_of(prefixes):
            inputs = pad_rows([prefixes[i] for i in batch], self.device)
            positions = positioned(self.model, inputs["attention_mask"])
            cache = self.model.base_model(input_ids=inputs["input_ids"], **positions, use_cache=True)[CACHE]
            kept = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])
            found |= {prefixes[i]: kept[:, :, place, :, : len(prefixes[i])].clone() for place, i in enumerate(batch)}
        return found

    def _read_suffixes(self) -> list[Tensor]:
        """Return the block's output (tokens, hidden_size) from each row's start on."""
        found = [torch.empty(0)] * len(self.rows)
        for batch in batches_of([row[start:] for row, start in zip(self.rows, self.starts, strict=True)]):
            inputs = self._inputs(batch)
            inputs.pop("use_cache")
            (states,) = capture(self.model, self.decoder, [self.layer], **inputs)
            for place, i in enumerate(batch):
                found[i] = states[place, : self.length(i)].clone()
        return found

    def length(self, index: int) -> int:
        """Return how many tokens of a row are run."""
        return len(self.rows[index]) - self.starts[index]

    def batch(self, indices: Sequence[int]) -> SuffixBatch:
        """Return rows as a batch."""
        states = nn.utils.rnn.pad_sequence([self.states[i] for i in indices], batch_first=True)
        return SuffixBatch(self._inputs(indices), states, [self.offsets[i] for i in indices])

    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return what to call the model with to read rows from their starts on."""
        suffixes = pad_rows([self.rows[i][self.starts[i] :] for i in indices], self.device)
        longest = max(self.starts[i] for i in indices)
        mask = suffixes["attention_mask"]
        if longest == 0:
            return {"input_ids": suffixes["input_ids"], **positioned(self.model, mask), "use_cache": False}
        first = next(self.kept[self.before[i]] for i in indices if self.starts[i])
        kept = first.new_zeros(*first.shape[:2], len(indices), first.shape[2], longest, first.shape[4])
        before = mask.new_zeros(len(indices), longest)
        for place, i in enumerate(indices):
            if self.starts[i]:
                kept[:, :, place, :, -self.starts[i] :] = self.kept[self.before[i]]
                before[place, -self.starts[i] :] = 1
        return {
            "input_ids": suffixes["input_ids"],
            **positioned(self.model, torch.cat([before, mask], 1), longest),
            CACHE: self._cache(kept),
            "use_cache": True,
        }

    def _cache(self, kept: Tensor) -> Any:
        """Return a cache of these keys and values (last blocks, 2, rows, heads, tokens, head size)."""
        template: Any = self.template
        cache = copy.copy(template)
        cache.layers = [copy.copy(layer) for layer in template.layers]
        missing = len(cache.layers) - len(kept)
        for number, layer in enumerate(cache.layers):
            # Of the first blocks, which are not run then, only the number of tokens is asked.
            own = kept[number - missing] if number >= missing else kept[0][:, :, :1].expand(2, *kept.shape[2:])
            layer.keys, layer.values = own
            if hasattr(layer, "cumulative_length"):  # a window's own count of what it has seen
                layer.cumulative_length = kept.shape[4]
        return cache

    @contextmanager
    def resume(self, batch: SuffixBatch) -> Iterator[None]:
        """Let the block, within this context, put out the states of a batch."""
        with resumed(self.decoder, self.layer, batch.states, tuple_length=self.tuple_length):
            yield
