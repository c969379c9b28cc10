"""The entries of a slot memory: what is kept of each thing, and which of them a prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import bm25s
from transformers import PreTrainedTokenizerBase

from memory_adapters.base_model.names import names_in, occurs
from memory_adapters.base_model.sampling import PLAIN_QUESTIONS, PLAIN_SENTENCES
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.items import Document, Item, QuestionAnswer
from memory_adapters.keys.spellings import Spellings
from memory_adapters.keys.things import Thing, spelling_ids, terms_of, things_of, words_in
from memory_adapters.memory_slots.keys_values import KeysValues
from memory_adapters.memory_slots.prompts import END, as_text
from memory_adapters.memory_slots.slots import MemorySlots
from memory_adapters.validation import shown

__all__ = ["Chooser", "Retriever", "SlotEntry", "make_entries"]

SHORT_PART = 12  # words; a paragraph of fewer, such as a heading, goes with the next


@dataclass(frozen=True)
class SlotEntry:
    """Store what is read together: all facts and questions about one thing, or a part of a document.

    Attributes:
        title: What it is about; the parts of a document are numbered.
        items: What is written in it; a document whole.
        input_ids: The tokens of its text.
        slots: The vectors that these were compressed into, if an encoder did.
        kept: The keys and values that are read of them, if some were chosen; without either the text is read whole.
        names: Token ids of the names that it is read for.
        objects: Token ids of rare names in what is written about the thing, such as those of people: where a prompt has
            no name of an entry, these find it.
        terms: Of an entry without a name, words that a prompt must have all of: each one's token ids, as it may be
            written.
    """

    title: str
    items: tuple[Item, ...]
    input_ids: tuple[int, ...] = field(repr=False)
    slots: MemorySlots | None = None
    kept: KeysValues | None = field(default=None, repr=False)
    names: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    terms: tuple[tuple[tuple[int, ...], ...], ...] = field(default=(), repr=False)
    objects: tuple[tuple[int, ...], ...] = field(default=(), repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_slots(self) -> int:
        """Vectors that are read; keys of a head, where keys and values are."""
        if self.kept is not None:
            return self.kept.num_kept
        return self.num_tokens if self.slots is None else self.slots.num_slots

    @property
    def num_positions(self) -> int:
        """How many of the model's positions it takes: keys and values keep those of their tokens."""
        return self.num_tokens if self.slots is None else self.slots.num_slots

    @property
    def num_numbers(self) -> int:
        """How many numbers are stored: keys and values and where they stood, slots, and the text's tokens."""
        kept = [] if self.kept is None else [*self.kept.keys, *self.kept.values, *self.kept.places]
        slots = [] if self.slots is None else [self.slots.vectors]
        return self.num_tokens + sum(tensor.numel() for tensor in [*kept, *slots])

    @property
    def compression_rate(self) -> float:
        """Tokens of the text ÷ slots."""
        return self.num_tokens / self.num_slots


Retriever: TypeAlias = Callable[[list[str]], Sequence[Sequence[SlotEntry]]]
"""Returns, for each prompt of a batch, the entries to read."""


def make_entries(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, part_tokens: int, known: Sequence[SlotEntry] = ()
) -> list[SlotEntry]:
    """Return the entries of items, in their order.

    Args:
        items: All that is to be read.
        tokenizer: The model's tokenizer.
        part_tokens: Most tokens of an entry; a longer document is cut into parts at its paragraphs and sentences.
        known: Entries that are taken over where they hold the same items.
    """
    held: dict[tuple[Item, ...], list[SlotEntry]] = {}
    for entry in known:
        held.setdefault(entry.items, []).append(entry)
    common = words_in([*PLAIN_SENTENCES, *PLAIN_QUESTIONS])
    found: list[SlotEntry] = []
    for thing in things_of(items, tokenizer):
        spoken = tuple(item for item in thing.items if not isinstance(item, Document))
        for own in (spoken, *((item,) for item in thing.items if isinstance(item, Document))):
            if own:
                found += held.get(own) or _entries(thing, own, tokenizer, part_tokens, common)
    return found


def _entries(
    thing: Thing,
    items: tuple[Item, ...],
    tokenizer: PreTrainedTokenizerBase,
    part_tokens: int,
    common: set[str],
) -> list[SlotEntry]:
    tokens = partial(tokenize, tokenizer, rendered=True)

    names, terms = [], []
    if thing.spellings:
        names = [tuple(ids) for ids in spelling_ids(thing, [], tokenizer)[0]]
    elif isinstance(items[0], QuestionAnswer):
        written = [{term, term.lower(), term.capitalize()} for term in terms_of(thing, common)]
        terms = [tuple(tuple(tokens(text)) for w in sorted(own) for text in (f" {w}", w)) for own in written]
    parts = _parts(as_text(items, " "), lambda text: len(tokens(text)), part_tokens)
    of_parts = [f"{thing.name} ({i + 1} of {len(parts)})" for i in range(len(parts))]
    titles = of_parts if len(parts) > 1 else [thing.name]
    if thing.spellings:  # a small model does not see what a part is about that does not name it
        parts = [part if occurs(thing.name, part) else f"{thing.name}. {part}" for part in parts]
    objects = tuple(_objects(thing, items, tokenizer))
    return [
        SlotEntry(title, items, tuple(tokens(part + END)), names=tuple(names), terms=tuple(terms), objects=objects)
        for title, part in zip(titles, parts, strict=True)
    ]


def _objects(thing: Thing, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Return the token ids of rare names in a thing's facts, questions and answers, without its own names.

    A rare name has two words or more, one of which the tokenizer splits: "Teresa Almeida" and not "New York", as what
    is named often is seldom asked about because of what was written.
    """

    def is_rare(name: str) -> bool:
        words = name.split()
        return len(words) > 1 and any(len(tokenize(tokenizer, f" {word}", rendered=True)) > 1 for word in words)

    spoken = [item for item in items if not isinstance(item, Document)]
    names = [name for item in spoken for name in names_in(as_text([item]), tokenizer)]
    others = [
        name
        for name in dict.fromkeys(names)
        if is_rare(name) and not any(occurs(name, own) or occurs(own, name) for own in thing.spellings)
    ]
    if not others:
        return []
    return [tuple(ids) for ids in spelling_ids(replace(thing, spellings=tuple(others)), [], tokenizer)[0]]


def _parts(text: str, length: Callable[[str], int], most: int) -> list[str]:
    """Cut a text at its paragraphs, and longer ones at their sentences and words, into parts of at most `most`."""
    paragraphs: list[str] = []
    heading = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        heading += paragraph.strip() + "\n"
        if len(paragraph.split()) >= SHORT_PART:
            paragraphs.append(heading.strip())
            heading = ""
    parts: list[str] = []
    for paragraph in [*paragraphs, *([heading.strip()] if heading else [])]:
        part = ""
        for piece in re.split(r"(?<=[.!?])\s+|\n", paragraph):
            for bit in _halves(piece, length, most):
                if part and length(f"{part} {bit}") > most:
                    parts.append(part)
                    part = ""
                part = f"{part} {bit}" if part else bit
        parts.append(part)
    return parts


def _halves(text: str, length: Callable[[str], int], most: int) -> list[str]:
    words = text.split(" ")
    if length(text) <= most or len(words) == 1:
        return [text]
    half = len(words) // 2
    return [one for part in (words[:half], words[half:]) for one in _halves(" ".join(part), length, most)]


class Chooser:
    """Choose which entries a prompt reads: those whose name stands in it, or those most like it.

    Args:
        entries: What there is to read.
        read: See `MemorySlotsConfig.read`.
        top_k: See `MemorySlotsConfig.top_k`.
        tokenizer: For the words of prompts and entries; token ids count as words if it is None.
        retriever: Chooses instead, if given.
    """

    def __init__(
        self,
        entries: Sequence[SlotEntry],
        read: str,
        top_k: int,
        tokenizer: PreTrainedTokenizerBase | None,
        retriever: Retriever | None = None,
    ) -> None:
        self.entries, self.read, self.top_k, self.tokenizer, self.retriever = entries, read, top_k, tokenizer, retriever
        self._names = Spellings((i, ids) for i, entry in enumerate(entries) for ids in entry.names)
        self._words = Spellings(
            (i, ids) for i, entry in enumerate(entries) for ids in {one for term in entry.terms for one in term}
        )
        having: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(entries):
            for ids in entry.objects:
                having.setdefault(ids, []).append(i)
        self._objects = Spellings((own[0], ids) for ids, own in having.items() if len(own) == 1)
        self._indexes: dict[tuple[int, ...], Any] = {}

    def choose(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Return the indices of the entries that each row of token ids reads, in rising order.

        Args:
            rows: Prompts, without padding.
            starts: Where the last question of each begins.
        """
        if self.retriever is not None:
            return self._retrieved(self.retriever, rows)
        every = list(range(len(self.entries)))
        if self.read == "all":
            return [every for _ in rows]
        found = []
        for row, start in zip(rows, starts, strict=True):
            if self.read == "bm25":
                found.append(self._best(every, row[start:]))
                continue
            spans = list(self._names.found(row))
            within = {place for _, first, last in spans for place in range(first, last + 1)}
            asked = [token for place, token in enumerate(row) if place >= start and place not in within]
            of_item: dict[tuple[Item, ...], list[int]] = {}
            for i in self._named(row, spans) or sorted(_outermost(list(self._objects.found(row)))):
                of_item.setdefault(self.entries[i].items, []).append(i)
            found.append(sorted(i for parts in of_item.values() for i in self._best(parts, asked)))
        return found

    def _retrieved(self, retriever: Retriever, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        place = {id(entry): i for i, entry in enumerate(self.entries)}
        chosen = [list(own) for own in retriever([self._text(row) for row in rows])]
        if len(chosen) != len(rows):
            raise ValueError(
                f"The retriever returned entries of {len(chosen)} prompts for {len(rows)}: give a list each."
            )
        if unknown := [one for own in chosen for one in own if id(one) not in place]:
            raise ValueError(f"The retriever returned {shown(unknown[0])}, which is none of the memory's `entries`.")
        return [[place[id(entry)] for entry in own] for own in chosen]

    def _named(self, row: Sequence[int], spans: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return the entries whose name stands in a row, and is no part of another's; or all of whose terms do."""
        named = _outermost(spans)
        stand: dict[int, set[tuple[int, ...]]] = {}
        for i, first, last in self._words.found(row):
            stand.setdefault(i, set()).add(tuple(row[first : last + 1]))
        for i, ids in stand.items():
            if all(ids & set(term) for term in self.entries[i].terms):
                named.add(i)
        return sorted(named)

    def _best(self, candidates: Sequence[int], question: Sequence[int]) -> list[int]:
        """Return the candidates that have most of a question's words, by BM25, if there are too many.

        Of a document that is named in a question without any of its words, the beginning.
        """
        if len(candidates) <= self.top_k and self.read != "bm25":
            return list(candidates)
        index = self._index(tuple(candidates))
        words = [word for word in self._as_words([question])[0] if word in index.vocab_dict]
        scores = index.get_scores(words) if words else [0.0] * len(candidates)
        best = sorted(range(len(candidates)), key=lambda place: -scores[place])[: self.top_k]
        found = sorted(candidates[place] for place in best if scores[place] > 0)
        return found or ([] if self.read == "bm25" else list(candidates[: self.top_k]))

    def _index(self, candidates: tuple[int, ...]) -> Any:
        """Return the BM25 index of some entries, which is made once: they are all, or the parts of a document."""
        if candidates not in self._indexes:
            index = self._indexes[candidates] = bm25s.BM25()
            index.index(self._as_words([self.entries[i].input_ids for i in candidates]), show_progress=False)
        return self._indexes[candidates]

    def _as_words(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        if self.tokenizer is None:
            return [[str(token) for token in row] for row in rows]
        texts = [self._text(row) for row in rows]
        return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)

    def _text(self, row: Sequence[int]) -> str:
        if self.tokenizer is None:
            raise ValueError("A retriever needs prompts as text: load the memory with `tokenizer=`.")
        return str(self.tokenizer.decode(list(row), skip_special_tokens=True))


def _outermost(spans: Sequence[tuple[int, int, int]]) -> set[int]:
    """Return the indices of those (index, first token, last token) that are no part of a longer one."""
    return {
        i for i, first, last in spans if not any(a <= first and last <= b and b - a > last - first for _, a, b in spans)
    }
