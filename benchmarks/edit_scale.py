"""Measure the time to write facts into a random model of GPT-J's shape ÷ that of a forward pass over their prompts.

    python benchmarks/edit_scale.py [--shape gptj] [--facts 10000]

Facts are invented; the model knows nothing, so this measures time and memory alone, with all steps of every target run.
`--shape tiny` tries the script on any machine.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoTokenizer, GPTJConfig

from benchmarks.common import DEVICE, BenchmarkParser, dumps, in_turn, random_model, save, timed
from memory_adapters import Fact, MemitConfig, inject_memory
from memory_adapters.base_model.tokens import pad_rows
from memory_adapters.embedded_model import embedded_model

SHAPES: dict[str, dict[str, Any]] = {
    "gptj": dict(n_layer=28, n_embd=4096, n_head=16, rotary_dim=64),
    "tiny": dict(n_layer=12, n_embd=64, n_head=4, rotary_dim=16),
}
SYLLABLES = ["ka", "lo", "mi", "ren", "sta", "vo", "dur", "el", "qui", "ban", "tor", "esh"]
CITIES = ["Rome", "Paris", "Tokyo", "Lima", "Cairo", "Berlin"]
BATCH = 100  # prompts of the forward pass


def main() -> None:
    parser = BenchmarkParser(__doc__, "edit_scale", model=False)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gptj", quick="tiny")
    parser.add_argument("--facts", type=int, default=10_000, quick=20)
    parser.add_argument("--covariance-tokens", type=int, default=200_000, quick=2_000)
    parser.add_argument("--steps", type=int, default=25, quick=2, help="of each target")
    arguments = parser.parse()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    config = GPTJConfig(vocab_size=50400, n_positions=2048, **SHAPES[arguments.shape])
    model = random_model(config, arguments.seed, dtype=torch.bfloat16)
    facts = invented(arguments.facts, arguments.seed)
    batch = pad_rows([tokenizer(fact.prompt)["input_ids"] for fact in facts[:BATCH]], DEVICE)

    @torch.no_grad()
    def forward() -> None:
        model(**batch)

    forward_seconds = in_turn({"forward": forward}, 3)["forward"].wall / len(facts[:BATCH])
    config = MemitConfig(layers=(0.1, 0.27), steps=arguments.steps, seed=arguments.seed)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    found: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "facts": arguments.facts,
        "layers": list(memory.config.layers),
    }
    fitting, _ = timed(memory.fit_covariance, num_tokens=arguments.covariance_tokens)
    writing, _ = timed(memory.write, facts)
    forgetting, _ = timed(memory.forget, facts[0])
    found |= {
        "covariance seconds": fitting.wall,
        "write seconds": writing.wall,
        "seconds a fact": writing.wall / len(facts),
        "a fact ÷ a forward pass of its prompt": writing.wall / len(facts) / forward_seconds,
        "forget seconds": forgetting.wall,
    }
    if DEVICE == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    print(dumps(found))
    save(arguments, found)


def invented(count: int, seed: int) -> list[Fact]:
    """Invent facts about different people."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize() for _ in range(2)]
        names.setdefault(" ".join(words))
    return [Fact(f"{name} lives in the city of", name, rng.choice(CITIES)) for name in names]


if __name__ == "__main__":
    main()
