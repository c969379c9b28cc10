"""What a comparison of methods found, as values, as JSON and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from memory_adapters.evaluation.comparison.costs import Costs
from memory_adapters.evaluation.comparison.tables import as_html, as_markdown, as_text
from memory_adapters.evaluation.edit_report import EditReport
from memory_adapters.report import WriteReport

__all__ = ["NOTHING", "Comparison", "MethodResult"]

NOTHING = "nothing"


@dataclass(frozen=True)
class MethodResult:
    """What one method made of the facts; None is what was not measured.

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
        """The result that `asdict` was called on."""
        kinds = {
            "write": lambda value: WriteReport(**value),
            "report": EditReport.from_dict,
            "portability": EditReport.from_dict,
            "costs": lambda value: Costs(**value),
        }
        made = {name: kinds[name](value) for name, value in values.items() if name in kinds and value is not None}
        return cls(**{**values, **made})


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` measured.

    Attributes:
        num_facts: How many facts `methods` is about.
        methods: Name of a baseline to what it made of them, in the order given; first `"nothing"`, the model alone.
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
        """How much higher the perplexity is than without the facts, as a share of it; None if it was not measured."""
        own, base = None if result.report is None else result.report.perplexity, self.base.perplexity
        return None if own is None or base is None else own / base - 1

    def failures(self) -> dict[str, MethodResult]:
        """What failed, by baseline and number of facts."""
        every = [(name, self.num_facts, result) for name, result in self.methods.items()]
        every += [(name, n, r) for name, line in self.curves.items() for n, r in line.items() if n != self.num_facts]
        return {f"{name}, {number:,} facts": result for name, number, result in every if result.failed is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values["curves"] = {name: {str(n): r for n, r in line.items()} for name, line in values["curves"].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` was called on."""
        curves = {
            name: {int(number): MethodResult.from_dict(result) for number, result in line.items()}
            for name, line in values["curves"].items()
        }
        methods = {name: MethodResult.from_dict(result) for name, result in values["methods"].items()}
        return cls(values["num_facts"], methods, curves)

    def markdown(self) -> str:
        """The tables in Markdown."""
        return as_markdown(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)
