"""`memory-adapters trace` and `covariance`: what is good to know before an edit."""

from __future__ import annotations

import importlib.util
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from memory_adapters import CovarianceFitter, Fact, MemitConfig
from memory_adapters.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    PrivateOption,
    PushOption,
    QuietOption,
)
from memory_adapters.cli.run import running, wrong
from memory_adapters.config import checked_layers
from memory_adapters.knowledge import read_items
from memory_adapters.memit.tracing import load_known_facts, trace_facts
from memory_adapters.plots import trace_heatmap
from memory_adapters.processes import is_first

__all__ = ["covariance", "trace"]

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
        if is_first():
            output.parent.mkdir(parents=True, exist_ok=True)
            table.save(output)
            if plot is not None:
                plot.parent.mkdir(parents=True, exist_ok=True)
                trace_heatmap(table, plot)
        files = " and ".join(str(file) for file in (output, plot) if file is not None)
        run.show(result, f"{table}\nlayers to edit: {layers}\nsaved in {files}")


def covariance(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option(dir_okay=False, metavar="FILE", help="Where to save it, such as c0.safetensors.")
    ],
    texts: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="TEXTS",
            help="A text file, a paragraph a line.  [default: text that the model samples]",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to read or sample.")
    ] = MemitConfig.covariance_tokens,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Blocks, as 6,7,8, or a range of depth, as 0.2,0.35.  [default: those MemitConfig edits]",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, metavar="FILE", help="With TEXTS: keep the state here, and go on from it if it exists."
        ),
    ] = None,
    push: PushOption = None,
    private: PrivateOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit the covariance that `write --covariance` takes.

    It is of the keys that MODEL has in ordinary text: what an edit by memit must leave alone.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        start = time.perf_counter()
        if checkpoint is not None and texts is None:
            raise wrong("--checkpoint", "it is for TEXTS, which are not given.")
        if private and push is None:
            raise wrong("--private", "it is for --push, which is not given.")
        chosen = _layers(layers)
        base, tokenizer = run.load_model(model, dtype)
        fitter = CovarianceFitter(base, tokenizer, chosen)
        if texts is None:
            fitter.sample(tokens, progress=run.progress)
        else:
            fitter.fit(texts, tokens, checkpoint=checkpoint, progress=run.progress)
        found, commit = fitter.covariance(), None
        if is_first():
            found.save(output)
            commit = None if push is None else found.push_to_hub(push, private=private or None)
        result = {
            "layers": sorted(found.matrices),
            "num_tokens": found.num_tokens,
            "num_texts": found.num_texts,
            "source": found.source,
            "seconds": time.perf_counter() - start,
            "output": str(output),
            "commit": commit,
        }
        said = f"{found}\n{result['seconds']:.1f} seconds\nsaved in {output}"
        run.show(result, said + ("" if commit is None else f"\npushed: {commit}"))


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


def _layers(given: str | None) -> list[int | float]:
    if given is None:
        return checked_layers(MemitConfig.layers)
    try:
        return checked_layers(json.loads(f"[{given}]"))
    except ValueError:
        raise wrong("--layers", f"{given!r} must be blocks, as 6,7,8, or a range of depth, as 0.2,0.35.") from None
