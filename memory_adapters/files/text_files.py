"""Read text in UTF-8 and tables in CSV, with errors that name the file and the line or row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["csv_rows", "read_text"]

_DELIMITERS = {",": "comma", ";": "semicolon"}


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, or has a NUL byte; the line is named.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"`{path}`, line {line} is not UTF-8: save the file as UTF-8.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"`{path}`, line {line} has a NUL byte, which no text has: save the file as UTF-8.")
    return text


def csv_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file as column to cell, without spaces around either; empty lines are left out.

    Cells are separated by commas or, if the header has more of them, by semicolons.

    Raises:
        FileNotFoundError, ValueError: As `read_text`, and if the table is not well formed; the row is named, counted
            from 1 without the header.
    """
    text = read_text(path)
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(_DELIMITERS, key=header.count)  # the first of equals
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, cells in enumerate(reader, 1):
            if None in cells:
                raise ValueError(
                    f"`{path}`, row {number} has more cells than the header: quote a cell that holds a "
                    f"{_DELIMITERS[delimiter]}."
                )
            yield {(name or "").strip(): (cell or "").strip() for name, cell in cells.items()}
    except csv.Error as error:
        raise ValueError(
            f"`{path}`, row {number + 1} is not CSV ({error}): put quotes around a whole cell, and write a quote in it "
            "twice."
        ) from None
