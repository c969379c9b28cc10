"""Several processes with one folder: what savers save and loaders load at the same time is always of one save.

    python -m tests.reliability.together FOLDER SECONDS

prints how many loads and saves there were, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memory_adapters import Covariance, MemorySlots, load_adapters, load_memory, save_adapters
from memory_adapters.base_model.fingerprint import base_fingerprint
from memory_adapters.files.atomic import OWN
from tests.reliability.killing import ended, fork
from tests.support.composing import put
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

SAVERS = 2


def memory_of(seed: int) -> Any:
    """The config alone (`weight`) changes what it says, as its tensors do."""
    memory: Any = put(tiny_model(), "residual", "knowledge", seed)
    memory.weight = 1.0 + seed
    return memory


def adapters_of(seed: int) -> Any:
    model = tiny_model()
    for kind in ("lora", "residual", "memit"):
        put(model, kind, kind, seed)
    return model


def files_of_two_saves() -> tuple[list[Covariance], list[MemorySlots]]:
    """Two of each kind of one file, that differ in the header and in the tensors."""
    fingerprint = base_fingerprint(tiny_model())
    covariances = [Covariance({1: torch.eye(32) * n}, n, n, "text", fingerprint) for n in (1, 2)]
    slots = [MemorySlots(torch.full((4, 32), float(n)), (4,), 7 + n, fingerprint, None, "0") for n in (1, 2)]
    return covariances, slots


def repeated(work: Callable[[int], None], seconds: float) -> Callable[[], str]:
    """What repeats `work(n)` for so long and says how often it did."""

    def run() -> str:
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            work(count)
            count += 1
        return str(count)

    return run


def run(folder: Path, seconds: float) -> dict[str, int]:
    torch.set_num_threads(1)
    memories = [memory_of(seed) for seed in range(SAVERS)]
    models = [adapters_of(seed) for seed in range(SAVERS)]
    covariances, slots = files_of_two_saves()
    said = [logits(memory.model) for memory in memories]
    all_said = [logits(model) for model in models]

    def save(seed: int) -> None:
        memories[seed].save_pretrained(folder / "memory")
        save_adapters(models[seed], folder / "all")
        covariances[seed].save(folder / "files" / "c.safetensors")
        slots[seed].save(folder / "files" / "slots.safetensors")

    def load(_number: int) -> None:
        model = tiny_model()
        load_memory(model, folder / "memory")
        assert any(logits(model).equal(one) for one in said), "config and weights are of two saves"
        model = tiny_model()
        load_adapters(model, folder / "all", tokenizer=byte_tokenizer())
        assert any(logits(model).equal(one) for one in all_said), "the adapters are of two saves"
        found = Covariance.load(folder / "files" / "c.safetensors")
        assert found.matrices[1].equal(covariances[found.num_tokens - 1].matrices[1])
        read = MemorySlots.load(folder / "files")
        assert read.vectors.equal(slots[read.num_tokens - 8].vectors)

    save(0)
    works = {f"saver {seed}": lambda _number, seed=seed: save(seed) for seed in range(SAVERS)}
    works |= {f"loader {number}": load for number in range(2)}
    children = {name: fork(repeated(work, seconds)) for name, work in works.items()}
    counts = {}
    for name, child in children.items():
        status, said_by_child = ended(*child)
        assert status == 0, f"{name} failed"
        counts[name] = int(said_by_child)
    load(0)
    left = [str(path) for path in folder.rglob("*") if OWN in path.name]
    assert not left, left
    return counts


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), float(sys.argv[2]))))
