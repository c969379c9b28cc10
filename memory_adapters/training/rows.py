"""Turn items into what a training epoch goes through: rows of tokens that take turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, document_rows, fact_row, keys_at_names, plain_rows
from memory_adapters.base_model.names import is_common_word
from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = ["TrainingTurn", "build_turns", "known_names", "make_prefixes"]


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
    names: Sequence[str] = (),
) -> tuple[list[TrainingTurn], list[str]]:
    """Tokenise items for training.

    A fact has a turn for its bare prompt and one for its prompt behind varied prefixes, and with other names of its
    subject; a question one as plain text
    and, if the tokenizer has a chat template, one as a chat; a document one a window.

    Args:
        items: What to write.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.
        names: What facts are about: where a question has one of these, its keys lie there.

    Returns:
        The turns, and notes for the user.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
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
            rows = [keys_at_names(row, names, tokenizer) for row in rows]
        turns.append(TrainingTurn(kind, index, rows))
        if isinstance(item, Fact):
            varied = [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            varied += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
        else:
            chat = chat_row(item, tokenizer)
            varied = [] if chat is None else [keys_at_names(chat, names, tokenizer)]
            not_rendered += chat is None and bool(tokenizer.chat_template)
        if varied := [row for row in varied if len(row.input_ids) <= max_length]:
            turns.append(TrainingTurn(kind, index, varied))
    if not_rendered:
        notes.append(
            f"{not_rendered} questions are written as plain text alone: the tokenizer's chat template does not render "
            "them as they are written"
        )
    return turns, notes


def known_names(items: Sequence[Item]) -> list[str]:
    """Return the subjects of facts, and their aliases."""
    return [name for item in items if isinstance(item, Fact) for name in (item.subject, *item.aliases)]


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
