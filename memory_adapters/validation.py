"""Checks of values that users and files give, with errors that name the argument, the value and the remedy."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

__all__ = [
    "check_choice",
    "check_fingerprint_fields",
    "check_flag",
    "check_name",
    "check_number",
    "check_path",
    "checked_layers",
    "cut",
    "shown",
]

LARGEST_INTEGER = 1 << 53
LARGEST_NUMBER = sys.float_info.max
LONGEST_NAME = 4096


def check_number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = float("inf"),
    integer: bool = False,
    open_low: bool = False,
) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is a number in [low, high] (or (low, high])."""
    number = isinstance(value, int) or (isinstance(value, float) and not integer)
    largest = LARGEST_INTEGER if integer else LARGEST_NUMBER
    valid = number and not isinstance(value, bool) and max(low, -largest) <= value <= min(high, largest)
    if not valid or (open_low and value == low):
        bounds = ["an integer" if integer else "a finite number"]
        bounds += [] if low == float("-inf") else [f"above {low}" if open_low else f"at least {low}"]
        bounds += [f"and at most {min(high, largest)}"] if high < largest or (number and value > largest) else []
        raise ValueError(f"`{name}` must be {' '.join(bounds)}, got {shown(value)}.")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {shown(value)}.")


def check_flag(name: str, value: object) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")


def check_name(name: str, value: object) -> None:
    """Raise a `ValueError` naming config field `name` unless `value` is None or a name: text on one line."""
    if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= LONGEST_NAME):
        raise ValueError(f"`{name}` must be a name of printable characters, got {shown(value)}.")


def check_path(name: str, value: object) -> None:
    """Raise a `TypeError` or `ValueError` naming argument `name` unless `value` is a path that is not empty."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{name}` must be a path, got {shown(value)}.")
    if not os.fspath(value) or "\0" in str(os.fspath(value)):
        raise ValueError(f"`{name}` must be the path of a folder, got {shown(value)}.")


def check_fingerprint_fields(name: str, value: object) -> None:
    """Raise a `ValueError` naming `name` unless `value` maps names to texts or whole numbers."""
    entries = value.items() if isinstance(value, dict) and len(value) <= 64 else [(None, None)]
    if not all(isinstance(key, str) and len(key) <= 100 and _is_label(entry) for key, entry in entries):
        raise ValueError(f"`{name}` must have a text or a whole number for each of its names, got {shown(value)}.")


def _is_label(value: object) -> bool:
    return value is None or type(value) is int or (isinstance(value, str) and len(value) <= 1000)


def shown(value: object) -> str:
    """Return `repr(value)` for an error message, cut where it is long."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Return text for an error message, cut where it is long."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def checked_layers(layers: Any) -> list[int | float]:
    """Return `layers` as a list of ints, or of one or two floats (a list, because configs are saved as JSON).

    Raises:
        ValueError: If it is neither.
    """
    listed = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [layers]
    indices = all(type(layer) is int for layer in listed)
    depths = all(isinstance(x, float) and 0 <= x <= 1 for x in listed) and len(listed) <= 2 and listed == sorted(listed)
    if not listed or not (indices or depths):
        raise ValueError(
            "`layers` must be block indices such as [7, 8], a depth such as 0.25, or a range such as (0.7, 0.8), "
            f"got {shown(layers)}."
        )
    return listed
