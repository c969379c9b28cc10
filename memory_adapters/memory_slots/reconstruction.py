"""What slots keep of a text: is it given back, continued, and asked about as if the model read the text itself?

All ways to read a text are compared on one path: its slots; the slots of another text; its token embeddings, which are
the full context; the embeddings of as many of its last tokens as it has slots; and nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.modes import evaluating
from memory_adapters.memory_slots import MemorySlots, SlotMemory
from memory_adapters.memory_slots.loss import Query, Row, autoencoding_rows, in_batches, predict
from memory_adapters.memory_slots.write import embedded_text

__all__ = [
    "ReconstructionScores",
    "markdown",
    "other_texts",
    "score_continuations_after",
    "score_reconstruction",
    "ways_to_read",
]

Reading = Sequence[MemorySlots | None]


@dataclass(frozen=True)
class ReconstructionScores:
    """Report how well texts are given back from their slots.

    Attributes:
        texts: How many.
        num_tokens: Of a text, mean.
        num_slots: Of a text, mean.
        compression_rate: Tokens ÷ slots, over all texts.
        cross_entropy: Mean over tokens behind the slots, [AE] and the tokens before, in nats.
        token_accuracy: Share of tokens that are the first choice there.
        bleu: Corpus BLEU of the greedy reconstructions (sacrebleu), 0 to 100; None without decoding.
        exact_prefix: EM of the ICAE paper: length of the exactly matching prefix ÷ length, in tokens, mean over texts.
        exact: Share of texts that are given back exactly.
    """

    texts: int
    num_tokens: float
    num_slots: float
    compression_rate: float
    cross_entropy: float
    token_accuracy: float
    bleu: float | None = None
    exact_prefix: float | None = None
    exact: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def score_reconstruction(
    memory: SlotMemory, texts: Sequence[str], slots: Reading, *, decode: bool = True
) -> ReconstructionScores:
    """Score how well `texts` come back from `slots`: their own (`memory.compress(texts)`), others', or None.

    Args:
        memory: A memory with a tokenizer; what it reads is put back afterwards.
        texts: At least one.
        slots: One for each text.
        decode: Decode greedily too, for BLEU and exact match.

    Raises:
        ImportError: If sacrebleu is missing.
        ValueError: If there are not as many slots as texts.
    """
    check_lengths(texts, slots)
    tokenizer = memory._require_tokenizer()
    spans = [memory.config.spans_of(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    vectors = [one for own, cut in zip(slots, spans, strict=True) for one in _vectors(memory, own, len(cut))]
    losses, hits = _predicted(memory, vectors, autoencoding_rows([span for cut in spans for span in cut], None))
    num_slots = sum(0 if own is None else own.num_slots for own in slots)
    scores = ReconstructionScores(
        len(texts),
        len(hits) / len(texts),
        num_slots / len(texts),
        len(hits) / num_slots if num_slots else math.inf,
        float(losses.mean()),
        float(hits.float().mean()),
    )
    return replace(scores, **_decoded(memory, texts, slots)) if decode else scores


def _decoded(memory: SlotMemory, texts: Sequence[str], slots: Reading) -> dict[str, Any]:
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise ImportError("BLEU needs the package sacrebleu: pip install memory-adapters[evaluation]") from None
    if any(own is None for own in slots):
        raise ValueError("`slots` holds None, from which nothing can be decoded: set `decode=False`.")
    before = memory.slots
    try:
        memory.use([own for own in slots if own is not None])
        told = memory.reconstruct()
    finally:
        memory.use(before)
    prefixes = []
    for text, other in zip(texts, told, strict=True):
        ids, found = (memory._require_tokenizer()(t, add_special_tokens=False)["input_ids"] for t in (text, other))
        same = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found)))
        prefixes.append(same / len(ids))
    return {
        "bleu": corpus_bleu(told, [list(texts)]).score,
        "exact_prefix": sum(prefixes) / len(prefixes),
        "exact": sum(a == b for a, b in zip(texts, told, strict=True)) / len(texts),
    }


def ways_to_read(memory: SlotMemory, texts: Sequence[str], slots: Sequence[MemorySlots]) -> dict[str, Reading]:
    """Return what the model can be given of each text (see the module).

    It is for `score_continuations_after` and `memory_adapters.memory_slots.question_answering`.

    Args:
        memory: The memory that compressed them.
        texts: At least two.
        slots: Of each text.

    Raises:
        ValueError: If there are fewer than two texts, or not as many slots.
    """
    check_lengths(texts, slots)
    if len(texts) < 2:
        raise ValueError(f"`texts` has {len(texts)} text: two are needed, for slots of another text.")
    whole = [embedded_text(memory.encoder, memory._require_tokenizer(), text) for text in texts]
    truncated = [
        embedded_text(memory.encoder, memory._require_tokenizer(), text, own.num_slots)
        for text, own in zip(texts, slots, strict=True)
    ]
    return {
        "full context": whole,
        "slots": list(slots),
        "another text's slots": [*slots[1:], slots[0]],
        "as many last tokens": truncated,
        "no context": [None] * len(texts),
    }


def score_continuations_after(memory: SlotMemory, continuations: Sequence[str], slots: Reading) -> float:
    """Return the perplexity of the texts' continuations (from their second token on) behind what is read of each.

    Args:
        memory: A memory with a tokenizer.
        continuations: Of each text.
        slots: What is read before it: one of `ways_to_read`.
    """
    check_lengths(continuations, slots)
    ids = [memory._require_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in continuations]
    rows = [Row(Query(row[:1], row[1:]), [i]) for i, row in enumerate(ids)]
    vectors = [_vectors(memory, own, 1, joined=True)[0] for own in slots]
    return math.exp(_predicted(memory, vectors, rows)[0].mean())


@torch.no_grad()
def _predicted(
    memory: SlotMemory, vectors: Sequence[torch.Tensor], rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `predict`, in batches."""
    with evaluating(memory.model):
        parts = [predict(memory.encoder, vectors, [rows[i] for i in part]) for part in in_batches(rows, vectors)]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def other_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """Make the texts of the ICAE paper's check: is the model's own knowledge of language doing the reconstruction?

    Returns:
        `"normal"`: the texts. `"patterned random"`: every token id of them plus 1. `"random"`: tokens drawn evenly.
    """
    special = set(tokenizer.all_special_ids)
    allowed = [i for i in range(len(tokenizer)) if i not in special]
    rng = random.Random(seed)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    following = dict(zip(allowed, [*allowed[1:], allowed[0]], strict=True))
    patterned = [[following.get(i, i) for i in row] for row in rows]
    drawn = [[rng.choice(allowed) for _ in row] for row in rows]
    return {
        "normal": list(texts),
        "patterned random": [str(tokenizer.decode(row)) for row in patterned],
        "random": [str(tokenizer.decode(row)) for row in drawn],
    }


def markdown(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return a table with a line for each row; what is None or missing is left blank."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *(name.replace("_", " ") for name in columns)]]
    for name, row in rows.items():
        cells = [row.get(column) for column in columns]
        lines.append([name, *("" if cell is None else f"{cell:.4g}" for cell in cells)])
    table = tabulate(lines, "firstrow", tablefmt="pipe", stralign="right", colalign=("left",), disable_numparse=True)
    return f"{table}\n"


def _vectors(memory: SlotMemory, slots: MemorySlots | None, spans: int, joined: bool = False) -> list[torch.Tensor]:
    if slots is None:
        return [torch.zeros(0, memory.encoder.decoder.embedding_size, device=memory.encoder.device)] * spans
    vectors = slots.vectors.to(memory.encoder.device)
    if joined:
        return [vectors]
    if slots.num_spans != spans:
        raise ValueError(f"`slots` hold {slots.num_spans} spans for a text of {spans}: give slots of texts as long.")
    return list(vectors.split(list(slots.spans)))


def check_lengths(texts: Sequence[object], slots: Sequence[object]) -> None:
    if not texts or len(texts) != len(slots):
        raise ValueError(f"`slots` has {len(slots)} entries for {len(texts)} texts: give one for each, and some text.")
