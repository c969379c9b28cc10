"""The PEFT config of a LoRA that a memory method puts on a model, and the names that users give of its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from memory_adapters.base_model.matrices import stored_transposed
from memory_adapters.validation import shown

__all__ = ["check_target_modules", "lora_config"]


def lora_config(modules: Mapping[str, nn.Module], *, rank: int, alpha: int, base_model: str | None) -> LoraConfig:
    """Return the config of a LoRA on these matrices, by full name, that is not trained by PEFT."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        fan_in_fan_out=all(map(stored_transposed, modules.values())),
        inference_mode=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
    )


def check_target_modules(names: Any) -> None:
    """Raise a `ValueError` unless `target_modules` is None or a list of names."""
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise ValueError(f"`target_modules` must be a list of module names, got {shown(names)}.")
