"""What a `write` reports."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["WriteReport"]


@dataclass
class WriteReport:
    """What one `write` did and what is known of it.

    Attributes:
        method: The method's name.
        num_items: Items by kind, such as `{"Fact": 20}`.
        recall: Share of facts and questions whose every target token is the model's first choice, in [0, 1]; None if
            there was none.
        recall_before: The same before the write.
        token_accuracy: Share of document tokens that are the model's first choice; None if there was no document.
        token_accuracy_before: The same before the write.
        perplexity: Perplexity on unrelated text afterwards; None if not measured.
        perplexity_before: The same before.
        losses: Mean training loss of each epoch; empty for methods that do not train.
        num_parameters: Numbers stored by the memory.
        seconds: Wall time of the whole write.
        notes: What the user should know, such as documents split into windows.
        answers: Prompts of what was written last, at most 4 (`prompt`), and the model's greedy answers without the
            memory (`before`) and with it (`after`).
    """

    method: str
    num_items: dict[str, int]
    recall: float | None = None
    recall_before: float | None = None
    token_accuracy: float | None = None
    token_accuracy_before: float | None = None
    perplexity: float | None = None
    perplexity_before: float | None = None
    losses: list[float] = field(default_factory=list)
    num_parameters: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    answers: list[dict[str, str]] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of what is known, for display."""
        items = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in self.num_items.items())
        rows = [("written", items)]
        for label, before, after, form in (
            ("recalled", self.recall_before, self.recall, "{:.0%}"),
            ("document tokens right", self.token_accuracy_before, self.token_accuracy, "{:.0%}"),
            ("perplexity on unrelated text", self.perplexity_before, self.perplexity, "{:.2f}"),
        ):
            if before is not None and after is not None:
                rows.append((label, f"{form.format(before)} → {form.format(after)}"))
        if self.losses:
            rows.append(("training loss", f"{self.losses[0]:.3f} → {self.losses[-1]:.3f} ({len(self.losses)} epochs)"))
        rows += [("parameters", f"{self.num_parameters:,}"), ("seconds", f"{self.seconds:.1f}")]
        return rows + [("note", note) for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def _all_rows(self) -> list[tuple[str, str]]:
        said = [f"{answer['prompt']!r}: {answer['before']!r} → {answer['after']!r}" for answer in self.answers]
        return self.rows() + [("answer", one) for one in said]

    def __repr__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return f"WriteReport ({self.method})\n" + "\n".join(f"  {a:<{width}}  {b}" for a, b in self._all_rows())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in self._all_rows())
        return f"<table><caption>{html.escape(self.method)}</caption>{cells}</table>"
