"""The same seed gives the same bytes on one machine: in one process, in another, and whatever else drew numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memory_adapters import CovarianceFitter, Fact, MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory
from memory_adapters.memory_slots.encoder_training import Example, train_encoder
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [
    Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome"),
    Fact("Big Ben stands in", subject="Big Ben", target="Oslo"),
]
TEXT = "The harbour was closed in winter, and the ships lay under the snow until the ice broke in April."
UNRELATED = ["The sea, the wind and all the ships.", "Birds sing in the early morning.", "He sold the house at last."]
TIMED = "seconds"
SEEDS = itertools.count(1)


def fresh_model() -> Any:
    """The same model each time; what else draws random numbers in the process has drawn others before."""
    model = tiny_model()
    seed = next(SEEDS)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return model


def generators() -> list[Any]:
    """States of the global generators."""
    kind, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), kind, *(np.asarray(part).tolist() for part in rest)]


def residual(model: Any, folder: Path, seed: int) -> None:
    config = MemoryAdapterConfig(
        layers=[1, 2], memory_dim=8, num_train_epochs=3, num_prefixes=2, min_steps=0, dropout=0.1, seed=seed
    )
    memory: Any = inject_memory(model, config, tokenizer=byte_tokenizer())
    memory.write([*FACTS, TEXT], training_args={"disable_tqdm": True})
    memory.save_pretrained(folder)


def edit(model: Any, folder: Path, seed: int) -> None:
    config = MemitConfig(layers=[1, 2], steps=4, num_prefixes=2, prefix_length=3, covariance_tokens=300, seed=seed)
    memory: Any = inject_memory(model, config, tokenizer=byte_tokenizer())
    memory.write(FACTS, progress=False)
    memory.covariance.save(folder / "covariance.safetensors")
    memory.save_pretrained(folder)


def slots(model: Any, folder: Path, seed: int) -> None:
    settings: Any = dict(read="all", num_slots=4, span_length=16, lora_rank=2, refine_steps=3, pooling="tokens")
    config = MemorySlotsConfig(**settings, seed=seed)
    memory: Any = inject_memory(model, config, tokenizer=byte_tokenizer())
    memory.write([TEXT, *FACTS], progress=False)
    memory.save_pretrained(folder)


def encoder(model: Any, folder: Path, seed: int) -> None:
    config = MemorySlotsConfig(num_slots=4, span_length=16, lora_rank=2, seed=seed)
    memory: Any = inject_memory(model, config, tokenizer=byte_tokenizer())
    ids = byte_tokenizer()(TEXT)["input_ids"]
    examples = [Example(ids[i : i + 24]) for i in range(8)]
    settings = dict(max_steps=3, per_device_train_batch_size=2, warmup_steps=0, learning_rate=1e-2, logging_steps=9)
    train_encoder(memory, examples, training_args=dict(**settings, output_dir=str(folder / "run"), disable_tqdm=True))
    memory.save_pretrained(folder)


def covariance(model: Any, folder: Path, seed: int) -> None:
    fitter = CovarianceFitter(model, byte_tokenizer(), [1, 2]).sample(300, seed=seed, progress=False)
    fitter.fit([TEXT, *UNRELATED], 200, progress=False).covariance().save(folder / "covariance.safetensors")


KINDS: dict[str, Callable[[Any, Path, int], None]] = {
    "residual": residual,
    "edit": edit,
    "slots": slots,
    "encoder": encoder,
    "covariance": covariance,
}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, with the seconds that a write took left out of cards and configs."""
    found = {}
    for file in sorted(folder.glob("*.*")):
        data = file.read_bytes()
        if file.suffix in (".json", ".md"):
            data = b"\n".join(line for line in data.splitlines() if TIMED.encode() not in line)
        found[file.name] = hashlib.sha256(data).hexdigest()
    return found


def made(kind: str, folder: Path, seed: int = 0) -> dict[str, str]:
    folder.mkdir()
    model = fresh_model()
    before = generators()
    KINDS[kind](model, folder, seed)
    assert generators() == before, "the numbers that others draw are the same with a memory and without"
    return digests(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first = made(kind, tmp_path / "first")
    assert made(kind, tmp_path / "again") == first
    other = made(kind, tmp_path / "other", seed=7)
    weights = [name for name in first if name.endswith(".safetensors")]
    assert weights
    assert all(other[name] != first[name] for name in weights)


@pytest.mark.integration
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "tests.reliability.test_determinism", str(tmp_path / "elsewhere"), *KINDS]
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=600)
    found = json.loads((tmp_path / "elsewhere" / "digests.json").read_text())
    assert {kind: made(kind, tmp_path / kind) for kind in KINDS} == found


@pytest.mark.parametrize("kind", ["residual", "edit", "slots", "covariance"])
def test_another_number_of_threads_changes_roundings_at_most(kind: str, tmp_path: Path) -> None:
    made(kind, tmp_path / "one")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        made(kind, tmp_path / "more")
    finally:
        torch.set_num_threads(threads)
    for file in (tmp_path / "one").glob("*.safetensors"):
        more = load_file(tmp_path / "more" / file.name)
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(more[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = {kind: made(kind, target / kind) for kind in sys.argv[2:]}
    (target / "digests.json").write_text(json.dumps(found))
