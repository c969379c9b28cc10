"""Load edits with the prompts to judge them by: CounterFact, zsRE, KnowEdit, EasyEdit, and your own facts.

Each loader takes the path of a JSON, JSONL or CSV file, or the id of a data set on the Hugging Face Hub. A row that
does not fit is a `ValueError` that names the file, the row and the field. Rows are counted from 1, without a CSV's
header and blank lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from memory_adapters.files.text_files import csv_rows, read_text
from memory_adapters.items import Fact, asked_by

__all__ = ["EditRecord", "Question", "load_counterfact", "load_facts", "load_zsre", "without_contradictions"]


class Question(NamedTuple):
    """Store a prompt with the answers that are right.

    Attributes:
        prompt: The prompt.
        answer: The right answer.
        alternatives: Others that are right too; any of them counts.
        kind: What it tests, such as `"Reasoning"`; questions of one kind are also scored by themselves.
    """

    prompt: str
    answer: str
    alternatives: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class EditRecord:
    """Store an edit with prompts to judge it by.

    Attributes:
        fact: What is written.
        true_target: The target without the edit; None if unknown, and then nothing is compared with it.
        paraphrases: Prompts that should give the new target.
        neighbours: (prompt, true answer), or a `Question`: prompts about something else, whose answers should not
            change.
        relation: What is said of the subject: an id such as `"P103"`; by default the prompt with `{}` for the subject.
        portability: (question, answer), or a `Question`: questions whose answers follow from the edit.
        generation_prompts: Beginnings of free text about the subject, for fluency and consistency.
    """

    fact: Fact
    true_target: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str] | Question, ...] = ()
    relation: str = ""
    portability: tuple[tuple[str, str] | Question, ...] = ()
    generation_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.relation:
            object.__setattr__(self, "relation", self.fact.template)


def without_contradictions(records: Sequence[EditRecord]) -> list[EditRecord]:
    """Return the records, in their order, without those whose facts have another target than an earlier one has."""
    first: dict[tuple[str, ...], str] = {}
    return [one for one in records if first.setdefault(asked_by(one.fact), one.fact.target) == one.fact.target]


def load_counterfact(
    source: str | os.PathLike[str], limit: int | None = None, *, split: str = "train"
) -> list[EditRecord]:
    """Read CounterFact, in its original nested form or flattened to one paraphrase and one neighbour a record.

    The original's neighbours are about subjects of which `target_true` holds. Its `attribute_prompts`, about subjects
    of which the new target holds anyway, belong to no score and are left out.

    Args:
        source: Path of a file or id of a data set on the Hub.
        limit: How many records from the start; None for all.
        split: Which split of a data set on the Hub.

    Raises:
        FileNotFoundError: If `source` looks like a file and is none.
        ImportError: If `source` is on the Hub and the package datasets is missing.
        ValueError: If a row does not fit; it is named.
    """
    rows = read_rows(source, limit, split)
    return [_nested(row) if "requested_rewrite" in row.fields else _flat(row) for row in rows]


def _nested(row: Row) -> EditRecord:
    fact = row.fact("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str")
    true_target = row.text("requested_rewrite.target_true.str")
    return EditRecord(
        fact,
        true_target,
        row.texts("paraphrase_prompts"),
        tuple((prompt, true_target) for prompt in row.texts("neighborhood_prompts")),
        row.optional_text("requested_rewrite.relation_id") or "",
        generation_prompts=row.texts("generation_prompts") if row.has("generation_prompts") else (),
    )


def _flat(row: Row) -> EditRecord:
    return EditRecord(
        row.fact("prompt", "subject", "target_new"),
        row.text("ground_truth"),
        (row.text("rephrase_prompt"),),
        ((row.text("locality_prompt"), row.text("locality_ground_truth")),),
    )


def load_zsre(source: str | os.PathLike[str], limit: int | None = None, *, split: str = "train") -> list[EditRecord]:
    """Read zsRE as questions: `alt` is written in place of the true answer, which is the first of `answers`.

    The neighbour is the unrelated question `loc`, with the question mark that it lacks in the data.

    Args:
        source: Path of a file or id of a data set on the Hub, with fields subject, src, rephrase, alt, answers, loc,
            loc_ans and, optionally, portability {New Question, New Answer}.
        limit: How many records from the start; None for all.
        split: Which split of a data set on the Hub.

    Raises:
        FileNotFoundError, ImportError, ValueError: As `load_counterfact`.
    """
    records = []
    for row in read_rows(source, limit, split):
        fact = row.fact("src", "subject", "alt")
        answers = row.texts("answers")
        if not answers:
            raise row.error("answers", "must hold at least one text, got []")
        question = row.text("loc")
        neighbour = (question if question.endswith("?") else f"{question}?", row.text("loc_ans"))
        records.append(
            EditRecord(fact, answers[0], (row.text("rephrase"),), (neighbour,), portability=row.follow_up() or ())
        )
    return records


def load_facts(source: str | os.PathLike[str], limit: int | None = None, *, split: str = "train") -> list[EditRecord]:
    """Read your own facts, or those of KnowEdit and EasyEdit.

    Columns: `prompt` (or `question`), `subject` and `target`; optionally `true_target`, `paraphrases` (or
    `paraphrase`), `neighbours` (or `neighbour`, `neighbors`, `neighbor`), `relation`, and a fact's `aliases` and
    `separator`. Others are passed over. `{}` in a prompt or a paraphrase stands for the subject. Paraphrases that end
    in a question mark are also asked in a chat, by `memory-adapters evaluate` and `compare`. A neighbour is written
    `prompt => answer`, or just `prompt` where the answer is the true target. Several in one CSV cell, or one JSON
    string, are separated by `|`; JSON may have a list of them instead, with [prompt, answer] for a neighbour. A CSV
    file has commas or semicolons.

        prompt,subject,target,true_target,paraphrases,neighbours
        {} is in,The Louvre,Rome,Paris,To see {} go to|You find {} in,Notre-Dame is in|Big Ben is in => London

    KnowEdit and EasyEdit call the target `target_new` (or `labels`; WikiBio has `text` for the prompt and `concept` for
    the subject), true targets `ground_truth`, of which the first is taken, and paraphrases `rephrase`,
    `rephrase_prompt` or `rephrase_prompts`. Their `locality` (neighbours) and `portability` map kinds, such as
    "Relation_Specificity" and "Reasoning", to lists of {"prompt", "ground_truth"}. As `locality_inputs` and
    `portability_inputs` they map them to one such object, which may hold lists; as `locality_prompt` and
    `locality_ground_truth` they have no kind. Any of several true answers counts; a question without one is
    passed over.

    Args:
        source: Path of a file or id of a data set on the Hub.
        limit: How many records from the start; None for all.
        split: Which split of a data set on the Hub.

    Raises:
        FileNotFoundError, ImportError, ValueError: As `load_counterfact`.
    """
    records = []
    for row in read_rows(source, limit, split):
        target = row.spelling("target", "target_new", "labels")
        prompt, subject = row.spelling("prompt", "question", "text"), row.spelling("subject", "concept")
        fact = row.fact(prompt, subject, target)
        true_target = row.true_target()
        records.append(
            EditRecord(
                fact,
                true_target,
                tuple(text.replace("{}", fact.subject) for text in row.paraphrases()),
                row.neighbours(true_target) + row.questions("locality"),
                row.optional_text("relation") or "",
                row.follow_up() or row.questions("portability"),
            )
        )
    return records


@dataclass(frozen=True)
class Row:
    """Store one row as it was read. A dot in a field's name leads into a nested mapping; None counts as missing."""

    source: str
    number: int
    fields: Mapping[str, Any]

    def error(self, field: str, problem: str) -> ValueError:
        return ValueError(f"`{self.source}`, row {self.number}: `{field}` {problem}. Correct or remove the row.")

    def value(self, field: str) -> Any:
        value: Any = self.fields
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def has(self, field: str) -> bool:
        return self.value(field) is not None

    def text(self, field: str) -> str:
        if not self.has(field):
            raise self.error(field, f"is missing; the row has {', '.join(map(str, self.fields))}")
        return self._checked(field, self.value(field))

    def optional_text(self, field: str) -> str | None:
        return self.text(field) if self.value(field) not in (None, "") else None

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.value(field)
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"must be a list of texts, got {value!r}")
        return tuple(self._checked(field, text) for text in value)

    def spelling(self, *spellings: str) -> str:
        """Return the spelling that the row has of a field, or the first."""
        return next((name for name in spellings if self.has(name)), spellings[0])

    def fact(self, prompt: str, subject: str, target: str) -> Fact:
        texts = self.text(prompt), self.text(subject), self.text(target)
        separator = self.value("separator")
        if self.source.lower().endswith(".csv"):
            separator = separator or None
        _, aliases = self._entries("aliases")
        try:
            return Fact(*texts, separator=separator, aliases=tuple(aliases))
        except ValueError as error:
            raise self.error(subject, f"does not fit: {error}") from None

    def true_target(self) -> str | None:
        field = self.spelling("true_target", "ground_truth")
        return next(iter(self._answers(field, self.value(field))), None)

    def paraphrases(self) -> list[str]:
        field, entries = self._entries("paraphrases", "paraphrase", "rephrase", "rephrase_prompt", "rephrase_prompts")
        return [self._checked(field, entry) for entry in entries]

    def follow_up(self) -> tuple[tuple[str, str], ...] | None:
        """Return zsRE's question about what follows, if the row has one."""
        names = ("portability.New Question", "portability.New Answer")
        return ((self.text(names[0]), self.text(names[1])),) if any(map(self.has, names)) else None

    def questions(self, name: str) -> tuple[Question, ...]:
        """Return the questions of `locality` or `portability`, by kind or without kinds."""
        field = self.spelling(name, f"{name}_inputs")
        kinds = self.value(field) or {}
        if not isinstance(kinds, Mapping):
            raise self.error(field, f'must map kinds to lists of {{"prompt", "ground_truth"}}, got {kinds!r}')
        asked = [(kind, f"{field}.{kind}", entries or []) for kind, entries in kinds.items()]
        if self.has(f"{name}_prompt"):
            single = {part: self.value(f"{name}_{part}") for part in ("prompt", "ground_truth")}
            asked.append(("", f"{name}_prompt", single))
        return tuple(
            Question(self._checked(place, prompt), answers[0], answers[1:], str(kind))
            for kind, place, entries in asked
            for prompt, truth in self._pairs(place, entries)
            if (answers := self._answers(place, truth))
        )

    def _pairs(self, field: str, entries: Any) -> Iterator[tuple[Any, Any]]:
        """Yield prompt and true answers of a question, of a list of them, or of one with lists of both."""
        listed = [entries] if isinstance(entries, Mapping) else entries
        if not isinstance(listed, (list, tuple)):
            raise self.error(field, f'must be a list of {{"prompt", "ground_truth"}}, got {entries!r}')
        for entry in listed:
            if not isinstance(entry, Mapping) or not {"prompt", "ground_truth"} <= set(entry):
                raise self.error(field, f'must hold {{"prompt", "ground_truth"}}, got {entry!r}')
            prompt, truth = entry["prompt"], entry["ground_truth"]
            if not isinstance(prompt, (list, tuple)):
                yield prompt, truth
            elif isinstance(truth, (list, tuple)) and len(truth) == len(prompt):
                yield from zip(prompt, truth, strict=True)
            else:
                raise self.error(field, f"must have a `ground_truth` for each `prompt`, got {entry!r}")

    def _answers(self, field: str, value: Any) -> tuple[str, ...]:
        """Return the texts of a text or of lists in any depth, each once, without empty ones."""
        if isinstance(value, (list, tuple)):
            return tuple(dict.fromkeys(answer for one in value for answer in self._answers(field, one)))
        return () if value is None or (isinstance(value, str) and not value.strip()) else (self._checked(field, value),)

    def neighbours(self, true_target: str | None) -> tuple[tuple[str, str], ...]:
        field, entries = self._entries("neighbours", "neighbour", "neighbors", "neighbor")
        pairs = []
        for entry in entries:
            pair = entry
            if isinstance(entry, str):
                prompt, arrow, answer = entry.partition("=>")
                pair = (prompt.strip(), answer.strip() if arrow else true_target)
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise self.error(field, f"must hold `prompt => answer` or [prompt, answer], got {entry!r}")
            if pair[1] is None:
                raise self.error(field, f"has no answer, and the row no `true_target`, for {entry!r}")
            pairs.append((self._checked(field, pair[0]), self._checked(field, pair[1])))
        return tuple(pairs)

    def _entries(self, *spellings: str) -> tuple[str, Sequence[Any]]:
        """Return the spelling that the row has of a field, and entries: of a list, or between the bars of a text."""
        field = self.spelling(*spellings)
        value = self.value(field) or ()
        if isinstance(value, str):
            return field, [part.strip() for part in value.split("|") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"must be a text or a list, got {value!r}")
        return field, value

    def _checked(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"must be a non-empty text, got {value!r}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, f"has half of a surrogate pair, which is no character: {value!r}") from None
        return value


def read_rows(source: str | os.PathLike[str], limit: int | None = None, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a file or of a data set on the Hub; their errors name them, counted from 1."""
    if limit is not None and limit < 0:
        raise ValueError(f"`limit={limit}` must be at least 0, or None for all rows.")
    name = os.fspath(source)
    suffix = Path(name).suffix.lower()
    if Path(name).is_file():
        if suffix not in _READERS:
            raise ValueError(f"`{name}` is of no known type: name it {', '.join(_READERS)} after what it holds.")
        rows = _READERS[suffix](name)
    elif suffix in _READERS or isinstance(source, os.PathLike):
        raise FileNotFoundError(f"`{name}` is no file; give the path of one, or the id of a data set on the Hub.")
    else:
        rows = _hub_rows(name, split)
    for number, fields in enumerate(islice(rows, limit), 1):
        if not isinstance(fields, Mapping):
            raise ValueError(f"`{name}`, row {number} must map fields to values, got {fields!r}. Correct or remove it.")
        yield Row(name, number, fields)


def _json_rows(path: str) -> Iterable[Any]:
    try:
        rows = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`{path}` is not JSON: {error}. If each line is a record, name it .jsonl.") from None
    if not isinstance(rows, list):
        raise ValueError(f"`{path}` must hold a list of records, got a {type(rows).__name__}.")
    return rows


def _jsonl_rows(path: str) -> Iterator[Any]:
    for number, line in enumerate(filter(str.strip, read_text(path).split("\n")), 1):
        try:
            yield json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"`{path}`, row {number} is not JSON: {error}. Correct or remove it.") from None


_READERS: dict[str, Callable[[str], Iterable[Any]]] = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": csv_rows}


def _hub_rows(name: str, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"Reading `{name}` from the Hub needs the package datasets: pip install memory-adapters[evaluation]"
        ) from None
    return load_dataset(name, split=split)
