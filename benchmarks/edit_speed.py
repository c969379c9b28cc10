"""Measure how many times faster facts are written than one at a time with whole forward passes, in the same process.

    python benchmarks/edit_speed.py --data FOLDER [--facts 100] [--plain-facts 6]

The plain loop writes the first few of the facts, for its seconds a fact; the changes of the weights are compared on
these. The covariance is the same and not counted. Also measured: the share of the arithmetic limit that finding z
reaches (operations needed ÷ what a large matrix product does in the same run), and tokens a second of the covariance
against a bare forward pass that stops at the same block.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import (
    DEVICE,
    BenchmarkParser,
    Times,
    counterfact,
    dumps,
    in_turn,
    load_model,
    save,
    timed,
    wikitext,
)
from benchmarks.plain_memit import PlainMemit
from memory_adapters import CovarianceFitter, MemitConfig, inject_memory
from memory_adapters.base_model.partial_forward import capture
from memory_adapters.base_model.tokens import batches_of, pad_rows, tokenize
from memory_adapters.memit.prompts import bare_rows, context_rows
from memory_adapters.memit.write import LedgerBuilder

LONGEST = 1 << 30  # tokens of a row: no limit


def main() -> None:
    parser = BenchmarkParser(__doc__, "edit_speed", data=True)
    parser.add_argument("--facts", type=int, default=100, quick=4)
    parser.add_argument("--plain-facts", type=int, default=6, quick=1)
    parser.add_argument("--covariance-tokens", type=int, default=20_000, quick=2_000)
    parser.add_argument("--covariance-texts", type=int, default=60, quick=2, help="to take the time of a covariance on")
    parser.add_argument("--rounds", type=int, default=3, quick=1, help="of the covariance")
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    facts = [record.fact for record in counterfact(arguments, arguments.facts)]
    texts = wikitext(arguments, "valid").split("\n")

    memory: Any = inject_memory(model, MemitConfig(chat=False, seed=arguments.seed), tokenizer=tokenizer)
    covariance = memory.fit_covariance(texts, arguments.covariance_tokens)
    few = facts[: arguments.plain_facts]
    with memory.disabled():
        builder = LedgerBuilder(model, tokenizer, memory.config)
        contexts = builder.contexts()
        plain = PlainMemit(model, tokenizer, memory.config, covariance, contexts)
        times, changes = timed(plain.write, few, together=True)
    baseline = times / len(few)
    stages = {f"seconds a fact, {stage}": seconds / len(few) for stage, seconds in plain.seconds.items()}
    found: dict[str, Any] = {"plain": a_fact(baseline) | stages}
    print(dumps(found["plain"]), flush=True)
    rows = context_rows(facts, bare_rows(facts, tokenizer, LONGEST), contexts, tokenizer, LONGEST)
    needed = operations(builder, [row for own in rows for row in own]) / len(facts)
    for label, precision in (("float32", "model"), ("bfloat16", "bfloat16")):
        config = MemitConfig(chat=False, precision=precision, seed=arguments.seed)
        fast: Any = inject_memory(model, config, tokenizer=tokenizer)
        fast.write(few, covariance=covariance)
        cosines = {
            layer: torch.cosine_similarity((f.B @ f.A).flatten(), changes[layer].flatten(), dim=0).item()
            for layer, f in fast.ledger.solve().items()
        }
        fast.forget(few)
        times, report = timed(fast.write, facts, covariance=covariance)
        each = times / len(facts)
        ratio = baseline / each
        limit = (config.steps - 1) * needed / product_speed(torch.bfloat16 if label == "bfloat16" else torch.float32)
        found[label] = a_fact(each) | {
            "times faster": ratio.wall,
            "times less CPU": ratio.cpu,
            "share of the arithmetic limit": limit / each.wall,
            "cosine of the change, by layer": cosines,
            "recall": report.recall,
        }
        print(dumps(found[label]), flush=True)
        fast.remove()
    layers = list(memory.config.layers)
    memory.remove()
    tokens = [tokenize(tokenizer, text)[:1024] for text in texts if len(text) > 200][: arguments.covariance_texts]
    found["covariance"] = covariance_speed(CovarianceFitter(model, tokenizer, layers), tokens, arguments.rounds)
    print(dumps(found["covariance"]))
    save(arguments, found)


def a_fact(times: Times) -> dict[str, float]:
    """Name the seconds of a fact."""
    return {"seconds a fact": times.wall, "CPU seconds a fact": times.cpu}


def operations(builder: LedgerBuilder, rows: Any) -> float:
    """Count the operations of one evaluation of all facts with its gradient, from the first edited block on."""
    blocks = builder.decoder.blocks[builder.layers[0] :]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
    head = builder.decoder.head.weight.numel()
    read = sum(row.num_read for row in rows)
    scored = sum(max(len(row.ids) - row.first_label, 1) for row in rows)
    return 2 * 2.0 * (read * weights + scored * head)  # forward, and backward to the activations


def product_speed(dtype: torch.dtype) -> float:
    """Measure the operations a second of a large matrix product, median of 5."""
    a = torch.randn(2048, 2048, dtype=dtype, device=DEVICE)
    return 2 * 2048**3 / in_turn({"product": lambda: a @ a}, 5)["product"].wall


def covariance_speed(fitter: CovarianceFitter, rows: list[list[int]], rounds: int) -> dict[str, float]:
    """Measure tokens a second of the fitter and of the bare pass, in turn on the same batches."""
    batches = [[rows[i] for i in batch] for batch in batches_of(rows)]

    def bare() -> None:
        for batch in batches:
            capture(fitter.model, fitter.decoder, [fitter.layers[-1]], **pad_rows(batch, DEVICE))

    def fit() -> None:
        for batch in batches:
            fitter.update(batch)

    times, tokens = in_turn({"bare": bare, "fit": fit}, rounds), sum(map(len, rows))
    return {
        "bare tokens a second": tokens / times["bare"].wall,
        "tokens a second": tokens / times["fit"].wall,
        "ratio": (times["bare"] / times["fit"]).wall,
    }


if __name__ == "__main__":
    main()
