"""`memory-adapters evaluate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memory_adapters import load_memory
from memory_adapters.cli.adapters import CONFIGS, parsed_settings, write_options
from memory_adapters.cli.options import (
    AdapterArgument,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    QuietOption,
    RecordsArgument,
    ReportOption,
    TextOption,
    TextTokensOption,
)
from memory_adapters.cli.run import running, wrong
from memory_adapters.evaluation import comparison
from memory_adapters.evaluation.records import EditRecord, load_counterfact, load_facts, load_zsre
from memory_adapters.evaluation.report import evaluate_edits

__all__ = ["compare", "evaluate"]

TEXT_TOKENS = 10_000
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

    ES, PS, NS: share of prompts, paraphrases and neighbours on which the wanted answer is likelier than the other; S:
    their harmonic mean; exact: greedy decoding gives the target. All in % (in JSON: shares in [0, 1]).
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
    """Compare the methods on the facts of RECORDS.

    Each method in turn writes the facts; its memory is scored as by `evaluate`, and taken out again. The perplexity is
    on --text, or else on text that the model samples.
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


def _text(file: Path | None) -> str | None:
    return None if file is None else file.read_text(encoding="utf-8")
