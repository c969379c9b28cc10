"""What an active memory costs: prefill and decode time with it, as a ratio to the same model without it.

    python benchmarks/overhead.py [--model HUB_ID_OR_PATH] [--rounds 9] [--output docs/results/overhead.json]

Rounds alternate between the two, in one process; medians of wall time and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemoryAdapterConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.residual_mlp.gated_mlp import GatedMLP

KEYS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("docs/results/overhead.json"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = torch.randint(100, 1000, (1, 512), generator=torch.Generator().manual_seed(0))

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1, use_cache=False)

    def decode() -> None:
        settings = {"max_new_tokens": 48, "min_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids[:, :16], attention_mask=torch.ones(1, 16), **settings)

    designs = {
        f"default (1 block, {KEYS} keys)": MemoryAdapterConfig(),
        f"3 blocks, {KEYS} keys each": MemoryAdapterConfig(layers=(0.7, 0.8)),
        "the experiment's (3 blocks)": MemoryAdapterConfig.fever_experiment(),
    }
    found: dict[str, dict[str, float]] = {}
    for what, config in designs.items():
        memory = inject_memory(model, config, tokenizer=tokenizer)
        for layer in memory.tuner_layers():
            mlp: GatedMLP = layer.memory_adapter_mlp[memory.adapter_name]  # type: ignore[attr-defined]
            if config.token_gate == "keys":
                mlp.add_keys(torch.randn(KEYS, mlp.up.shape[1]), torch.zeros(KEYS))
        for label, job in (("prefill 512 tokens", prefill), ("decode 48 tokens", decode)):
            wall, cpu = ratio(memory, job, arguments.rounds)
            found.setdefault(what, {}).update({f"{label}, wall": wall, f"{label}, cpu": cpu})
            print(f"{what:32} {label:20} wall ×{wall:.3f}  cpu ×{cpu:.3f}", flush=True)
        memory.remove()
    about = {
        "command": f"python benchmarks/overhead.py --rounds {arguments.rounds}",
        "threads": torch.get_num_threads(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"about": about, "ratios": found}, indent=1) + "\n")


def ratio(memory: Any, job: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median time with the memory ÷ without it, wall and CPU."""
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    job()
    for turn in range(rounds):
        for active in (True, False) if turn % 2 else (False, True):
            memory.active = active
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            times[active].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {active: [statistics.median(column) for column in zip(*times[active], strict=True)] for active in times}
    return medians[True][0] / medians[False][0], medians[True][1] / medians[False][1]


if __name__ == "__main__":
    main()
