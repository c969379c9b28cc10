"""Run a command, and end the program with an exit code. Imports the library only when a command works."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import typer

from memory_adapters.cli import load_library
from memory_adapters.cli.messages import say

if TYPE_CHECKING:
    from memory_adapters.cli.run import Run

__all__ = ["running"]

_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)  # whose messages need no traceback


@contextmanager
def running(*, as_json: bool, quiet: bool, debug: bool, device: str = "cpu") -> Iterator[Run]:
    """Print to stderr within this context, and end the program with an exit code after a failure.

    Under `accelerate launch` or `torchrun` the processes work together, and only the first prints.
    """
    try:
        load_library()
        from memory_adapters.cli.run import started

        with started(as_json=as_json, quiet=quiet, device=device) as run, redirect_stdout(sys.stderr):
            yield run
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        kind = "" if isinstance(error, _EXPECTED) and str(error) else f"{type(error).__name__}: "
        say(f"error: {kind}{error}{notes}" + ("" if debug or not kind else " (--debug shows where)"))
        raise typer.Exit(1) from None
