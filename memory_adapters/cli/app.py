"""Gather the commands in one program."""

from __future__ import annotations

from typing import Annotated

import typer

import memory_adapters
from memory_adapters.cli.commands import compare, covariance, demo, evaluate, export, info, trace, write

__all__ = ["app"]

app = typer.Typer(
    name="memory-adapters",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but not as well as asked, 130 interrupted.",
)
for command in (write, evaluate, compare, trace, covariance, export, info, demo):
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"memory-adapters {memory_adapters.__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Write knowledge for frozen language models, measure, save and share it."""
