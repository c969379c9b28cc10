"""Turn items into rows of tokens: where what is to be learned begins, and where keys may lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.tokens import continued_prompt, last_token_of, shared_length, tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = [
    "IGNORED",
    "Row",
    "ScoredRow",
    "chat_row",
    "document_rows",
    "fact_row",
    "keys_at_names",
    "plain_rows",
    "question_row",
]

IGNORED = -100


class ScoredRow(Protocol):
    """Describe a row of tokens of which those from `first_label` on are scored."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def first_label(self) -> int: ...
    @property
    def is_document(self) -> bool: ...
    @property
    def item(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """Store one sequence of tokens, and what is to be predicted in it.

    Attributes:
        input_ids: Its tokens.
        first_label: Index of the first token that is to be predicted.
        key_positions: Tokens whose states may become keys: a fact's subject (its last token), a question, a document.
        context: Tokens of a text that says the same, for the teacher of context distillation to read first; empty
            where the base model alone is the teacher.
        is_document: Whether it is running text, rather than a prompt and what should follow it.
        item: Index of the item that it comes from.
        by_other_name: Whether a fact's subject has another name in it.
    """

    input_ids: list[int]
    first_label: int
    key_positions: list[int]
    context: list[int]
    is_document: bool = False
    item: int = 0
    by_other_name: bool = False

    @property
    def labels(self) -> list[int]:
        """`input_ids` with `IGNORED` before `first_label`."""
        return [IGNORED] * self.first_label + self.input_ids[self.first_label :]


def plain_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return the rows of items as they are given: a fact's bare prompt, a question as text, a document's windows.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens, or a document has a single token.
    """
    rows: list[Row] = []
    for index, item in enumerate(items):
        if isinstance(item, Document):
            windows = document_rows(item, tokenizer, max_length)
            if not windows:
                raise ValueError(
                    f"`items[{index}]` is a Document of a single token ({item.text[:40]!r}), in which there is nothing "
                    "to predict: give a text, a Fact or a QuestionAnswer."
                )
            rows += [replace(window, item=index) for window in windows]
            continue
        row = fact_row(item, tokenizer) if isinstance(item, Fact) else question_row(item, tokenizer)
        if len(row.input_ids) > max_length:
            raise ValueError(
                f"`items[{index}]` ({type(item).__name__}) has {len(row.input_ids)} tokens, more than the {max_length} "
                "that fit: shorten it, raise `max_length` up to the model's context, or give it as a Document, which "
                "is split."
            )
        rows.append(replace(row, item=index))
    return rows


def fact_row(fact: Fact, tokenizer: PreTrainedTokenizerBase, prefix: str = "", alias: str | None = None) -> Row:
    """Return a fact's row, behind a prefix, and with another name in its subject's place if one is given."""
    subject = fact.subject if alias is None else alias
    prompt = prefix + fact.about(subject)
    ids, first = continued_prompt(tokenizer, prompt, fact.continuation)
    end = len(prefix) + fact.subject_start + len(subject)
    last = last_token_of(tokenizer, prompt + fact.continuation, end, ids)
    context = tokenize(tokenizer, fact.prompt + fact.continuation + ".\n\n")
    return Row(ids, first, [min(last, first - 1)], context, by_other_name=alias is not None)


def question_row(item: QuestionAnswer, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a question's row as plain text."""
    context = tokenize(tokenizer, item.question + item.continuation + "\n\n")
    ids, first = continued_prompt(tokenizer, item.question, item.continuation)
    return Row(ids, first, list(range(first)), context)


def chat_row(item: Fact | QuestionAnswer, tokenizer: PreTrainedTokenizerBase) -> Row | None:
    """Return the row of a question, or of a fact's prompt, in the tokenizer's chat template, to the end of the answer.

    Returns:
        None if the tokenizer has no template, or one that does not render the prompt as it is written.
    """
    rendered = rendered_question(tokenizer, item.prompt)
    if rendered is None:
        return None
    prompt, begin = rendered
    context = tokenize(tokenizer, item.prompt + item.continuation + "\n\n")
    ids, first = continued_prompt(tokenizer, prompt, item.target, rendered=True)
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # the model's turn ends here
    if isinstance(item, Fact):
        end = begin + item.subject_end
        return Row(ids, first, [last_token_of(tokenizer, prompt, end, ids, rendered=True)], context)
    head, tail = (tokenize(tokenizer, prompt[:end], rendered=True) for end in (begin, begin + len(item.prompt)))
    return Row(ids, first, list(range(shared_length(head, ids), shared_length(tail, ids))), context)


def document_rows(item: Document, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return a document's windows of at most `max_length` tokens, without those of a single token."""
    ids = tokenize(tokenizer, item.text)
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Row(window, 1, list(range(len(window))), window, True) for window in windows if len(window) > 1]


def keys_at_names(row: Row, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a question's row whose keys lie at the names that its question has; the row itself if it has none.

    The other words of a question are those of every question: keys there would open on all of them.
    """
    prompt = str(tokenizer.decode(row.input_ids[: row.first_label]))
    ends = sorted({prompt.rindex(name) + len(name) for name in names if name in prompt})
    if not ends:
        return row
    ids = row.input_ids[: row.first_label]
    places = [min(last_token_of(tokenizer, prompt, end, ids, rendered=True), row.first_label - 1) for end in ends]
    return replace(row, key_positions=places)
