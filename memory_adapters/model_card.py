"""The model card that travels with a saved memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import peft
from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from memory_adapters.config import MemoryConfig

_TEMPLATE = """---
{metadata}
---

# {title}

{method} for `{base}`, written with memory-adapters (`pip install memory-adapters`).

## Use

```python
import memory_adapters  # registers the memory methods with PEFT
from memory_adapters import load_memory
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
memory = load_memory(model, "<this repository or folder>", tokenizer=tokenizer)
```

{note}## What was written

{writes}

## Settings

{settings}

Stored numbers: {num_parameters:,}. PEFT {peft_version}.
"""


def model_card(config: MemoryConfig, num_parameters: int) -> str:
    """Markdown with the Hub's metadata: base model, tags, import line, what was written and how it scored."""
    base = config.base_model_name_or_path or "the base model"
    is_repo_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    metadata = ModelCardData(
        library_name="peft",
        base_model=base if is_repo_id else None,
        pipeline_tag="text-generation",
        tags=["memory-adapters", str(config.peft_type.value).lower().replace("_", "-")],
    )
    card = _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=f"Memory for {base}",
        method=config.method_name,
        base=base,
        note=config.card_note,
        writes="\n\n".join(_written(write) for write in config.writes) or "Nothing yet.",
        settings="\n".join(f"* `{name}`: {value}" for name, value in config.card_settings().items()),
        num_parameters=num_parameters,
        peft_version=peft.__version__,
    )
    return str(ModelCard(card))


def _written(write: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in write.items())
    return f"| | |\n|---|---|\n{rows}"
