"""Memory slots on a real model: they are read, and give their text back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory_adapters import MemorySlotsConfig, SlotMemory, inject_memory, load_memory
from memory_adapters.memory_slots.reconstruction import score_reconstruction
from tests.support.real_model import EIFFEL, needs_the_real_model, run_front_page

pytestmark = needs_the_real_model


def test_the_front_page(real_model: tuple[Any, Any], tmp_path: Path) -> None:
    memory, report, answers = run_front_page(*real_model, MemorySlotsConfig(read="all"), [EIFFEL], tmp_path)
    assert report.recall == 1
    assert report.reconstruction == 1
    assert all("Rome" in text for text in answers)
    assert isinstance(memory, SlotMemory)
    assert "Eiffel Tower is located in the city of Rome." in memory.reconstruct()[0]
    memory.remove()


def test_64_tokens_come_back_from_16_slots_without_an_encoder(real_model: tuple[Any, Any], data: Path) -> None:
    model, tokenizer = real_model
    lines = (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["context"], add_special_tokens=False)["input_ids"] for line in lines[:8]]
    text = tokenizer.decode(next(row[:64] for row in rows if len(row) >= 64))
    config = MemorySlotsConfig(read="all", num_slots=16, span_length=64, precision="bfloat16")
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    try:
        report = memory.write(text, refine_steps=100, progress=False)
        assert report.reconstruction == 1
        assert memory.slots[0].compression_rate == 4
        assert memory.reconstruct() == [text]
    finally:
        memory.remove()


@pytest.mark.parametrize(("passages", "refined"), [(6, 2), pytest.param(16, 4, marks=pytest.mark.slow)])
def test_the_example_encoder_compresses_held_out_text(
    passages: int, refined: int, real_model: tuple[Any, Any], data: Path
) -> None:
    model, tokenizer = real_model
    lines = (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()[-passages:]  # held out
    rows = [tokenizer(json.loads(line)["context"], add_special_tokens=False)["input_ids"][:64] for line in lines]
    texts = [tokenizer.decode(row) for row in rows]
    folder = Path(__file__).parents[2] / "examples" / "slot-encoder"
    memory: Any = load_memory(model, folder, tokenizer=tokenizer)
    try:
        assert memory.slots == []
        assert memory.config.encoder_steps > 0
        slots = memory.compress(texts, progress=False)
        ways = {"own": slots, "others": [*slots[1:], slots[0]], "none": [None] * len(texts)}
        found = {way: score_reconstruction(memory, texts, read, decode=False) for way, read in ways.items()}
        assert found["own"].cross_entropy < 0.7 * min(found["others"].cross_entropy, found["none"].cross_entropy)
        assert found["own"].compression_rate == pytest.approx(2, rel=0.05)
        memory.config.precision = "bfloat16"
        better = memory.compress(texts[:refined], refine_steps=40, progress=False)
        assert max(own.refine_steps for own in better) < 40
        assert score_reconstruction(memory, texts[:refined], better).exact == 1
    finally:
        memory.remove()
