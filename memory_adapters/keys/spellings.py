"""Find where names stand in rows of tokens, spelled out in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Spellings"]


class Spellings:
    """Know the token ids of names, and find them in rows; how many there are matters little.

    Args:
        spellings: Pairs of a name's index and token ids.
    """

    def __init__(self, spellings: Iterable[tuple[int, Sequence[int]]]) -> None:
        self._by_last: dict[int, list[tuple[int, list[int]]]] = {}
        for name, ids in spellings:
            if ids:
                self._by_last.setdefault(ids[-1], []).append((name, list(ids)))

    def found(self, row: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield the index of each name that stands in a row, and its first and last token there, in reading order."""
        for last, token in enumerate(row):
            for name, ids in self._by_last.get(token, ()):
                first = last + 1 - len(ids)
                if first >= 0 and list(row[first : last + 1]) == ids:
                    yield name, first, last
