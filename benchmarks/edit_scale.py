"""Seconds to write many facts into a randomly initialised model of GPT-J's shape: what an edit costs at scale.

    python benchmarks/edit_scale.py [--shape gptj] [--facts 10000] [--output FILE]

Facts are invented; the model knows nothing, so this measures time and memory alone, with all steps of every target run.
`--shape tiny` tries the script on any machine.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from memory_adapters import Fact, MemitConfig, inject_memory
from memory_adapters.embedded_model import embedded_model

SHAPES = {
    "gptj": dict(n_layer=28, n_embd=4096, n_head=16, rotary_dim=64),
    "tiny": dict(n_layer=12, n_embd=64, n_head=4, rotary_dim=16),
}
SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "vo", "dur", "el", "qui", "ban", "tor", "esh"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gptj")
    parser.add_argument("--facts", type=int, default=10_000)
    parser.add_argument("--covariance-tokens", type=int, default=200_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = GPTJForCausalLM(GPTJConfig(vocab_size=50400, n_positions=2048, **SHAPES[arguments.shape])).eval()
    torch.set_default_dtype(torch.float32)

    memory: Any = inject_memory(model, MemitConfig(layers=(0.1, 0.27), steps=25), tokenizer=tokenizer)
    found: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "facts": arguments.facts,
        "layers": list(memory.config.layers),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    start = time.perf_counter()
    memory.fit_covariance(num_tokens=arguments.covariance_tokens)
    found["covariance seconds"] = time.perf_counter() - start
    report = memory.write(invented(arguments.facts))
    found["write seconds"] = report.seconds
    found["seconds a fact"] = report.seconds / arguments.facts
    start = time.perf_counter()
    memory.forget(memory.facts[0])
    found["forget seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def invented(count: int) -> list[Fact]:
    """So many facts about different people who do not exist."""
    rng = random.Random(0)
    names: dict[str, None] = {}
    while len(names) < count:
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize() for _ in range(2)]
        names.setdefault(" ".join(words))
    cities = ["Rome", "Paris", "Tokyo", "Lima", "Cairo", "Berlin"]
    return [Fact("{} lives in the city of", name, rng.choice(cities)) for name in names]


if __name__ == "__main__":
    main()
