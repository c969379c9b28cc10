"""Measure everything of a set of edits in one report, and show several reports side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.modes import evaluating
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.edits import EditScores, KindScores, mean_of, score_kinds
from memory_adapters.evaluation.scores.generation import (
    consistency,
    fluency,
    generate_texts,
    greedy_success,
    greedy_texts,
)
from memory_adapters.evaluation.scores.own_words import OwnWordsAnswer, OwnWordsQuestions, score_own_words
from memory_adapters.evaluation.scores.perplexity import held_out_perplexity, perplexity_and_divergence
from memory_adapters.evaluation.tables import UNKNOWN, format_table, table_rows
from memory_adapters.files.atomic import atomic_file

__all__ = [
    "EditReport",
    "ItemScores",
    "RelationScores",
    "answer_table",
    "compare",
    "evaluate_edits",
    "item_table",
    "kind_table",
    "report_cells",
    "score_table",
]

SHOWN_RELATIONS = 10
SHOWN_CHARACTERS = 40  # of a prompt, a target and an answer in `item_table`
SHOWN_SCORES = (  # of `score_table`
    "S", "ES", "PS", "NS", "exact", "tokens", "paraphrases exact", "paraphrase tokens", "portability exact",
    "own words", "same", "leak", "spill", "perplexity",
)  # fmt: skip


@dataclass(frozen=True)
class RelationScores:
    """Store the scores of one relation: shares in [0, 1] as in `EditScores`; `number` is how many records it has."""

    relation: str
    number: int
    exact_match: float
    efficacy: float | None
    paraphrase: float | None
    neighbourhood: float | None


@dataclass(frozen=True)
class ItemScores:
    """Store what became of one fact.

    Attributes:
        prompt: Its prompt.
        target: Its target.
        says: What the model decodes greedily after the prompt.
        hit: Whether every token of the target is the model's first choice.
        paraphrases_hit: After how many of the paraphrases it is.
        num_paraphrases: How many there are.
    """

    prompt: str
    target: str
    says: str
    hit: bool
    paraphrases_hit: int
    num_paraphrases: int


@dataclass(frozen=True, repr=False)
class EditReport:
    """Store what `evaluate_edits` measured; None is what was not asked for or has nothing to be judged by.

    Attributes:
        num_records: Edits judged.
        scores: Shares over all of them.
        relations: The same by relation, those that resist most first.
        kinds: Scores of each kind of neighbours and of questions about what follows, where the records name kinds.
        items: What became of each fact, in the order of the records.
        greedy_success: Share of the prompts after which greedy decoding names the new target.
        paraphrase_greedy_success: The same of the paraphrases.
        fluency: GE of the generated texts.
        consistency: RS of the generated texts against the references.
        num_generated: Texts that were generated.
        perplexity: Perplexity on `text`, or on held-out sentences.
        divergence: KL of the base's predictions on `text` from the model's, in nats a token.
        seconds: Wall time of the whole evaluation.
        own_words: Share of the chat questions in other words whose answer names the object.
        same: Share of the chat answers about other things that are the base's, letter for letter.
        leak: Share of the chat answers about other things that name a written object which the base's did not.
        spill: Share of the chat answers to other questions about the written subjects that name what was written.
        answers: The answers to the questions in other words.
    """

    num_records: int
    scores: EditScores
    relations: list[RelationScores] = field(default_factory=list)
    greedy_success: float | None = None
    paraphrase_greedy_success: float | None = None
    fluency: float | None = None
    consistency: float | None = None
    num_generated: int = 0
    perplexity: float | None = None
    divergence: float | None = None
    seconds: float = 0.0
    kinds: list[KindScores] = field(default_factory=list)
    items: list[ItemScores] = field(default_factory=list)
    own_words: float | None = None
    same: float | None = None
    leak: float | None = None
    spill: float | None = None
    answers: list[OwnWordsAnswer] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditReport:
        """Return the report that `to_dict` was called on."""
        given = {f.name for f in fields(EditScores) if f.init}
        scores = EditScores(**{name: value for name, value in values["scores"].items() if name in given})
        relations = [RelationScores(**relation) for relation in values["relations"]]
        kinds = [KindScores(**kind) for kind in values.get("kinds", ())]  # earlier versions have neither
        lists = {
            "relations": relations,
            "kinds": kinds,
            "items": [ItemScores(**item) for item in values.get("items", ())],
            "answers": [OwnWordsAnswer(**answer) for answer in values.get("answers", ())],
        }
        return cls(**{**values, "scores": scores, **lists})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as JSON. An existing file is replaced whole, or kept if this is interrupted."""
        with atomic_file(path) as staging:
            staging.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EditReport:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def _tables(self, style: str) -> list[str]:
        """Return the scores, the single numbers and the relations that resist most, as tables."""
        s = self.scores
        portability = (s.portability_exact_match, s.portability_token_accuracy)
        judged: dict[str, tuple[float | None, ...]] = {
            "prompt (ES)": (s.efficacy, s.exact_match, s.token_accuracy, self.greedy_success),
            "paraphrases (PS)": (
                s.paraphrase, s.paraphrase_exact_match, s.paraphrase_token_accuracy, self.paraphrase_greedy_success,
            ),
            "neighbours (NS)": (s.neighbourhood, s.neighbourhood_exact_match, s.neighbourhood_token_accuracy, None),
            "portability": (None, *portability, None),
            "harmonic mean (S)": (s.score, None, s.token_score, None),
        }  # fmt: skip
        for one in self.kinds:
            judged[f"{one.group}: {one.kind}"] = (one.neighbourhood, one.exact_match, one.token_accuracy, None)
        shares = [["%", "preferred", "exact", "tokens", "greedy"]]
        shares += [[label, *map(_percent, row)] for label, row in judged.items() if any(x is not None for x in row)]
        tables = [format_table(shares, style)]
        words = (("own words", self.own_words), ("same", self.same), ("leak", self.leak), ("spill", self.spill))
        told = [[label, _percent(share)] for label, share in words if share is not None]
        if told:
            tables.append(format_table([["chat answers, %", ""], *told], style))
        numbers = [("fluency (GE)", self.fluency, 1), ("consistency (RS)", self.consistency, 1)]
        numbers += [("perplexity", self.perplexity, 2)]
        known = [[label, f"{value:.{digits}f}"] for label, value, digits in numbers if value is not None]
        if known:
            tables.append(format_table(known, style, header=False))
        resisting = [["relation", "edits", "exact", "ES", "PS", "NS"]]
        for r in self.relations[:SHOWN_RELATIONS]:
            rates = map(_percent, (r.exact_match, r.efficacy, r.paraphrase, r.neighbourhood))
            resisting.append([r.relation, str(r.number), *rates])
        if len(self.relations) > SHOWN_RELATIONS:
            resisting.append([f"… {len(self.relations) - SHOWN_RELATIONS} more", *[""] * 5])
        return [*tables, format_table(resisting, style)] if self.relations else tables

    def __repr__(self) -> str:
        return f"EditReport ({self.num_records} edits, {self.seconds:.1f} s)\n" + "\n\n".join(self._tables("plain"))

    def _repr_html_(self) -> str:
        return f"<p>{self.num_records} edits, {self.seconds:.1f} s</p>" + "".join(self._tables("html"))


def evaluate_edits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    *,
    text: str | Sequence[str] | None = None,
    max_text_tokens: int | None = None,
    greedy: bool = True,
    num_tokens: int | None = None,
    generate: bool = False,
    references: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    per_item: bool = False,
    own_words: OwnWordsQuestions | None = None,
    base_predictions: Sequence[Tensor] | None = None,
    progress: bool = True,
) -> EditReport:
    """Measure everything the records allow on the model as it stands.

    Args:
        model: A causal LM, with what is to be judged active.
        tokenizer: Its tokenizer.
        records: The edits.
        text: Unrelated text for the perplexity; None for the held-out sentences that `WriteReport` is about. Its drift
            is seen in `compare` with a report of the base model.
        max_text_tokens: Most tokens of it that are read.
        greedy: Decode greedily after each prompt and paraphrase, and look for the target.
        num_tokens: How many tokens; see `greedy_success`.
        generate: Generate texts of 100 tokens for fluency and consistency: from the `generation_prompts` of each
            record, or from its prompt and paraphrases if it has none.
        references: Texts about the new targets, by target: `{"Rome": ["Rome is the capital of Italy.", ...]}`.
            Consistency is that of the records whose target is there.
        seed: Seed of the generated texts.
        per_item: Also report each fact, with what the model decodes greedily after its prompt.
        own_words: Questions in other words to ask in the chat template, as `record_questions` makes them. `same`,
            `leak` and `spill` need the base's answers, see `OwnWordsQuestions.with_base_answers`.
        base_predictions: Log-probabilities of the base on the beginning of `text`, window by window, as
            `scores.perplexity.predictions` yields them; for `divergence`.
        progress: Show bars.

    Raises:
        ValueError: If there is no record, `references` is given without `generate` or fits no record, or
            `base_predictions` are of another text.
    """
    start = time.perf_counter()
    if references is not None and not generate:
        raise ValueError("`references` are compared with generated texts: set `generate=True` too.")
    if references is not None and not any(record.fact.target in references for record in records):
        raise ValueError(f"`references` has no target of the records; its keys start {list(references)[:3]}.")
    scored, kinds = score_kinds(model, tokenizer, records, progress=progress)
    measured: dict[str, Any] = {}
    if greedy:
        asked = [(prompt, r.fact.target) for r in records for prompt in (r.fact.prompt, *r.paraphrases)]
        prompts, targets = zip(*asked, strict=True)
        found = iter(greedy_success(model, tokenizer, prompts, targets, num_tokens=num_tokens, progress=progress))
        by_record = [(next(found), [next(found) for _ in record.paraphrases]) for record in records]
        measured["greedy_success"] = mean_of(named for named, _ in by_record)
        measured["paraphrase_greedy_success"] = mean_of(mean_of(named) for _, named in by_record)
    if generate:
        beginnings = [record.generation_prompts or (record.fact.prompt, *record.paraphrases) for record in records]
        texts = generate_texts(
            model, tokenizer, [prompt for prompts in beginnings for prompt in prompts], seed=seed, progress=progress
        )
        measured |= {"fluency": fluency(texts), "num_generated": len(texts)}
        if references is not None:
            remaining = iter(texts)
            generated = [[next(remaining) for _ in prompts] for prompts in beginnings]
            pairs = [
                (own, references[record.fact.target])
                for record, own in zip(records, generated, strict=True)
                if record.fact.target in references
            ]
            measured["consistency"] = consistency(*zip(*pairs, strict=True))
    if per_item:
        texts = greedy_texts(model, tokenizer, [record.fact.prompt for record in records], progress=progress)
        measured["items"] = [_item(*found) for found in zip(records, scored, texts, strict=True)]
    if own_words is not None:
        measured |= vars(score_own_words(model, tokenizer, own_words))
    with evaluating(model):
        if text is None:
            measured["perplexity"] = held_out_perplexity(model, tokenizer)
        else:
            measured["perplexity"], measured["divergence"] = perplexity_and_divergence(
                model, tokenizer, text, base_predictions or (), max_tokens=max_text_tokens
            )
    return EditReport(
        num_records=len(records),
        scores=EditScores.mean(scored),
        relations=_by_relation(records, scored),
        kinds=kinds,
        **measured,
        seconds=time.perf_counter() - start,
    )


def _item(record: EditRecord, scores: EditScores, says: str) -> ItemScores:
    count = len(record.paraphrases)
    hits = round((scores.paraphrase_exact_match or 0.0) * count)
    return ItemScores(record.fact.prompt, record.fact.target, says, scores.exact_match == 1, hits, count)


def _by_relation(records: Sequence[EditRecord], scored: Sequence[EditScores]) -> list[RelationScores]:
    """Group scores by relation: lowest exact match first, then lowest efficacy, then the largest relation."""
    groups: dict[str, list[EditScores]] = {}
    for record, scores in zip(records, scored, strict=True):
        groups.setdefault(record.relation, []).append(scores)
    relations = []
    for relation, group in groups.items():
        s = EditScores.mean(group)
        relations.append(RelationScores(relation, len(group), s.exact_match, s.efficacy, s.paraphrase, s.neighbourhood))
    return sorted(relations, key=lambda r: (r.exact_match, r.efficacy or 0.0, -r.number, r.relation))


def compare(reports: Mapping[str, EditReport]) -> str:
    """Return a Markdown table with a row for each report; perplexity also as its drift from the first report's.

    Columns that no report has a value for are left out.

    Raises:
        ValueError: If there is no report.
    """
    cells = _cells_of(reports)
    return format_table(table_rows(cells, list(next(iter(cells.values())))), "pipe")


def score_table(reports: Mapping[str, EditReport]) -> str:
    """Return a table for the terminal, as `compare`, of the scores that are looked at first."""
    return format_table(table_rows(_cells_of(reports), SHOWN_SCORES))


def kind_table(reports: Mapping[str, EditReport]) -> str:
    """Return a table for the terminal with a line for each kind of question; `""` if the records name no kinds."""
    cells: dict[str, dict[str, str]] = {}
    for name, report in reports.items():
        for one in report.kinds:
            row = cells.setdefault(f"{one.group}: {one.kind}", {"facts": str(one.number)})
            for label, share in (
                ("NS", one.neighbourhood), ("exact", one.exact_match), ("tokens", one.token_accuracy)
            ):  # fmt: skip
                row[f"{label} {name}"] = _percent(share)
    columns = ["facts", *(f"{label} {name}" for label in ("NS", "exact", "tokens") for name in reports)]
    return format_table(table_rows(cells, columns)) if cells else ""


def item_table(reports: Mapping[str, EditReport]) -> str:
    """Return a table for the terminal with a line for each fact: what is said, and whether the last report has a hit.

    Reports without `items` have no part in it.
    """
    *_, last = reports.values()
    rows = [["prompt", "target", *reports, "", "paraphrases hit"]]
    for number, item in enumerate(last.items):
        said = [_line(report.items[number].says) for report in reports.values()]
        hits = f"{item.paraphrases_hit} of {item.num_paraphrases}" if item.num_paraphrases else UNKNOWN
        rows.append([_line(item.prompt, end=True), _line(item.target), *said, "hit" if item.hit else "miss", hits])
    return format_table(rows)


def answer_table(reports: Mapping[str, EditReport]) -> str:
    """Return a table for the terminal with a line for each question in other words; `""` if none was asked.

    The last column says whether the last report's answer names the object.
    """
    *_, last = reports.values()
    rows = [["question", "wanted", *reports, ""]]
    for number, answer in enumerate(last.answers):
        said = [_line(report.answers[number].says) for report in reports.values()]
        rows.append([_line(answer.question), _line(answer.wanted), *said, "named" if answer.named else "not named"])
    return format_table(rows) if last.answers else ""


def _line(text: str, *, end: bool = False) -> str:
    """Return text on one line, without signs that steer a terminal, cut to its beginning or its end."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"…{text[1 - SHOWN_CHARACTERS :]}" if end else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _cells_of(reports: Mapping[str, EditReport]) -> dict[str, dict[str, str]]:
    if not reports:
        raise ValueError("`reports` is empty: give at least one EditReport by name.")
    base = next((report.perplexity for report in reports.values() if report.perplexity is not None), None)
    return {name: report_cells(report, base) for name, report in reports.items()}


def report_cells(report: EditReport, base_perplexity: float | None) -> dict[str, str]:
    """Return the cells of a report's row in a table, by column: shares in percent, what is not known as a dash.

    Args:
        report: The report.
        base_perplexity: Perplexity without the edits, which the drift is from; None to leave perplexity out.
    """
    s = report.scores
    shares = {
        "S": s.score,
        "ES": s.efficacy,
        "PS": s.paraphrase,
        "NS": s.neighbourhood,
        "exact": s.exact_match,
        "paraphrases exact": s.paraphrase_exact_match,
        "greedy": report.greedy_success,
        "paraphrases greedy": report.paraphrase_greedy_success,
        "neighbours exact": s.neighbourhood_exact_match,
        "S (tokens)": s.token_score,
        "tokens": s.token_accuracy,
        "paraphrase tokens": s.paraphrase_token_accuracy,
        "neighbour tokens": s.neighbourhood_token_accuracy,
        "portability exact": s.portability_exact_match,
        "portability tokens": s.portability_token_accuracy,
        "own words": report.own_words,
        "same": report.same,
        "leak": report.leak,
        "spill": report.spill,
    }
    cells = {"edits": str(report.num_records)} | {label: _percent(share) for label, share in shares.items()}
    for label, value in (("GE", report.fluency), ("RS", report.consistency)):
        cells[label] = UNKNOWN if value is None else f"{value:.1f}"
    cells["KL"] = UNKNOWN if report.divergence is None else f"{report.divergence:.4f}"
    cells["perplexity"] = UNKNOWN
    if report.perplexity is not None and base_perplexity is not None:
        drift = report.perplexity / base_perplexity - 1
        cells["perplexity"] = f"{report.perplexity:.2f}" + (f" ({drift:+.2%})" if drift else "")
    return cells


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}"
