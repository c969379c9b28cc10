"""A hundred adapters on one model: what idle ones cost a forward pass, and what it costs to switch.

    python benchmarks/many_adapters.py [--adapters 100] [--rounds 15] [--output FILE]

Models without and with idle adapters run in turn, in the same process; ratios are of medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from memory_adapters import (
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlots,
    MemorySlotsConfig,
    inject_memory,
    memories,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.partial_forward import CACHE
from memory_adapters.config import MemoryConfig
from memory_adapters.embedded_model import embedded_model
from memory_adapters.memit.ledger import Factors

RANK = 10  # facts of an edit
KEYS = 10
SLOTS = 16
ROWS = 8
CONFIGS: dict[str, Callable[[], MemoryConfig]] = {
    "residual": lambda: MemoryAdapterConfig(num_keys=KEYS),
    "memit": MemitConfig,
    "slots": lambda: MemorySlotsConfig(num_slots=SLOTS, span_length=64, lora_rank=8),
}


def add(model: Any, tokenizer: Any, kind: str, index: int) -> None:
    """A memory of the usual size with random contents."""
    memory: Any = inject_memory(model, CONFIGS[kind](), tokenizer=tokenizer, adapter_name=f"{kind}_{index}")
    generator = torch.Generator().manual_seed(index)
    if kind == "memit":
        widths = {i: k.shape[1] for i, k in memory.ledger.keys.items()}
        size = memory.ledger.targets.shape[1]
        random = {
            i: (torch.randn(RANK, w, generator=generator), torch.randn(size, RANK, generator=generator))
            for i, w in widths.items()
        }
        memory._place({i: Factors(A * 1e-3, B * 1e-3) for i, (A, B) in random.items()})
    elif kind == "slots":
        vectors = 0.1 * torch.randn(SLOTS, memory.encoder.decoder.embedding_size, generator=generator)
        memory.use(
            MemorySlots(vectors, (SLOTS,), 64, memory.config.base_fingerprint, memory.encoder.fingerprint(), "0" * 64)
        )
    else:
        for layer in memory.tuner_layers():
            mlp = layer.memory_adapter_mlp[memory.adapter_name]
            mlp.keys.copy_(torch.randn(mlp.keys.shape, generator=generator))
    memory.active = False


def timed(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each, run in turn."""
    wall: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in tqdm(range(rounds), unit="round", leave=False):
        for name, action in actions.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            action()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {n: {"wall": statistics.median(wall[n]), "cpu": statistics.median(cpu[n])} for n in actions}


@torch.no_grad()
def measure(bare: Any, few: Any, many: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Ratios of CPU time (and of wall time where asked), and the seconds behind them."""
    ids = torch.randint(1000, 20000, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = ids.expand(ROWS, -1)
    every = list(memories(many))
    cache = many(ids, use_cache=True)[CACHE]
    bare_cache = bare(ids, use_cache=True)[CACHE]

    def decode(model: Any, past: Any) -> None:
        model(ids[:, :1], **{CACHE: past}, use_cache=True)
        past.crop(-1)

    def run(model: Any, context: Any = None, inputs: Any = ids) -> None:
        with context or nullcontext():
            model(inputs, use_cache=True)

    def switch(model: Any, names: list[str]) -> None:
        with use_adapters(model, names):
            pass

    times = timed(
        {
            "prefill, no adapter": lambda: run(bare),
            "prefill, all idle": lambda: run(many),
            "decode, no adapter": lambda: decode(bare, bare_cache),
            "decode, all idle": lambda: decode(many, cache),
            "few, one for each row": lambda: run(few, use_adapters_by_row(few, every[:ROWS]), batch),
            "prefill, one of few speaks": lambda: run(few, use_adapters(few, [every[0]])),
            "prefill, one of many speaks": lambda: run(many, use_adapters(many, [every[0]])),
            "switch among few": lambda: switch(few, [every[1]]),
            "switch among many": lambda: switch(many, [every[-1]]),
            "batch, one for all rows": lambda: run(many, use_adapters(many, [every[0]]), batch),
            "batch, one for each row": lambda: run(many, use_adapters_by_row(many, every[:ROWS]), batch),
        },
        rounds,
    )

    def ratio(a: str, b: str, clock: str = "cpu") -> float:
        return round(times[a][clock] / times[b][clock], 4)

    return {
        "idle, prefill": ratio("prefill, all idle", "prefill, no adapter"),
        "idle, decode": ratio("decode, all idle", "decode, no adapter"),
        "one of many ÷ one of few": ratio("prefill, one of many speaks", "prefill, one of few speaks"),
        "switch ÷ prefill": ratio("switch among many", "prefill, no adapter"),
        "one for each row ÷ one for all": ratio("batch, one for each row", "batch, one for all rows"),
        "wall": {
            "idle, prefill": ratio("prefill, all idle", "prefill, no adapter", "wall"),
            "idle, decode": ratio("decode, all idle", "decode, no adapter", "wall"),
        },
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/results/many_adapters.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = arguments.model or embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(name)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    bare = load()
    found: dict[str, Any] = {}
    for kind in CONFIGS:
        few, many = load(), load()
        for model, count in ((few, ROWS), (many, arguments.adapters)):
            for index in tqdm(range(count), desc=kind, leave=False):
                add(model, tokenizer, kind, index)
        found[kind] = measure(bare, few, many, arguments.tokens, arguments.rounds)
        print(kind, json.dumps({k: v for k, v in found[kind].items() if k != "seconds"}, indent=1), flush=True)
    about = {"adapters": arguments.adapters, "tokens": arguments.tokens, "rows": ROWS, "rounds": arguments.rounds}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "ratios": "of median CPU time"}
    arguments.output.write_text(json.dumps({"about": about, "methods": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
