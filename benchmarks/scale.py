"""Predict what a token and a fact cost from the size of the model, and measure it ÷ the prediction, at three sizes.

    python benchmarks/scale.py [--sizes tiny 135M 1B]

Each model has random weights and SmolLM2's tokenizer; the speed of one plain forward pass (FLOP/s) in the same process
is the baseline that turns the formulas of docs/scale.md into seconds. Every cost is a difference of two runs of
different length, so that what does not grow with the work drops out.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.common import DEVICE, BenchmarkParser, dumps, random_model, save, stored, timed
from memory_adapters import CovarianceFitter, Fact, MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory
from memory_adapters.base_model.decoder import resolve_layers
from memory_adapters.embedded_model import embedded_model

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=256, intermediate_size=704, num_hidden_layers=10, num_attention_heads=4),
    "135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
    "1B": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=16),
}
LONG = 10.0  # seconds after which nothing is tried again
STEPS, PREFIXES, EPOCHS, SPAN = 5, 2, 4, 128
COUNTS = {"tiny": (16, 112), "135M": (4, 28), "1B": (2, 6)}  # facts of the two runs
NAMES = [a + b for a in ("Ada", "Ben", "Cle", "Dor", "Emi", "Fri", "Gre", "Hug") for b in map(chr, range(97, 113))]
FACTS = [Fact("The mother tongue of {} is", f"{name} Lindqvist", "Danish") for name in NAMES]
TEXT = "The harbour was closed in winter, and the ships lay under the snow until the ice broke in April. " * 80


def blocks_parameters(model: Any) -> int:
    """Count the parameters of the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters())


def slope(run: Callable[[int], None], few: int, many: int) -> float:
    """Measure the seconds of each more; where a run is short, the median of three tries."""
    tries: list[float] = []
    while len(tries) < 3 and sum(tries) * (many - few) < LONG:
        short, long = (timed(run, count)[0].wall for count in (few, many))
        tries.append((long - short) / (many - few))
    return statistics.median(tries)


def formulas(model: Any, tokens: int) -> dict[str, float]:
    """Count the FLOP of each cost: N parameters of the blocks, H of the head; the edit reads a share of the blocks."""
    N, H = blocks_parameters(model), model.lm_head.weight.numel()
    depth, d_in = model.config.num_hidden_layers, model.config.intermediate_size
    edited = resolve_layers(MemitConfig().layers, depth)
    below, under = (edited[-1] + 1) / depth, edited[0] / depth
    first = (int(0.18 * depth) + 1) / depth
    rows = (1 + PREFIXES) * tokens
    return {
        "forward, a token": 2 * N + 2 * H,
        "covariance, a token": 2 * N * below + len(edited) * d_in**2,
        "edit, a fact": STEPS * 4 * N * (1 - under) * rows + 2 * N * below * rows,
        "residual, a fact": EPOCHS * 4 * N * (1 - first) * tokens,
        "slots, compressing a token": 2 * N,
        "slots, a token and step of refinement": 4 * N + 4 * H,
    }


def measured(model: Any, tokenizer: Any, facts: tuple[int, int]) -> dict[str, float]:
    """Measure the seconds of each cost."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(DEVICE)

    @torch.no_grad()
    def forward(count: int) -> None:
        model(ids[:, :count], use_cache=False)

    def covariance(count: int) -> None:
        CovarianceFitter(model, tokenizer, MemitConfig().layers).fit([TEXT[:1200]] * 40, count, progress=False)

    given = CovarianceFitter(model, tokenizer, MemitConfig().layers).fit([TEXT], 512, progress=False).covariance()

    def edit(count: int) -> None:
        config = MemitConfig(steps=STEPS, num_prefixes=PREFIXES, prefix_length=4, target_loss=0.0)
        memory: Any = inject_memory(model, config, tokenizer=tokenizer)
        memory.write(FACTS[:count], covariance=given, progress=False)
        memory.remove()

    def residual(count: int) -> None:
        config = MemoryAdapterConfig(
            num_train_epochs=EPOCHS, min_steps=0, num_prefixes=0, target_loss=0.0, token_gate="none", batch_size=4
        )
        memory: Any = inject_memory(model, config, tokenizer=tokenizer)
        memory.write(FACTS[:count], unrelated=[TEXT[:60]] * 4, progress=False)
        memory.remove()

    slots: Any = inject_memory(
        model,
        MemorySlotsConfig(read="all", num_slots=SPAN // 4, span_length=SPAN, refine_target_loss=0.0),
        tokenizer=tokenizer,
    )

    def compress(count: int) -> None:
        slots.compress(tokenizer.decode(ids[0, :count]), refine_steps=0, progress=False)

    def refine(count: int) -> None:
        slots.compress(tokenizer.decode(ids[0, :SPAN]), refine_steps=count, progress=False)

    found = {
        "slots, compressing a token": slope(compress, 2 * SPAN, 6 * SPAN),
        "slots, a token and step of refinement": slope(refine, 1, 4) / SPAN,
    }
    slots.remove()
    return {
        "forward, a token": slope(forward, 128, 512),
        "covariance, a token": slope(covariance, 600, 1800),
        "edit, a fact": slope(edit, *facts),
        "residual, a fact": slope(residual, *facts),
        **found,
    }


def main() -> None:
    parser = BenchmarkParser(__doc__, "scale", model=False)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), quick=["tiny"])
    arguments = parser.parse()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tokens = len(tokenizer(FACTS[0].prompt + " Danish")["input_ids"]) - 1
    rows = stored(arguments, "sizes")
    for size in [size for size in arguments.sizes if size not in rows]:
        config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **SIZES[size])
        model = random_model(config, arguments.seed)
        counts = (2, 4) if arguments.quick else COUNTS[size]
        flops, seconds = formulas(model, tokens), measured(model, tokenizer, counts)
        speed = flops["forward, a token"] / seconds["forward, a token"]
        rows[size] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "blocks": blocks_parameters(model),
            "forward FLOP/s": speed,
            "costs": {
                name: {
                    "FLOP": flops[name],
                    "predicted s": flops[name] / speed,
                    "measured s": seconds[name],
                    "measured / predicted": round(seconds[name] * speed / flops[name], 2),
                }
                for name in flops
            },
        }
        print(size, dumps(rows[size]), flush=True)
        del model
        gc.collect()
        save(arguments, {"sizes": rows}, **{"tokens of a fact": tokens})


if __name__ == "__main__":
    main()
