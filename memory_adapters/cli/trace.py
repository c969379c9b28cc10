"""`memory-adapters trace`."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from memory_adapters.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    QuietOption,
)
from memory_adapters.cli.run import running
from memory_adapters.evaluation.plots import trace_heatmap
from memory_adapters.files.item_files import read_items
from memory_adapters.items import Fact
from memory_adapters.memit.tracing import load_known_facts, trace_facts
from memory_adapters.training.distributed import is_main_process

__all__ = ["trace"]

LAYERS_TO_EDIT = 5


def trace(
    model: ModelArgument,
    facts: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="FACTS",
            help='A .json list or a .jsonl file of {"prompt", "subject", "target"}, or known_1000.json of the paper.',
        ),
    ],
    output: Annotated[Path, typer.Option(dir_okay=False, metavar="FILE.json", help="Where to save the table.")],
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE.png", help="Also draw it (.png, .svg, .pdf).")
    ] = None,
    limit: LimitOption = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Draws of the noise a fact.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="Trace also facts that the model does not know.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the layers where MODEL recalls facts.

    By causal tracing; on a CPU a fact takes minutes.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        traced = _facts(facts)[:limit]
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("`--plot` needs matplotlib: run `pip install memory-adapters[plots]`.")
        base, tokenizer = run.load_model(model, dtype)
        table = trace_facts(base, tokenizer, traced, samples=samples, only_known=not every, progress=run.progress)
        layers = table.recommended_layers(min(LAYERS_TO_EDIT, table.effects["mlp"].shape[1]))
        result = {**table.to_dict(), "recommended_layers": layers}
        if is_main_process():
            output.parent.mkdir(parents=True, exist_ok=True)
            table.save(output)
            if plot is not None:
                plot.parent.mkdir(parents=True, exist_ok=True)
                trace_heatmap(table, plot)
        files = " and ".join(str(file) for file in (output, plot) if file is not None)
        run.show(result, f"{table}\nlayers to edit: {layers}\nsaved in {files}")


def _facts(path: Path) -> list[Fact]:
    with suppress(ValueError):
        return load_known_facts(path)
    items = read_items(path)
    facts = [item for item in items if isinstance(item, Fact)]
    if len(facts) < len(items):
        raise ValueError(
            f"`{path}` holds a {next(type(i).__name__ for i in items if i not in facts)}; tracing takes facts."
        )
    return facts
