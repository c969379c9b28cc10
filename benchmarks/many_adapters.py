"""Measure what idle adapters cost a forward pass, and what switching costs: ratios to a model without, in one process.

    python benchmarks/many_adapters.py [--adapters 100] [--rounds 15]

Models without adapters, with a few and with many run in turn; ratios are of medians over the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import DEVICE, BenchmarkParser, dumps, in_turn, load_model, save
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
from memory_adapters.memit.ledger import Factors

RANK = 10  # facts of an edit
KEYS = 10
SLOTS = 16
ROWS = 8
CONFIGS: dict[str, Callable[[], MemoryConfig]] = {
    "residual": lambda: MemoryAdapterConfig(num_keys=KEYS),
    "memit": MemitConfig,
    "slots": lambda: MemorySlotsConfig(read="all", num_slots=SLOTS, span_length=64, lora_rank=8),
}


def add(model: Any, tokenizer: Any, kind: str, index: int) -> None:
    """Inject a memory of the usual size with random contents, and switch it off."""
    memory: Any = inject_memory(model, CONFIGS[kind](), tokenizer=tokenizer, adapter_name=f"{kind}_{index}")
    generator = torch.Generator().manual_seed(index)
    if kind == "memit":
        widths = {i: k.shape[1] for i, k in memory.ledger.keys.items()}
        size = next(iter(memory.ledger.shares.values())).shape[1]
        random = {
            i: (torch.randn(RANK, w, generator=generator), torch.randn(size, RANK, generator=generator))
            for i, w in widths.items()
        }
        memory._set_factors(factors={i: Factors(A * 1e-3, B * 1e-3) for i, (A, B) in random.items()})
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


@torch.no_grad()
def measure(bare: Any, few: Any, many: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure ratios of CPU time, of wall time for idle adapters, and the seconds behind them."""
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(1000, 20000, (1, arguments.tokens), generator=generator).to(DEVICE)
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

    times = in_turn(
        {
            "prefill, no adapter": lambda: run(bare),
            "prefill, all idle": lambda: run(many),
            "decode, no adapter": lambda: decode(bare, bare_cache),
            "decode, all idle": lambda: decode(many, cache),
            "few, one for each row": lambda: run(few, use_adapters_by_row(few, every[:ROWS]), batch),
            "prefill, one of few active": lambda: run(few, use_adapters(few, [every[0]])),
            "prefill, one of many active": lambda: run(many, use_adapters(many, [every[0]])),
            "switch among few": lambda: switch(few, [every[1]]),
            "switch among many": lambda: switch(many, [every[-1]]),
            "batch, one for all rows": lambda: run(many, use_adapters(many, [every[0]]), batch),
            "batch, one for each row": lambda: run(many, use_adapters_by_row(many, every[:ROWS]), batch),
        },
        arguments.rounds,
    )

    def ratio(a: str, b: str, clock: str = "cpu") -> float:
        return round(getattr(times[a] / times[b], clock), 4)

    return {
        "idle, prefill": ratio("prefill, all idle", "prefill, no adapter"),
        "idle, decode": ratio("decode, all idle", "decode, no adapter"),
        "one of many ÷ one of few": ratio("prefill, one of many active", "prefill, one of few active"),
        "switch ÷ prefill": ratio("switch among many", "prefill, no adapter"),
        "one for each row ÷ one for all": ratio("batch, one for each row", "batch, one for all rows"),
        "wall": {
            "idle, prefill": ratio("prefill, all idle", "prefill, no adapter", "wall"),
            "idle, decode": ratio("decode, all idle", "decode, no adapter", "wall"),
        },
        "seconds": {name: own._asdict() for name, own in times.items()},
    }


def main() -> None:
    parser = BenchmarkParser(__doc__, "many_adapters")
    parser.add_argument("--adapters", type=int, default=100, quick=10)
    parser.add_argument("--tokens", type=int, default=64, quick=8)
    parser.add_argument("--rounds", type=int, default=15, quick=1)
    arguments = parser.parse()
    bare, tokenizer = load_model(arguments)
    found: dict[str, Any] = {}
    for kind in CONFIGS:
        few, many = load_model(arguments)[0], load_model(arguments)[0]
        for model, count in ((few, ROWS), (many, arguments.adapters)):
            for index in tqdm(range(count), desc=kind, leave=False):
                add(model, tokenizer, kind, index)
        found[kind] = measure(bare, few, many, arguments)
        print(kind, dumps({k: v for k, v in found[kind].items() if k != "seconds"}), flush=True)
    about = {"adapters": arguments.adapters, "tokens": arguments.tokens, "rows": ROWS, "rounds": arguments.rounds}
    save(arguments, {"methods": found}, **about, ratios="of median CPU time")


if __name__ == "__main__":
    main()
