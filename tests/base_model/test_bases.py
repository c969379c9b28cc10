"""Bases that are not plain weights in memory: quantised by bitsandbytes or torchao, or spread over memory and disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from memory_adapters import inject_memory, load_memory, memories
from tests.support.composing import SUITES
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import ARCHITECTURES, byte_tokenizer, quantised_model, tiny_model


def torchao_model(folder: Path, bits: int) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    wide = {**ARCHITECTURES["llama"], "hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **wide)).save_pretrained(folder)
    kind = quantization.Int8WeightOnlyConfig() if bits == 8 else quantization.IntxWeightOnlyConfig(torch.int4)
    config = TorchAoConfig(kind)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def bitsandbytes_model(folder: Path, bits: int) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    return quantised_model(folder, load_in_4bit=bits == 4, load_in_8bit=bits == 8)


def offloaded_model(folder: Path, architecture: str) -> PreTrainedModel:
    """Blocks 1 and 2 on the disk, as `device_map="auto"` does where memory is short."""
    tiny_model(architecture).save_pretrained(folder / "whole")
    names = [name for name, _ in tiny_model(architecture).named_modules()]
    blocks = [name for name in names if name.endswith((".0", ".1", ".2", ".3")) and name.count(".") == 2]
    rest = [
        name for name in names if name.count(".") == 1 and not any(block.startswith(f"{name}.") for block in blocks)
    ]
    places = {name: "disk" if name in blocks[1:3] else "cpu" for name in [*blocks, *rest, "lm_head"] if name in names}
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", device_map=places, offload_folder=folder / "parts")
    assert any(parameter.is_meta for parameter in model.parameters())
    return model.eval()


BASES: dict[str, Callable[[Path], PreTrainedModel]] = {
    "bitsandbytes 4-bit": lambda folder: bitsandbytes_model(folder, 4),
    "bitsandbytes 8-bit": lambda folder: bitsandbytes_model(folder, 8),
    "torchao 4-bit": lambda folder: torchao_model(folder, 4),
    "torchao 8-bit": lambda folder: torchao_model(folder, 8),
    "disk, llama": lambda folder: offloaded_model(folder, "llama"),
    "disk, qwen2": lambda folder: offloaded_model(folder, "qwen2"),
    "disk, gpt2": lambda folder: offloaded_model(folder, "gpt2"),
}


def plain_values(weight: torch.Tensor) -> torch.Tensor:
    """Of torchao's tensors, which cannot be compared, what they stand for."""
    return weight.dequantize() if type(weight.data) is not torch.Tensor else weight.data


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", SUITES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_written_switched_off_saved_removed_and_loaded(base: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = BASES[base](tmp_path / "base")
    plain = logits(model)
    weights = {name: plain_values(weight).clone() for name, weight in model.named_parameters() if not weight.is_meta}
    memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), plain)
    report: Any = SUITES[kind].write(memory)
    assert report.perplexity is not None
    with_memory = logits(model)
    assert not torch.equal(with_memory, plain)
    assert torch.isfinite(with_memory).all()
    with memory.disabled():
        assert torch.equal(logits(model), plain)
    settings: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert model.generate(**encode(PROMPT), **settings).shape[1] == len(PROMPT) + 4
    memory.save_pretrained(tmp_path / "memory")
    memory.remove()
    assert torch.equal(logits(model), plain)
    after = dict(model.named_parameters())
    assert all(torch.equal(plain_values(after[name]), weight) for name, weight in weights.items())
    load_memory(model, tmp_path / "memory", tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), with_memory)
    with memories(model)["knowledge"].disabled():
        assert torch.equal(logits(model), plain)
