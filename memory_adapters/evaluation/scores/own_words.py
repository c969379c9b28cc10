"""Judge answers to questions in other words: do they name what was written, and are all others as they were?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.answering import chat_answers
from memory_adapters.base_model.unrelated_questions import share_same
from memory_adapters.evaluation.records import Question
from memory_adapters.evaluation.scores.generation import holds

__all__ = ["OwnWordsAnswer", "OwnWordsQuestions", "OwnWordsScores", "leak", "names", "score_own_words"]


@dataclass(frozen=True)
class OwnWordsQuestions:
    """Store questions about what is written, and about other things.

    Attributes:
        asked: Questions in other words about what is written, with the objects that an answer must name.
        others: Questions about other things, whose answers should stay as they are.
        objects: What was written, to look for in the answers about other things.
        beside: Other questions about the things that are written, with what is written about them, which is no answer.
        base_answers: What the base answers to `others`, once `with_base_answers` has asked it.
        base_beside: What it answers to `beside`.
    """

    asked: tuple[Question, ...]
    others: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    beside: tuple[Question, ...] = ()
    base_answers: tuple[str, ...] | None = None
    base_beside: tuple[str, ...] | None = None

    def with_base_answers(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> OwnWordsQuestions:
        """Return the same with the answers of the model, which must be the base, to all questions but `asked`."""
        beside = tuple(chat_answers(model, tokenizer, [question.prompt for question in self.beside]))
        return replace(self, base_answers=tuple(chat_answers(model, tokenizer, self.others)), base_beside=beside)


@dataclass(frozen=True)
class OwnWordsAnswer:
    """Store a question, the object that was wanted, what the model says, and whether that names the object."""

    question: str
    wanted: str
    says: str
    named: bool


@dataclass(frozen=True)
class OwnWordsScores:
    """Store shares in [0, 1]; None is what there was no question for, or no answer of the base to compare with.

    Attributes:
        own_words: Share of the questions about what is written whose answer names the object.
        same: Share of the answers about other things that are the base's, letter for letter.
        leak: Share of the answers about other things that name a written object which the base's did not.
        spill: Share of the answers to other questions about the written things that name what was written about them,
            which the base's did not.
        answers: The answers about what is written.
    """

    own_words: float | None = None
    same: float | None = None
    leak: float | None = None
    spill: float | None = None
    answers: list[OwnWordsAnswer] = field(default_factory=list)


def score_own_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: OwnWordsQuestions
) -> OwnWordsScores:
    """Ask the model as it stands, in its chat template, and score its greedy answers of at most 24 tokens.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer; without a chat template the questions are asked as plain text.
        questions: What is asked. `others` and `beside` are left out as long as the base has not answered them.
    """
    said = chat_answers(model, tokenizer, [question.prompt for question in questions.asked])
    answers = [
        OwnWordsAnswer(q.prompt, q.answer, answer, names(answer, (q.answer, *q.alternatives)))
        for q, answer in zip(questions.asked, said, strict=True)
    ]
    own_words = sum(answer.named for answer in answers) / len(answers) if answers else None
    if questions.base_answers is None:
        return OwnWordsScores(own_words, answers=answers)
    now = chat_answers(model, tokenizer, questions.others)
    changed = leak(questions.base_answers, now, questions.objects)
    beside = chat_answers(model, tokenizer, [question.prompt for question in questions.beside])
    wrong = [
        leak([before], [after], [question.answer, *question.alternatives]) or 0.0
        for before, after, question in zip(questions.base_beside or (), beside, questions.beside, strict=True)
    ]
    spilled = sum(wrong) / len(wrong) if wrong else None
    return OwnWordsScores(own_words, share_same(questions.base_answers, now), changed, spilled, answers)


def names(answer: str, objects: Iterable[str]) -> bool:
    """Return whether an answer holds one of `objects`, as whole words in capital or small letters."""
    return any(holds(answer.casefold(), one.strip().casefold()) for one in objects)


def leak(before: Sequence[str], after: Sequence[str], objects: Sequence[str]) -> float | None:
    """Return the share of answers that name one of `objects` which they did not name before; None without answers."""
    new = [any(names(b, [one]) and not names(a, [one]) for one in objects) for a, b in zip(before, after, strict=True)]
    return sum(new) / len(new) if new else None
