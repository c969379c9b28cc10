"""Measure general ability: the share of multiple-choice questions that a model answers."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.evaluation.records import read_rows
from memory_adapters.evaluation.scores.edits import score_continuations

__all__ = ["Choice", "choice_accuracy", "known_choices", "load_choices"]

NUM_CHOICES = 4


@dataclass(frozen=True)
class Choice:
    """Ask a question with answers to choose among.

    Attributes:
        question: What the answers continue: a question, or the beginning of a sentence.
        choices: At least two answers, no two alike.
        answer: Index of the right one.

    Raises:
        ValueError: If there are fewer than two choices, two are alike, or there is none at `answer`.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"`choices` must be two or more different texts, got {self.choices!r}.")
        if type(self.answer) is not int or not 0 <= self.answer < len(self.choices):
            raise ValueError(f"`answer={self.answer!r}` must be an index of the {len(self.choices)} `choices`, from 0.")


def load_choices(source: str | os.PathLike[str], limit: int | None = None) -> list[Choice]:
    """Read questions from a JSON or JSONL file, or from a data set on the Hub.

    A row has `question`, `choices` (a list) and `answer` (the index of the right one, from 0).

    Args:
        source: Path of the file or id of the data set.
        limit: How many from the start; None for all.

    Raises:
        FileNotFoundError: If `source` looks like a file and is none.
        ValueError: If a row does not fit; it is named.
    """
    found = []
    for row in read_rows(source, limit):
        question, choices = row.text("question"), row.texts("choices")
        try:
            found.append(Choice(question, choices, row.value("answer")))
        except ValueError as error:
            raise row.error("choices", f"does not fit: {error}") from None
    return found


def known_choices(source: str | os.PathLike[str], limit: int | None = None, *, seed: int = 0) -> list[Choice]:
    """Make questions of CounterFact's known facts: a fact's attribute among three of other facts of its relation.

    Facts of a relation that has fewer than four different attributes are left out.

    Args:
        source: Path of `known_1000.json`, with fields prompt, attribute and relation_id.
        limit: How many facts from the start are asked about; None for all. The wrong answers are drawn from all.
        seed: Of the wrong answers and the order of all four.

    Raises:
        FileNotFoundError, ValueError: As `load_choices`.
    """
    facts = [(row.text("prompt"), row.text("attribute"), row.text("relation_id")) for row in read_rows(source)]
    attributes: dict[str, list[str]] = {}
    for _, attribute, relation in facts:
        attributes.setdefault(relation, [])
        if attribute not in attributes[relation]:
            attributes[relation].append(attribute)
    chooser, found = random.Random(seed), []
    for prompt, attribute, relation in facts[:limit]:
        others = [other for other in attributes[relation] if other != attribute]
        if len(others) >= NUM_CHOICES - 1:
            choices = [attribute, *chooser.sample(others, NUM_CHOICES - 1)]
            chooser.shuffle(choices)
            found.append(Choice(prompt, tuple(choices), choices.index(attribute)))
    return found


def choice_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice]) -> float:
    """Return the share of questions whose right answer has the highest mean log-probability per token, in [0, 1].

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        choices: The questions.

    Raises:
        ValueError: If there is no question.
    """
    if not choices:
        raise ValueError("`choices` is empty: give at least one Choice.")
    queries = [(one.question, choice) for one in choices for choice in one.choices]
    scored = iter(score_continuations(model, tokenizer, queries))
    right = 0
    for one in choices:
        log_probs = [next(scored)[0] for _ in one.choices]
        right += max(range(len(log_probs)), key=log_probs.__getitem__) == one.answer
    return right / len(choices)
