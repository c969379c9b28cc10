"""Write the model cards of saved memories, and of files that are pushed on their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from memory_adapters.base_model.fingerprint import Fingerprint
from memory_adapters.config import MemoryConfig
from memory_adapters.items import Item
from memory_adapters.validation import cut

__all__ = ["HERE", "CardExample", "file_card", "hub_id", "model_card"]

HERE = "<this repository or folder>"  # `push_to_hub` replaces it by the repository's name
TITLE_LENGTH = 40
SHOWN_ITEMS = 20

_TEMPLATE = """---
{metadata}
---

# {title}

{method} for {base_name}, written with memory-adapters (`pip install memory-adapters`).

## Use

```python
import memory_adapters  # registers the memory methods with PEFT
from memory_adapters import load_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({quoted})
tokenizer = AutoTokenizer.from_pretrained({quoted})
memory = load_memory(model, "{here}", tokenizer=tokenizer)
```

{note}{answers}## What it holds

{items}

## Writes

{writes}

## Settings

{settings}

Stored numbers: {num_parameters:,}. PEFT {peft_version}.
"""

_ANSWERS = """## Before and after

Greedy answers to the facts and questions written last, without the memory and with it.

| prompt | without | with |
|---|---|---|
{rows}

"""

_FILE_TEMPLATE = """---
{metadata}
---

# {title}

{text} Made with memory-adapters (`pip install memory-adapters`).

```python
{snippet}
```

{about}
"""


class CardExample(NamedTuple):
    """Store a prompt, and the model's greedy answers without the memory and with it."""

    prompt: str
    before: str
    after: str


def hub_id(name: str | None) -> str | None:
    """Return the name that a model was loaded by if it is that of a repository on the Hub; None for a local path."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if Path(name or "").exists() else name


def model_card(
    config: MemoryConfig,
    num_parameters: int,
    examples: Sequence[CardExample] = (),
    *,
    base_model: str | None = None,
) -> str:
    """Return the model card of a memory: metadata for the Hub, how to load it, examples, what was written and settings.

    Args:
        config: The memory's config.
        num_parameters: How many numbers the memory stores.
        examples: Answers to show; none by default.
        base_model: The base model's repository on the Hub; by default the config's, if that is one.
    """
    known = base_model or hub_id(config.base_model_name_or_path)
    base = known or "the base model"
    metadata = ModelCardData(
        library_name="peft",
        base_model=known,
        pipeline_tag="text-generation",
        tags=["memory-adapters", str(config.kind).lower().replace("_", "-")],
        widget=[_widget(example) for example in examples] or None,
    )
    card = _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=f"Memory for {_plain(base)}",
        quoted=json.dumps(base, ensure_ascii=False),
        method=config.method_name,
        base_name=f"`{base}`" if known else base,
        here=HERE,
        note=config.card_note,
        answers=_before_and_after(examples),
        items=_held(config.written_items()),
        writes="\n\n".join(_table(report.rows()) for report in config.reports()) or "Nothing yet.",
        settings="\n".join(f"* `{name}`: {value}" for name, value in config.card_settings().items()),
        num_parameters=num_parameters,
        peft_version=peft.__version__,
    )
    return str(ModelCard(card))


def file_card(
    *, title: str, tag: str, text: str, snippet: str, about: Mapping[str, object], base_fingerprint: Fingerprint
) -> str:
    """Return the model card of a file that is not a memory.

    Args:
        title: The heading.
        tag: The Hub's tag for such files.
        text: A sentence that says what the file is.
        snippet: Python code that loads it from `HERE`.
        about: Labels and values for a table.
        base_fingerprint: Fingerprint of the model that it belongs to. The card gives its type and size.
    """
    metadata = ModelCardData(library_name="memory-adapters", tags=["memory-adapters", tag])
    base = ("model_type", "num_layers", "hidden_size")
    known = {name.replace("_", " "): base_fingerprint[name] for name in base if name in base_fingerprint}
    rows = {key: str(value) for key, value in {**about, **known}.items()}
    card = _FILE_TEMPLATE.format(
        metadata=metadata.to_yaml(), title=title, text=text, snippet=snippet, about=_table(rows.items())
    )
    return str(ModelCard(card))


def _widget(example: CardExample) -> dict[str, Any]:
    """Return an example for the Hub's inference widget, with the answer given with the memory."""
    prompt = example.prompt
    title = prompt if len(prompt) <= TITLE_LENGTH else prompt[: TITLE_LENGTH - 1] + "…"
    return {"text": prompt, "example_title": title, "output": {"text": example.after}}


def _before_and_after(examples: Sequence[CardExample]) -> str:
    rows = [" | ".join(map(_plain, example)) for example in examples]
    return _ANSWERS.format(rows="\n".join(f"| {row} |" for row in rows)) if rows else ""


def _held(items: Sequence[Item]) -> str:
    """Return a list of items, cut where it is long."""
    if not items:
        return "Nothing."
    lines = [f"* {_plain(cut(repr(item)))}" for item in items[:SHOWN_ITEMS]]
    more = [f"* and {len(items) - SHOWN_ITEMS:,} more"] if len(items) > SHOWN_ITEMS else []
    return "\n".join([f"{len(items):,} items:", "", *lines, *more])


def _plain(text: str) -> str:
    """Return text on one line, escaped for Markdown."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(printable.split()))


def _table(labelled: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"| {_plain(key)} | {_plain(value)} |" for key, value in labelled)
    return f"| | |\n|---|---|\n{rows}"
