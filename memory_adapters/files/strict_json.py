"""Read JSON strictly, from files that are inside their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["file_in", "parse_json", "read_json"]

JSON_BYTES = 1 << 26
DEPTH = 16
SAVE_AGAIN = "Save or download it again."


def parse_json(text: bytes | str) -> Any:
    """Parse a JSON text in UTF-8.

    Raises:
        ValueError: If it is not JSON, is nested deeper than 16, or has something that parsers disagree about: NaN,
            infinity, a name twice in one object, or half of a surrogate pair.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
        level = [value]
        for _ in range(DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
        if level:
            raise ValueError(f"nested deeper than {DEPTH}")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEPTH}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def file_in(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a link to a file outside the folder, other than the Hub's cache has.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"`{folder}` has no {name}: it is not what was saved, or only part of it.")
    home, real = folder.resolve(), path.resolve()
    snapshot = next((parent for parent in (home, *home.parents) if parent.parent.name == "snapshots"), None)
    blobs = snapshot.parents[1] / "blobs" if snapshot else home
    if real.parent not in (home, blobs):
        raise ValueError(f"`{path}` is a link to `{real}`, outside of its folder: put a copy of that file there.")
    return path


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file of at most 64 MiB.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is larger, or as `parse_json`.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_BYTES:
            raise ValueError(f"`{path}` has {size:,} bytes; it may have at most {JSON_BYTES:,}. {SAVE_AGAIN}")
        data = file.read()
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"`{path}` is not valid JSON ({error}). {SAVE_AGAIN}") from error
