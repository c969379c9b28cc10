"""`memory-adapters evaluate`, and the records and texts that `compare` reads too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from memory_adapters.cli.run import running
from memory_adapters.evaluation.edit_report import evaluate_edits, score_table
from memory_adapters.evaluation.records import EditRecord, load_counterfact, load_facts, load_zsre
from memory_adapters.inject import load_memory

__all__ = ["evaluate", "read_records", "read_text"]

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
        judged = read_records(records, limit)
        options: dict[str, Any] = dict(
            text=read_text(text), max_text_tokens=text_tokens, greedy=False, progress=run.progress
        )
        base, tokenizer = run.load_model(model, dtype)
        memory = load_memory(base, adapter, tokenizer=tokenizer)
        with memory.disabled():
            without = evaluate_edits(base, tokenizer, judged, **options)
        reports = {"without": without, "with": evaluate_edits(base, tokenizer, judged, **options)}
        result = {"adapter": adapter, **{name: report.to_dict() for name, report in reports.items()}}
        if output is not None:
            run.save(result, output)
        run.show(result, f"{len(judged)} facts, scores in %\n{score_table(reports)}")


def read_records(source: str, limit: int | None) -> list[EditRecord]:
    """Read records in the first format that their first row fits."""
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


def read_text(file: Path | None) -> str | None:
    """Read a text file, if there is one."""
    return None if file is None else file.read_text(encoding="utf-8")
