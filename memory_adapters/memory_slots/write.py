"""From texts to slots: cut into spans, compressed by the encoder, refined; or to the keys and values that are kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import chat_start
from memory_adapters.base_model.decoder import attention_window, context_length
from memory_adapters.base_model.modes import bfloat16_weights, evaluating
from memory_adapters.base_model.nonfinite import origin, rows_not_finite
from memory_adapters.base_model.quantised import differentiable
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.memory_slots.distillation import refine_keys_values
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder
from memory_adapters.memory_slots.keys_values import KeysValues, select_keys_values
from memory_adapters.memory_slots.loss import Query, Row, autoencoding_rows, in_batches, predict
from memory_adapters.memory_slots.prompts import END
from memory_adapters.memory_slots.refinement import Goal, refine
from memory_adapters.memory_slots.slots import MemorySlots

__all__ = ["Compressed", "compress_texts", "embedded_text", "keep_keys_values"]

WHOLE_TOKENS = 64  # a text of no more is kept whole, as keys and values


@dataclass(frozen=True)
class Compressed:
    """Store one compressed text.

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
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    asked: Sequence[Query],
    steps: int,
    progress: bool,
) -> list[Compressed]:
    """Compress each text into slots; all are encoded together.

    Args:
        encoder: Of the model.
        tokenizer: The model's.
        texts: At least one.
        asked: What else refinement asks, of the slots of each text.
        steps: Most steps of refinement.
        progress: Show bars.
    """
    config = encoder.config
    if not math.isfinite(encoder.parts.embedding_rms):
        raise ValueError("The model's embeddings hold NaN or infinity: load them anew, and then the memory.")
    cut = [config.spans_of(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    limit = context_length(encoder.model)
    longest = max(len(span) + config.slots_for(len(span)) for spans in cut for span in spans)
    if longest >= limit:
        raise ValueError(
            f"`span_length={config.span_length}` and `num_slots={config.num_slots}` make spans that take {longest + 1} "
            f"positions with their slots, and the model has {limit}: set them lower."
        )
    fingerprint = encoder.fingerprint()
    with evaluating(encoder.model):
        every = iter(encoder.compress([span for spans in cut for span in spans], progress))
        vectors = [[next(every) for _ in spans] for spans in cut]
        _check(encoder, texts, cut, vectors)
        refined: list[tuple[list[Tensor], list[float]]] = [(own, []) for own in vectors]
        accuracies: list[tuple[float, float] | None] = [None] * len(texts)
        if steps:
            goals = [_goals(config.refine_fraction, spans, tokenizer.eos_token_id, asked) for spans in cut]
            before = _accuracies(encoder, cut, vectors)
            fast = [*encoder.stack.modules(), encoder.decoder.head] if encoder.refines_in_bfloat16 else []
            with differentiable(encoder.model), bfloat16_weights(fast):
                refined = [
                    one
                    for group in _groups([sum(map(len, spans)) for spans in cut])
                    for one in refine(
                        encoder,
                        [vectors[i] for i in group],
                        [goals[i] for i in group],
                        steps,
                        progress,
                        [texts[i] for i in group],
                    )
                ]
            accuracies = list(zip(before, _accuracies(encoder, cut, [own for own, _ in refined]), strict=True))
    found = []
    for text, spans, (own, losses), accuracy in zip(texts, cut, refined, accuracies, strict=True):
        slots = MemorySlots(
            torch.cat(own).cpu(),
            tuple(map(len, own)),
            sum(map(len, spans)),
            config.base_fingerprint or {},
            fingerprint,
            hashlib.sha256(text.encode()).hexdigest(),
            len(losses),
        )
        found.append(Compressed(slots, losses, accuracy))
    return found


def _check(
    encoder: Encoder, texts: Sequence[str], cut: Sequence[Sequence[Sequence[int]]], vectors: Sequence[Sequence[Tensor]]
) -> None:
    """Raise a `ValueError` that names the first text whose slots are not finite, and where that arises."""
    for text, spans, own in zip(texts, cut, vectors, strict=True):
        for span, slots in zip(spans, own, strict=True):
            if rows_not_finite(slots):
                where = origin(encoder.model, encoder.decoder, pad_rows([span], encoder.device))
                raise ValueError(f"The slots of {text[:40]!r} hold NaN or infinity: {where}.")


def _goals(fraction: float, spans: Sequence[Sequence[int]], end: int | None, asked: Sequence[Query]) -> list[Goal]:
    """Return what refinement asks of a text's slots: its spans, and what else is asked behind all of them."""
    share = fraction if asked else 1.0
    goals = [Goal(autoencoding_rows(spans, end), share)] if share else []
    if share < 1:
        goals.append(Goal([Row(one, range(len(spans))) for one in asked], 1 - share))
    return goals


def _groups(tokens: Sequence[int]) -> list[list[int]]:
    """Return indices of texts, in turn, that are refined together: as many as one pass takes."""
    groups: list[list[int]] = []
    total = 0
    for i, own in enumerate(tokens):
        total += own
        if not groups or total > BATCH_TOKENS:
            groups.append([])
            total = own
        groups[-1].append(i)
    return groups


@torch.no_grad()
def _accuracies(
    encoder: Encoder, cut: Sequence[Sequence[Sequence[int]]], vectors: Sequence[Sequence[Tensor]]
) -> list[float]:
    """Return the share of each text's tokens that the model gives back behind the true ones before them."""
    found = []
    for spans, own in zip(cut, vectors, strict=True):
        rows = autoencoding_rows(spans, None)
        hits = [predict(encoder, own, [rows[i] for i in batch])[1] for batch in in_batches(rows, own)]
        found.append(float(torch.cat(hits).float().mean()))
    return found


def embedded_text(
    encoder: Encoder, tokenizer: PreTrainedTokenizerBase, text: str, last: int | None = None
) -> MemorySlots:
    """Return the token embeddings of a text (of its last `last` tokens, if given) as slots, read as the text is."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][-(last or 0) :]
    with torch.no_grad():
        vectors = encoder.decoder.embeddings(torch.tensor(ids, device=encoder.device)).float().cpu()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return MemorySlots(vectors, (len(ids),), len(ids), encoder.config.base_fingerprint or {}, None, sha256)


def keep_keys_values(
    encoder: Encoder,
    stack: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, Sequence[int]]],
    steps: int,
    progress: bool,
) -> list[tuple[KeysValues | None, list[float]]]:
    """Choose the keys and values of texts, as they are behind what a chat begins with (or nothing), and refine them.

    An encoder that was trained makes them, at the places that are chosen.

    Args:
        encoder: Of the model.
        stack: The module that reads.
        tokenizer: The model's.
        texts: Title and token ids of each.
        steps: Most steps of refinement.
        progress: Show bars.

    Returns:
        Of each text, what is kept (None for a short one, which is read whole), and the loss before each step.

    Raises:
        ValueError: If a text cannot be read twice within the model's positions.
    """
    prefix = chat_start(tokenizer) if encoder.config.opening else []
    separator = tokenize(tokenizer, END, rendered=True)
    room = min(context_length(encoder.model), attention_window(encoder.model.config.get_text_config(decoder=True)))
    for title, ids in texts:
        if (needed := len(prefix) + 2 * len(ids) + len(separator)) > room and len(ids) > WHOLE_TOKENS:
            raise ValueError(
                f"The entry {title!r} has {len(ids)} tokens, and is read twice to choose keys and values: {needed} "
                f"tokens, of {room} that the model can attend to. Set `part_tokens` lower."
            )
    found: list[tuple[KeysValues | None, list[float]]] = []
    for _, ids in tqdm(texts, unit="entry", desc="choosing keys and values", disable=not progress or len(texts) == 1):
        count = encoder.config.slots_for(len(ids))
        if len(ids) <= WHOLE_TOKENS or count >= len(ids):
            found.append((None, []))
            continue
        with encoder.adapters_disabled():
            kept = select_keys_values(stack, prefix, ids, separator, count)
        if encoder.config.encoder_steps > 0:
            with evaluating(encoder.model), torch.no_grad():
                keys, values = zip(*encoder.keys_values(prefix, ids, kept.places), strict=True)
            kept = replace(kept, keys=keys, values=values)
        losses: list[float] = []
        if steps:
            kept, losses = refine_keys_values(encoder, tokenizer, kept, ids, separator, steps, progress)
        found.append((kept, losses))
    return found
