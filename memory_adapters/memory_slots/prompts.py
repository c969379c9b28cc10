"""Items for slots, as text."""

from __future__ import annotations

from collections.abc import Sequence

from memory_adapters.items import Document, Fact, Item, QuestionAnswer

__all__ = ["END", "as_text"]

END = "\n\n"  # of every entry's text: what comes behind it is the prompt's


def as_text(items: Sequence[Item], between: str = "\n") -> str:
    """Return documents as they are, facts as sentences, questions with their answers; a line each by default."""
    return between.join(item.text if isinstance(item, Document) else _sentence(item) for item in items)


def _sentence(item: Fact | QuestionAnswer) -> str:
    if not isinstance(item, Fact):
        return f"{item.prompt}{item.continuation}"
    names = f" {item.subject} is also called {', '.join(item.aliases)}." if item.aliases else ""
    return f"{item.prompt}{item.continuation}.{names}"
