"""`memory-adapters evaluate`, `compare`, `trace` and `covariance`."""

from __future__ import annotations

import importlib.util
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from memory_adapters import CovarianceFitter, Fact, MemitConfig, load_memory
from memory_adapters.cli.adapters import CONFIGS, parsed_settings, write_options
from memory_adapters.cli.options import (
    AdapterArgument,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    PrivateOption,
    PushOption,
    QuietOption,
    RecordsArgument,
    ReportOption,
    TextOption,
    TextTokensOption,
)
from memory_adapters.cli.run import running, wrong
from memory_adapters.config import checked_layers
from memory_adapters.evaluation import comparison
from memory_adapters.evaluation.records import EditRecord, load_counterfact, load_facts, load_zsre
from memory_adapters.evaluation.report import evaluate_edits
from memory_adapters.knowledge import read_items
from memory_adapters.memit.tracing import load_known_facts, trace_facts
from memory_adapters.plots import trace_heatmap
from memory_adapters.processes import is_first

__all__ = ["compare", "covariance", "evaluate", "trace"]

TEXT_TOKENS = 10_000
LAYERS_TO_EDIT = 5
_FORMATS = {"CounterFact": load_counterfact, "zsRE": load_zsre, "your own facts": load_facts}


def evaluate(
    model: ModelArgument,
    adapter: AdapterArgument,
    records: RecordsArgument,
    limit: LimitOption = None,
    text: TextOption = None,
    text_tokens: TextTokensOption = TEXT_TOKENS,
    output: ReportOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Score MODEL on RECORDS without and with the memory ADAPTER.

    ES, PS, NS: share of prompts, paraphrases and neighbours on which the wanted answer is likelier than the other; S: their
    harmonic mean; exact: greedy decoding gives the target. All in % (in JSON: shares in [0, 1]).
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        judged = _records(records, limit)
        options: dict[str, Any] = dict(
            text=_text(text), max_text_tokens=text_tokens, greedy=False, progress=run.progress
        )
        base, tokenizer = run.load_model(model, dtype)
        memory = load_memory(base, adapter, tokenizer=tokenizer)
        with memory.disabled():
            without = evaluate_edits(base, tokenizer, judged, **options)
        reports = {"without": without, "with": evaluate_edits(base, tokenizer, judged, **options)}
        result = {"adapter": adapter, **{name: report.to_dict() for name, report in reports.items()}}
        if output is not None:
            run.save(result, output)
        run.show(result, f"{len(judged)} facts, scores in %\n{comparison.aligned(comparison.score_table(reports))}")


def compare(
    model: ModelArgument,
    records: RecordsArgument,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="Which methods, in which order, separated by commas.")
    ] = ",".join(CONFIGS),
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.FIELD=VALUE",
            help="A field of a method's config, such as memit.precision=bfloat16; repeat for several.",
        ),
    ] = None,
    limit: LimitOption = None,
    text: TextOption = None,
    text_tokens: TextTokensOption = TEXT_TOKENS,
    output: ReportOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the facts of RECORDS with each method in turn, and compare the scores.

    Each memory is taken out again; none is saved. The perplexity is on --text, or else on text that the model samples. Scores
    as in `evaluate`.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run:
        names = [name.strip() for name in methods.split(",")]
        if not set(names) <= set(CONFIGS) or len(set(names)) < len(names):
            raise wrong("--methods", f"{methods!r} must name some of {', '.join(CONFIGS)}, each once.")
        own: dict[str, list[str]] = {name: [] for name in names}
        for pair in settings or []:
            name, _, field = pair.partition(".")
            if name not in own:
                raise wrong("--set", f"{pair!r} must begin with one of {', '.join(names)} and a dot.")
            own[name].append(field)
        configs = {name: CONFIGS[name](**parsed_settings(CONFIGS[name], pairs)) for name, pairs in own.items()}
        judged = _records(records, limit)
        base, tokenizer = run.load_model(model, dtype)
        result = comparison.compare(
            base,
            tokenizer,
            judged,
            configs,
            text=_text(text),
            max_text_tokens=text_tokens,
            write_settings={name: write_options(name, run.progress) for name in names},
            progress=run.progress,
        )
        if output is not None:
            run.save(result.to_dict(), output)
        run.show(result.to_dict(), repr(result))


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
    """Find the layers where MODEL recalls facts, by causal tracing. On a CPU a fact takes minutes."""
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
            metavar="[TEXTS]",
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
    """Compute what MODEL's memit edits must leave alone: the covariance of ordinary keys, for `write --covariance`."""
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


def _records(source: str, limit: int | None) -> list[EditRecord]:
    """Records in the first format that their first row fits."""
    problems = []
    for name, load in _FORMATS.items():
        try:
            load(source, 1)
        except ValueError as error:
            problems.append(f"  {name}: {error}")
            continue
        found = load(source, limit)
        if not found:
            raise ValueError(f"`{source}` holds no record: give at least one.")
        return found
    raise ValueError("\n".join([f"`{source}` is in none of the formats:", *problems]))


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


def _text(file: Path | None) -> str | None:
    return None if file is None else file.read_text(encoding="utf-8")
