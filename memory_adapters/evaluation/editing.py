"""How well edits hold: on their prompts, on paraphrases, and on the neighbourhood that must not change.

P(text | prompt) is the mean log-probability per token, as the field normalises it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from memory_adapters.decoder import find_decoder
from memory_adapters.knowledge import Fact
from memory_adapters.tokens import score_rows, shared_length, tokenize

__all__ = ["EditRecord", "EditScores", "load_counterfact", "score_edits"]


@dataclass(frozen=True)
class EditRecord:
    """A counterfactual edit with prompts to judge it by.

    Attributes:
        fact: What is written.
        true_target: What the base model should say instead.
        paraphrases: Prompts that should give the new target.
        neighbours: (prompt, true target): prompts about other subjects that should not change.
    """

    fact: Fact
    true_target: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class EditScores:
    """Shares in [0, 1] over records.

    Attributes:
        efficacy: P(new) > P(true) on the prompt (ES).
        paraphrase: The same on the paraphrases (PS).
        neighbourhood: P(true) > P(new) on the neighbours (NS).
        score: Harmonic mean of the three (S).
        exact_match: Every token of the new target is the model's first choice on the prompt: greedy decoding gives it.
        paraphrase_exact_match: The same on the paraphrases.
    """

    efficacy: float
    paraphrase: float
    neighbourhood: float
    score: float
    exact_match: float
    paraphrase_exact_match: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def load_counterfact(path: str | os.PathLike[str], limit: int | None = None) -> list[EditRecord]:
    """Read CounterFact in its flat form: a JSON list with one paraphrase and one neighbour a record.

    Args:
        path: The file.
        limit: How many records from the start; None for all.
    """
    with open(path, encoding="utf-8") as file:
        records = json.load(file)[:limit]
    return [
        EditRecord(
            Fact(record["prompt"], record["subject"], record["target_new"]),
            record["ground_truth"],
            (record["rephrase_prompt"],),
            ((record["locality_prompt"], record["locality_ground_truth"]),),
        )
        for record in records
    ]


def score_edits(model: nn.Module, tokenizer: Any, records: Sequence[EditRecord]) -> EditScores:
    """Score `records` on the model as it stands."""
    queries: list[tuple[str, str]] = []
    for record in records:
        for prompt in (record.fact.prompt, *record.paraphrases):
            queries += [(prompt, record.fact.target), (prompt, record.true_target)]
        for prompt, true_target in record.neighbours:
            queries += [(prompt, record.fact.target), (prompt, true_target)]
    scored = iter(score_continuations(model, tokenizer, queries))
    prompts: list[tuple[bool, bool]] = []
    paraphrases: list[tuple[bool, bool]] = []
    neighbours: list[bool] = []
    for record in records:
        for position in range(1 + len(record.paraphrases)):
            (new, exact), (true, _) = next(scored), next(scored)
            (paraphrases if position else prompts).append((new > true, exact))
        for _ in record.neighbours:
            (new, _), (true, _) = next(scored), next(scored)
            neighbours.append(true > new)
    efficacy, exact_match = (_mean([pair[i] for pair in prompts]) for i in (0, 1))
    paraphrase, paraphrase_exact_match = (_mean([pair[i] for pair in paraphrases]) for i in (0, 1))
    neighbourhood = _mean(neighbours)
    parts = (efficacy, paraphrase, neighbourhood)
    score = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    return EditScores(efficacy, paraphrase, neighbourhood, score, exact_match, paraphrase_exact_match)


def score_continuations(
    model: nn.Module, tokenizer: Any, queries: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Mean log-probability per token of each (prompt, continuation), and whether greedy decoding gives it.

    The continuation is joined with the space, if any, that its prompt needs, and is scored by its place in the joint
    tokenisation.
    """
    rows, first = [], []
    for prompt, target in queries:
        ids = tokenize(tokenizer, prompt + Fact(prompt, prompt, target).continuation)
        rows.append(ids)
        first.append(max(shared_length(tokenize(tokenizer, prompt), ids), 1))
    scores = score_rows(model, find_decoder(model), rows, first)
    means, exact = scores.log_prob / scores.count, scores.right == scores.count
    return list(zip(means.tolist(), exact.tolist(), strict=True))


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
