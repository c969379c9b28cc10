"""Read items from JSON, JSONL, CSV and text files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memory_adapters.files.strict_json import parse_json
from memory_adapters.files.text_files import csv_rows, read_text
from memory_adapters.items import Item, item_from_dict

__all__ = ["read_items"]


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Read the items in a file in UTF-8.

    A `.json` file is a list of objects, a `.jsonl` file has one on each line, a `.csv` file one in each row, under a
    header, with commas or semicolons. Each has the fields of a fact ("prompt" or "question", "subject" and "target"),
    of a question ("question" and "answer") or of a document ("text"). A `.txt` file is one document.

    A thing with several facts, {"subject", "facts": [{"prompt", "target"}, ...]}, gives all of its facts; the questions
    about them are passed over.

    Rows of data sets for knowledge editing are facts too: KnowEdit, EasyEdit, CounterFact and zsRE, which name the
    target otherwise. What is there to judge a fact by, such as "true_target", "paraphrases" or "locality", is passed
    over, and so are other columns of a CSV file and other fields of a row of a data set.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an entry is not an item (with the line it begins on, or the row of a CSV file), the file has no
            items, or its name ends otherwise.
    """
    file = Path(path)
    if file.suffix.lower() not in _READERS:
        raise ValueError(f"`{file}` has an unknown type: its name must end in {', '.join(_READERS)}.")
    items = [
        _item(value, place) for place, given in _READERS[file.suffix.lower()](file) for value in _facts_of_thing(given)
    ]
    if not items:
        raise ValueError(f"`{file}` has no items: give at least one.")
    return items


# Where data sets have prompt, subject and target; the last of each tells it from the others.
_DATA_SETS = (
    ("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new.str"),  # CounterFact
    ("src", "subject", "alt"),  # zsRE
    ("text", "concept", "labels"),  # KnowEdit's WikiBio
    ("prompt", "subject", "labels"),
    ("prompt", "subject", "target_new"),  # KnowEdit, EasyEdit, CounterFact in flat form
)
_JUDGING = {"true_target", "ground_truth", "relation", "portability", "locality", "rephrase", "rephrase_prompt"}
_JUDGING |= {"questions", "training_questions", "alternatives"}
_JUDGING |= {"paraphrases", "paraphrase", "neighbours", "neighbour", "neighbors", "neighbor"}
_KINDS = (("prompt", "subject", "target"), ("question", "answer"), ("text",))
_OPTIONAL = ("separator", "aliases", "question")
_BETWEEN = re.compile(r"[\s,]*")


def _facts_of_thing(value: Any) -> list[Any]:
    """Return the facts of a thing that has several, each with the thing as its subject; else the value itself."""
    if not isinstance(value, Mapping) or "subject" not in value or not isinstance(value.get("facts"), list):
        return [value]
    return [{**fact, "subject": value["subject"]} if isinstance(fact, Mapping) else fact for fact in value["facts"]]


def _item(value: Any, place: str) -> Item:
    try:
        return item_from_dict(_fields(value))
    except ValueError as error:
        joint = " " if str(error).startswith("has ") else ": "
        raise ValueError(f"{place}{joint}{error}") from None


def _fields(value: Any) -> Any:
    """Return the fields of an item of a row of a data set, or of a fact beside what it is judged by."""
    if not isinstance(value, Mapping):
        return value
    if names := _data_set(value):
        for name in names:
            if _inner(value, name) is None:
                raise ValueError(f"has `{names[-1]}`, the target of a fact, but no `{name}`: add it.")
        return dict(zip(_KINDS[0], (_inner(value, name) for name in names), strict=True))
    if {"question", "subject", "target"} <= set(value) and "prompt" not in value:  # a question is a prompt too
        value = {"prompt" if name == "question" else name: part for name, part in value.items()}
    if set(_KINDS[0]) <= set(value):
        return {name: part for name, part in value.items() if name not in _JUDGING}
    return value


def _data_set(value: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return where a row has prompt, subject and target, if it is one of a data set and at most one of them is missing.

    A text with labels alone is a document.
    """
    for names in _DATA_SETS:
        prompt, subject, target = (_inner(value, name) is not None for name in names)
        if target and "target" not in value and (subject or (prompt and names[0] != "text")):
            return names
    return None


def _inner(value: Any, name: str) -> Any:
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _listed(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each element of a JSON list."""
    text = read_text(file)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is not JSON: {error}. If each line is an item, name the file .jsonl.") from None
    if not isinstance(whole, list):
        raise ValueError(f"`{file}` must be a list of items, got a {type(whole).__name__}.")
    decoder, start = json.JSONDecoder(), text.index("[") + 1
    line = text.count("\n", 0, start) + 1
    for _ in whole:
        begin = _BETWEEN.match(text, start).end()  # type: ignore[union-attr]
        line += text.count("\n", start, begin)
        _, start = decoder.raw_decode(text, begin)
        yield f"`{file}`, line {line}", _parsed(text[begin:start], file, line)
        line += text.count("\n", begin, start)


def _line_by_line(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line that is not empty."""
    for line, text in enumerate(read_text(file).split("\n"), 1):
        if text.strip():
            yield f"`{file}`, line {line}", _parsed(text, file, line)


def _parsed(text: str, file: Path, line: int) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{file}`, line {line} is not JSON: {error.msg} (column {error.colno}).") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(
            f"`{file}`, line {line} has half of a surrogate pair, {half}, which is no character: remove it."
        ) from None
    except ValueError as error:
        raise ValueError(f"`{file}`, line {line} is not JSON: {error}.") from None


def _row_by_row(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and fields of each row: those of the kind of item whose cells it fills."""
    for number, row in enumerate(csv_rows(file), 1):
        place = f"`{file}`, row {number}"
        if _data_set(row):
            yield place, row
            continue
        filled = {name: cell for name, cell in row.items() if cell}
        kinds = [kind for kind in _KINDS if set(kind) <= set(row)]
        kind = next((kind for kind in kinds if set(kind) & set(filled)), kinds[0] if kinds else ())
        fields: dict[str, Any] = {name: row[name] for name in kind}
        if "target" in fields:
            fields |= {name: filled[name] for name in _OPTIONAL if name in filled}
            if "aliases" in fields:
                fields["aliases"] = [part.strip() for part in fields["aliases"].split("|") if part.strip()]
        yield place, fields or row


def _document(file: Path) -> Iterator[tuple[str, Any]]:
    yield f"`{file}`, line 1", {"text": read_text(file)}


_READERS = {".json": _listed, ".jsonl": _line_by_line, ".csv": _row_by_row, ".txt": _document}
