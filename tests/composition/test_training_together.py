"""Trainer and TRL on a LoRA and a memory together: both learn, checkpoints hold only adapters, resuming is exact."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from memory_adapters import Memory, MemoryAdapterConfig, SaveAdaptersCallback, inject_memory, load_adapters, memories
from tests.support.composing import SUITES
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model
from tests.training.test_own_training import QUIET, TEXT, loss_of


def lora_and_memory(kind: str = "residual") -> tuple[Any, Memory]:
    """A PeftModel with a LoRA, and a memory injected into it; both take part, and what can be trained is."""
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    if kind != "residual":
        memory = inject_memory(wrapped, SUITES[kind].make_config(), tokenizer=byte_tokenizer(), adapter_name="facts")
        SUITES[kind].fill(memory)
        return wrapped, memory
    config = MemoryAdapterConfig(layers=[1, 2], memory_dim=16, token_gate="sigmoid")
    return wrapped, inject_memory(wrapped, config, tokenizer=byte_tokenizer(), adapter_name="facts")


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "memory" in n or "slot" in n}


def trainer(model: Any, folder: Path, steps: int, **settings: Any) -> Trainer:
    ids = byte_tokenizer()(TEXT)["input_ids"]
    rows = [{"input_ids": ids[i:], "labels": ids[i:]} for i in range(8)]
    arguments: dict[str, Any] = dict(learning_rate=1e-2, max_steps=steps, per_device_train_batch_size=1, seed=3)
    arguments |= dict(output_dir=str(folder), lr_scheduler_type="constant", **QUIET)
    args = TrainingArguments(**arguments | settings)
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=[SaveAdaptersCallback()])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
def test_checkpoint_and_resume_with_both(kind: str, tmp_path: Path) -> None:
    whole, memory = lora_and_memory(kind)
    before = tensors(whole)
    trainer(whole, tmp_path / "whole", 8, save_strategy="no").train()
    moved = {name for name, tensor in tensors(whole).items() if not torch.equal(tensor, before[name])}
    assert any("lora_" in name and "default" in name for name in moved)
    assert any("facts" in name for name in moved) == (kind == "residual"), "an edit and slots stay as they were written"
    assert all(p.requires_grad is False for n, p in whole.named_parameters() if "lora_" not in n and "facts" not in n)

    first, _ = lora_and_memory(kind)
    trainer(first, tmp_path / "run", 5, save_steps=5).train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert not list(checkpoint.glob("model*.safetensors"))
    second, memory = lora_and_memory(kind)
    resumed = trainer(second, tmp_path / "run", 8, save_strategy="no")
    with pytest.warns(UserWarning, match="switched off the memory") if kind == "memit" else nullcontext():
        resumed.train(resume_from_checkpoint=str(checkpoint))  # the callback switches it on again
    assert memory.active
    after = tensors(second)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(whole).items())
    assert memories(second) == {"facts": memory}

    other = tiny_model()
    load_adapters(other, checkpoint / "adapters", tokenizer=byte_tokenizer())
    first.config.use_cache = True  # Trainer leaves it switched off, and sums are rounded otherwise without a cache
    assert torch.equal(logits(other), logits(first.eval()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl_trains_a_memory_and_a_lora_together(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, memory = lora_and_memory()
    before, start = loss_of(model), tensors(model)
    settings = dict(max_length=64, bf16=False, learning_rate=1e-2, max_steps=40, save_steps=40, **QUIET)
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **settings)
    rows = Dataset.from_list([{"text": TEXT}] * 4)
    trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        callbacks=[SaveAdaptersCallback()],
    ).train()
    assert loss_of(model) < 0.8 * before
    moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, start[name])}
    assert {("default" in name, "facts" in name) for name in moved} == {(True, False), (False, True)}
    other = tiny_model()
    load_adapters(other, tmp_path / "checkpoint-40" / "adapters")
    assert torch.equal(logits(other), logits(model.eval()))
    assert memory.active


@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|You are trying to modify a model with PEFT)")
def test_dpo_has_the_memory_in_its_reference_too(kind: str, tmp_path: Path) -> None:
    """The recipe of docs/compose.md."""
    trl = pytest.importorskip("trl")
    model = tiny_model()
    memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer(), adapter_name="facts")
    SUITES[kind].fill(memory)
    on = logits(model)
    reference = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="switched off the memory 'facts'") if kind == "memit" else nullcontext():
        policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    memory.active = True
    policy.set_requires_grad("facts", False)
    before = {name: tensor for name, tensor in tensors(model).items() if "facts" in name}
    settings = {
        **QUIET,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
    }
    dpo = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(output_dir=str(tmp_path), save_strategy="no", **settings),
        train_dataset=Dataset.from_list([{"prompt": "Rome is", "chosen": " old", "rejected": " new"}] * 4),
        processing_class=byte_tokenizer(),
    )
    dpo.train()
    losses = [entry["loss"] for entry in dpo.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]
    assert memory.active
    assert all(torch.equal(tensors(model)[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(reference.eval()), on)
