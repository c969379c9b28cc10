"""Load edits with the prompts to judge them by: CounterFact, zsRE, and your own facts.

Each loader takes the path of a JSON, JSONL or CSV file, or the id of a data set on the Hugging Face Hub. A row that
does not fit is a `ValueError` that names the file, the row and the field. Rows are counted from 1, without a CSV's
header and blank lines.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from memory_adapters.items import Fact

__all__ = ["EditRecord", "load_counterfact", "load_facts", "load_zsre"]


@dataclass(frozen=True)
class EditRecord:
    """Store an edit with prompts to judge it by.

    Attributes:
        fact: What is written.
        true_target: The target without the edit; None if unknown, and then nothing is compared with it.
        paraphrases: Prompts that should give the new target.
        neighbours: (prompt, true answer): prompts about something else, whose answers should not change.
        relation: What is said of the subject: an id such as `"P103"`; by default the prompt with `{}` for the subject.
        portability: (question, answer): questions whose answers follow from the edit.
        generation_prompts: Beginnings of free text about the subject, for fluency and consistency.
    """

    fact: Fact
    true_target: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    relation: str = ""
    portability: tuple[tuple[str, str], ...] = ()
    generation_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.relation:
            object.__setattr__(self, "relation", self.fact.prompt.replace(self.fact.subject, "{}"))


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


def _nested(row: _Row) -> EditRecord:
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


def _flat(row: _Row) -> EditRecord:
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
        portability: tuple[tuple[str, str], ...] = ()
        if row.has("portability.New Question") or row.has("portability.New Answer"):
            portability = ((row.text("portability.New Question"), row.text("portability.New Answer")),)
        records.append(EditRecord(fact, answers[0], (row.text("rephrase"),), (neighbour,), portability=portability))
    return records


def load_facts(source: str | os.PathLike[str], limit: int | None = None, *, split: str = "train") -> list[EditRecord]:
    """Read your own facts.

    Columns: `prompt`, `subject` and `target`; optionally `true_target`, `paraphrases` (or `paraphrase`), `neighbours`
    (or `neighbour`, `neighbors`, `neighbor`) and `relation`. Others are passed over. `{}` in a prompt or a paraphrase
    stands for the subject. A neighbour is written `prompt => answer`, or just `prompt` where the answer is the true
    target. Several in one CSV cell, or one JSON string, are separated by `|`; JSON may have a list of them instead,
    with [prompt, answer] for a neighbour.

        prompt,subject,target,true_target,paraphrases,neighbours
        {} is in,The Louvre,Rome,Paris,To see {} go to|You find {} in,Notre-Dame is in|Big Ben is in => London

    Args:
        source: Path of a file or id of a data set on the Hub.
        limit: How many records from the start; None for all.
        split: Which split of a data set on the Hub.

    Raises:
        FileNotFoundError, ImportError, ValueError: As `load_counterfact`.
    """
    records = []
    for row in read_rows(source, limit, split):
        fact = row.fact("prompt", "subject", "target")
        true_target = row.optional_text("true_target")
        paraphrases = tuple(text.replace("{}", fact.subject) for text in row.paraphrases())
        relation = row.optional_text("relation") or ""
        records.append(EditRecord(fact, true_target, paraphrases, row.neighbours(true_target), relation))
    return records


@dataclass(frozen=True)
class _Row:
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

    def fact(self, prompt: str, subject: str, target: str) -> Fact:
        texts = self.text(prompt), self.text(subject), self.text(target)
        try:
            return Fact(*texts)
        except ValueError as error:
            raise self.error(subject, f"does not fit: {error}") from None

    def paraphrases(self) -> list[str]:
        field, entries = self._entries("paraphrases", "paraphrase")
        return [self._checked(field, entry) for entry in entries]

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
        field = next((name for name in spellings if self.has(name)), spellings[0])
        value = self.value(field) or ()
        if isinstance(value, str):
            return field, [part.strip() for part in value.split("|") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise self.error(field, f"must be a text or a list, got {value!r}")
        return field, value

    def _checked(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"must be a non-empty text, got {value!r}")
        return value


def read_rows(source: str | os.PathLike[str], limit: int | None = None, split: str = "train") -> Iterator[_Row]:
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
        yield _Row(name, number, fields)


def _json_rows(path: str) -> Iterable[Any]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{path}` is not JSON: {error}. If each line is a record, name it .jsonl.") from None
    if not isinstance(rows, list):
        raise ValueError(f"`{path}` must hold a list of records, got a {type(rows).__name__}.")
    return rows


def _jsonl_rows(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(filter(str.strip, file), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{path}`, row {number} is not JSON: {error}. Correct or remove it.") from None


def _csv_rows(path: str) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, cells in enumerate(csv.DictReader(file), 1):
            if None in cells:
                raise ValueError(
                    f"`{path}`, row {number} has more cells than the header: quote a cell that holds a comma."
                )
            yield {name: (cell or "").strip() for name, cell in cells.items()}


_READERS: dict[str, Callable[[str], Iterable[Any]]] = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}


def _hub_rows(name: str, split: str) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"Reading `{name}` from the Hub needs the package datasets: pip install memory-adapters[evaluation]"
        ) from None
    return load_dataset(name, split=split)
