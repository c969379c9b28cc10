"""Give a model the same facts by several baselines, one after the other, and measure scores and costs."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.baselines import Baseline, Unchanged, WrittenMemory
from memory_adapters.evaluation.comparison.results import NOTHING, Comparison, MethodResult
from memory_adapters.evaluation.comparison.stored_results import StoredResults
from memory_adapters.evaluation.comparison.tasks import Curve, Documents, Full, Portability, Task, Things
from memory_adapters.evaluation.questions import DocumentQuestions, Thing
from memory_adapters.evaluation.records import EditRecord, without_contradictions
from memory_adapters.evaluation.scores.choices import Choice
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions

__all__ = ["NOTHING", "Comparison", "MethodResult", "compare"]

UNMEASURED = "not measured yet"


@dataclass(frozen=True)
class _Part:
    """Name one write: a task by a baseline."""

    name: str
    baseline: Baseline
    task: Task

    @property
    def label(self) -> str:
        return f"{self.name}-{self.task.kind}-{len(self.task.records)}"

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on."""
        base = base_model(self.task.model)
        return {
            "model": {**base_fingerprint(base), "dtype": str(base.dtype), "device": base.device.type},
            "adapters": list(getattr(base, "peft_config", {})),
            "baseline": self.baseline.settings(),
            **self.task.settings(),
        }

    def measure(self) -> MethodResult:
        """Measure; a baseline that fails gives a result with the reason. What fails without one raises."""
        try:
            return self.task.measure(self.baseline)
        except Exception as error:
            if isinstance(self.baseline, Unchanged):
                raise
            return MethodResult(failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    baselines: Mapping[str, Baseline | MemoryConfig],
    *,
    num_facts: int | None = None,
    text: str | Sequence[str] | None = None,
    max_text_tokens: int | None = None,
    greedy: bool = True,
    fluency_prompts: int = 0,
    choices: Sequence[Choice] | None = None,
    portability: Sequence[EditRecord] | None = None,
    own_words: OwnWordsQuestions | None = None,
    things: Sequence[Thing] | None = None,
    other_things: Sequence[Thing] = (),
    documents: Sequence[DocumentQuestions] | None = None,
    costs: bool = True,
    fact_counts: Sequence[int] = (),
    max_seconds: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    only_stored: bool = False,
    progress: bool = True,
) -> Comparison:
    """Score the model, then give it the records' facts by each baseline in turn, score, and take them out again.

    Every baseline gets all facts in one write. Of records that contradict each other the first counts, and a warning
    says how many are left out. A baseline that does not fit the model or tokenizer is refused before anything is
    measured. A baseline that fails while it is measured has the reason in its result, and the others go on. The model
    is left as it was, also on failure and interruption.

    Args:
        model: A causal LM; memories that are active on it stay active, and belong to the base.
        tokenizer: Its tokenizer.
        records: Facts, with the prompts to judge them by.
        baselines: Name to a baseline, or to the config of a memory; the same method may come several times with
            other settings. `Unchanged` comes by itself, as `"nothing"`.
        num_facts: The first so many are compared in full; None for all. `fact_counts` may go beyond.
        text: Unrelated text for the perplexity, and the KL to the base on its first 2,048 tokens; None for the held-out
            sentences that `WriteReport` is about, without KL.
        max_text_tokens: Most tokens of it that are read; None for all.
        greedy: Decode greedily after each prompt and paraphrase, and look for the target.
        fluency_prompts: Generate a text of 100 tokens from so many prompts, for fluency.
        choices: Multiple-choice questions, for general ability.
        portability: Records with questions about what follows from their facts, which are written by themselves,
            without what contradicts earlier ones.
        own_words: Questions in other words about the facts compared in full, and about other things, to ask in the
            chat template; see `evaluation.questions.record_questions`.
        things: Things with several facts each, which are written by themselves, and asked about in the chat template,
            with what follows from their facts; see `evaluation.questions.load_things`.
        other_things: Things that are not written, about which is asked too.
        documents: Texts, which are written by themselves, and asked about in the chat template.
        costs: Measure bytes on disk, speed and forgetting too.
        fact_counts: Curves: the first so many records, for each count, without what contradicts earlier ones; scores of
            at most 1,000 of them, and perplexity.
        max_seconds: Leave out a count of facts that a baseline would take longer to write, by the seconds a fact of its
            next smaller count; the reason is in the result. None to write every count.
        folder: Where to store each result as soon as it is there, a JSON file a write. A second call with the same
            settings reads them instead of measuring again; what failed is tried again.
        only_stored: Measure nothing: what is not in `folder` yet is left out, and the result says so.
        progress: Show bars. Those of a memory's `write` are turned off by `WrittenMemory`'s `write_options`.

    Raises:
        ValueError: If there is no record, a count of facts is out of range, `portability` has no questions, another
            baseline than `Unchanged` is called `"nothing"`, `folder` holds results of other settings, `only_stored`
            lacks one with the results of the model alone, or as `inject_memory`.
        TypeError: If a config is of no memory method.
    """
    if not records:
        raise ValueError("`records` is empty: give at least one EditRecord.")
    compared, counted = _consistent(records, num_facts, fact_counts)
    if portability is not None and not any(record.portability for record in portability):
        raise ValueError("`portability` has no record with questions of its own: give those of zsRE, or None.")
    named = {name: one if isinstance(one, Baseline) else WrittenMemory(one) for name, one in baselines.items()}
    if not isinstance(named.setdefault(NOTHING, Unchanged()), Unchanged):
        raise ValueError(f"`baselines` calls a {type(named[NOTHING]).__name__} {NOTHING!r}, the name of the base.")
    named = {NOTHING: named[NOTHING], **named}
    for baseline in named.values():
        baseline.check(model, tokenizer)
    base: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    shown = {**base, "progress": progress}
    scored = {**shown, "text": text, "max_text_tokens": max_text_tokens}
    full = Full(
        records=compared,
        greedy=greedy,
        fluency_prompts=fluency_prompts,
        choices=choices,
        own_words=own_words,
        costs=costs,
        **scored,
    )
    others: list[Task] = [
        Portability(records=without_contradictions(portability or ()), **shown),
        Things(records=things or (), others=other_things, **base),
        Documents(records=documents or (), **base),
    ]
    curves = [Curve(records=counted[number], **scored) for number in sorted({*counted} - {len(compared)})]
    tasks: list[Task] = [full, *(task for task in others if task.records), *curves]
    parts = [_Part(name, baseline, task) for task in tasks for name, baseline in named.items()]
    found: dict[str, MethodResult] = {}
    stored = None if folder is None else StoredResults(folder)
    if stored is not None:
        known = {part.label: stored.read(part.label, part.settings()) for part in parts}
        found = {label: MethodResult.from_dict(values) for label, values in known.items() if values is not None}
    missing = [part for part in parts if part.label not in found]
    with tqdm(missing, desc="comparing", unit="write", disable=not progress) as bar:
        for part in bar:
            bar.set_postfix_str(part.label)
            if why := _too_long(part, parts, found, max_seconds) or (UNMEASURED if only_stored else None):
                found[part.label] = MethodResult(skipped=why)
                continue
            found[part.label] = result = part.measure()
            if stored is not None and result.failed is None:
                stored.save(part.label, part.settings(), asdict(result))
    if found[parts[0].label].report is None:
        raise ValueError(
            f"`folder` ({folder}) has no {parts[0].label}.json, the result of the model alone: call without "
            "`only_stored` first."
        )
    return _assembled(parts, found, len(compared), [*counted])


def _consistent(
    records: Sequence[EditRecord], num_facts: int | None, fact_counts: Sequence[int]
) -> tuple[list[EditRecord], dict[int, list[EditRecord]]]:
    """Return the records that are compared in full, and those of each curve, without what contradicts earlier ones."""
    count = len(records) if num_facts is None else num_facts
    for argument, number in [("num_facts", count), *(("fact_counts", number) for number in fact_counts)]:
        if not 1 <= number <= len(records):
            raise ValueError(
                f"`{argument}` has {number}: it must be at least 1 and at most {len(records)}, as there are records."
            )
    compared = without_contradictions(records[:count])
    counted = {len(own): own for own in (without_contradictions(records[:number]) for number in fact_counts)}
    most = max([count, *fact_counts])
    if left_out := most - max([len(compared), *counted]):
        warnings.warn(f"{left_out} of {most} records contradict earlier ones, and are left out.", stacklevel=3)
    return compared, counted


def _too_long(
    part: _Part, parts: Sequence[_Part], results: Mapping[str, MethodResult], most: float | None
) -> str | None:
    """Return why a write of a curve would take more than `most` seconds, by what fewer facts took; None if not."""
    if part.task.kind != "curve" or most is None or isinstance(part.baseline, Unchanged):
        return None
    number = len(part.task.records)
    same = [other for other in parts if other.name == part.name and isinstance(other.task, Curve)]
    found = [(len(one.task.records), results.get(one.label)) for one in same]
    timed = [(n, r.costs.seconds) for n, r in found if r is not None and r.costs is not None and n < number]
    if not timed:
        if any(r is not None and r.skipped not in (None, UNMEASURED) for n, r in found if n < number):
            return "fewer facts would take too long already"
        return None
    most_written, seconds = max(timed)
    expected = seconds * number / most_written
    if expected <= most:
        return None
    return f"{most_written:,} facts took {seconds:,.0f} s; so many would take about {expected:,.0f} s"


def _assembled(
    parts: Sequence[_Part], found: Mapping[str, MethodResult], count: int, fact_counts: Sequence[int]
) -> Comparison:
    methods: dict[str, MethodResult] = {}
    curves: dict[str, dict[int, MethodResult]] = {}
    for part in parts:
        task, result = part.task, found[part.label]
        if task.kind == "full":
            methods[part.name] = result
        elif task.kind != "curve":
            methods[part.name] = _with_task(methods[part.name], task, result)
        if isinstance(task, Curve) and len(task.records) in fact_counts:
            curves.setdefault(part.name, {})[len(task.records)] = result
    return Comparison(count, methods, {name: dict(sorted(line.items())) for name, line in curves.items()})


def _with_task(whole: MethodResult, task: Task, result: MethodResult) -> MethodResult:
    """Return a baseline's whole result with that of a task, and why it has none."""
    skipped = [whole.skipped, result.skipped and f"{task.kind}: {result.skipped}"]
    return replace(
        whole,
        failed=whole.failed or (result.failed and f"{task.kind}: {result.failed}"),
        traceback=whole.traceback or result.traceback,
        skipped="; ".join(filter(None, skipped)) or None,
        **task.found(result),
    )
