"""`memory-adapters compare`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from memory_adapters.cli.baselines import Baselines
from memory_adapters.cli.evaluate import read_judged, read_records, read_things
from memory_adapters.cli.messages import say, wrong
from memory_adapters.cli.run import Run
from memory_adapters.evaluation.comparison.compare import compare as compare_baselines
from memory_adapters.evaluation.comparison.results import Comparison
from memory_adapters.evaluation.plots import comparison_plots
from memory_adapters.evaluation.questions import load_documents
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.choices import Choice, known_choices, load_choices
from memory_adapters.files.text_files import read_text
from memory_adapters.training.distributed import is_main_process

__all__ = ["compare_methods"]

RESULTS = "results"  # folder of the single results


def compare_methods(
    run: Run,
    model: str,
    records: str | None,
    *,
    things: str | None,
    things_limit: int | None,
    methods: str | None,
    settings: Sequence[str],
    starts: Sequence[str],
    limit: int | None,
    fact_counts: Sequence[int],
    max_seconds: float | None,
    documents: str | None,
    documents_limit: int | None,
    portability: str | None,
    portability_limit: int | None,
    choices: str | None,
    choices_limit: int | None,
    fluency: int,
    text: Path | None,
    text_tokens: int,
    folder: Path | None,
    only_stored: bool,
    output: Path | None,
    dtype: str,
    debug: bool,
) -> None:
    """Compare the methods on the facts of records, and save and print what was found."""
    with ExitStack() as stack:
        baselines = Baselines(methods, settings, starts)
        alone = None if records is not None else things  # else they are a task beside the records
        judged, in_own_words = read_judged(records, alone, limit, None if limit is None else max([limit, *fact_counts]))
        given, others = ([], []) if things is None else read_things(things, limit if alone else things_limit)
        asked = None if portability is None else _portability(portability, portability_limit or limit)
        texts = None if documents is None else load_documents(documents, documents_limit)
        questions = None if choices is None else _choices(choices, choices_limit)
        base, tokenizer = run.load_model(model, dtype)
        result = compare_baselines(
            base,
            tokenizer,
            judged,
            baselines.baselines(stack, run.progress),
            num_facts=len(judged) if alone is not None else min(limit or len(judged), len(judged)),
            text=None if text is None else read_text(text),
            max_text_tokens=text_tokens,
            fluency_prompts=fluency,
            choices=questions,
            portability=asked,
            own_words=in_own_words,
            things=given if alone is None or any(thing.consequences for thing in given) else None,
            other_things=others,
            documents=texts,
            fact_counts=fact_counts,
            max_seconds=max_seconds,
            folder=None if folder is None else folder / RESULTS,
            only_stored=only_stored,
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
    """Write comparison.json, .md and .html, and figures if matplotlib is installed."""
    run.save(result.to_dict(), folder / "comparison.json")
    if is_main_process():
        (folder / "comparison.md").write_text(result.markdown(), encoding="utf-8")
        (folder / "comparison.html").write_text(result.html(), encoding="utf-8")
        try:
            comparison_plots(result, folder)
        except ModuleNotFoundError as error:
            say(f"no figures: {error}")
