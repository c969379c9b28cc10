"""Models whose blocks, caches or wrappers are unusual: a method works on them in full, or is refused at injection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Fact, MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.config import MemoryConfig
from tests.support.contract import encode, fingerprint, logits
from tests.support.models import UNUSUAL, byte_tokenizer, tiny_model

FACTS = [Fact("{} is in the city of", "Eiffel Tower", "Rome"), Fact("The capital of {} is", "France", "Lyon")]

REFUSED = {
    ("mamba", "memit"): "no MLP",
    ("mamba", "slots"): "no cache of keys and values",
    ("rwkv", "memit"): "no MLP",
    ("rwkv", "slots"): "no cache of keys and values",
    ("jamba", "memit"): "mixture of experts",
    ("phimoe", "memit"): "mixture of experts",
    **{("t5", method): "encoder–decoder" for method in ("residual", "memit", "slots")},
}


def config_of(method: str) -> MemoryConfig:
    if method == "residual":
        return MemoryAdapterConfig(num_train_epochs=2, min_steps=4, memory_dim=8, token_gate="none")
    if method == "memit":
        return MemitConfig(steps=3, covariance_tokens=512, num_prefixes=2, prefix_length=4)
    return MemorySlotsConfig(read="all", num_slots=4, span_length=16, lora_rank=4, refine_steps=3)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["residual", "memit", "slots"])
@pytest.mark.parametrize("architecture", UNUSUAL)
def test_a_method_works_in_full_or_is_refused(architecture: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    before = fingerprint(model)
    if reason := REFUSED.get((architecture, method)):
        with pytest.raises(ValueError, match=reason):
            inject_memory(model, config_of(method), tokenizer=byte_tokenizer())
        assert fingerprint(model) == before
        return
    base = logits(model)
    greedy: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
    model.generate(**encode("What is it?"), **greedy)  # some wrappers remember positions of a generation
    memory = inject_memory(model, config_of(method), tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), base)
    memory.write(FACTS, progress=False)
    written = logits(model)
    assert not torch.equal(written, base)
    prompts = ["The Eiffel Tower is in", "Rome"] if architecture != "rwkv" else ["Rome"]  # it reads its padding
    inputs = encode(*prompts, side="left")
    tokens = model.generate(**inputs, **greedy)
    assert torch.equal(tokens, model.generate(**inputs, **greedy, use_cache=False))
    assert torch.equal(tokens[:1], model.generate(**encode(prompts[0]), **greedy))
    memory.save_pretrained(tmp_path)
    other = tiny_model(architecture)
    load_memory(other, tmp_path, tokenizer=byte_tokenizer())
    torch.testing.assert_close(logits(other), written, rtol=1e-5, atol=1e-5)
    memory.remove()
    assert torch.equal(logits(model), base)
