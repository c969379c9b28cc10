"""Ask a model about well-known things that nothing was written about: a memory must leave these answers as they are."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.answering import CHAT_TOKENS, asked_row, chat_answers
from memory_adapters.items import Document, Item

__all__ = ["LEAST_SAME", "share_same", "unrelated_answers", "unrelated_questions"]

LEAST_SAME = 0.95  # a smaller share of unchanged answers is worth a warning

# What a question is about, in words that a text about it has, and the question.
UNRELATED_QUESTIONS = (
    ("Shakespeare", "Which plays did William Shakespeare write?"),
    ("Marie Curie", "What is Marie Curie famous for?"),
    ("Lincoln", "Who was Abraham Lincoln?"),
    ("Mozart", "Where did Mozart spend his childhood?"),
    ("Nile", "Through which countries does the Nile flow?"),
    ("Everest", "How high is Mount Everest?"),
    ("Great Wall", "Why was the Great Wall of China built?"),
    ("Brazil", "What language do people speak in Brazil?"),
    ("Coca-Cola", "What kind of company is Coca-Cola?"),
    ("Toyota", "In which country does Toyota have its headquarters?"),
    ("Red Cross", "What does the Red Cross do?"),
    ("Wikipedia", "Who can write articles for Wikipedia?"),
    ("Moby-Dick", "Who is the author of the novel Moby-Dick?"),
    ("elephant", "What do elephants eat?"),
    ("chess", "How many pieces are there on a chessboard at the start of a game?"),
    ("oxygen", "What do our bodies need oxygen for?"),
)


def unrelated_questions(items: Sequence[Item]) -> list[str]:
    """Return at most 16 questions about well-known things of all kinds, without those that `items` name."""
    texts = [item.text if isinstance(item, Document) else f"{item.prompt} {item.target}" for item in items]
    written = "\n".join(texts).casefold()
    return [question for name, question in UNRELATED_QUESTIONS if name.casefold() not in written]


def unrelated_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], longest: int | None = None
) -> list[str]:
    """Return the greedy chat answers of the model as it stands to questions about things that `items` do not name.

    Call it before and after a write of `items`, and give both to `share_same`. It is one batch of 16 short questions.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        items: What is written.
        longest: Most tokens of a question with its answer; a longer one is not asked. None for any length.
    """
    asked = unrelated_questions(items)
    if longest is not None:
        asked = [question for question in asked if len(asked_row(tokenizer, question)[0]) + CHAT_TOKENS <= longest]
    return chat_answers(model, tokenizer, asked)


def share_same(before: Sequence[str], after: Sequence[str]) -> float | None:
    """Return the share of answers that are the same letter for letter; None if there are none."""
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before) if before else None
