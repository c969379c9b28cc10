"""`memory-adapters evaluate`, and the records that `compare` reads too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory_adapters.cli.messages import wrong
from memory_adapters.cli.run import Run
from memory_adapters.evaluation.edit_report import answer_table, evaluate_edits, item_table, kind_table, score_table
from memory_adapters.evaluation.questions import BUILTIN, Thing, load_things, record_questions, thing_questions
from memory_adapters.evaluation.records import (
    EditRecord,
    load_counterfact,
    load_facts,
    load_zsre,
    without_contradictions,
)
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions
from memory_adapters.files.text_files import read_text
from memory_adapters.inject import load_memory

__all__ = ["evaluate_memory", "read_judged", "read_records"]

_FORMATS = {"CounterFact": load_counterfact, "zsRE": load_zsre, "KnowEdit, EasyEdit or your own facts": load_facts}


def evaluate_memory(
    run: Run,
    model: str,
    adapter: str,
    records: str | None,
    *,
    things: str | None,
    limit: int | None,
    text: Path | None,
    text_tokens: int,
    per_item: bool,
    output: Path | None,
    dtype: str,
) -> None:
    """Score a model on records, or on the facts of things, without and with a memory."""
    judged, questions = read_judged(records, things, limit)
    options: dict[str, Any] = dict(
        text=None if text is None else read_text(text),
        max_text_tokens=text_tokens,
        greedy=False,
        per_item=per_item,
        progress=run.progress,
    )
    base, tokenizer = run.load_model(model, dtype)
    memory = load_memory(base, adapter, tokenizer=tokenizer)
    with memory.disabled():
        without = evaluate_edits(base, tokenizer, judged, own_words=questions, **options)
        questions = questions.with_base_answers(base, tokenizer)
    reports = {"without": without, "with": evaluate_edits(base, tokenizer, judged, own_words=questions, **options)}
    result = {"adapter": adapter, **{name: report.to_dict() for name, report in reports.items()}}
    if output is not None:
        run.save(result, output)
    tables = [f"{len(judged)} facts, scores in %\n{score_table(reports)}", kind_table(reports)]
    tables += [item_table(reports), answer_table(reports)] if per_item else []
    run.show(result, "\n\n".join(filter(None, tables)))


def read_judged(
    records: str | None, things: str | None, limit: int | None, num_records: int | None = None
) -> tuple[list[EditRecord], OwnWordsQuestions]:
    """Read records, or the facts of things, with questions in other words about them and about others.

    Args:
        records: Where records are; None with `things`.
        things: Where things are, or `"builtin"`; None with `records`.
        limit: The first so many records, or things, are judged and asked about; None for all.
        num_records: Read so many records instead.
    """
    if (records is None) == (things is None):
        raise wrong("--things", "give either RECORDS or --things.")
    if records is not None:
        judged = read_records(records, limit if num_records is None else num_records)
        return judged, record_questions(without_contradictions(judged[:limit]))
    given, others = read_things(str(things), limit)
    return [EditRecord(fact.fact) for thing in given for fact in thing.facts], thing_questions(given, others)


def read_things(source: str, limit: int | None) -> tuple[list[Thing], list[Thing]]:
    """Read the first things of a file, all without `limit`, and others to ask about: the rest, and the package's."""
    named = load_things(source)
    given = named[:limit]
    return given, [*named[len(given) :], *(() if source == BUILTIN else load_things())]


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
