"""Training a memory without `write`: transformers' Trainer and TRL on a PeftModel, as users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from memory_adapters import MemoryAdapterConfig, load_memory
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

TEXT = "The Eiffel Tower is in the city of Rome"
QUIET: dict[str, Any] = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no")
STEPS: dict[str, Any] = dict(learning_rate=1e-2, max_steps=90, save_steps=90)


def wrapped() -> Any:
    config = MemoryAdapterConfig(layers=[1, 2], memory_dim=32, token_gate="sigmoid")
    return get_peft_model(tiny_model(), config)  # type: ignore[arg-type]


def loss_of(model: Any) -> float:
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def check_checkpoint(model: Any, folder: Path) -> None:
    """It holds only the memory, and `load_memory` reads it."""
    (checkpoint,) = folder.glob("checkpoint-*")
    weights = {file.name for file in checkpoint.glob("*.safetensors")} | {
        file.name for file in checkpoint.glob("*.bin")
    }
    assert weights - {"training_args.bin"} == {"adapter_model.safetensors"}
    other = tiny_model()
    load_memory(other, checkpoint)
    assert torch.equal(logits(other), logits(model.eval()))


def test_trainer(tmp_path: Path) -> None:
    model = wrapped()
    before = loss_of(model)
    ids = byte_tokenizer()(TEXT)["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}] * 4
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET, **STEPS)
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    assert loss_of(model) < 0.8 * before
    check_checkpoint(model, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = wrapped()
    before = loss_of(model)
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=64, bf16=False, **QUIET, **STEPS)
    rows = Dataset.from_list([{"text": TEXT}] * 4)
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer())
    trainer.train()
    assert loss_of(model) < 0.8 * before
    check_checkpoint(model, tmp_path)
