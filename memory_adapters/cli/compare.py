"""`memory-adapters compare`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from memory_adapters.cli.baselines import Baselines, baseline_names
from memory_adapters.cli.evaluate import TEXT_TOKENS, read_records, read_text
from memory_adapters.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    RecordsArgument,
    ReportOption,
    TextOption,
    TextTokensOption,
)
from memory_adapters.cli.run import Run, running, say, wrong
from memory_adapters.evaluation.comparison.compare import compare as compare_baselines
from memory_adapters.evaluation.comparison.results import Comparison
from memory_adapters.evaluation.plots import comparison_plots
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.choices import Choice, known_choices, load_choices
from memory_adapters.training.distributed import is_main_process

__all__ = ["compare"]

RESULTS = "results"  # folder of the single results


def compare(
    model: ModelArgument,
    records: RecordsArgument,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"Some of {', '.join(baseline_names())}, separated by commas; nothing always comes first.  [default: "
            "all but those that need a --start which is not given]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.NAME=VALUE",
            help="A field of a method's config, such as memit.precision=bfloat16, an option of its write, or of "
            "the training of lora and full; repeat for several. A method's name sets it for all of its variants.",
        ),
    ] = None,
    starts: Annotated[
        list[str] | None,
        typer.Option(
            "--start",
            metavar="METHOD=ADAPTER",
            help="A saved memory that the method's variants start from, such as a trained slot encoder: a folder or a "
            "Hub id; repeat for several.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Compare on the first N records.  [default: all]")
    ] = None,
    fact_counts: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS",
            help="Curves: score and perplexity with the first so many records, such as 1,10,100, beyond --limit too.",
        ),
    ] = None,
    portability: Annotated[
        str | None,
        typer.Option(
            metavar="RECORDS", help="zsRE with questions about what follows from its facts, written by themselves."
        ),
    ] = None,
    portability_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.  [default: as --limit]")
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Multiple-choice questions for general ability: with question, choices and answer (an index), or "
            "CounterFact's known_1000.json.",
        ),
    ] = None,
    choices_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.  [default: all]")
    ] = None,
    fluency: Annotated[
        int, typer.Option(min=0, metavar="N", help="Generate texts of 100 tokens from N prompts, for fluency.")
    ] = 0,
    text: TextOption = None,
    text_tokens: TextTokensOption = TEXT_TOKENS,
    folder: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            metavar="FOLDER",
            help="Store every result here as soon as it is there, and resume from them; then tables and plots.",
        ),
    ] = None,
    output: ReportOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the methods, and what else gives a model facts, on those of RECORDS.

    Each in turn writes the facts, is scored, and is taken out again; what it costs is measured too. The perplexity is
    on --text, or else on text that the model samples.
    """
    with running(as_json=as_json, quiet=quiet, debug=debug, device=device) as run, ExitStack() as stack:
        baselines = Baselines(methods, settings or [], starts or [])
        counts = _fact_counts(fact_counts)
        judged = read_records(records, None if limit is None else max([limit, *counts]))
        asked = None if portability is None else _portability(portability, portability_limit or limit)
        questions = None if choices is None else _choices(choices, choices_limit)
        base, tokenizer = run.load_model(model, dtype)
        result = compare_baselines(
            base,
            tokenizer,
            judged,
            baselines.baselines(stack, run.progress),
            num_facts=min(limit or len(judged), len(judged)),
            text=read_text(text),
            max_text_tokens=text_tokens,
            fluency_prompts=fluency,
            choices=questions,
            portability=asked,
            fact_counts=counts,
            folder=None if folder is None else folder / RESULTS,
            progress=run.progress,
        )
        if folder is not None:
            _save(run, result, folder)
        if output is not None:
            run.save(result.to_dict(), output)
        run.show(result.to_dict(), repr(result))
        failures = result.failures()
        for where, failed in failures.items() if debug else ():
            say(f"{where}: {failed.traceback}")
        if failures:
            run.missed(f"failed: {'; '.join(failures)}")


def _fact_counts(given: str | None) -> list[int]:
    try:
        counts = [] if given is None else [int(number) for number in given.split(",")]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise wrong("--fact-counts", f"{given!r} must be counts of facts from 1 up, such as 1,10,100.")
    return counts


def _portability(source: str, limit: int | None) -> list[EditRecord]:
    records = read_records(source, limit)
    if not any(record.portability for record in records):
        raise wrong("--portability", f"{source} has no questions about what follows from its facts; give zsRE's.")
    return records


def _choices(source: str, limit: int | None) -> list[Choice]:
    """Read questions in the first format that the file fits."""
    problems = []
    for load in (load_choices, known_choices):
        try:
            found = load(source, limit)
        except ValueError as error:
            problems.append(f"  {error}")
            continue
        if not found:
            raise ValueError(f"`{source}` gives no question: four different attributes of a relation are needed.")
        return found
    raise ValueError("\n".join([f"`{source}` is in none of the formats:", *problems]))


def _save(run: Run, result: Comparison, folder: Path) -> None:
    """Write comparison.json, comparison.md, and figures if matplotlib is installed."""
    run.save(result.to_dict(), folder / "comparison.json")
    if is_main_process():
        (folder / "comparison.md").write_text(result.markdown(), encoding="utf-8")
        try:
            comparison_plots(result, folder)
        except ModuleNotFoundError as error:
            say(f"no figures: {error}")
