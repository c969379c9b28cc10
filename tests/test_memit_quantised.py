"""Edits beside quantised weights, which stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memory_adapters import load_memory
from tests.contract import logits
from tests.models import byte_tokenizer, quantised_model
from tests.test_memit_write import FACTS, memory_on

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_an_edit_beside_quantised_weights(bits: int, tmp_path: Path) -> None:
    model = quantised_model(tmp_path / "base", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = logits(model)
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    memory = memory_on(model)
    assert torch.equal(logits(model), base)
    report = memory.write(FACTS, progress=False)
    spoken = logits(model)
    assert not torch.equal(spoken, base)
    assert report.perplexity is not None
    with memory.disabled():
        assert torch.equal(logits(model), base)
    memory.save_pretrained(tmp_path / "edit")
    memory.remove()
    assert torch.equal(logits(model), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    load_memory(model, tmp_path / "edit", tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), spoken)
