"""Read NAME=VALUE pairs of the command line: fields of a method's config, and options of its `write`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from memory_adapters.cli.messages import wrong
from memory_adapters.registry import Method, methods

__all__ = ["check_config", "check_names", "method_named", "parse_pairs"]


def method_named(name: str, option: str = "--method") -> Method:
    """Return the registered method of this name; another is wrong usage of `option`."""
    known = methods()
    if name not in known:
        raise wrong(option, f"{name!r} is no method; give one of {', '.join(known)}.")
    return known[name]


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` pairs as a dictionary; a value is JSON or, if it is not, a string."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise wrong(option, f"{pair!r} has no value: write NAME=VALUE.")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def check_names(option: str, owner: str, kind: str, given: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are not known, as wrong usage of `option` that lists those that are."""
    for name in given:
        if name not in known:
            raise wrong(option, f"{owner} has no {kind} `{name}`; it has {', '.join(sorted(known)) or 'none'}.")


def check_config(method: Method, settings: Mapping[str, Any]) -> None:
    """Refuse values that the method's config does not take, as wrong usage of `--set`."""
    try:
        method.config_class(**settings)
    except (TypeError, ValueError) as error:
        raise wrong("--set", str(error)) from None
