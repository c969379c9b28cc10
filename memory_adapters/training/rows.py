"""Turn items into rows of tokens to train on: where the loss is, and where keys may lie."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memory_adapters.base_model.tokens import last_token_of, shared_length, tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = ["IGNORED", "Row", "TrainingTurn", "build_turns"]

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One training sequence.

    Attributes:
        input_ids: Its tokens.
        first_label: Index of the first token that is to be predicted.
        key_positions: Tokens whose states may become keys: a fact's subject (its last token), a question, a document.
        context: Tokens of the text that says the same, for the teacher of context distillation to read first; empty
            where the base model alone is the teacher.
    """

    input_ids: list[int]
    first_label: int
    key_positions: list[int]
    context: list[int]

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * self.first_label + self.input_ids[self.first_label :]


@dataclass(frozen=True)
class TrainingTurn:
    """A place in every epoch. Its rows take turns, an epoch each.

    Attributes:
        kind: `"fact"`, `"question"`, `"document"`, or `"locality"` for text on which the base must be kept.
        item: Index of the item it comes from.
        rows: The variants.
        plain: Whether this is the item as given (and so counts for recall).
    """

    kind: str
    item: int
    rows: list[Row]
    plain: bool


def build_turns(
    items: Sequence[Item],
    tokenizer: Any,
    *,
    prefixes: Sequence[str],
    max_length: int,
) -> tuple[list[TrainingTurn], list[str]]:
    """Tokenise items.

    A fact has a slot for its bare prompt and one for its prompt behind varied prefixes; a question one as plain text
    and, if the tokenizer has a chat template, one as a chat; a document one a window.

    Args:
        items: What to write.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.

    Returns:
        The slots, and notes for the user.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    slots: list[TrainingTurn] = []
    notes: list[str] = []
    for index, item in enumerate(items):
        if isinstance(item, Fact):
            bare = _fact_row(item, tokenizer, "")
            _check_length(bare, max_length, index, "Fact")
            slots.append(TrainingTurn("fact", index, [bare], True))
            varied = [_fact_row(item, tokenizer, prefix) for prefix in prefixes]
            varied = [row for row in varied if len(row.input_ids) <= max_length]
            if varied:
                slots.append(TrainingTurn("fact", index, varied, False))
        elif isinstance(item, QuestionAnswer):
            row = _question_row(item, tokenizer, chat=False)
            _check_length(row, max_length, index, "QuestionAnswer")
            slots.append(TrainingTurn("question", index, [row], True))
            if getattr(tokenizer, "chat_template", None):
                chat = _question_row(item, tokenizer, chat=True)
                if len(chat.input_ids) <= max_length:
                    slots.append(TrainingTurn("question", index, [chat], False))
        else:
            windows = _document_rows(item, tokenizer, max_length)
            slots += [TrainingTurn("document", index, [window], True) for window in windows]
            if len(windows) > 1:
                tokens = sum(len(window.input_ids) for window in windows)
                notes.append(f"document {index} of {tokens} tokens was split into {len(windows)} windows")
    return slots, notes


def make_prefixes(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Short runs of words from `texts`, each ended like a sentence, to put before a fact."""
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


def _fact_row(fact: Fact, tokenizer: Any, prefix: str) -> Row:
    prompt = prefix + fact.prompt
    text = prompt + fact.continuation
    ids = tokenize(tokenizer, text)
    end = len(prefix) + fact.prompt.rindex(fact.subject) + len(fact.subject)
    subject = last_token_of(tokenizer, text, end, ids)
    context = tokenize(tokenizer, fact.prompt + fact.continuation + ".\n\n")
    return Row(ids, _first_label(tokenizer, prompt, ids), [subject], context)


def _question_row(item: QuestionAnswer, tokenizer: Any, *, chat: bool) -> Row:
    context = tokenize(tokenizer, item.question + item.continuation + "\n\n")
    if not chat:
        ids = tokenize(tokenizer, item.question + item.continuation)
        first = _first_label(tokenizer, item.question, ids)
        return Row(ids, first, list(range(first)), context)
    turn = [{"role": "user", "content": item.question}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    plain = {"add_special_tokens": False}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # the model's turn ends here
    ids = list(tokenizer(prompt + item.answer, **plain)["input_ids"]) + end
    first = shared_length(list(tokenizer(prompt, **plain)["input_ids"]), ids)
    begin = prompt.find(item.question)
    head = list(tokenizer(prompt[: max(begin, 0)], **plain)["input_ids"])
    tail = list(tokenizer(prompt[: begin + len(item.question)], **plain)["input_ids"]) if begin >= 0 else head
    return Row(ids, first, list(range(shared_length(head, ids), shared_length(tail, ids))), context)


def _document_rows(item: Document, tokenizer: Any, max_length: int) -> list[Row]:
    ids = tokenize(tokenizer, item.text)
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Row(window, 1, list(range(len(window))), window) for window in windows if len(window) > 1]


def _first_label(tokenizer: Any, prompt: str, ids: Sequence[int]) -> int:
    return max(shared_length(tokenize(tokenizer, prompt), ids), 1)


def _check_length(row: Row, max_length: int, index: int, kind: str) -> None:
    if len(row.input_ids) > max_length:
        raise ValueError(
            f"`items[{index}]` ({kind}) has {len(row.input_ids)} tokens, more than the {max_length} that fit: "
            "shorten it, raise `max_length` up to the model's context, or give it as a Document, which is split."
        )
