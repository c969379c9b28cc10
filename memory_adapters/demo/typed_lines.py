"""Read facts and questions that somebody types, one a line."""

from __future__ import annotations

import re

from memory_adapters.items import Fact, Item, QuestionAnswer
from memory_adapters.validation import shown

__all__ = ["parse_lines"]

_QUESTION = re.compile(r"(.+?[?？؟])\s*(.*\w.*)")
_FORMS = "write `subject | prompt | target`, or `question? answer`"


def parse_lines(text: str) -> list[Item]:
    """Return the item of each line: `subject | prompt | target` is a fact, `question? answer` a question.

    A question without a question mark has a bar before its answer: `question | answer`. Empty lines are passed over.

    Raises:
        ValueError: If a line is neither, or its parts make no item; says which line.
    """
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                items.append(_parse(line.strip()))
            except ValueError as error:
                raise ValueError(f"Line {number}: {error}") from None
    if not items:
        raise ValueError(f"There is no line: {_FORMS}.")
    return items


def _parse(line: str) -> Item:
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) == 3:
        subject, prompt, target = cells
        return Fact(prompt, subject, target)
    if len(cells) == 2:
        return QuestionAnswer(*cells)
    asked = _QUESTION.fullmatch(line) if len(cells) == 1 else None
    if asked is None:
        raise ValueError(f"{shown(line)} is neither a fact nor a question with its answer: {_FORMS}.")
    return QuestionAnswer(*asked.groups())
