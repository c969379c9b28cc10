"""Print tables of text: the first row is the header, the first column names what a row is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import indent

from tabulate import tabulate

__all__ = ["UNKNOWN", "format_table", "table_rows"]

UNKNOWN = "–"
MARKDOWN = "pipe"  # tabulate's name of it


def format_table(rows: Sequence[Sequence[str]], style: str = "plain", *, header: bool = True) -> str:
    """Format rows of cells, the first column to the left and the others to the right.

    Args:
        rows: Rows of as many cells each, at least one beside the header.
        style: `"plain"` for a terminal, `"pipe"` for Markdown, `"html"`.
        header: Whether the first row is the header.
    """
    if style == MARKDOWN:  # HTML is escaped by tabulate
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    headers = "firstrow" if header and style != "plain" else ()  # plain needs no rule below it, nor its padding
    # Cells are formatted already: a number as the text "0.50" must not be shown as 0.5.
    table = tabulate(rows, headers, tablefmt=style, stralign="right", colalign=("left",), disable_numparse=True)
    return indent(table, "  ") if style == "plain" else table


def table_rows(cells: Mapping[str, Mapping[str, str]], columns: Sequence[str]) -> list[list[str]]:
    """Return a header and a row for each of `cells`, name to column to cell; columns without any value are left out."""
    shown = [column for column in columns if any(row.get(column, UNKNOWN) != UNKNOWN for row in cells.values())]
    return [["", *shown], *([name, *(row.get(column, UNKNOWN) for column in shown)] for name, row in cells.items())]
