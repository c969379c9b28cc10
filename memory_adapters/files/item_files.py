"""Read items from JSON, JSONL and text files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory_adapters.files.strict_json import parse_json
from memory_adapters.items import Item, item_from_dict

__all__ = ["read_items"]


def read_items(path: str | os.PathLike[str]) -> list[Item]:
    """Read the items in a file in UTF-8.

    A `.json` file is a list of objects, a `.jsonl` file has one on each line. Each has the fields of a fact ("prompt",
    "subject" and "target"), of a question ("question" and "answer") or of a document ("text"). A `.txt` file is one
    document.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an entry is not an item (with the line it begins on), the file has no items, or its name ends
            otherwise.
    """
    file = Path(path)
    readers = {".json": _listed, ".jsonl": _line_by_line, ".txt": lambda _, text: [(1, {"text": text})]}
    if file.suffix.lower() not in readers:
        raise ValueError(f"`{file}` has an unknown type: its name must end in {', '.join(readers)}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"`{file}`, line {line} is not UTF-8: save the file as UTF-8.") from None
    items = [_item(value, f"`{file}`, line {line}") for line, value in readers[file.suffix.lower()](file, text)]
    if not items:
        raise ValueError(f"`{file}` has no items: give at least one.")
    return items


_BETWEEN = re.compile(r"[\s,]*")


def _item(value: Any, place: str) -> Item:
    try:
        return item_from_dict(value)
    except ValueError as error:
        joint = " " if str(error).startswith("has ") else ": "
        raise ValueError(f"{place}{joint}{error}") from None


def _listed(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield line and value of each element of a JSON list."""
    try:
        whole = parse_json(text)
    except ValueError as error:
        raise ValueError(f"`{file}` is not JSON: {error}. If each line is an item, name the file .jsonl.") from None
    if not isinstance(whole, list):
        raise ValueError(f"`{file}` must be a list of items, got a {type(whole).__name__}.")
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    line = text.count("\n", 0, place) + 1
    for value in whole:
        start = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        line += text.count("\n", place, start)
        yield line, value
        _, place = decoder.raw_decode(text, start)
        line += text.count("\n", start, place)


def _line_by_line(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield line and value of each line that is not empty."""
    for line, value in enumerate(text.split("\n"), 1):
        if value.strip():
            try:
                yield line, parse_json(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{file}`, line {line} is not JSON: {error.msg} (column {error.colno}).") from None
            except ValueError as error:
                raise ValueError(f"`{file}`, line {line} is not JSON: {error}.") from None
