"""What can be written into a memory: facts, documents, questions with answers."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeAlias

from memory_adapters.validation import cut, shown

__all__ = [
    "Document",
    "Fact",
    "Item",
    "Items",
    "QuestionAnswer",
    "as_items",
    "asked_by",
    "by_subject",
    "continuation_of",
    "item_from_dict",
    "item_to_dict",
    "remarks",
    "without_repetitions",
]


@dataclass(frozen=True)
class Fact:
    """State a fact: a prompt that names its subject, and the text that should follow it.

    Attributes:
        prompt: Text that ends where the target begins; contains `subject`, or `{}` in its place. A space at its end is
            moved to the target: tokenizers join it to the next word, so it is not what a model reads before one.
        subject: Whom or what the fact is about. Where the prompt has it several times, the last whole word is meant;
            `{}` says which is.
        target: The continuation to learn, such as `"Rome"`.
        separator: What joins prompt and target; None for a space, or for nothing where scripts and signs have none.
        aliases: Other names of the subject, which stand for it too.
        question: A question that the target answers, which names the subject, or has `{}` in its place. Methods that
            learn questions make some of the prompt by themselves, by rules of English.
        subject_start: Index in `prompt` of the subject's first character. Found, not given.

    Raises:
        ValueError: If a field is empty, the prompt holds neither the subject nor `{}`, or the question neither of these
            nor an alias.
    """

    prompt: str
    subject: str
    target: str
    separator: str | None = field(default=None, repr=False)
    aliases: tuple[str, ...] = field(default=(), repr=False)
    question: str | None = field(default=None, repr=False)
    subject_start: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            _check_text(f"`{name}` of a Fact", getattr(self, name))
        if self.separator is not None and not (isinstance(self.separator, str) and self.separator.isprintable()):
            raise ValueError(
                f"`separator` of a Fact must be a string such as '' or ' ', or None, got {shown(self.separator)}."
            )
        aliases = self.aliases
        if not isinstance(aliases, (list, tuple)):
            raise ValueError(f"`aliases` of a Fact must be a list of names, got {shown(aliases)}.")
        for alias in aliases:
            _check_text("each of the `aliases` of a Fact", alias)
        prompt, said = (self.prompt, []) if self.separator is not None else _without_last_space(self.prompt)
        prompt, subject, start, found = _place(prompt, self.subject)
        said += found
        question = None if self.question is None else _asked(self.question, subject, aliases)
        values = dict(prompt=prompt, subject=subject, subject_start=start, aliases=tuple(aliases), question=question)
        values["remarks"] = tuple(said)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def continuation(self) -> str:
        """The target with what joins it to the prompt: a space, in most scripts."""
        return continuation_of(self.prompt, self.target) if self.separator is None else self.separator + self.target

    @property
    def subject_end(self) -> int:
        """Index in `prompt` of the character behind the subject."""
        return self.subject_start + len(self.subject)

    @property
    def template(self) -> str:
        """The prompt with `{}` in the subject's place."""
        return f"{self.prompt[: self.subject_start]}{{}}{self.prompt[self.subject_end :]}"

    def about(self, subject: str) -> str:
        """Return the prompt with another subject in its place."""
        return self.prompt[: self.subject_start] + subject + self.prompt[self.subject_end :]


@dataclass(frozen=True)
class Document:
    """Give running text to be learned as it stands.

    Attributes:
        text: The text.
        subject: What it is about, by the name that people ask with: memories with keys, and slots, act where a prompt
            has it. None for the name that the text has most often.

    Raises:
        ValueError: If a field is empty.
    """

    text: str
    subject: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_text("`text` of a Document", self.text)
        if self.subject is not None:
            _check_text("`subject` of a Document", self.subject)
            object.__setattr__(self, "subject", self.subject.strip())


@dataclass(frozen=True)
class QuestionAnswer:
    """Give a question and the answer to learn. Raises `ValueError` if either is empty.

    A space at the question's end is moved to the answer, as with a `Fact`.
    """

    question: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "answer"):
            _check_text(f"`{name}` of a QuestionAnswer", getattr(self, name))
        question, said = _without_last_space(self.question)
        object.__setattr__(self, "question", question)
        object.__setattr__(self, "remarks", tuple(said))

    @property
    def prompt(self) -> str:
        """The question, as a fact calls what stands before its target."""
        return self.question

    @property
    def target(self) -> str:
        """The answer, as a fact calls it."""
        return self.answer

    @property
    def continuation(self) -> str:
        """The answer with the space, if any, that joins it to the question."""
        return continuation_of(self.question, self.answer)


Item = Fact | Document | QuestionAnswer
Items: TypeAlias = Item | str | Mapping[str, Any] | Iterable[Item | str | Mapping[str, Any]]
"""What `write` and `forget` take: one item or many; a string is a `Document`, a dictionary has an item's fields."""


def as_items(items: Items, accepted: tuple[type, ...] = (Fact, Document, QuestionAnswer)) -> list[Item]:
    """Return one item or many as a list; a plain string is a `Document`, a dictionary has the fields of an item.

    Args:
        items: What the user gave to `write`.
        accepted: The kinds of item that the method takes.

    Raises:
        TypeError: If an item is of another kind; says what is taken.
        ValueError: If there is no item, or a field of one cannot be used.
    """
    if isinstance(items, io.IOBase) or hasattr(items, "columns"):  # whose lines, and whose column names, it would be
        raise TypeError(
            f"`items` is a {type(items).__name__}; give a list of items, such as `table.to_dict('records')`, or what "
            "`memory_adapters.read_items(path)` reads."
        )
    single = isinstance(items, (str, bytes, Mapping, *_KINDS)) or not isinstance(items, Iterable)
    listed: list[Any] = [items] if single else list(items)  # type: ignore[arg-type]  # mypy does not follow `single`
    if not listed:
        raise ValueError("`items` is empty: give at least one thing to write.")
    converted = [_as_item(item) for item in listed]
    for item in converted:
        if not isinstance(item, accepted):
            names = ", ".join(kind.__name__ for kind in accepted)
            raise TypeError(f"`items` holds a {type(item).__name__}; this memory takes {names}.")
    return converted


def _as_item(value: Any) -> Any:
    if isinstance(value, str):
        if re.fullmatch(r"\S+\.(?:jsonl?|csv|txt)", value):
            raise TypeError(
                f"`items` holds {value!r}, which names a file: give what is in it "
                "(`memory_adapters.read_items(path)`), or Document(text)."
            )
        return Document(value)
    if not isinstance(value, Mapping):
        return value
    if _kind_of(value) is None:
        raise TypeError(f"`items` holds a {type(value).__name__} that {_no_item(value)}")
    return item_from_dict(value)


def item_from_dict(value: Any) -> Item:
    """Return the item of a JSON object: its fields are those of one kind of item, and no others.

    Raises:
        ValueError: If the fields are not those of an item, or their values do not make one.
    """
    kind = _kind_of(value)
    if kind is None:
        raise ValueError(_no_item(value))
    return kind(**value)


def item_to_dict(item: Item) -> dict[str, Any]:
    """Return an item as a JSON object, for `item_from_dict`."""
    given = {f.name: (f.default, getattr(item, f.name)) for f in fields(item) if f.init}
    values = {name: value for name, (default, value) in given.items() if value != default}
    if isinstance(item, Fact):
        if Fact(item.prompt, item.subject, item.target).subject_start != item.subject_start:
            values["prompt"] = item.template  # else another place would be taken for the subject's
        if item.aliases:
            values["aliases"] = list(item.aliases)
    return values


_KINDS: tuple[type[Item], ...] = (Fact, QuestionAnswer, Document)


def _kind_of(value: Any) -> type[Item] | None:
    """Return the kind of item whose fields a mapping has: all that must be given, and none of another kind."""
    for kind in _KINDS:
        own = [field for field in fields(kind) if field.init]
        needed = {field.name for field in own if field.default is MISSING}
        if isinstance(value, Mapping) and needed <= set(value) <= {field.name for field in own}:
            return kind
    return None


def _no_item(value: Any) -> str:
    names = [[f.name for f in fields(kind) if f.init and f.default is MISSING] for kind in _KINDS]
    kinds = " or ".join(f"({', '.join(own)})" for own in names)
    is_mapping = isinstance(value, Mapping)
    found = f"the fields ({cut(', '.join(map(str, value)))})" if is_mapping else shown(value)
    return f"has {found}; an item has the fields {kinds}, and no others."


def asked_by(item: Item) -> tuple[str, ...]:
    """Return what an item answers, whatever it answers: another of the same replaces it.

    That is a fact's subject and its prompt with the subject left open, a question, or a document itself.
    """
    if isinstance(item, Fact):
        return item.subject, item.template
    return (item.question,) if isinstance(item, QuestionAnswer) else ("", item.text)


def by_subject(facts: Sequence[Fact]) -> list[list[Fact]]:
    """Group facts by what they are about: those whose subjects or aliases have a name in common, in any letters.

    Groups are in the order of their first facts, and facts within them in theirs.
    """
    groups: list[tuple[set[str], list[int]]] = []
    for index, fact in enumerate(facts):
        names, own = {name.casefold() for name in (fact.subject, *fact.aliases)}, [index]
        for same in [group for group in groups if group[0] & names]:  # several where it is what they have in common
            groups.remove(same)
            names, own = names | same[0], own + same[1]
        groups.append((names, sorted(own)))
    return [[facts[i] for i in own] for _, own in sorted(groups, key=lambda group: group[1])]


def without_repetitions(items: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """Return items without those that are the same as others, and notes for the user.

    Raises:
        ValueError: If facts or questions that ask the same have different answers; lists all that do.
    """
    groups: dict[tuple[str, ...], dict[Item, None]] = {}
    for item in items:
        groups.setdefault(asked_by(item), {})[item] = None
    answers = {asked: {getattr(item, "target", None) for item in own} for asked, own in groups.items()}
    if clashes := [list(groups[asked]) for asked, targets in answers.items() if len(targets) > 1]:
        listed = "; ".join(f"{own[0].prompt!r}: {', '.join(repr(one.target) for one in own)}" for own in clashes)  # type: ignore[union-attr]  # documents do not clash
        raise ValueError(f"`items` contradict each other ({listed}): keep one target of each.")
    left = len(items) - len(groups)
    return [next(iter(own)) for own in groups.values()], [f"{left} repeated item(s) left out"] if left else []


def remarks(items: Sequence[Item]) -> list[str]:
    """Return what the user should know of how items were understood, a line for each kind of remark."""
    found: dict[str, list[Item]] = {}
    for item in items:
        for remark in getattr(item, "remarks", ()):
            found.setdefault(remark, []).append(item)
    return [
        f"{len(own)} of {len(items)} items: {remark} (first: {cut(repr(getattr(own[0], 'prompt', '')))})"
        for remark, own in found.items()
    ]


SPACE_MOVED = "the space at the end of the prompt was moved to the target: ask without it"
SEVERAL = "the prompt has the subject several times, and the last is taken for it: put {} where it is meant"
WITHIN_WORD = "the prompt has the subject only as a part of longer words: put {} where it is meant"
RESPELLED = "accents or spaces of prompt and subject were spelled differently, and are composed and plain now"


def _check_text(what: str, value: object) -> None:
    """Raise a `ValueError` unless a value is text that is not blank, and that can be encoded."""
    if not isinstance(value, str) or not _visible(value).strip():
        raise ValueError(f"{what} must be a non-empty string, got {shown(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has half of a surrogate pair at index {error.start}, which is no character: {shown(value)}. "
            "Decode the text again, or remove it."
        ) from None


def _without_last_space(prompt: str) -> tuple[str, list[str]]:
    """Return a prompt without spaces at its end, and the remark that it had some."""
    bare = prompt.rstrip(" \u00a0")
    return bare, [SPACE_MOVED] if bare != prompt else []


def _place(prompt: str, subject: str) -> tuple[str, str, int, list[str]]:
    """Return prompt and subject as they are used, where the subject begins, and remarks.

    Raises:
        ValueError: If the prompt holds neither the subject nor `{}`; says how the nearest spelling differs.
    """
    if "{}" in prompt:
        start = len(prompt.rpartition("{}")[0].replace("{}", subject))
        return prompt.replace("{}", subject), subject, start, []
    said = []
    if subject not in prompt and _composed(subject) in _composed(prompt):
        prompt, subject = _composed(prompt), _composed(subject)
        said.append(RESPELLED)
    starts = [start for start in range(len(prompt)) if prompt.startswith(subject, start)]
    if not starts:
        raise ValueError(
            f"`subject={shown(subject)}` is not in `prompt={shown(prompt)}`{_difference(prompt, subject)}: "
            "name it there as written, or put {} in its place."
        )
    whole = [start for start in starts if _is_whole_word(prompt, start, start + len(subject))]
    if len(whole) != 1:
        said.append(SEVERAL if whole else WITHIN_WORD)
    return prompt, subject, (whole or starts)[-1], said


def _asked(question: Any, subject: str, aliases: Sequence[str]) -> str:
    """Return a fact's question with its subject in place of `{}`.

    Raises:
        ValueError: If it is empty, or does not name the subject.
    """
    _check_text("`question` of a Fact", question)
    asked: str = _without_last_space(question.replace("{}", subject))[0]
    if not any(_composed(name).casefold() in _composed(asked).casefold() for name in (subject, *aliases)):
        raise ValueError(
            f"`question={shown(question)}` of a Fact does not name its subject {subject!r}: name it there, or put {{}} "
            "in its place."
        )
    return asked


def _composed(text: str) -> str:
    """Return text with composed accents (NFC), and plain spaces for all others."""
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in unicodedata.normalize("NFC", text))


def _difference(prompt: str, subject: str) -> str:
    """Return, for an error, how the prompt spells a subject that it does not hold letter for letter."""
    for what, fold in (
        ("in capital letters", str.casefold),
        ("in characters that cannot be seen, or in their width", lambda text: _visible(text).casefold()),
    ):
        if fold(_composed(subject)) in fold(_composed(prompt)):
            return f" (it is there, but differs {what})"
    return ""


def _visible(text: str) -> str:
    """Return text in its compatible form (NFKC), without characters that are not seen."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) not in ("Cf", "Cc"))


def _is_whole_word(text: str, start: int, end: int) -> bool:
    return not (_within_word(text, start) or _within_word(text, end))


def _within_word(text: str, place: int) -> bool:
    """Return whether the characters before and behind a place belong to one word, in a script with spaces."""
    if not 0 < place < len(text):
        return False
    before, behind = text[place - 1], text[place]
    if unicodedata.category(behind)[0] == "M" or "\u200d" in (before, behind):  # it is a part of the letter before
        return True
    return all(_in_word(c) and not _no_spaces(c) for c in (before, behind))


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def continuation_of(prompt: str, target: str) -> str:
    """Return a target with the space that joins it to a prompt, or without where scripts and signs have none."""
    return _joint(prompt, target) + target


def _joint(before: str, after: str) -> str:
    """Return the space between two texts, or nothing if one is there already, or the script or the signs have none."""
    last, first = before[-1], after[0]
    if last.isspace() or first.isspace() or _no_spaces(last) or _no_spaces(first):
        return ""
    opening = unicodedata.category(last) in ("Ps", "Pi", "Sc") or last in "/@#_~\\¿¡"
    if last in "\"'`*":  # it opens what it has not closed
        opening = before.count(last) % 2 == 1 and not (last == "'" and before[-2:-1].isalnum())
    if last in "-–—":
        opening = len(before) > 1 and before[-2].isalnum()
    closing = first in "%‰°,;:!?…)]}" or re.match(r"\.(?!\w)|(?:n)?['’]\w{1,2}\b", after) is not None
    return "" if opening or closing else " "


# Scripts that put no spaces between words, beside those whose characters are wide.
UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI")


def _no_spaces(character: str) -> bool:
    name = unicodedata.name(character, "")
    if unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character) != "So":  # but for emoji
        return not name.startswith("HANGUL")
    return name.startswith(UNSPACED)
