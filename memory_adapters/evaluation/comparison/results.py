"""What a comparison of baselines found: as values, as JSON, as tables."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from string import Template
from typing import Any, NamedTuple

from memory_adapters.evaluation.comparison.costs import Costs
from memory_adapters.evaluation.edit_report import EditReport, report_cells
from memory_adapters.evaluation.scores.own_words import OwnWordsAnswer, OwnWordsScores
from memory_adapters.evaluation.tables import UNKNOWN, format_table, table_rows
from memory_adapters.report import WriteReport

__all__ = ["NOTHING", "Comparison", "MethodResult", "Table"]

NOTHING = "nothing"
SCORES = (
    "S",
    "ES",
    "PS",
    "NS",
    "exact",
    "paraphrases exact",
    "greedy",
    "portability exact",
    "portability tokens",
    "own words",
    "same",
    "leak",
    "spill",
    "things",
    "things same",
    "documents",
    "GE",
    "ability",
)
CLOSE = 0.02  # shares of questions answered that advice takes for equal
LEAST_SAME = 0.9  # of the answers about other things, for a method that leaves the rest as it was
SHOWN_CHARACTERS = 80  # of an answer
COSTS = ("write, s", "CPU, s", "forget, s", "on disk", "prefill", "decode", "peak memory", "stored numbers")


@dataclass(frozen=True)
class MethodResult:
    """Store what was measured of one baseline; None is what was not measured.

    Attributes:
        write: What its writing reported.
        report: The scores with its knowledge on the model.
        portability: The scores after another write, of the facts that have questions about what follows from them.
        things: The answers to questions about things with several facts each, after another write, of these.
        consequences: The answers to questions about what follows from the facts of these things, by kind of question.
        documents: The answers to questions about texts, after another write, of these.
        ability: Share of multiple-choice questions answered, in [0, 1].
        costs: What it costs.
        failed: Why it could not be measured, or not all of it.
        skipped: Why it was not tried.
        traceback: Where that failed.
    """

    write: WriteReport | None = None
    report: EditReport | None = None
    portability: EditReport | None = None
    things: OwnWordsScores | None = None
    consequences: dict[str, OwnWordsScores] = field(default_factory=dict)
    documents: OwnWordsScores | None = None
    ability: float | None = None
    costs: Costs | None = None
    failed: str | None = None
    traceback: str | None = None
    skipped: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodResult:
        """Return the result that `asdict` was called on."""
        kinds: dict[str, Callable[[Any], Any]] = {
            "write": _write_report,
            "report": EditReport.from_dict,
            "portability": EditReport.from_dict,
            "things": _own_words_scores,
            "consequences": lambda value: {kind: _own_words_scores(one) for kind, one in value.items()},
            "documents": _own_words_scores,
            "costs": lambda value: Costs(**value),
        }
        made = {name: kinds[name](value) for name, value in values.items() if name in kinds and value is not None}
        return cls(**{**values, **made})

    def score_cells(self, base_perplexity: float | None) -> dict[str, str]:
        """Return the cells of the table of scores, by column."""
        if self.report is None:
            return {}
        cells = report_cells(self.report, base_perplexity)
        if self.portability is not None:
            other = report_cells(self.portability, None)
            cells |= {label: other[label] for label in ("portability exact", "portability tokens")}
        things, documents = self.things or OwnWordsScores(), self.documents or OwnWordsScores()
        shares = {
            "things": things.own_words,
            "things same": things.same,
            **{_consequences(kind): scores.own_words for kind, scores in self.consequences.items()},
            "documents": documents.own_words,
            "ability": self.ability,
        }
        return cells | {label: f"{100 * share:.1f}" for label, share in shares.items() if share is not None}

    def cost_cells(self) -> dict[str, str]:
        """Return the cells of the table of costs, by column; none of what stores nothing."""
        costs = self.costs
        if costs is None or self.write is None or not self.write.num_parameters:
            return {}
        cells = {
            "write, s": f"{costs.seconds:.1f}",
            "CPU, s": f"{costs.cpu_seconds:.1f}",
            "peak memory": _size(costs.peak_memory),
            "stored numbers": f"{self.write.num_parameters:,}",
        }
        if costs.bytes_on_disk is not None:
            cells["on disk"] = _size(costs.bytes_on_disk)
            cells["forget, s"] = "= write" if costs.forget_seconds is None else f"{costs.forget_seconds:.2f}"
        if costs.prefill is not None and costs.decode is not None:
            cells |= {"prefill": f"×{costs.prefill:.2f}", "decode": f"×{costs.decode:.2f}"}
        return cells


class Table(NamedTuple):
    """Store rows of cells under a title; the first row is the header, the first column names."""

    title: str
    rows: list[list[str]]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Store what `compare` measured.

    Attributes:
        num_facts: How many facts `methods` is about.
        methods: Name of a baseline to its result, in the order given; first `"nothing"`, the model alone.
        curves: The same for other numbers of facts, from 1 up: baseline to number to result, with fewer scores.
    """

    num_facts: int
    methods: dict[str, MethodResult]
    curves: dict[str, dict[int, MethodResult]] = field(default_factory=dict)

    @property
    def base(self) -> EditReport:
        """The scores of the model without the facts."""
        report = self.methods[NOTHING].report
        assert report is not None
        return report

    def drift(self, result: MethodResult) -> float | None:
        """Return how much higher the perplexity is than without the facts, as a share of it; None if not measured."""
        own, base = None if result.report is None else result.report.perplexity, self.base.perplexity
        return None if own is None or base is None else own / base - 1

    def failures(self) -> dict[str, MethodResult]:
        """Return what failed, by baseline and number of facts."""
        return {f"{name}, {number:,} facts": one for name, number, one in self._every() if one.failed is not None}

    def _every(self) -> Iterator[tuple[str, int, MethodResult]]:
        """Yield all results, with their baseline and number of facts."""
        for name, result in self.methods.items():
            yield name, self.num_facts, result
        for name, line in self.curves.items():
            for number, result in line.items():
                if number != self.num_facts:
                    yield name, number, result

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        values = asdict(self)
        values["curves"] = {name: {str(n): r for n, r in line.items()} for name, line in values["curves"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `to_dict` was called on."""
        curves = {
            name: {int(number): MethodResult.from_dict(result) for number, result in line.items()}
            for name, line in values["curves"].items()
        }
        methods = {name: MethodResult.from_dict(result) for name, result in values["methods"].items()}
        return cls(values["num_facts"], methods, curves)

    def tables(self) -> list[Table]:
        """Return the scores, the costs and, where there are curves, what they show by number of facts."""
        labels = {name: f"{name} (failed)" if result.failed else name for name, result in self.methods.items()}
        base = self.base.perplexity
        scores = {labels[name]: result.score_cells(base) for name, result in self.methods.items()}
        costs = {labels[name]: result.cost_cells() for name, result in self.methods.items()}
        follow = dict.fromkeys(_consequences(kind) for result in self.methods.values() for kind in result.consequences)
        after = SCORES.index("things same") + 1
        columns = (*SCORES[:after], *follow, *SCORES[after:], "KL", "perplexity")
        found = [
            Table(f"{self.num_facts:,} facts; scores in %", table_rows(scores, columns)),
            Table("Costs", table_rows(costs, COSTS)),
        ]
        quality = "S" if self.base.scores.score is not None else "exact"
        shown: dict[str, Callable[[MethodResult], str]] = {
            f"{quality} by number of facts, in %": lambda result: result.score_cells(None)[quality],
            "Perplexity by number of facts": lambda result: result.score_cells(base)["perplexity"],
            "Seconds to write by number of facts": lambda result: result.cost_cells().get("write, s", UNKNOWN),
        }
        for title, cell in shown.items() if self.curves else ():
            lines = {
                name: {f"{number:,}": _curve_cell(result, cell) for number, result in line.items()}
                for name, line in self.curves.items()
            }
            found.append(Table(title, table_rows(lines, list(next(iter(lines.values()))))))
        return found

    def examples(self, number: int = 5) -> Table | None:
        """Return what each method answers to some of the questions in other words; None if none was asked."""
        said = {name: [] if r.report is None else r.report.answers for name, r in self.methods.items()}
        questions = said[NOTHING]
        chosen = (
            sorted({round(i * (len(questions) - 1) / max(number - 1, 1)) for i in range(number)}) if questions else []
        )
        if not chosen:
            return None
        rows = [["", *(questions[i].question for i in chosen)], ["(wanted)", *(questions[i].wanted for i in chosen)]]
        rows += [
            [name, *(("✓ " if answers[i].named else "") + _shortened(answers[i].says) for i in chosen)]
            for name, answers in said.items()
            if answers
        ]
        return Table(f"{len(chosen)} of {len(questions)} questions in other words, as each answers them", rows)

    def advice(self) -> str:
        """Return which method to take on these facts, and why, in a sentence or two.

        It is the one with the highest share of questions in other words answered (or, where none was asked, of
        paraphrases, or else of prompts) among those that leave the rest as it was: at least 90% of the chat answers
        about other things letter for letter, neighbours preferred at most 5 percentage points less, and a perplexity
        that rises by at most 3%, as far as that was measured. Of those within 2 points of it those that answer most
        about things, again within 2 points, and of these the one that writes fastest. Of things and documents, the
        method that answers most, and leaves 90% of the answers about other things.
        """
        found = [_Judged.of(name, self) for name, result in self.methods.items() if result.report and name != NOTHING]
        base = _Judged.of(NOTHING, self)
        better = sorted((one for one in found if one.quality > base.quality), key=lambda one: -one.quality)
        if not better:
            return f"None of the methods raises {base.label}: {base.quality:.0%} without the facts."
        harmless = [one for one in better if one.harmless]
        if not harmless:
            return f"None of the methods leaves the rest as it was. The most {base.label}: {better[0]}."
        near = [one for one in harmless if one.quality >= harmless[0].quality - CLOSE]
        most = max(one.things for one in near)
        nearest = [one for one in near if one.things >= most - CLOSE]
        taken = min(nearest, key=lambda one: one.seconds)
        why = f"the most {base.label} of those that leave the rest as it was"
        if taken is not harmless[0]:
            better_at = "is written fastest" if harmless[0] in nearest else "answers more about things"
            why = f"nearly {why}, and it {better_at}"
        text = f"Take {taken.name}: {why}, {taken.shown}."
        others = [str(one) for one in harmless if one is not taken][:2]
        dearer = [str(one) for one in better if one.quality > taken.quality + CLOSE and not one.harmless][:2]
        text += f" Next: {'; '.join(others)}." if others else ""
        text += f" More, at a price: {'; '.join(dearer)}." if dearer else ""
        return text + self._best_of_task("things") + self._best_of_task("documents")

    def _best_of_task(self, task: str) -> str:
        """Return which method answers most about things or documents, as a sentence; nothing if none answers any."""
        found = {name: getattr(result, task) or OwnWordsScores() for name, result in self.methods.items()}
        shares = {
            name: scores.own_words or 0.0
            for name, scores in found.items()
            if name == NOTHING or scores.same is None or scores.same >= LEAST_SAME
        }
        most = max(shares.values())
        best = [name for name, share in shares.items() if share == most > shares[NOTHING]]
        return f" Of questions about {task}: {' and '.join(best)}, {most:.0%}." if best else ""

    def html(self) -> str:
        """Return a standalone HTML page, with the advice and sortable tables."""
        page = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
        parts = [
            f'<h2>{html.escape(title)}</h2><div class="scrolled">{format_table(rows, "html")}</div>'
            for title, rows in self._pages()
        ]
        parts += [f"<p>{html.escape(line)}</p>" for line in self._remarks()]
        return page.substitute(advice=html.escape(self.advice()), tables="\n".join(parts))

    def markdown(self) -> str:
        """Return the advice, the tables in Markdown under headings, and a list of what failed."""
        parts = [self.advice()] + [f"## {title}\n\n{format_table(rows, 'pipe')}" for title, rows in self._pages()]
        remarks = "\n".join(f"- {line}" for line in self._remarks())
        return "\n\n".join([*parts, *([f"## Not measured\n\n{remarks}"] if remarks else [])]) + "\n"

    def __repr__(self) -> str:
        parts = [f"{title}\n{format_table(rows)}" for title, rows in self.tables()]
        remarks = "\n".join(self._remarks())
        return "\n\n".join(["Comparison: " + parts[0], *parts[1:], *([remarks] if remarks else []), self.advice()])

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(title)}</p>{format_table(rows, 'html')}" for title, rows in self.tables()]
        return "".join([*parts, *(f"<p>{html.escape(line)}</p>" for line in self._remarks())])

    def _pages(self) -> list[Table]:
        examples = self.examples()
        return [*self.tables(), *([examples] if examples else [])]

    def _remarks(self) -> list[str]:
        """Return what failed, and what was not tried, with the reasons."""
        skipped: dict[str, dict[str, list[str]]] = {}  # reason to name to numbers of facts
        for name, number, result in self._every():
            if result.skipped:
                skipped.setdefault(result.skipped, {}).setdefault(name, []).append(f"{number:,}")
        failed = [f"failed: {where}: {result.failed}" for where, result in self.failures().items()]
        for reason, names in skipped.items():
            listed = "; ".join(f"{name} with {', '.join(numbers)} facts" for name, numbers in names.items())
            failed.append(f"skipped: {listed}: {reason}")
        return failed


@dataclass(frozen=True)
class _Judged:
    """Store what advice is taken from.

    Attributes:
        name: Of the method.
        label: What `quality` is, in words.
        quality: The share that it answers, in [0, 1].
        things: The share of the questions about things, in [0, 1].
        prices: What else changed, in words.
        harmless: Whether that is little.
        seconds: To write the facts.
    """

    name: str
    label: str
    quality: float
    things: float
    prices: tuple[str, ...]
    harmless: bool
    seconds: float

    @classmethod
    def of(cls, name: str, comparison: Comparison) -> _Judged:
        result, base = comparison.methods[name], comparison.base
        report = result.report
        assert report is not None
        qualities = {
            "questions in other words answered": (report.own_words, base.own_words),
            "paraphrases answered": (report.scores.paraphrase_exact_match, base.scores.paraphrase_exact_match),
            "prompts answered": (report.scores.exact_match, base.scores.exact_match),
        }
        label, quality = next((label, own or 0.0) for label, (own, was) in qualities.items() if was is not None)
        prices, harmless = [], True
        if report.same is not None and base.own_words is not None:
            prices.append(f"{report.same:.0%} of other answers the same")
            harmless &= report.same >= LEAST_SAME
        own, was = report.scores.neighbourhood, base.scores.neighbourhood
        if own is not None and was is not None:
            prices.append(f"neighbours {own:.0%} for {was:.0%}")
            harmless &= own >= was - 0.05
        if (drift := comparison.drift(result)) is not None:
            prices.append(f"perplexity {drift:+.1%}")
            harmless &= drift <= 0.03
        seconds = float("inf") if result.costs is None else result.costs.seconds
        things = 0.0 if result.things is None else result.things.own_words or 0.0
        return cls(name, label, quality, things, tuple(prices), harmless, seconds)

    @property
    def shown(self) -> str:
        """The share and its price, in words."""
        return f"{self.quality:.0%} ({', '.join(self.prices)})" if self.prices else f"{self.quality:.0%}"

    def __str__(self) -> str:
        return f"{self.name}, {self.shown}"


def _write_report(values: Mapping[str, Any]) -> WriteReport:
    """Return a stored report; results of earlier versions also have `answers`, which no report has any more."""
    return WriteReport.from_dict({name: value for name, value in values.items() if name != "answers"})


def _curve_cell(result: MethodResult, cell: Callable[[MethodResult], str]) -> str:
    if result.report is None:
        return "skipped" if result.skipped else "failed"
    return "failed" if result.failed else cell(result)


def _own_words_scores(values: Mapping[str, Any]) -> OwnWordsScores:
    return OwnWordsScores(**{**values, "answers": [OwnWordsAnswer(**answer) for answer in values["answers"]]})


def _consequences(kind: str) -> str:
    """Return the column of the questions of a kind about what follows."""
    return f"consequences: {kind}" if kind else "consequences"


def _shortened(text: str) -> str:
    """Return an answer on one line, cut to its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
