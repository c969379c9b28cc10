"""Give a model the same facts by several baselines, one after the other, and measure scores and costs."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import base_model
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.sampling import HELD_OUT_SENTENCES
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison.baselines import Baseline, Unchanged, WrittenMemory
from memory_adapters.evaluation.comparison.costs import (
    applied_at_cost,
    bytes_on_disk,
    seconds_to_forget,
    slowdown,
    speed_prompt,
    speeds,
)
from memory_adapters.evaluation.comparison.results import NOTHING, Comparison, MethodResult
from memory_adapters.evaluation.comparison.stored_results import StoredResults, digest
from memory_adapters.evaluation.edit_report import evaluate_edits
from memory_adapters.evaluation.questions import DocumentQuestions, Thing, thing_questions
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.choices import Choice, choice_accuracy
from memory_adapters.evaluation.scores.generation import fluency, generate_texts
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions, score_own_words
from memory_adapters.evaluation.scores.perplexity import predictions
from memory_adapters.items import Document, as_items

__all__ = ["NOTHING", "Comparison", "MethodResult", "compare"]

KL_TOKENS = 2048  # on which predictions of the base are kept, in half precision


@dataclass(frozen=True)
class _Part:
    """Name one write of one baseline. Its kind is `"full"`, `"portability"`, `"things"`, `"documents"` or `"curve"`."""

    name: str
    kind: str
    baseline: Baseline
    records: Sequence[Any]  # things; texts with their questions, of documents; else edits

    @property
    def label(self) -> str:
        return f"{self.name}-{self.kind}-{len(self.records)}"


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

    Every baseline gets all facts in one write. A baseline that does not fit the model or tokenizer is refused before
    anything is measured. A baseline that fails while it is measured has the reason in its result, and the others go on.
    The model is left as it was, also on failure and interruption.

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
        portability: Records with questions about what follows from their facts, which are written by themselves.
        own_words: Questions in other words about the facts compared in full, and about other things, to ask in the
            chat template; see `evaluation.questions.record_questions`.
        things: Things with several facts each, which are written by themselves, and asked about in the chat template,
            with what follows from their facts; see `evaluation.questions.load_things`.
        other_things: Things that are not written, about which is asked too.
        documents: Texts, which are written by themselves, and asked about in the chat template.
        costs: Measure bytes on disk, speed and forgetting too.
        fact_counts: Curves: the first so many records, for each count; scores and perplexity alone.
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
    count = len(records) if num_facts is None else num_facts
    for argument, number in [("num_facts", count), *(("fact_counts", number) for number in fact_counts)]:
        if not 1 <= number <= len(records):
            raise ValueError(
                f"`{argument}` has {number}: it must be at least 1 and at most {len(records)}, as there are records."
            )
    if portability is not None and not any(record.portability for record in portability):
        raise ValueError("`portability` has no record with questions of its own: give those of zsRE, or None.")
    named = {name: one if isinstance(one, Baseline) else WrittenMemory(one) for name, one in baselines.items()}
    if not isinstance(named.setdefault(NOTHING, Unchanged()), Unchanged):
        raise ValueError(f"`baselines` calls a {type(named[NOTHING]).__name__} {NOTHING!r}, the name of the base.")
    named = {NOTHING: named[NOTHING], **named}
    for baseline in named.values():
        baseline.check(model, tokenizer)
    tasks = {"portability": portability, "things": things, "documents": documents}
    parts = _parts(named, records, count, tasks, fact_counts)
    measured = _Measurement(
        model,
        tokenizer,
        text,
        max_text_tokens,
        greedy,
        fluency_prompts,
        choices,
        own_words,
        thing_questions(things, other_things) if things else None,
        costs,
        progress,
    )
    found: dict[str, MethodResult] = {}
    stored = None if folder is None else StoredResults(folder)
    if stored is not None:
        known = {part.label: stored.read(part.label, measured.settings(part)) for part in parts}
        found = {label: MethodResult.from_dict(values) for label, values in known.items() if values is not None}
    missing = [part for part in parts if part.label not in found]
    with tqdm(missing, desc="comparing", unit="write", disable=not progress) as bar:
        for part in bar:
            bar.set_postfix_str(part.label)
            if why := "not measured yet" if only_stored else _too_long(part, parts, found, max_seconds):
                found[part.label] = MethodResult(skipped=why)
                continue
            found[part.label] = result = measured.measure(part)
            if stored is not None and result.failed is None:
                stored.save(part.label, measured.settings(part), asdict(result))
    if found[parts[0].label].report is None:
        raise ValueError(
            f"`folder` ({folder}) has no {parts[0].label}.json, the result of the model alone: call without "
            "`only_stored` first."
        )
    return _assembled(parts, found, count, fact_counts)


def _parts(
    named: Mapping[str, Baseline],
    records: Sequence[EditRecord],
    count: int,
    tasks: Mapping[str, Sequence[Any] | None],
    fact_counts: Sequence[int],
) -> list[_Part]:
    """Return all that is to be measured, the first `count` records by each baseline first."""
    parts = [_Part(name, "full", one, records[:count]) for name, one in named.items()]
    parts += [_Part(name, kind, one, given) for kind, given in tasks.items() if given for name, one in named.items()]
    rising = [number for number in sorted(set(fact_counts)) if number != count]
    return parts + [_Part(name, "curve", one, records[:number]) for number in rising for name, one in named.items()]


def _too_long(
    part: _Part, parts: Sequence[_Part], results: Mapping[str, MethodResult], most: float | None
) -> str | None:
    """Return why a write of a curve would take more than `most` seconds, by what fewer facts took; None if not."""
    if part.kind != "curve" or most is None or isinstance(part.baseline, Unchanged):
        return None
    number = len(part.records)
    same = [other for other in parts if other.name == part.name and other.kind in ("full", "curve")]
    found = [(len(one.records), results.get(one.label)) for one in same]
    timed = [(n, r.costs.seconds) for n, r in found if r is not None and r.costs is not None and n < number]
    if not timed:
        if any(r is not None and r.skipped for n, r in found if n < number):
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
        result, number = found[part.label], len(part.records)
        if part.kind in ("portability", "things", "documents"):
            whole, kind = methods[part.name], part.kind
            own: dict[str, Any] = {kind: result.report if kind == "portability" else getattr(result, kind)}
            methods[part.name] = replace(
                whole,
                **own,
                consequences=result.consequences or whole.consequences,
                failed=whole.failed or (result.failed and f"{kind}: {result.failed}"),
                traceback=whole.traceback or result.traceback,
                skipped="; ".join(filter(None, [whole.skipped, result.skipped and f"{kind}: {result.skipped}"]))
                or None,
            )
        elif part.kind == "full":
            methods[part.name] = result
        if part.kind == "curve" or (part.kind == "full" and number in fact_counts):
            curves.setdefault(part.name, {})[number] = result
    return Comparison(count, methods, {name: dict(sorted(line.items())) for name, line in curves.items()})


@dataclass(frozen=True)
class _Measurement:
    """Store a model, and what is measured on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str | Sequence[str] | None
    max_text_tokens: int | None
    greedy: bool
    fluency_prompts: int
    choices: Sequence[Choice] | None
    own_words: OwnWordsQuestions | None
    about_things: OwnWordsQuestions | None
    costs: bool
    progress: bool

    @cached_property
    def questions(self) -> OwnWordsQuestions | None:
        """The questions with the answers of the base; first looked at before a baseline is on the model."""
        return self.own_words and self.own_words.with_base_answers(self.model, self.tokenizer)

    @cached_property
    def thing_questions(self) -> OwnWordsQuestions:
        """The same of the things."""
        assert self.about_things is not None
        return self.about_things.with_base_answers(self.model, self.tokenizer)

    @cached_property
    def base_predictions(self) -> list[Tensor] | None:
        """What the base predicts on the beginning of the text; first looked at before a baseline is on the model."""
        if self.text is None:
            return None
        tokens = KL_TOKENS if self.max_text_tokens is None else min(KL_TOKENS, self.max_text_tokens)
        with evaluating(self.model):
            found = predictions(self.model, self.tokenizer, self.text, max_tokens=tokens)
            return [window.half() for window, _ in found]

    def settings(self, part: _Part) -> dict[str, Any]:
        """Return what the result of a part depends on."""
        base = base_model(self.model)
        settings: dict[str, Any] = {
            "model": {**base_fingerprint(base), "dtype": str(base.dtype), "device": base.device.type},
            "adapters": list(getattr(base, "peft_config", {})),
            "baseline": part.baseline.settings(),
            "records": digest(part.records),
        }
        if part.kind in ("full", "curve"):
            text = HELD_OUT_SENTENCES if self.text is None else self.text
            settings |= {"text": digest(text), "max_text_tokens": self.max_text_tokens}
        if part.kind == "full":
            settings |= {"greedy": self.greedy, "fluency_prompts": self.fluency_prompts, "costs": self.costs}
            settings["choices"] = self.choices and digest(self.choices)
            if self.own_words is not None:  # results of earlier versions, without them, count for calls without them
                settings["own_words"] = digest(self.own_words)
        if part.kind == "things":
            settings["asked"] = digest(self.about_things)
        return settings

    def measure(self, part: _Part) -> MethodResult:
        """Measure a part; a baseline that fails gives a result with the reason. What fails without one raises."""
        try:
            return self._measure(part)
        except Exception as error:
            if isinstance(part.baseline, Unchanged):
                raise
            return MethodResult(failed=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())

    def _measure(self, part: _Part) -> MethodResult:
        if part.kind == "documents":
            return self._measure_documents(part)
        if part.kind == "things":
            return self._measure_things(part)
        model, tokenizer, full = self.model, self.tokenizer, part.kind == "full"
        facts = [record.fact for record in part.records]
        ids = speed_prompt(tokenizer, [fact.prompt for fact in facts])
        before = speeds(model, ids, [nullcontext])[0] if full and self.costs else None
        questions = self.questions if full else None
        base_predictions = self.base_predictions if full else None
        with applied_at_cost(model, tokenizer, part.baseline, facts) as (applied, costs):
            report = evaluate_edits(
                model,
                tokenizer,
                part.records,
                text=None if part.kind == "portability" else self.text,
                max_text_tokens=self.max_text_tokens,
                greedy=full and self.greedy,
                own_words=questions,
                base_predictions=base_predictions,
                progress=self.progress,
            )
            ability = None
            if full and self.fluency_prompts:
                prompts = [prompt for r in part.records for prompt in r.generation_prompts or (r.fact.prompt,)]
                texts = generate_texts(model, tokenizer, prompts[: self.fluency_prompts], progress=self.progress)
                report = replace(report, fluency=fluency(texts), num_generated=len(texts))
            if full and self.choices is not None:
                ability = choice_accuracy(model, tokenizer, self.choices)
            if before is not None:
                prefill, decode = slowdown(model, ids, applied, before)
                costs = replace(costs, bytes_on_disk=bytes_on_disk(applied), prefill=prefill, decode=decode)
                costs = replace(costs, forget_seconds=seconds_to_forget(applied, facts[-1]))
            return MethodResult(applied.report, report, ability=ability, costs=costs)

    def _measure_things(self, part: _Part) -> MethodResult:
        """Write the facts of things, and ask about them, about others, and about what follows."""
        questions, facts = self.thing_questions, [fact.fact for thing in part.records for fact in thing.facts]
        consequences: dict[str, list[Question]] = {}
        for question in (one for thing in part.records for one in thing.consequences):
            consequences.setdefault(question.kind, []).append(question)
        with part.baseline.applied(self.model, self.tokenizer, facts) as applied:
            return MethodResult(
                applied.report,
                things=score_own_words(self.model, self.tokenizer, questions),
                consequences={
                    kind: score_own_words(self.model, self.tokenizer, OwnWordsQuestions(tuple(asked)))
                    for kind, asked in consequences.items()
                },
            )

    def _measure_documents(self, part: _Part) -> MethodResult:
        """Write texts, and ask about them; what takes none is skipped."""
        texts = [Document(one.text) for one in part.records]
        asked = OwnWordsQuestions(tuple(question for one in part.records for question in one.questions))
        try:
            as_items(texts, part.baseline.accepts(self.model, self.tokenizer))
        except TypeError as error:
            return MethodResult(skipped=str(error))
        with part.baseline.applied(self.model, self.tokenizer, texts) as applied:
            return MethodResult(applied.report, documents=score_own_words(self.model, self.tokenizer, asked))
