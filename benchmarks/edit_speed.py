"""Seconds to write facts: the library against one fact at a time with whole forward passes, in the same run.

    python benchmarks/edit_speed.py --data FOLDER [--facts 100] [--plain-facts 6] [--output FILE]

The plain loop writes the first few of the facts, for its seconds a fact; the changes of the weights are compared on
these. The covariance is the same and not counted. Also printed: the share of the arithmetic limit that finding z
reaches (operations needed ÷ what a large matrix product does in the same run), and tokens a second of the covariance
against a bare forward pass that stops at the same block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_memit import PlainMemit
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import CovarianceFitter, MemitConfig, inject_memory
from memory_adapters.base_model.partial_forward import capture
from memory_adapters.base_model.tokens import batches_of, pad_rows, tokenize
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.perplexity import load_wikitext
from memory_adapters.memit.prompts import fact_rows
from memory_adapters.memit.write import LedgerBuilder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--plain-facts", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3, help="of the covariance")
    parser.add_argument("--output", type=Path, default=Path("docs/results/edit_speed.json"))
    arguments = parser.parse_args()
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = Path(arguments.data)
    facts = [r.fact for r in load_counterfact(data / "counterfact" / "edit.json", arguments.facts)]
    texts = load_wikitext(data / "wikitext2" / "valid.txt").split("\n")
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"}

    memory: Any = inject_memory(model, MemitConfig(), tokenizer=tokenizer)
    covariance = memory.fit_covariance(texts, 20_000)
    few = facts[: arguments.plain_facts]
    with memory.disabled():
        maker = LedgerBuilder(model, tokenizer, memory.config)
        contexts = maker.contexts()
        plain = PlainMemit(model, tokenizer, memory.config, covariance, contexts)
        wall, cpu = time.perf_counter(), time.process_time()
        expected = plain.write(few, apart=True)
        found["plain"] = {
            "seconds a fact": (time.perf_counter() - wall) / len(few),
            "CPU seconds a fact": (time.process_time() - cpu) / len(few),
            **{f"seconds a fact, {stage}": seconds / len(few) for stage, seconds in plain.seconds.items()},
        }
        print(json.dumps(found["plain"], indent=1), flush=True)
    for precision in ("model", "bfloat16"):
        fast: Any = inject_memory(model, MemitConfig(precision=precision), tokenizer=tokenizer)
        fast.write(few, covariance=covariance)
        cosines = {
            layer: torch.cosine_similarity((f.B @ f.A).flatten(), expected[layer].flatten(), dim=0).item()
            for layer, f in fast.ledger.solve().items()
        }
        fast.forget(few)
        wall, cpu = time.perf_counter(), time.process_time()
        report = fast.write(facts, covariance=covariance)
        seconds = (time.perf_counter() - wall) / len(facts)
        rows = fact_rows(facts, contexts, tokenizer, 1 << 30)
        needed = operations(model, maker, rows) * (fast.config.steps - 1) / len(facts)
        peak = product_speed(torch.float32 if precision == "model" else torch.bfloat16)
        row = {
            "seconds a fact": seconds,
            "CPU seconds a fact": (time.process_time() - cpu) / len(facts),
            "times faster": found["plain"]["seconds a fact"] / seconds,
            "times less CPU": found["plain"]["CPU seconds a fact"] / ((time.process_time() - cpu) / len(facts)),
            "share of the arithmetic limit": needed / peak / seconds,
            "cosine of the change, by layer": cosines,
            "recall": report.recall,
        }
        found["float32" if precision == "model" else precision] = row
        print(json.dumps(row, indent=1), flush=True)
        fast.remove()
    memory.remove()
    found["covariance"] = covariance_speed(model, tokenizer, memory._names, texts, arguments.rounds)
    print(json.dumps(found["covariance"], indent=1))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def operations(model: Any, maker: LedgerBuilder, rows: Any) -> float:
    """Multiplications and additions that one evaluation of all facts with its gradient needs, above the last block."""
    blocks = maker.decoder.blocks[maker.layers[-1] + 1 :]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    head = maker.decoder.head.weight.numel()
    read = sum(row.num_read for row in rows)
    scored = sum(max(len(row.ids) - row.first_label, 1) for row in rows)
    return 2 * 2.0 * (read * weights + scored * head)  # forward, and backward to the activations


def product_speed(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, median of 5."""
    a = torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / timed(lambda: a @ a, 5)


def timed(run: Callable[[], Any], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def covariance_speed(model: Any, tokenizer: Any, layers: Any, texts: list[str], rounds: int) -> dict[str, float]:
    """Median tokens a second of the fitter and of the bare pass, in turns on the same batches."""
    fitter = CovarianceFitter(model, tokenizer, list(layers))
    rows = [tokenize(tokenizer, text)[:1024] for text in texts if len(text) > 200][:60]
    batches = [[rows[i] for i in batch] for batch in batches_of(rows)]
    tokens = sum(map(len, rows))

    def bare() -> None:
        for batch in batches:
            capture(model, fitter.decoder, [fitter.layers[-1]], **pad_rows(batch))

    def fit() -> None:
        for batch in batches:
            fitter.update(batch)

    pairs = [(timed(bare, 1), timed(fit, 1)) for _ in range(rounds)]
    seconds = [statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(b / f for b, f in pairs)
    return {"bare tokens a second": tokens / seconds[0], "tokens a second": tokens / seconds[1], "ratio": ratio}


if __name__ == "__main__":
    main()
