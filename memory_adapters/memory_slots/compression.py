"""From texts to slots: cut into spans, compressed by the encoder, refined one text at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memory_adapters.forward_passes import bfloat16_weights, evaluating
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder
from memory_adapters.memory_slots.refinement import Asked, Rows, asked_rows, autoencoding_rows, predict, refine
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.quantised import differentiable

__all__ = ["Compressed", "compress_texts"]


@dataclass(frozen=True)
class Compressed:
    """One text.

    Attributes:
        slots: What it was compressed into.
        losses: Before each step of refinement.
        accuracy: Share of its tokens that the model gives back, before refinement and after, each token judged behind
            the true ones before it; None without refinement.
    """

    slots: MemorySlots
    losses: list[float]
    accuracy: tuple[float, float] | None


def compress_texts(
    encoder: Encoder, tokenizer: Any, texts: Sequence[str], asked: Sequence[Asked], steps: int, progress: bool
) -> list[Compressed]:
    """Slots of each text; all are encoded together.

    Args:
        encoder: Of the model.
        tokenizer: The model's.
        texts: At least one.
        asked: What else refinement asks, of the slots of each text.
        steps: Most steps of refinement.
        progress: Show bars.
    """
    config, found = encoder.config, []
    cut = [config.spans_of(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    fingerprint = encoder.fingerprint()
    with evaluating(encoder.model):
        every = iter(encoder.compress([span for spans in cut for span in spans], progress))
        for text, spans in zip(texts, cut, strict=True):
            vectors, accuracy = [next(every) for _ in spans], None
            losses: list[float] = []
            if steps:
                rows = _wanted(encoder, spans, tokenizer.eos_token_id, asked)
                before = _accuracy(encoder, vectors, spans)
                fast = [*encoder.stack.modules(), encoder.decoder.head] if config.precision == "bfloat16" else []
                with differentiable(encoder.model), bfloat16_weights(fast):
                    vectors, losses = refine(encoder, vectors, rows, steps, progress)
                accuracy = (before, _accuracy(encoder, vectors, spans))
            slots = MemorySlots(
                torch.cat(vectors).cpu(),
                tuple(map(len, vectors)),
                sum(map(len, spans)),
                config.base_fingerprint or {},
                fingerprint,
                hashlib.sha256(text.encode()).hexdigest(),
                len(losses),
            )
            found.append(Compressed(slots, losses, accuracy))
    return found


def _wanted(encoder: Encoder, spans: Sequence[Sequence[int]], end: int | None, asked: Sequence[Asked]) -> list[Rows]:
    """What refinement asks of the slots of a text's spans, in parts that fit in memory."""
    share = encoder.config.refine_fraction if asked else 1.0
    rows = []
    for part in _parts(spans) if share else []:
        texts = [spans[i] for i in part]
        weight = share * len(part) / len(spans)
        rows.append(autoencoding_rows(encoder, texts, end, weight, [[i] for i in part]))
    if asked and share < 1:
        rows.append(asked_rows(encoder, asked, [range(len(spans))] * len(asked), 1 - share))
    return rows


@torch.no_grad()
def _accuracy(encoder: Encoder, vectors: Sequence[torch.Tensor], spans: Sequence[Sequence[int]]) -> float:
    right = []
    for part in _parts(spans):
        rows = autoencoding_rows(encoder, [spans[i] for i in part], None, 1.0, [[i] for i in part])
        right.append(predict(encoder, vectors, rows)[1])
    return float(torch.cat(right).float().mean())


def _parts(spans: Sequence[Sequence[int]]) -> list[range]:
    size = max(1, BATCH_TOKENS // max(map(len, spans)))
    return [range(start, min(start + size, len(spans))) for start in range(0, len(spans), size)]
