"""Slots of a quantised model, whose weights stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memory_adapters import load_memory
from memory_adapters.memory_slots.encoder_training import train_encoder
from tests.memory_slots.test_encoder_training import QUIET, text_examples
from tests.memory_slots.test_slots import TEXT, memory_on
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, quantised_model

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_slots_of_a_quantised_model(bits: int, tmp_path: Path) -> None:
    model = quantised_model(tmp_path / "base", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    memory = memory_on(model)
    assert torch.equal(logits(model), base)
    settings = QUIET | dict(output_dir=str(tmp_path / "training"), max_steps=4, learning_rate=1e-2)
    log = train_encoder(memory, text_examples(), training_args=settings)
    assert log[-1]["train_loss"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in memory.state_dict().values())
    report = memory.write(TEXT[:16], refine_steps=20, progress=False)
    assert report.losses[-1] < report.losses[0]
    with_memory = logits(model)
    assert not torch.equal(with_memory, base)
    with memory.disabled():
        assert torch.equal(logits(model), base)
    memory.save_pretrained(tmp_path / "slots")
    memory.remove()
    assert torch.equal(logits(model), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    load_memory(model, tmp_path / "slots", tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), with_memory)
