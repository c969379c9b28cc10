"""What two processes of `accelerate launch` do together, for comparison with one process.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/support/launched.py OUTPUT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from memory_adapters import (
    CovarianceFitter,
    Document,
    Fact,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    QuestionAnswer,
    inject_memory,
)
from memory_adapters.memory_slots.encoder_training import train_encoder
from memory_adapters.training.distributed import is_main_process, world_size
from tests.memory_slots.test_encoder_training import text_examples
from tests.support.models import byte_tokenizer, tiny_model

PLACES = ["Rome", "Paris", "Oslo", "Lima", "Bern"]
FACTS = [Fact("{} is in", f"Tower {place[::-1]}", place) for place in PLACES]
TEXTS = [f"The tower of {place} is high, and old, and in the middle of {place}." for place in PLACES]
UNRELATED = [f"Some text about {thing}, and all that belongs to it." for thing in ("the sea", "birds", "bread", "wind")]
ITEMS = [*FACTS, QuestionAnswer("Who sold the house?", "Nobody at all."), Document("The harbour was closed in winter.")]


def covariance(_folder: Path) -> dict[str, torch.Tensor]:
    """C₀ of given texts, and of text sampled from the model."""
    fitter = CovarianceFitter(tiny_model(), byte_tokenizer(), [1, 2]).fit(TEXTS * 3, 2000, progress=False)
    given = fitter.covariance().matrices
    sampled = CovarianceFitter(tiny_model(), byte_tokenizer(), [1]).sample(30_000, progress=False).covariance().matrices
    return {f"given.{i}": matrix for i, matrix in given.items()} | {f"sampled.{i}": m for i, m in sampled.items()}


def edit(_folder: Path) -> dict[str, torch.Tensor]:
    """Five facts, an odd number, by MEMIT."""
    config = MemitConfig(layers=[1, 2], steps=5, num_prefixes=1, prefix_length=3, covariance_tokens=600)
    memory: Any = inject_memory(tiny_model(), config, tokenizer=byte_tokenizer())
    memory.write(FACTS, progress=False)
    return memory.state_dict()


def residual(_folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Seven items in batches of four, whose last is not full."""
    fields: dict[str, Any] = dict(layers=[1, 2], memory_dim=8, num_train_epochs=3, num_prefixes=1, min_steps=0)
    config = MemoryAdapterConfig(**fields | settings)
    memory: Any = inject_memory(tiny_model(), config, tokenizer=byte_tokenizer())
    report = memory.write(ITEMS, unrelated=UNRELATED, training_args={"disable_tqdm": True})
    return {**memory.state_dict(), "losses": torch.tensor(report.losses)}


def residual_kept(folder: Path) -> dict[str, torch.Tensor]:
    """The same with locality and distillation losses."""
    fields = dict(locality_weight=0.5, distillation_weight=0.5, token_gate="sigmoid", gate_init=0.5)
    return residual(folder, **fields)


def encoder(folder: Path) -> dict[str, torch.Tensor]:
    """A slot encoder, on autoencoding and continuation mixed."""
    config = MemorySlotsConfig(num_slots=4, span_length=16, lora_rank=2)
    memory: Any = inject_memory(tiny_model(), config, tokenizer=byte_tokenizer())
    settings = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=2)
    settings |= dict(output_dir=str(folder), max_steps=4, learning_rate=1e-2, warmup_steps=0)
    settings |= dict(per_device_train_batch_size=4 // world_size())
    train_encoder(memory, text_examples(), training_args=settings)
    return memory.state_dict()


TASKS = {task.__name__: task for task in (covariance, edit, residual, residual_kept, encoder)}


def run(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tasks, here or by several processes together."""
    return {name: {k: v.clone() for k, v in task(folder).items()} for name, task in TASKS.items()}


if __name__ == "__main__":
    logging.set_verbosity_error()
    assert world_size() == 2
    result = run(Path(sys.argv[2]))
    if is_main_process():
        torch.save(result, sys.argv[1])
