"""What a comparison of baselines found: as values, as JSON, as tables."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from memory_adapters.evaluation.comparison.costs import Costs
from memory_adapters.evaluation.edit_report import EditReport, report_cells
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
    "GE",
    "ability",
)
COSTS = ("write, s", "CPU, s", "forget, s", "on disk", "prefill", "decode", "peak memory", "stored numbers")


@dataclass(frozen=True)
class MethodResult:
    """Store what was measured of one baseline; None is what was not measured.

    Attributes:
        write: What its writing reported.
        report: The scores with its knowledge on the model.
        portability: The scores after another write, of the facts that have questions about what follows from them.
        ability: Share of multiple-choice questions answered, in [0, 1].
        costs: What it costs.
        failed: Why it could not be measured, or not all of it.
        traceback: Where that failed.
    """

    write: WriteReport | None = None
    report: EditReport | None = None
    portability: EditReport | None = None
    ability: float | None = None
    costs: Costs | None = None
    failed: str | None = None
    traceback: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodResult:
        """Return the result that `asdict` was called on."""
        kinds: dict[str, Callable[[Any], Any]] = {
            "write": _write_report,
            "report": EditReport.from_dict,
            "portability": EditReport.from_dict,
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
        return cells | ({} if self.ability is None else {"ability": f"{100 * self.ability:.1f}"})

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
        every = [(name, self.num_facts, result) for name, result in self.methods.items()]
        every += [(name, n, r) for name, line in self.curves.items() for n, r in line.items() if n != self.num_facts]
        return {f"{name}, {number:,} facts": result for name, number, result in every if result.failed is not None}

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
        found = [
            Table(f"{self.num_facts:,} facts; scores in %", table_rows(scores, (*SCORES, "KL", "perplexity"))),
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
                name: {f"{number:,}": "failed" if result.failed else cell(result) for number, result in line.items()}
                for name, line in self.curves.items()
            }
            found.append(Table(title, table_rows(lines, list(next(iter(lines.values()))))))
        return found

    def markdown(self) -> str:
        """Return the tables in Markdown under headings, and a list of what failed."""
        parts = [f"## {title}\n\n{format_table(rows, 'pipe')}" for title, rows in self.tables()]
        failures = "\n".join(f"- {line}" for line in self._failures())
        return "\n\n".join([*parts, *([f"## Failed\n\n{failures}"] if failures else [])]) + "\n"

    def __repr__(self) -> str:
        parts = [f"{title}\n{format_table(rows)}" for title, rows in self.tables()]
        failures = "\n".join(f"failed: {line}" for line in self._failures())
        return "\n\n".join(["Comparison: " + parts[0], *parts[1:], *([failures] if failures else [])])

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(title)}</p>{format_table(rows, 'html')}" for title, rows in self.tables()]
        return "".join([*parts, *(f"<p>failed: {html.escape(line)}</p>" for line in self._failures())])

    def _failures(self) -> list[str]:
        return [f"{where}: {result.failed}" for where, result in self.failures().items()]


def _write_report(values: Mapping[str, Any]) -> WriteReport:
    """Return a stored report; results of earlier versions also have `answers`, which no report has any more."""
    return WriteReport.from_dict({name: value for name, value in values.items() if name != "answers"})


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
