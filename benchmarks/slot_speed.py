"""Measure generation from memory slots against generation from the text itself: time and memory, in one process.

    python benchmarks/slot_speed.py [--model HUB_ID_OR_PATH] [--tokens 2048] [--batches 1 8]

In turn within each round: the whole context in the prompt; for each number of slots, compress it, then generate; and
generate from slots that were compressed before (their keys and values are kept). What an encoder was trained for does
not change its speed, so none is needed. Memory is the growth of the process's resident set (of the allocated memory on
a GPU).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import re
import statistics
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch

from benchmarks.common import DEVICE, BenchmarkParser, Times, dumps, load_model, median, save, timed
from memory_adapters import MemorySlotsConfig, inject_memory

PROMPT = 32


def main() -> None:
    parser = BenchmarkParser(__doc__, "slot_speed")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, quick=512, help="of the context")
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 128], quick=[128], help="for the whole context")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], quick=[1])
    parser.add_argument("--new-tokens", type=int, default=128, quick=4, help="to generate")
    parser.add_argument("--rounds", type=int, default=3, quick=1)
    arguments = parser.parse()
    model, tokenizer = load_model(arguments, getattr(torch, arguments.dtype))
    generator = torch.Generator().manual_seed(arguments.seed)
    rows: dict[str, Any] = {}
    words = torch.tensor([i for i in range(len(tokenizer)) if re.fullmatch(" [a-z]+", tokenizer.decode([i]))])
    for batch in arguments.batches:
        ids, prompts = (
            words[torch.randint(len(words), (batch, tokens), generator=generator)]
            for tokens in (arguments.tokens, PROMPT)
        )
        texts, prompts = [tokenizer.decode(row) for row in ids], prompts.to(DEVICE)
        whole = torch.cat([ids.to(DEVICE), prompts], 1)
        row = compared(model, tokenizer, texts, whole, prompts, arguments)
        rows[f"{arguments.tokens} tokens, batch {batch}"] = row
        print(dumps(row), flush=True)
    save(
        arguments,
        {"rows": rows},
        generation=f"{arguments.new_tokens} tokens, greedy, behind a prompt of {PROMPT}",
        rounds=f"{arguments.rounds}; medians",
    )


def compared(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    whole: torch.Tensor,
    prompts: torch.Tensor,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Measure seconds, CPU seconds and peak MiB of each way, medians over rounds, and ratios to the full context."""
    new = arguments.new_tokens
    settings: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    memories: dict[int, Any] = {}
    for slots in arguments.slots:
        config = MemorySlotsConfig(
            num_slots=512 * slots // arguments.tokens, span_length=512, refine_steps=0, seed=arguments.seed
        )
        memories[slots] = inject_memory(model, config, tokenizer=tokenizer, adapter_name=f"slots{slots}")
    made = {slots: memory.compress(texts, progress=False) for slots, memory in memories.items()}
    rows: dict[str, Any] = {f"{slots} slots: achieved": own[0].num_slots for slots, own in made.items()}

    def generate(ids: torch.Tensor) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def compress_and_generate(memory: Any) -> None:
        memory.use(memory.compress(texts, progress=False))
        generate(prompts)

    found: dict[str, list[tuple[Times, float]]] = {}
    for _ in range(arguments.rounds):
        found.setdefault("full context", []).append(measured(lambda: generate(whole)))
        for slots, memory in memories.items():
            way = f"{slots} slots: compress and generate"
            found.setdefault(way, []).append(measured(partial(compress_and_generate, memory)))
            # What was just compressed is read again: its keys and values are there.
            found.setdefault(f"{slots} slots: cached", []).append(measured(lambda: generate(prompts)))
            memory.use(None)
    for memory in reversed(memories.values()):
        memory.remove()
    baseline = median([times for times, _ in found["full context"]])
    for way, values in found.items():
        times, peak = median([own for own, _ in values]), statistics.median(peak for _, peak in values)
        row = {"seconds": round(times.wall, 3), "CPU seconds": round(times.cpu, 3), "peak MiB": round(peak)}
        rows[way] = row | {"full context ÷ it": round((baseline / times).wall, 2)}
    return rows


def measured(run: Callable[[], None]) -> tuple[Times, float]:
    """Measure the time of a run, and the growth of memory in MiB at its peak."""
    cuda, process, peak, done = DEVICE == "cuda", psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, or its use again would not be seen
    before = torch.cuda.memory_allocated() if cuda else process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        times, _ = timed(run)
    finally:
        done.set()
        watcher.join()
    most = torch.cuda.max_memory_allocated() if cuda else max(peak[0], process.memory_info().rss)
    return times, (most - before) / 2**20


if __name__ == "__main__":
    main()
