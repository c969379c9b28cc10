"""The command line `memory-adapters`: a thin layer over the public functions. Needs typer."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_starting", "load_library", "main"]

# A process that runs the command line imports torch and PEFT, which takes seconds, only when a command works: not for
# help, nor for wrong usage. In every other process `import memory_adapters` imports all, and registers with PEFT.
_starting = Path(*sys.argv[:1]).stem == "memory-adapters" or (
    sys.argv[:1] == ["-m"]
    and not {("-m", __name__), ("-m", "memory_adapters")}.isdisjoint(
        zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    )
)


def main() -> None:
    """Run the command line; exits with 0 (done), 1 (failed), 2 (wrong usage), 3 (missed) or 130 (interrupted)."""
    try:
        from memory_adapters.cli.app import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("error: the command line needs typer: run `pip install memory-adapters[cli]`.")
    app()


def is_starting() -> bool:
    """Return whether this process runs the command line, and has not called `load_library` yet."""
    return _starting


def load_library() -> None:
    """Import all of memory-adapters if it is not there yet, without what other packages print when they are imported.

    Raises:
        ImportError: If something is missing; what was printed is shown then.
    """
    global _starting
    if not _starting:
        return
    with _stderr_held_back():
        _starting = False
        try:
            importlib.reload(sys.modules["memory_adapters"])
        except BaseException:
            _starting = True
            raise


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Hold back what any code prints on stderr, C libraries too; after an error it is printed."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            sys.stderr.flush()
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
