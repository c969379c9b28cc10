"""The command line `memory-adapters`: a thin layer over the public functions. Needs typer."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits with 0 (done), 1 (failed), 2 (wrong usage), 3 (missed) or 130 (interrupted)."""
    try:
        from memory_adapters.cli.app import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: the command line needs typer: run `pip install memory-adapters[cli]`.")
    app()
