"""`memory-adapters covariance`."""

from __future__ import annotations

import json
import time
from pathlib import Path

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.run import Run
from memory_adapters.memit import CovarianceFitter, MemitConfig
from memory_adapters.training.distributed import is_main_process
from memory_adapters.validation import checked_layers

__all__ = ["fit_covariance"]


def fit_covariance(
    run: Run,
    model: str,
    texts: Path | None,
    output: Path,
    *,
    tokens: int,
    layers: str | None,
    checkpoint: Path | None,
    push: str | None,
    private: bool,
    dtype: str,
) -> None:
    """Fit the covariance of a model's ordinary keys, and save it."""
    start = time.perf_counter()
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
