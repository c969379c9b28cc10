"""Facts and questions for slots: as text to compress, as what refinement asks, and how the model answers them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.nonfinite import check_scores
from memory_adapters.base_model.sampling import PLAIN_SENTENCES
from memory_adapters.base_model.tokens import score_rows, shared_length, tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer
from memory_adapters.memory_slots.encoder import Encoder
from memory_adapters.memory_slots.loss import Query

__all__ = ["as_queries", "as_text", "scores"]


def as_text(items: Sequence[Item]) -> str:
    """Documents as they are, facts as sentences, questions with their answers; a line each."""
    return "\n".join(item.text if isinstance(item, Document) else _sentence(item) for item in items)


def _sentence(item: Fact | QuestionAnswer) -> str:
    if isinstance(item, Fact):
        return f"{item.prompt}{item.continuation}."
    return f"{item.question}{item.continuation}"


def as_queries(tokenizer: Any, items: Sequence[Item]) -> list[Query]:
    """Prompt and wanted continuation of each fact and question."""
    found = []
    for item in items:
        if not isinstance(item, Document):
            prompt = item.prompt if isinstance(item, Fact) else item.question
            whole, head = tokenize(tokenizer, prompt + item.continuation), tokenize(tokenizer, prompt)
            first = max(shared_length(head, whole), 1)
            found.append(Query(whole[:first], whole[first:]))
    return found


def scores(encoder: Encoder, tokenizer: Any, asked: Sequence[Query]) -> tuple[float | None, float]:
    """Share of facts and questions answered as the model now is, and its perplexity on plain sentences."""
    plain = [tokenize(tokenizer, sentence) for sentence in PLAIN_SENTENCES]
    rows = [[*(a.prompt or []), *a.target] for a in asked] + plain
    first = [len(row) - len(a.target) for row, a in zip(rows, asked, strict=False)] + [1] * len(plain)
    with evaluating(encoder.model):
        found = score_rows(encoder.model, encoder.decoder, rows, first)
        check_scores(found, encoder.model, encoder.decoder, rows)
    right = (found.right == found.count)[: len(asked)].float().mean() if asked else None
    loss = -found.log_prob[len(asked) :].sum() / found.count[len(asked) :].sum()
    return (None if right is None else float(right)), math.exp(loss)
