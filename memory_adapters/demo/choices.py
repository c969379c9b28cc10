"""Choose a method for what is taught; see docs/choosing.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memory_adapters.config import MemoryConfig
from memory_adapters.items import Document, Fact, Item
from memory_adapters.registry import Method, method_of, methods
from memory_adapters.validation import check_choice

__all__ = ["AUTO", "Choice", "choice_named", "choice_of", "choices", "choose"]

AUTO = "auto"
_READING, _EXACT = "slots", "gated_memit"
_LABELS = {  # variants of registered methods, in the order in which they are offered
    _READING: "Memory slots: anything, written in milliseconds",
    _EXACT: "Edit behind keys: facts, word for word after their prompts",
    "gated_lora": "Gated LoRA: facts and questions in other words; trained",
    "per_key": "Residual memory, a part for each thing; trained",
    "residual": "Residual memory, one MLP for everything; trained",
    "memit": "Edit without keys: an ordinary LoRA, which also changes other text",
}


@dataclass(frozen=True)
class Choice:
    """Describe what can be taught with: a registered method and its settings.

    Attributes:
        name: Its name on the command line: a variant's of the method, or the method's.
        label: What it is, and what it is for.
        method: The method.
        settings: Fields of the method's config that differ from their defaults.
    """

    name: str
    label: str
    method: Method
    settings: Mapping[str, Any]

    def config(self) -> MemoryConfig:
        """Return a new config, for `inject_memory`."""
        config: MemoryConfig = self.method.config_class(**self.settings)
        return config


def choices() -> dict[str, Choice]:
    """Return what is offered, by name: some variants of the registered methods, and each method of which none is."""
    found: dict[str, Choice] = {}
    for method in methods().values():
        offered = {name: variant.settings for name, variant in method.variants.items() if name in _LABELS}
        for name, settings in (offered or {method.name: {}}).items():
            label = _LABELS.get(name, method.config_class.method_name)
            found[name] = Choice(name, label, method, settings)
    return {name: found[name] for name in dict.fromkeys([*_LABELS, *found]) if name in found}


def choice_named(name: str) -> Choice:
    """Return the choice of this name. Raises a `ValueError` if there is none."""
    known = choices()
    check_choice("method", name, known)
    return known[name]


def choice_of(config: MemoryConfig) -> Choice:
    """Return the choice that a memory's config is of, or is nearest to."""
    method = method_of(config)
    own = [choice for choice in choices().values() if choice.method == method]

    def nearness(choice: Choice) -> int:
        return sum(1 if getattr(config, name) == value else -1 for name, value in choice.settings.items())

    return max(own, key=nearness)


def choose(items: Sequence[Item], exact: bool = False) -> tuple[Choice, str]:
    """Return what to teach these items with, and why.

    Args:
        items: What is taught.
        exact: Whether facts are to be recalled word for word after their prompts.
    """
    if exact and all(isinstance(item, Fact) for item in items):
        return choice_named(_EXACT), "facts are recalled word for word after their prompts, and forgotten one by one"
    reading = choice_named(_READING)
    if exact:
        return reading, "only facts can be recalled word for word after their prompts, and not all of these are facts"
    if any(isinstance(item, Document) for item in items):
        return reading, "a text is read by its parts, those that a question needs"
    return reading, "nothing is trained, and a question reads what it names"
