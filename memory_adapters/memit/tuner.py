"""A closed-form edit's config as PEFT meets it; the edit itself is PEFT's own LoRA."""

from __future__ import annotations

from typing import ClassVar

from memory_adapters.peft_layers.refusing_tuner import RefusingTuner

__all__ = ["EditTuner"]


class EditTuner(RefusingTuner):
    """Say that PEFT cannot make an edit from a `MemitConfig`."""

    refusal: ClassVar[str] = (
        "PEFT and transformers cannot make an edit from a MemitConfig: make it with "
        "`memory_adapters.inject_memory(model, MemitConfig(), tokenizer=tokenizer)`. Saved edits load in PEFT as the "
        "LoRA adapters that they are."
    )
