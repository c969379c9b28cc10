"""A memory of each method in a folder, and copies of it in which something is not what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from memory_adapters import (
    Fact,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_memory,
    memories,
)
from memory_adapters.config import MemoryConfig
from tests.support.contract import fingerprint
from tests.support.models import byte_tokenizer, tiny_model

FACT = Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome")
SMALL = dict(layers=[1, 2], steps=2, num_prefixes=1, covariance_tokens=256)
CONFIGS: dict[str, Callable[[], MemoryConfig]] = {
    "residual": lambda: MemoryAdapterConfig(layers=[1, 2], memory_dim=4, token_gate="none", gate_init=0.5),
    "edit": lambda: MemitConfig(**SMALL),
    "slots": lambda: MemorySlotsConfig(read="all", num_slots=2, span_length=4, lora_rank=2, refine_steps=0),
}
CONFIG, SETTINGS, WEIGHTS = "adapter_config.json", "memory_config.json", "adapter_model.safetensors"


def save_each(folder: Path) -> Path:
    """A memory of each method, written with the byte tokenizer, in a folder of the method's name."""
    for method, config in CONFIGS.items():
        memory: Any = inject_memory(tiny_model(), config(), tokenizer=byte_tokenizer(chat=True))
        if method != "residual":
            memory.write(FACT, progress=False)
        memory.save_pretrained(folder / method)
    return folder


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def changed(folder: Path, to: Path, name: str, **fields: Any) -> Path:
    """A copy of the folder with other fields in one JSON file."""
    path = copied(folder, to) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return to


def refused(folder: Path, message: str, model: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
    """Loading is a `ValueError` with these words, and leaves the model as it was."""
    model = tiny_model() if model is None else model
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        load_memory(model, folder, tokenizer=tokenizer)
    assert fingerprint(model) == before
    assert not memories(model)


def settings_file(folder: Path) -> str:
    return SETTINGS if (folder / SETTINGS).is_file() else CONFIG
