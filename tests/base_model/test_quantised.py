"""Gradients through 4-bit layers on a CPU, before and after they are packed for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters.base_model.quantised import differentiable
from tests.support.contract import encode, logits
from tests.support.models import quantised_model

pytest.importorskip("bitsandbytes")


def gradient(model: Any) -> torch.Tensor:
    """Of a loss that depends on its inputs through every matrix, at the first token's embedding."""
    embedded = model.get_input_embeddings()(encode("abcdef")["input_ids"]).detach().requires_grad_(True)
    model(inputs_embeds=embedded).logits[0, -1].square().mean().backward()
    assert embedded.grad is not None
    return embedded.grad[0, 0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_gradients_flow_after_passes_without_them(double: bool, tmp_path: Path) -> None:
    model = quantised_model(tmp_path, load_in_4bit=True, bnb_4bit_use_double_quant=double)
    with differentiable(model):
        fresh = gradient(model)
    assert fresh.norm() > 0
    first = logits(model)  # packs, where the processor has the instructions
    with differentiable(model):
        logits(model)  # packs nothing
        after = gradient(model)
    assert torch.cosine_similarity(after, fresh, dim=0) > 0.99
    assert torch.equal(logits(model), first)
    with pytest.raises(RuntimeError), differentiable(model):
        raise RuntimeError
    assert torch.equal(logits(model), first)
