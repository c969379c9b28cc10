"""Report what a write did."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any

__all__ = ["ItemResult", "WriteReport", "html_table"]

SHOWN_ITEMS = 20


@dataclass(frozen=True)
class ItemResult:
    """Report what became of one fact or question.

    Attributes:
        prompt: What is asked.
        target: What should follow.
        recalled: Whether every token of the target is the model's first choice behind the prompt.
        recalled_before: The same before the write.
        answered_in_chat: Whether the model's greedy answer to the prompt in the chat template names the target; None
            where there is no template, or it was not tried.
        earlier: Whether the item was written by an earlier write.
    """

    prompt: str
    target: str
    recalled: bool
    recalled_before: bool
    answered_in_chat: bool | None = None
    earlier: bool = False

    def __str__(self) -> str:
        chat = {None: "", True: ", in chat: hit", False: ", in chat: miss"}[self.answered_in_chat]
        return f"{'hit' if self.recalled else 'miss'}{chat}"


@dataclass
class WriteReport:
    """Report what one `write` did; shares are in [0, 1], and None is what was not measured.

    Attributes:
        method: The method's name.
        num_items: Number of items by kind, such as `{"Fact": 20}`.
        recall: Share of the facts and questions of this write whose every target token is the model's first choice
            behind the prompt; of edits with `chat=True`, the mean of that and of the same in the chat template.
        recall_before: The same before the write.
        earlier_recall: The same for items of earlier writes (256 of them, where there are more).
        earlier_recall_before: The same before the write.
        token_accuracy: Share of document tokens that are the model's first choice behind the tokens before them.
        token_accuracy_before: The same before the write.
        reconstruction: Share of a text's tokens that the model gives back from its memory slots.
        reconstruction_before: The same before the slots were refined.
        perplexity: Perplexity on held-out English sentences, the same for all methods.
        perplexity_before: The same before the write.
        same: Share of chat answers about well-known other things that the write left as they were, letter for letter;
            None where the tokenizer has no chat template.
        losses: Mean training loss of each epoch or step; empty for methods that do not train.
        num_parameters: How many numbers the memory stores.
        seconds: Wall time of the whole write.
        notes: What the user should know, such as documents that were split into windows.
        results: What became of each fact and question. Left out of what is saved with the memory.
    """

    method: str
    num_items: dict[str, int]
    recall: float | None = None
    recall_before: float | None = None
    earlier_recall: float | None = None
    earlier_recall_before: float | None = None
    token_accuracy: float | None = None
    token_accuracy_before: float | None = None
    reconstruction: float | None = None
    reconstruction_before: float | None = None
    perplexity: float | None = None
    perplexity_before: float | None = None
    same: float | None = None
    losses: list[float] = field(default_factory=list)
    num_parameters: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    results: list[ItemResult] = field(default_factory=list)

    @property
    def nothing_learned(self) -> bool:
        """Whether no fact or question of this write is recalled, where there are some."""
        return self.recall == 0

    def rows(self) -> list[tuple[str, str]]:
        """Return label and value of what was measured, for display."""
        items = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in self.num_items.items())
        rows = [("written", items)]
        for label, before, after, form in (
            ("recalled", self.recall_before, self.recall, "{:.0%}"),
            ("recalled of earlier writes", self.earlier_recall_before, self.earlier_recall, "{:.0%}"),
            ("document tokens right", self.token_accuracy_before, self.token_accuracy, "{:.0%}"),
            ("tokens given back", self.reconstruction_before, self.reconstruction, "{:.0%}"),
            ("perplexity on held-out text", self.perplexity_before, self.perplexity, "{:.2f}"),
        ):
            if before is not None and after is not None:
                rows.append((label, f"{form.format(before)} → {form.format(after)}"))
        if self.same is not None:
            rows.append(("answers about other things as before", f"{self.same:.0%}"))
        if self.losses:
            rows.append(("training loss", f"{self.losses[0]:.3f} → {self.losses[-1]:.3f} ({len(self.losses)} epochs)"))
        rows += [("parameters", f"{self.num_parameters:,}"), ("seconds", f"{self.seconds:.1f}")]
        return rows + [("note", note) for note in self.notes] + self._item_rows()

    def _item_rows(self) -> list[tuple[str, str]]:
        """Return a line an item, those that are not recalled first; of many, those alone."""
        ordered = sorted(self.results, key=lambda result: (result.recalled, result.answered_in_chat is not False))
        shown = [result for result in ordered if not result.recalled or len(ordered) <= SHOWN_ITEMS]
        rows = [(str(result), f"{result.prompt!r} → {result.target!r}") for result in shown[:SHOWN_ITEMS]]
        left = len(shown) - SHOWN_ITEMS
        return rows + ([("", f"… {left} more that are not recalled; see `results`")] if left > 0 else [])

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
        results = [ItemResult(**result) for result in values.get("results", [])]
        return cls(**{**values, "results": results})

    def __repr__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        return f"WriteReport ({self.method})\n" + "\n".join(f"  {a:<{width}}  {b}" for a, b in self.rows())

    def _repr_html_(self) -> str:
        return html_table(self.method, self.rows())


def html_table(caption: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return rows of a label and a value as an HTML table, for notebooks."""
    cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{cells}</table>"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_result(value: object) -> bool:
    known = {own.name: str(own.type).split(" ")[0] for own in fields(ItemResult)}
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool, NoneType)}
    return (
        isinstance(value, dict)
        and set(value) <= set(known)
        and {"prompt", "target", "recalled", "recalled_before"} <= set(value)
        and all(isinstance(one, kinds[known[name]]) for name, one in value.items())
    )


_CHECKS = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "list[float]": lambda value: isinstance(value, list) and all(map(_is_number, value)),
    "list[ItemResult]": lambda value: isinstance(value, list) and all(map(_is_result, value)),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "dict[str, int]": lambda value: (
        isinstance(value, dict) and all(isinstance(name, str) and type(count) is int for name, count in value.items())
    ),
}
