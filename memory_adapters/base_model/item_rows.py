"""Turn items into rows of tokens: where what is to be learned begins, and where keys may lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.tokens import last_token_of, shared_length, tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = ["IGNORED", "Row", "ScoredRow", "document_rows", "fact_row", "plain_rows", "question_row"]

IGNORED = -100


class ScoredRow(Protocol):
    """Describe a row of tokens of which those from `first_label` on are scored."""

    @property
    def input_ids(self) -> list[int]: ...
    @property
    def first_label(self) -> int: ...
    @property
    def is_document(self) -> bool: ...


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
    """

    input_ids: list[int]
    first_label: int
    key_positions: list[int]
    context: list[int]
    is_document: bool = False

    @property
    def labels(self) -> list[int]:
        """`input_ids` with `IGNORED` before `first_label`."""
        return [IGNORED] * self.first_label + self.input_ids[self.first_label :]


def plain_rows(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return the rows of items as they are given: a fact's bare prompt, a question as text, a document's windows.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    rows: list[Row] = []
    for index, item in enumerate(items):
        if isinstance(item, Document):
            rows += document_rows(item, tokenizer, max_length)
            continue
        row = fact_row(item, tokenizer) if isinstance(item, Fact) else question_row(item, tokenizer)
        if len(row.input_ids) > max_length:
            raise ValueError(
                f"`items[{index}]` ({type(item).__name__}) has {len(row.input_ids)} tokens, more than the {max_length} "
                "that fit: shorten it, raise `max_length` up to the model's context, or give it as a Document, which "
                "is split."
            )
        rows.append(row)
    return rows


def fact_row(fact: Fact, tokenizer: PreTrainedTokenizerBase, prefix: str = "") -> Row:
    """Return a fact's row, behind a prefix."""
    prompt = prefix + fact.prompt
    text = prompt + fact.continuation
    ids = tokenize(tokenizer, text)
    end = len(prefix) + fact.prompt.rindex(fact.subject) + len(fact.subject)
    subject = last_token_of(tokenizer, text, end, ids)
    context = tokenize(tokenizer, fact.prompt + fact.continuation + ".\n\n")
    return Row(ids, _first_label(tokenizer, prompt, ids), [subject], context)


def question_row(item: QuestionAnswer, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> Row:
    """Return a question's row, as plain text or in the tokenizer's chat template."""
    context = tokenize(tokenizer, item.question + item.continuation + "\n\n")
    if not chat:
        ids = tokenize(tokenizer, item.question + item.continuation)
        first = _first_label(tokenizer, item.question, ids)
        return Row(ids, first, list(range(first)), context)
    turn = [{"role": "user", "content": item.question}]
    prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]  # the model's turn ends here
    ids = _bare_ids(tokenizer, prompt + item.answer) + end
    first = shared_length(_bare_ids(tokenizer, prompt), ids)
    begin = prompt.find(item.question)
    head = _bare_ids(tokenizer, prompt[: max(begin, 0)])
    tail = _bare_ids(tokenizer, prompt[: begin + len(item.question)]) if begin >= 0 else head
    return Row(ids, first, list(range(shared_length(head, ids), shared_length(tail, ids))), context)


def document_rows(item: Document, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return a document's windows of at most `max_length` tokens, without those of a single token."""
    ids = tokenize(tokenizer, item.text)
    windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [Row(window, 1, list(range(len(window))), window, True) for window in windows if len(window) > 1]


def _bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_label(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> int:
    return max(shared_length(tokenize(tokenizer, prompt), ids), 1)
