"""The tasks of a comparison: what each writes by a baseline, and what it measures then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.sampling import HELD_OUT_SENTENCES
from memory_adapters.evaluation.comparison.baselines import Baseline
from memory_adapters.evaluation.comparison.costs import (
    applied_at_cost,
    bytes_on_disk,
    seconds_to_forget,
    slowdown,
    speed_prompt,
    speeds,
)
from memory_adapters.evaluation.comparison.results import MethodResult
from memory_adapters.evaluation.comparison.stored_results import digest
from memory_adapters.evaluation.edit_report import evaluate_edits
from memory_adapters.evaluation.questions import DocumentQuestions, Thing, thing_questions
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.choices import Choice, choice_accuracy
from memory_adapters.evaluation.scores.generation import fluency, generate_texts
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions, score_own_words
from memory_adapters.evaluation.scores.perplexity import predictions
from memory_adapters.items import Document, as_items

__all__ = ["Curve", "Documents", "Full", "Portability", "Task", "Things"]

CURVE_RECORDS = 1000  # that are judged where more are written
KL_TOKENS = 2048  # on which predictions of the base are kept, in half precision


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Write something by a baseline, and measure what the model knows then.

    Attributes:
        kind: Its name in the names of stored results.
        records: What is written, with what is asked about it.
        model: The causal LM.
        tokenizer: Its tokenizer.
    """

    kind: ClassVar[str]
    records: Sequence[Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on, beside the model and the baseline."""
        return {"records": digest(self.records)}

    @abstractmethod
    def measure(self, baseline: Baseline) -> MethodResult:
        """Put the baseline on the model, measure, and take it off."""

    def found(self, result: MethodResult) -> dict[str, Any]:
        """Return what a baseline's whole result takes over from the result of this task."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Curve(Task):
    """Write some of the facts: scores of the first 1,000, and perplexity, to see how they go with the number of facts.

    Attributes:
        text: See `compare`.
        max_text_tokens: See `compare`.
        progress: See `compare`.
    """

    kind = "curve"
    records: Sequence[EditRecord]
    text: str | Sequence[str] | None
    max_text_tokens: int | None
    progress: bool

    def settings(self) -> dict[str, Any]:
        text = HELD_OUT_SENTENCES if self.text is None else self.text
        return super().settings() | {"text": digest(text), "max_text_tokens": self.max_text_tokens}

    def measure(self, baseline: Baseline) -> MethodResult:
        facts = [record.fact for record in self.records]
        with applied_at_cost(self.model, self.tokenizer, baseline, facts) as (applied, costs):
            report = evaluate_edits(
                self.model,
                self.tokenizer,
                self.records[:CURVE_RECORDS],
                text=self.text,
                max_text_tokens=self.max_text_tokens,
                greedy=False,
                progress=self.progress,
            )
            return MethodResult(applied.report, report, costs=costs)


@dataclass(frozen=True, kw_only=True)
class Full(Curve):
    """Write the facts that are compared in full: every score and cost.

    Attributes:
        greedy: See `compare`.
        fluency_prompts: See `compare`.
        choices: See `compare`.
        own_words: See `compare`.
        costs: See `compare`.
    """

    kind = "full"
    greedy: bool
    fluency_prompts: int
    choices: Sequence[Choice] | None
    own_words: OwnWordsQuestions | None
    costs: bool

    @cached_property
    def questions(self) -> OwnWordsQuestions | None:
        """The questions with the answers of the base; first looked at before a baseline is on the model."""
        return self.own_words and self.own_words.with_base_answers(self.model, self.tokenizer)

    @cached_property
    def base_predictions(self) -> list[Tensor] | None:
        """What the base predicts on the beginning of the text; first looked at before a baseline is on the model."""
        if self.text is None:
            return None
        tokens = KL_TOKENS if self.max_text_tokens is None else min(KL_TOKENS, self.max_text_tokens)
        with evaluating(self.model):
            found = predictions(self.model, self.tokenizer, self.text, max_tokens=tokens)
            return [window.half() for window, _ in found]

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        settings |= {"greedy": self.greedy, "fluency_prompts": self.fluency_prompts, "costs": self.costs}
        settings["choices"] = self.choices and digest(self.choices)
        if self.own_words is not None:  # results of earlier versions, without them, count for calls without them
            settings["own_words"] = digest(self.own_words)
        return settings

    def measure(self, baseline: Baseline) -> MethodResult:
        model, tokenizer, facts = self.model, self.tokenizer, [record.fact for record in self.records]
        ids = speed_prompt(tokenizer, [fact.prompt for fact in facts])
        before = speeds(model, ids, [nullcontext])[0] if self.costs else None
        questions, base_predictions = self.questions, self.base_predictions
        with applied_at_cost(model, tokenizer, baseline, facts) as (applied, costs):
            report = evaluate_edits(
                model,
                tokenizer,
                self.records,
                text=self.text,
                max_text_tokens=self.max_text_tokens,
                greedy=self.greedy,
                own_words=questions,
                base_predictions=base_predictions,
                progress=self.progress,
            )
            ability = None
            if self.fluency_prompts:
                prompts = [prompt for r in self.records for prompt in r.generation_prompts or (r.fact.prompt,)]
                texts = generate_texts(model, tokenizer, prompts[: self.fluency_prompts], progress=self.progress)
                report = replace(report, fluency=fluency(texts), num_generated=len(texts))
            if self.choices is not None:
                ability = choice_accuracy(model, tokenizer, self.choices)
            if before is not None:
                prefill, decode = slowdown(model, ids, applied, before)
                costs = replace(costs, bytes_on_disk=bytes_on_disk(applied), prefill=prefill, decode=decode)
                costs = replace(costs, forget_seconds=seconds_to_forget(applied, facts[-1]))
            return MethodResult(applied.report, report, ability=ability, costs=costs)


@dataclass(frozen=True, kw_only=True)
class Portability(Task):
    """Write facts of which records ask what follows.

    Attributes:
        progress: See `compare`.
    """

    kind = "portability"
    records: Sequence[EditRecord]
    progress: bool

    def measure(self, baseline: Baseline) -> MethodResult:
        facts = [record.fact for record in self.records]
        with applied_at_cost(self.model, self.tokenizer, baseline, facts) as (applied, costs):
            report = evaluate_edits(self.model, self.tokenizer, self.records, greedy=False, progress=self.progress)
            return MethodResult(applied.report, report, costs=costs)

    def found(self, result: MethodResult) -> dict[str, Any]:
        return {"portability": result.report}


@dataclass(frozen=True, kw_only=True)
class Things(Task):
    """Write the facts of things, and ask about them, about others, and about what follows.

    Attributes:
        others: Things that are not written.
    """

    kind = "things"
    records: Sequence[Thing]
    others: Sequence[Thing]

    @cached_property
    def asked(self) -> OwnWordsQuestions:
        """What is asked about them and the others."""
        return thing_questions(self.records, self.others)

    @cached_property
    def questions(self) -> OwnWordsQuestions:
        """The same with the answers of the base; first looked at before a baseline is on the model."""
        return self.asked.with_base_answers(self.model, self.tokenizer)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"asked": digest(self.asked)}

    def measure(self, baseline: Baseline) -> MethodResult:
        questions, facts = self.questions, [fact.fact for thing in self.records for fact in thing.facts]
        consequences: dict[str, list[Question]] = {}
        for question in (one for thing in self.records for one in thing.consequences):
            consequences.setdefault(question.kind, []).append(question)
        with baseline.applied(self.model, self.tokenizer, facts) as applied:
            return MethodResult(
                applied.report,
                things=score_own_words(self.model, self.tokenizer, questions),
                consequences={
                    kind: score_own_words(self.model, self.tokenizer, OwnWordsQuestions(tuple(asked)))
                    for kind, asked in consequences.items()
                },
            )

    def found(self, result: MethodResult) -> dict[str, Any]:
        return {"things": result.things, "consequences": result.consequences}


@dataclass(frozen=True, kw_only=True)
class Documents(Task):
    """Write texts, and ask about them; what takes none is skipped."""

    kind = "documents"
    records: Sequence[DocumentQuestions]

    def measure(self, baseline: Baseline) -> MethodResult:
        texts = [Document(one.text) for one in self.records]
        asked = OwnWordsQuestions(tuple(question for one in self.records for question in one.questions))
        try:
            as_items(texts, baseline.accepts(self.model, self.tokenizer))
        except TypeError as error:
            return MethodResult(skipped=str(error))
        with baseline.applied(self.model, self.tokenizer, texts) as applied:
            return MethodResult(applied.report, documents=score_own_words(self.model, self.tokenizer, asked))

    def found(self, result: MethodResult) -> dict[str, Any]:
        return {"documents": result.documents}
