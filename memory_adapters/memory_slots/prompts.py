"""Items for slots: as text to compress, and as what refinement asks."""

from __future__ import annotations

from collections.abc import Sequence

from memory_adapters.base_model.item_rows import Row
from memory_adapters.items import Document, Fact, Item, QuestionAnswer
from memory_adapters.memory_slots.loss import Query

__all__ = ["END", "as_queries", "as_text"]

END = "\n\n"  # of every entry's text: what comes behind it is the prompt's


def as_text(items: Sequence[Item], between: str = "\n") -> str:
    """Return documents as they are, facts as sentences, questions with their answers; a line each by default."""
    return between.join(item.text if isinstance(item, Document) else _sentence(item) for item in items)


def _sentence(item: Fact | QuestionAnswer) -> str:
    if not isinstance(item, Fact):
        return f"{item.prompt}{item.continuation}"
    names = f" {item.subject} is also called {', '.join(item.aliases)}." if item.aliases else ""
    return f"{item.prompt}{item.continuation}.{names}"


def as_queries(rows: Sequence[Row]) -> list[Query]:
    """Return the prompt and the continuation that each row of a fact or question wants."""
    return [Query(row.input_ids[: row.first_label], row.input_ids[row.first_label :]) for row in rows]
