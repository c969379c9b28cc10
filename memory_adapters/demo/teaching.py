"""Teach a model, ask it, and keep what it was taught: what the page does, without the page."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.answering import chat_answers
from memory_adapters.demo.choices import AUTO, Choice, choice_named, choice_of, choose
from memory_adapters.embedded_model import is_embedded
from memory_adapters.explanation import Explanation
from memory_adapters.files.model_card import hub_id
from memory_adapters.inject import inject_memory, load_memory
from memory_adapters.items import Item, Items, as_items
from memory_adapters.memory import Memory
from memory_adapters.report import WriteReport

__all__ = ["ANSWER_TOKENS", "Taught", "Teaching"]

ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Taught:
    """Say what was taught with, why, and what came of it."""

    choice: Choice
    why: str
    report: WriteReport


class Teaching:
    """Teach one model with one memory, which is made with the first thing that is taught.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        memory: The memory; None before anything is taught or loaded.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.memory: Memory[Any] | None = None

    @property
    def items(self) -> list[Item]:
        """What is taught, in the order of the writes."""
        return [] if self.memory is None else self.memory.items

    @property
    def choice(self) -> Choice | None:
        """What is taught with; None before anything is."""
        return None if self.memory is None else choice_of(self.memory.config)

    def teach(
        self, items: Items, method: str = AUTO, *, exact: bool = False, measure: bool = True, progress: bool = True
    ) -> Taught:
        """Write items into the memory. After an error everything is as before.

        Args:
            items: What to teach.
            method: The name of one of `choices()`, or `"auto"` to choose by what is taught: see `choose`. What holds
                something already goes on with its own method.
            exact: For `"auto"`: whether facts are to be recalled word for word after their prompts.
            measure: Whether to measure what is recalled and what else changes, which takes seconds.
            progress: Whether to show progress bars.

        Raises:
            ValueError, TypeError: As `Memory.write`; and if the memory holds items, and is of another method.
        """
        listed = as_items(items)
        choice, why = self._chosen(listed, method, exact)
        before = self.memory
        if before is not None and (before.items or choice == self.choice):
            return Taught(choice, why, before.write(listed, progress=progress, measure=measure))
        memory = inject_memory(self.model, choice.config(), tokenizer=self.tokenizer)
        try:
            report = memory.write(listed, progress=progress, measure=measure)
        except BaseException:
            memory.remove()
            raise
        self._replace(memory)
        return Taught(choice, why, report)

    def _chosen(self, items: Sequence[Item], method: str, exact: bool) -> tuple[Choice, str]:
        asked = None if method == AUTO else choice_named(method)
        current = self.choice
        if current is None or not self.items:
            return (asked, "as you asked") if asked else choose(items, exact)
        held = f"the memory holds items written with {current.name}"
        if asked and asked.name != current.name:
            raise ValueError(f"`method={method!r}`, but {held}: go on with that, or start over.")
        if other := [item for item in items if not isinstance(item, current.method.memory_class.accepts)]:
            raise ValueError(f"A {type(other[0]).__name__} cannot be taught now: {held}, which takes none. Start over.")
        return current, held

    def forget(self, items: Items) -> None:
        """Take items out again; see `Memory.forget`. Raises a `ValueError` if one is not taught."""
        if self.memory is None:
            raise ValueError("`items` cannot be forgotten: nothing is taught.")
        self.memory.forget(items)

    def start_over(self) -> None:
        """Remove the memory: the model is the base again."""
        self._replace(None)

    def ask_without(self, question: str) -> str:
        """Return the answer of the model without the memory."""
        if self.memory is None:
            return self._asked(question)
        with self.memory.disabled():
            return self._asked(question)

    def ask_with(self, question: str) -> str:
        """Return the answer of the model with the memory."""
        return self._asked(question)

    def _asked(self, question: str) -> str:
        if not question.strip():
            raise ValueError(f"`question` is {question!r}: ask something.")
        if self.memory is not None:
            return self.memory.ask(question, max_new_tokens=ANSWER_TOKENS)
        (answer,) = chat_answers(self.model, self.tokenizer, [question], num_tokens=ANSWER_TOKENS)
        return answer.strip()

    def explain(self, question: str) -> Explanation | None:
        """Show what acts in a question, and where; None before anything is taught."""
        return None if self.memory is None else self.memory.explain(question)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the memory; see `Memory.save_pretrained`."""
        self._needed("saved").save_pretrained(folder)

    def load(self, path_or_repo_id: str | os.PathLike[str]) -> None:
        """Load a saved memory in place of this one, which stays if that fails; see `load_memory`."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* duplicates .*")  # of this memory, which is removed then
            loaded = load_memory(self.model, path_or_repo_id, tokenizer=self.tokenizer)
        self._replace(loaded)

    def push(self, repo_id: str, *, private: bool = True, base_model: str | None = None) -> str:
        """Push the memory to the Hub, and return the commit's URL; see `Memory.push_to_hub`."""
        return self._needed("pushed").push_to_hub(repo_id, private=private, base_model=base_model)

    @property
    def is_of_a_folder(self) -> bool:
        """Whether the model was loaded from a folder, so that a push needs the name of its repository."""
        name = self.model.name_or_path or ""
        return not is_embedded(name) and hub_id(name) is None

    def _needed(self, what: str) -> Memory[Any]:
        if self.memory is None or not self.items:
            raise ValueError(f"Nothing can be {what}: teach something first.")
        return self.memory

    def _replace(self, memory: Memory[Any] | None) -> None:
        before, self.memory = self.memory, memory
        if before is not None:
            before.remove()
