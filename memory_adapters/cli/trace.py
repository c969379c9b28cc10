"""`memory-adapters trace`."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

from memory_adapters.cli.run import Run
from memory_adapters.evaluation.plots import trace_heatmap
from memory_adapters.files.item_files import read_items
from memory_adapters.items import Fact
from memory_adapters.memit.tracing import load_known_facts, trace_facts
from memory_adapters.training.distributed import is_main_process

__all__ = ["trace_layers"]

LAYERS_TO_EDIT = 5


def trace_layers(
    run: Run,
    model: str,
    facts: Path,
    output: Path,
    *,
    plot: Path | None,
    limit: int | None,
    samples: int,
    every: bool,
    dtype: str,
) -> None:
    """Find the layers where a model recalls the facts of a file."""
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
