"""`memory-adapters covariance`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from memory_adapters.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PrivateOption,
    PushOption,
    QuietOption,
)
from memory_adapters.cli.run import running, wrong
from memory_adapters.memit import CovarianceFitter, MemitConfig
from memory_adapters.training.distributed import is_main_process
from memory_adapters.validation import checked_layers

__all__ = ["covariance"]


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
    """Fit the covariance that `write --option covariance=FILE` takes.

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
        if is_main_process():
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


def _layers(given: str | None) -> list[int | float]:
    if given is None:
        return checked_layers(MemitConfig.layers)
    try:
        return checked_layers(json.loads(f"[{given}]"))
    except ValueError:
        raise wrong("--layers", f"{given!r} must be blocks, as 6,7,8, or a range of depth, as 0.2,0.35.") from None
