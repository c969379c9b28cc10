"""Report what a write did."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["WriteReport"]


@dataclass
class WriteReport:
    """Report what one `write` did; shares are in [0, 1], and None is what was not measured.

    Attributes:
        method: The method's name.
        num_items: Number of items by kind, such as `{"Fact": 20}`.
        recall: Share of facts and questions whose every target token is the model's first choice.
        recall_before: The same before the write.
        token_accuracy: Share of document tokens that are the model's first choice behind the tokens before them.
        token_accuracy_before: The same before the write.
        reconstruction: Share of a text's tokens that the model gives back from its memory slots.
        reconstruction_before: The same before the slots were refined.
        perplexity: Perplexity on held-out English sentences, the same for all methods.
        perplexity_before: The same before the write.
        losses: Mean training loss of each epoch or step; empty for methods that do not train.
        num_parameters: How many numbers the memory stores.
        seconds: Wall time of the whole write.
        notes: What the user should know, such as documents that were split into windows.
    """

    method: str
    num_items: dict[str, int]
    recall: float | None = None
    recall_before: float | None = None
    token_accuracy: float | None = None
    token_accuracy_before: float | None = None
    reconstruction: float | None = None
    reconstruction_before: float | None = None
    perplexity: float | None = None
    perplexity_before: float | None = None
    losses: list[float] = field(default_factory=list)
    num_parameters: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value of what was measured, for display."""
        items = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in self.num_items.items())
        rows = [("written", items)]
        for label, before, after, form in (
            ("recalled", self.recall_before, self.recall, "{:.0%}"),
            ("document tokens right", self.token_accuracy_before, self.token_accuracy, "{:.0%}"),
            ("tokens given back", self.reconstruction_before, self.reconstruction, "{:.0%}"),
            ("perplexity on held-out text", self.perplexity_before, self.perplexity, "{:.2f}"),
        ):
            if before is not None and after is not None:
                rows.append((label, f"{form.format(before)} → {form.format(after)}"))
        if self.losses:
            rows.append(("training loss", f"{self.losses[0]:.3f} → {self.losses[-1]:.3f} ({len(self.losses)} epochs)"))
        rows += [("parameters", f"{self.num_parameters:,}"), ("seconds", f"{self.seconds:.1f}")]
        return rows + [("note", note) for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WriteReport:
        """Return the report that `to_dict` was called on.

        Raises:
            ValueError: If a field is unknown or missing, or its value is of another type.
        """
        known = {own.name: str(own.type) for own in fields(cls)}
        if not isinstance(values, Mapping) or not {"method", "num_items"} <= set(values) <= set(known):
            raise ValueError(f"a report of a write has the fields {', '.join(known)}")
        for name, value in values.items():
            if not _CHECKS[known[name]](value):
                raise ValueError(f"`{name}` of a report must be of the type {known[name]}")
        return cls(**values)

    def __repr__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return f"WriteReport ({self.method})\n" + "\n".join(f"  {a:<{width}}  {b}" for a, b in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self.rows())
        return f"<table><caption>{html.escape(self.method)}</caption>{cells}</table>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "list[float]": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "dict[str, int]": lambda value: (
        isinstance(value, dict) and all(isinstance(name, str) and type(count) is int for name, count in value.items())
    ),
}
