"""What can be written into a memory."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memory_adapters.config import cut, shown
from memory_adapters.reading import parse_json

__all__ = ["Document", "Fact", "Item", "QuestionAnswer", "as_items", "read_items"]


@dataclass(frozen=True)
class Fact:
    """A prompt that names its subject, and the text that should follow it.

    Attributes:
        prompt: Text that ends where the target begins; contains `subject`, or `{}` in its place.
        subject: Whom or what the fact is about.
        target: The continuation to learn, such as `"Rome"`.

    Raises:
        ValueError: If a field is empty, or the prompt holds neither the subject nor `{}`.
    """

    prompt: str
    subject: str
    target: str

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` of a Fact must be a non-empty string, got {shown(value)}.")
        if "{}" in self.prompt:
            object.__setattr__(self, "prompt", self.prompt.replace("{}", self.subject))
        if self.subject not in self.prompt:
            raise ValueError(
                f"`subject={shown(self.subject)}` is not in `prompt={shown(self.prompt)}`: "
                "name it there as written, or put {} in its place."
            )

    @property
    def continuation(self) -> str:
        """The target with the space, if any, that joins it to the prompt."""
        return _joint(self.prompt, self.target) + self.target


@dataclass(frozen=True)
class Document:
    """Running text to be learned as it stands. Raises `ValueError` if it is empty."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"`text` of a Document must be a non-empty string, got {shown(self.text)}.")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question and the answer to learn. Raises `ValueError` if either is empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` of a QuestionAnswer must be a non-empty string, got {shown(value)}.")

    @property
    def continuation(self) -> str:
        """The answer with the space, if any, that joins it to the question."""
        return _joint(self.question, self.answer) + self.answer


Item = Fact | Document | QuestionAnswer


def as_items(items: object, accepted: tuple[type, ...] = (Fact, Document, QuestionAnswer)) -> list[Item]:
    """One item or many, as a list; a plain string is a `Document`.

    Args:
        items: What the user gave to `write`.
        accepted: The kinds of item that the method takes.

    Raises:
        TypeError: If something in it is of another kind; says what is taken.
        ValueError: If there is nothing in it.
    """
    single = isinstance(items, (str, Fact, Document, QuestionAnswer)) or not isinstance(items, Iterable)
    listed = [items] if single else list(items)  # type: ignore[call-overload]
    if not listed:
        raise ValueError("`items` is empty: give at least one thing to write.")
    converted = [Document(item) if isinstance(item, str) else item for item in listed]
    for item in converted:
        if not isinstance(item, accepted):
            names = ", ".join(kind.__name__ for kind in accepted)
            raise TypeError(f"`items` holds a {type(item).__name__}; this memory takes {names}.")
    return converted  # type: ignore[return-value]


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Items from a file in UTF-8 that holds nothing else.

    A `.json` file is a list of objects, a `.jsonl` file has one on each line: `{"prompt", "subject", "target"}`,
    `{"question", "answer"}` or `{"text"}`, mixed, without other fields. A `.txt` file is one document.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If something in it is no item (with the line that it begins on), there is none, or the file's name
            ends otherwise.
    """
    file = Path(path)
    readers = {".json": _listed, ".jsonl": _line_by_line, ".txt": lambda _, text: [(1, {"text": text})]}
    if file.suffix.lower() not in readers:
        raise ValueError(f"`{file}` is of no known type: name it {', '.join(readers)} after what it holds.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"`{file}`, line {line} is not UTF-8: save the file as UTF-8.") from None
    items = [_item(value, f"`{file}`, line {line}") for line, value in readers[file.suffix.lower()](file, text)]
    if not items:
        raise ValueError(f"`{file}` is empty: give at least one item.")
    return items


_KINDS: tuple[type[Item], ...] = (Fact, QuestionAnswer, Document)
_BETWEEN = re.compile(r"[\s,]*")


def _item(value: Any, place: str) -> Item:
    for kind in _KINDS:
        if isinstance(value, dict) and set(value) == {field.name for field in fields(kind)}:
            try:
                return kind(**value)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
    kinds = " or ".join(str({field.name for field in fields(kind)}) for kind in _KINDS)
    found = f"the fields {cut(', '.join(value)) or 'of nothing'}" if isinstance(value, dict) else shown(value)
    raise ValueError(f"{place} has {found}; an item has {kinds}, and no other fields.")


def _listed(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Line and value of each element of a JSON list."""
    try:
        whole = parse_json(text)
    except ValueError as error:
        raise ValueError(f"`{file}` is not JSON: {error}. If each line is an item, name it .jsonl.") from None
    if not isinstance(whole, list):
        raise ValueError(f"`{file}` must hold a list of items, got a {type(whole).__name__}.")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    line = text.count("\n", 0, place) + 1
    for value in whole:
        start = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", place, start)
        yield line, value
        _, place = decoder.raw_decode(text, start)
        line += text.count("\n", start, place)


def _line_by_line(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    for line, value in enumerate(text.split("\n"), 1):
        if value.strip():
            try:
                yield line, parse_json(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{file}`, line {line} is not JSON: {error.msg} (column {error.colno}).") from None
            except ValueError as error:
                raise ValueError(f"`{file}`, line {line} is not JSON: {error}.") from None


def _joint(before: str, after: str) -> str:
    """A space between two texts, unless one is there already or the script is written without."""
    if before[-1].isspace() or after[0].isspace() or _no_spaces(before[-1]) or _no_spaces(after[0]):
        return ""
    return " "


def _no_spaces(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")
