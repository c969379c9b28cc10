"""What commands say on stderr, and of wrong usage. Needs no torch before a command works."""

from __future__ import annotations

import sys

import typer

from memory_adapters.cli import is_starting

__all__ = ["say", "wrong"]


def wrong(option: str, why: str) -> typer.BadParameter:
    """Return the error for wrong usage of an option or argument: exit code 2."""
    return typer.BadParameter(why, param_hint=option)


def say(message: str) -> None:
    """Print a line on stderr."""
    who = ""
    if not is_starting():
        from accelerate import PartialState

        from memory_adapters.training.distributed import is_main_process

        who = "" if is_main_process() else f"process {PartialState().process_index}: "  # type: ignore[has-type]  # set in untyped code
    print(f"{who}{message}", file=sys.stderr)
