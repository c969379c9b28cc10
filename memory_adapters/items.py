"""What can be written into a memory: facts, documents, questions with answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from memory_adapters.validation import cut, shown

__all__ = ["Document", "Fact", "Item", "Items", "QuestionAnswer", "as_items", "item_from_dict"]


@dataclass(frozen=True)
class Fact:
    """State a fact: a prompt that names its subject, and the text that should follow it.

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
    """Give running text to be learned as it stands. Raises `ValueError` if it is empty."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"`text` of a Document must be a non-empty string, got {shown(self.text)}.")


@dataclass(frozen=True)
class QuestionAnswer:
    """Give a question and the answer to learn. Raises `ValueError` if either is empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` of a QuestionAnswer must be a non-empty string, got {shown(value)}.")

    @property
    def prompt(self) -> str:
        """The question, as a fact calls what stands before its target."""
        return self.question

    @property
    def continuation(self) -> str:
        """The answer with the space, if any, that joins it to the question."""
        return _joint(self.question, self.answer) + self.answer


Item = Fact | Document | QuestionAnswer
Items: TypeAlias = Item | str | Iterable[Item | str]
"""What `write` and `forget` take: one item or many; a plain string is a `Document`."""


def as_items(items: Items, accepted: tuple[type, ...] = (Fact, Document, QuestionAnswer)) -> list[Item]:
    """Return one item or many as a list; a plain string is a `Document`.

    Args:
        items: What the user gave to `write`.
        accepted: The kinds of item that the method takes.

    Raises:
        TypeError: If an item is of another kind; says what is taken.
        ValueError: If there is no item.
    """
    single = isinstance(items, (str, Fact, Document, QuestionAnswer)) or not isinstance(items, Iterable)
    listed = [items] if single else list(items)  # type: ignore[arg-type]  # mypy does not follow `single`
    if not listed:
        raise ValueError("`items` is empty: give at least one thing to write.")
    converted = [Document(item) if isinstance(item, str) else item for item in listed]
    for item in converted:
        if not isinstance(item, accepted):
            names = ", ".join(kind.__name__ for kind in accepted)
            raise TypeError(f"`items` holds a {type(item).__name__}; this memory takes {names}.")
    return converted  # type: ignore[return-value]


def item_from_dict(value: Any) -> Item:
    """Return the item of a JSON object: its fields are those of one kind of item, and no others.

    Raises:
        ValueError: If the fields are not those of an item, or their values do not make one.
    """
    for kind in _KINDS:
        if isinstance(value, dict) and set(value) == {field.name for field in fields(kind)}:
            return kind(**value)
    kinds = " or ".join(f"({', '.join(field.name for field in fields(kind))})" for kind in _KINDS)
    found = f"the fields ({cut(', '.join(map(str, value)))})" if isinstance(value, dict) else shown(value)
    raise ValueError(f"has {found}; an item has the fields {kinds}, and no others.")


_KINDS: tuple[type[Item], ...] = (Fact, QuestionAnswer, Document)


def _joint(before: str, after: str) -> str:
    """Return the space between two texts, or nothing if one is there already or the script has none."""
    if before[-1].isspace() or after[0].isspace() or _no_spaces(before[-1]) or _no_spaces(after[0]):
        return ""
    return " "


def _no_spaces(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")
