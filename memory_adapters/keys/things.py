"""What items are about, and where that is named: the rows in which the keys of things lie, and their spellings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.item_rows import Row, chat_row, fact_row, keys_at_names, plain_rows
from memory_adapters.base_model.names import is_common_word, names_in, occurs, times_named
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Document, Fact, Item, QuestionAnswer
from memory_adapters.training.phrasings import REQUESTS, phrasings
from memory_adapters.training.rows import other_names

__all__ = [
    "NAME_WINDOW",
    "Thing",
    "asked_about",
    "key_rows",
    "keys_at_thing",
    "rendered",
    "spelling_ids",
    "terms_of",
    "thing_rows",
    "things_of",
    "words_in",
]

NAME_WINDOW, TERMS_WINDOW = 3, 16  # tokens more than a name, or terms, have

_ABOUT = ("Tell me about {}.", "What do you know about {}?")


@dataclass(frozen=True)
class Thing:
    """Store what items are about together.

    Attributes:
        name: What it is called; the item's own text, cut, if it has no name.
        spellings: Its name, other names, and these in lower case; none if it has no name.
        items: What is written about it.
    """

    name: str
    spellings: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def named_item(self) -> Item:
        """An item from which its keys are found: a fact with its name for subject, if it has one."""
        first = self.items[0]
        text = _text(first)
        if isinstance(first, Fact) or not self.spellings:
            return first
        named = next((name for name in self.spellings if name in text), None)
        return first if named is None else Fact(text[: text.index(named) + len(named)], named, "…")


def things_of(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[Thing]:
    """Return what items are about: the subject of a fact or document, or what a question or a document names most.

    Where a question names several things, it is about the one that is a fact's subject or alias, else about the one
    that most items name. An item without a name in it is a thing of its own.
    """
    names: dict[str, str] = {}  # in lower case, to the name of the thing
    named = [_given_names(item) for item in items]
    for given in filter(None, named):
        own = [one.casefold() for one in given]
        name = next((names[one] for one in own if one in names), given[0])
        names |= {one: names.get(one, name) for one in own}
    found = [[] if given else names_in(_text(item), tokenizer) for item, given in zip(items, named, strict=True)]
    counts = Counter(name.casefold() for own in found for name in own)
    grouped: dict[str, list[Item]] = {}
    spelled: dict[str, list[str]] = {}
    for item, given, own_names in zip(items, named, found, strict=True):
        if given:
            name = names[given[0].casefold()]
            others = other_names(item, tokenizer) if isinstance(item, Fact) else []
            spelled.setdefault(name, []).extend([given[0], *others])
        else:
            text = _text(item)
            of_question = isinstance(item, QuestionAnswer)
            known = [own for own in names if occurs(own, text.casefold())] if of_question else []
            main = (
                max(own_names, key=lambda own: counts[own.casefold()], default=None)
                if of_question
                else _most_named(own_names, text)
            )
            if known:
                name = names[max(known, key=len)]
            elif main is not None:
                name = names.setdefault(main.casefold(), main)
                spelled.setdefault(name, []).append(main)
            else:
                name = _title(item, grouped)
        grouped.setdefault(name, []).append(item)
    return [Thing(name, tuple(dict.fromkeys(spelled.get(name, ()))), tuple(own)) for name, own in grouped.items()]


def _given_names(item: Item) -> list[str]:
    """Return what the user calls the thing that an item is about, its main name first; nothing if that is not said."""
    if isinstance(item, Fact):
        return [item.subject, *item.aliases]
    return [item.subject] if isinstance(item, Document) and item.subject is not None else []


def _most_named(names: Sequence[str], text: str) -> str | None:
    """Return the name that a text has most often as whole words, the first of several."""
    found, most = None, 0
    for name in names:
        if text.count(name) > most and (times := times_named(name, text)) > most:
            found, most = name, times
    return found


def _text(item: Item) -> str:
    return item.text if isinstance(item, Document) else item.prompt


def _title(item: Item, taken: Mapping[str, Any]) -> str:
    short = " ".join(_text(item).split())[:60]
    return next(title for n in count(1) if (title := short if n == 1 else f"{short} ({n})") not in taken)


def words_in(texts: Iterable[str]) -> set[str]:
    """Return the words of texts, in lower case."""
    return {word for text in texts for word in re.findall(r"[^\W_]+", text.casefold())}


def terms_of(thing: Thing, common: Collection[str]) -> list[str]:
    """Return the words that tell a thing without a name from others: those that other texts do not have.

    Args:
        thing: The thing.
        common: Words of other texts, in lower case.
    """
    words = list(dict.fromkeys(re.findall(r"[^\W_]+", _text(thing.items[0]))))
    rare = [word for word in words if word.casefold() not in common]
    return rare or [word for word in words if len(word) == max(map(len, words))]


def asked_about(things: Sequence[Thing]) -> dict[Item, Thing]:
    """Return, for each question, what it is about, with those names that stand in it alone."""
    return {
        item: Thing(thing.name, tuple(name for name in thing.spellings if occurs(name, item.question)), (item,))
        for thing in things
        for item in thing.items
        if isinstance(item, QuestionAnswer)
    }


def thing_rows(
    thing: Thing,
    terms: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefixes: Sequence[str],
    max_length: int,
    rephrase: bool,
) -> list[Row]:
    """Tokenise what a thing's values are trained on.

    Args:
        thing: The thing.
        terms: What its keys lie at if it has no name; see `terms_of`.
        tokenizer: The model's tokenizer.
        prefixes: Texts to put before facts, so that they hold outside their own prompt.
        max_length: Longest row in tokens.
        rephrase: Whether to add questions that facts answer, in the chat template.

    Raises:
        ValueError: If a fact or question does not fit in `max_length` tokens.
    """
    rows: list[Row] = []
    for number, item in enumerate(thing.items):
        own = plain_rows([item], tokenizer, max_length)
        if isinstance(item, Fact):
            own += [fact_row(item, tokenizer, prefix) for prefix in prefixes]
            own += [fact_row(item, tokenizer, alias=name) for name in other_names(item, tokenizer)]
            own += rendered([chat_row(item, tokenizer)])
            questions = [QuestionAnswer(text, item.target) for text in phrasings(item)] if rephrase else []
            own += [
                keys_at_thing(row, thing, tokenizer) for row in rendered(chat_row(one, tokenizer) for one in questions)
            ]
            asked = []
        elif isinstance(item, QuestionAnswer):
            varied = REQUESTS if rephrase else REQUESTS[:1]
            asked = [QuestionAnswer(text.format(item.question), item.answer) for text in varied]
        else:
            asked = []
        own += rendered(chat_row(one, tokenizer) for one in asked)
        if not isinstance(item, Fact):
            own = [_at(row, thing.spellings or terms, tokenizer) for row in own]
        rows += [replace(row, item=number) for row in own if len(row.input_ids) <= max_length]
    return rows


def rendered(rows: Iterable[Row | None]) -> list[Row]:
    """Return the rows of a chat template that renders them."""
    return [row for row in rows if row is not None]


def key_rows(thing: Thing, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return further rows in which keys of a thing lie: its name, asked about in the chat template."""
    if not thing.spellings:
        return []
    asked = [QuestionAnswer(text.format(thing.spellings[0]), "It is") for text in _ABOUT]
    return [keys_at_thing(row, thing, tokenizer) for row in rendered(chat_row(one, tokenizer) for one in asked)]


def keys_at_thing(row: Row, thing: Thing, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Return a row with its keys at the thing's name; without keys if the thing has one that is not there."""
    return _at(row, thing.spellings, tokenizer) if thing.spellings else row


def _at(row: Row, words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Row:
    placed = keys_at_names(row, words, tokenizer)
    return replace(row, key_positions=[]) if placed is row else placed


def spelling_ids(thing: Thing, terms: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], int]:
    """Return the token ids that must stand where a thing is named, and over how many tokens more they may be spread.

    They are those of its spellings, within a text and at its beginning, its own name first; or, of a thing without a
    name, the last token of each of its terms.
    """
    if not thing.spellings:
        ids = [tokenize(tokenizer, f" {term}", rendered=True)[-1:] for term in terms]
        return [[token for one in ids for token in one]], TERMS_WINDOW
    lower = [name.lower() for name in thing.spellings if not is_common_word(name, tokenizer)]
    every = dict.fromkeys((*thing.spellings, *lower))
    found = [tokenize(tokenizer, text, rendered=True) for name in every for text in (f" {name}", name)]
    return list(map(list, dict.fromkeys(tuple(ids) for ids in found if ids))), NAME_WINDOW
