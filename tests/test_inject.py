"""Putting memories on a model: what looking at them changes (nothing), and what loading computes (once)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memory_adapters import MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory, load_memory, memories
from memory_adapters.base_model import decoder as decoder_module
from memory_adapters.base_model import fingerprint as fingerprint_module
from memory_adapters.config import MemoryConfig
from tests.support.contract import fingerprint
from tests.support.models import byte_tokenizer, tiny_model

CONFIGS: dict[str, MemoryConfig] = {
    "residual": MemoryAdapterConfig(layers=[1], memory_dim=4),
    "edit": MemitConfig(layers=[1, 2]),
    "slots": MemorySlotsConfig(num_slots=2, span_length=4, lora_rank=2),
}


def test_looking_at_memories_changes_nothing() -> None:
    model: Any = tiny_model()
    model.add_adapter(MemoryAdapterConfig(layers=[1], memory_dim=4), adapter_name="by peft")
    for name, config in CONFIGS.items():
        inject_memory(model, config, adapter_name=name)
    before = fingerprint(model)
    for memory in memories(model).values():
        assert memory.attached
        assert (memory.config.writes, memory.items) == ([], [])
        repr(memory)
    assert list(memories(model)) == ["by peft", *CONFIGS]
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", CONFIGS)
def test_loading_finds_the_decoder_and_the_fingerprint_once(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_memory(tiny_model(), CONFIGS[method], tokenizer=byte_tokenizer()).save_pretrained(tmp_path)
    model, calls = tiny_model(), []
    made, hashed = decoder_module.Decoder, fingerprint_module._mark
    monkeypatch.setattr(decoder_module, "Decoder", lambda *args: calls.append("decoder") or made(*args))
    monkeypatch.setattr(fingerprint_module, "_mark", lambda rows: calls.append("mark") or hashed(rows))
    load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    assert calls.count("decoder") == 1
    assert calls.count("mark") == 4, "the embeddings, the head, two blocks and all blocks"
