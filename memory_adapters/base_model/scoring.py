"""Score what a model recalls of items, and its perplexity on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.item_rows import ScoredRow
from memory_adapters.base_model.nonfinite import check_scores
from memory_adapters.base_model.sampling import HELD_OUT_SENTENCES
from memory_adapters.base_model.tokens import score_rows, tokenize

__all__ = ["Scores", "scored"]


@dataclass(frozen=True)
class Scores:
    """Store how a model does on what is written and on held-out text; see the fields of `WriteReport`.

    Attributes:
        recalled: For each fact and question, by the index of the item, whether each of its rows is recalled: first its
            prompt as it is, then, if that was taught, in the chat template.
        token_accuracy: Share of the documents' tokens.
        perplexity: On held-out sentences.
    """

    recalled: dict[int, list[bool]]
    token_accuracy: float | None
    perplexity: float

    def recall(self, items: range) -> float | None:
        """Return the share of the rows of these items that is recalled; None if none is a fact or a question."""
        own = [right for item, rows in self.recalled.items() if item in items for right in rows]
        return sum(own) / len(own) if own else None


def scored(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ScoredRow],
    layers_path: str | None = None,
) -> Scores:
    """Return the scores of rows and of held-out sentences, which are the same for all methods.

    Raises:
        ValueError: If a log-probability is NaN or infinite; says where that arises.
    """
    decoder = find_decoder(model, layers_path)
    held_out = [tokenize(tokenizer, sentence) for sentence in HELD_OUT_SENTENCES]
    ids = [list(row.input_ids) for row in rows] + held_out
    found = score_rows(model, decoder, ids, [row.first_label for row in rows] + [1] * len(held_out))
    check_scores(found, model, decoder, ids)
    documents = torch.tensor([row.is_document for row in rows], dtype=torch.bool)
    right, count = found.right[: len(rows)], found.count[: len(rows)]
    recalled: dict[int, list[bool]] = {}
    for row, hit in zip(rows, (right == count).tolist(), strict=True):
        if not row.is_document:
            recalled.setdefault(row.item, []).append(hit)
    loss = -found.log_prob[len(rows) :].sum() / found.count[len(rows) :].sum()
    return Scores(
        recalled=recalled,
        token_accuracy=(right[documents].sum() / count[documents].sum()).item() if documents.any() else None,
        perplexity=math.exp(min(float(loss), 700.0)),  # exp(710) is more than a float holds
    )
