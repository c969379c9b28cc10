"""Turn items into what a training epoch goes through: rows of tokens that take turns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, document_rows, fact_row, keys_at_names, plain_rows
from memory_adapters.base_model.names import is_common_word
from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = ["TrainingTurn", "build_turns", "make_prefixes", "other_names"]


@dataclass(frozen=True)
class TrainingTurn:
    """Store one example of every epoch. Its rows take turns, an epoch each.

    Attributes:
        kind: `"fact"`, `"question"`, `"document"`, or `"locality"` for text on which the base must be kept.
        item: Index of the item it comes from.
        rows: The variants.
    """

    kind: str
    item: int
    rows: list[Row]


def build_turns(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefixes: Sequence[str],
    max_length: int,
    words: Mapping[Item, Sequence[str]] | None = None,
) -> tuple[list[TrainingTurn], list[str]]:
    """Tokenise items for training.

    A fact has a turn for its bare prompt and one for its prompt behind varied prefixes, and with other names of its
    subject; a question one as plain text and, if the tokenizer has a chat template, one as a chat; a document one a
    window.

    Args:
        items: What to write.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.
        words: For questions, the words at which their keys lie.

    Returns:
        The turns, and notes for the user.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    words = words or {}
    turns: list[TrainingTurn] = []
    notes: list[str] = []
    not_rendered = 0
    for index, item in enumerate(items):
        if isinstance(item, Document):
            windows = document_rows(item, tokenizer, max_length)
            turns += [TrainingTurn("document", index, [window]) for window in windows]
            if len(windows) > 1:
                tokens = sum(len(window.input_ids) for window in windows)
                notes.append(f"document {index} of {tokens} tokens was split into {len(windows)} windows")
            continue
        kind = "fact" if isinstance(item, Fact) else "question"
        rows = plain_rows([item], tokenizer, max_length)
        if isinstance(item, QuestionAnswer):
            rows = [keys_at_names(row, words.get(item, ()), tokenizer) for row in rows]
        turns.append(TrainingTurn(kind, index, rows))
        if isinstance(item, Fact):
            varied = [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            varied += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
        else:
            chat = chat_row(item, tokenizer)
            varied = [] if chat is None else [keys_at_names(chat, words.get(item, ()), tokenizer)]
            not_rendered += chat is None and bool(tokenizer.chat_template)
        if varied := [row for row in varied if len(row.input_ids) <= max_length]:
            turns.append(TrainingTurn(kind, index, varied))
    if not_rendered:
        notes.append(
            f"{not_rendered} questions are written as plain text alone: the tokenizer's chat template does not render "
            "them as they are written"
        )
    return turns, notes


def other_names(fact: Fact, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what else a fact's subject is called: its aliases, and in lower case, unless that is a common word."""
    lower = fact.subject.lower()
    names = [*fact.aliases, *([] if is_common_word(lower, tokenizer) else [lower])]
    return [name for name in dict.fromkeys(names) if name != fact.subject]


def make_prefixes(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return short runs of words from `texts`, each ended like a sentence, to put before a fact."""
    rng = random.Random(seed)
    words = [text.split() for text in texts if len(text.split()) >= 8]
    if not words:
        return []
    prefixes = []
    for _ in range(count):
        source = rng.choice(words)
        length = rng.randint(4, 8)
        start = rng.randrange(len(source) - length + 1)
        prefixes.append(" ".join(source[start : start + length]).rstrip(".,;:!?") + ". ")
    return prefixes
