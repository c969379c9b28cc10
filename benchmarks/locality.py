"""Compare designs of the gated residual MLP on the same facts: scores and perplexity beside those of the base model.

    python benchmarks/locality.py --data FOLDER [--records 20] [--designs default experiment ...] [--dtype bfloat16]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. Each design is one `write`, scored in the same process as the
base model. Results are saved as they come, and an interrupted run goes on from them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import (
    BenchmarkParser,
    counterfact,
    load_model,
    save,
    save_tables,
    score,
    stored,
    table,
    timed,
    wikitext,
)
from memory_adapters import MemoryAdapterConfig, inject_memory

EXPERIMENT = MemoryAdapterConfig.fever_experiment
TOP = (0.7, 0.8)
KL: dict[str, Any] = {"num_prefixes": 5, "locality_weight": 1.0}
FAST_GATE: dict[str, Any] = {"num_prefixes": 5, "gate_learning_rate": 1e-2}
DESIGNS: dict[str, tuple[str, MemoryAdapterConfig]] = {
    "experiment": ("the experiment's module: gate 1.0, every token, 70–80%", EXPERIMENT()),
    "experiment + KL": ("the same with prefixes and locality loss", EXPERIMENT(**KL)),
    "zero gate": ("gate 0.0 with its own learning rate, every token, 70–80%", EXPERIMENT(gate_init=0.0, **FAST_GATE)),
    "sigmoid + KL": (
        "sigmoid gate per token, absolute scale, locality loss, 70–80%",
        EXPERIMENT(token_gate="sigmoid", **{**FAST_GATE, **KL}),
    ),
    "sigmoid early + KL": (
        "sigmoid gate per token, stream scale, locality loss, block 5",
        MemoryAdapterConfig(token_gate="sigmoid", **KL),
    ),
    "keys late": ("keys of the subjects, stream scale, 70–80%", MemoryAdapterConfig(layers=TOP)),
    "default": ("keys of the subjects, stream scale, block 5: the default", MemoryAdapterConfig()),
    "default, gate 0.0": ("the default, gate starting at 0", MemoryAdapterConfig(gate_init=0.0)),
    "default + KL": ("the default with locality loss", MemoryAdapterConfig(**KL)),
    "default + distillation": (
        "the default, half of the loss from the model that has read the fact",
        MemoryAdapterConfig(distillation_weight=0.5),
    ),
    "per_key": ("hidden units of each thing, from its name on, blocks 12–29", MemoryAdapterConfig(values="per_key")),
}


def main() -> None:
    parser = BenchmarkParser(__doc__, "locality", data=True)
    parser.add_records(20, perplexity_tokens=8192)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), quick=["default"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    arguments = parser.parse()
    model, tokenizer = load_model(arguments, getattr(torch, arguments.dtype))
    records, text = counterfact(arguments, arguments.records), wikitext(arguments, "test")
    facts = [record.fact for record in records]
    rows: dict[str, dict[str, Any]] = stored(arguments, "rows")

    def measure(what: str) -> dict[str, Any]:
        return {"what": what, **score(model, tokenizer, records, text, arguments.perplexity_tokens)}

    if "base" not in rows:
        rows["base"] = measure("the base model")
    for design in [design for design in arguments.designs if design not in rows]:
        what, config = DESIGNS[design]
        config.seed = arguments.seed
        memory = inject_memory(model, config, tokenizer=tokenizer)
        times, report = timed(memory.write, facts)
        rows[design] = {**measure(what), "seconds": times.wall, "cpu": times.cpu, "loss": report.losses[-1]}
        memory.remove()
        about = save(
            arguments,
            {"rows": rows},
            records=f"the first {arguments.records} of counterfact/edit.json",
            perplexity=f"WikiText-2 test, first {arguments.perplexity_tokens} tokens in windows of 512",
        )
        save_tables(arguments, about, markdown(rows))
        print(markdown(rows), flush=True)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Format the rows, with the perplexity's change from the base model."""
    head = ["design", "exact match", "ES", "PS", "paraphrase exact", "NS", "S", "perplexity", "seconds"]
    scores = ("exact_match", "efficacy", "paraphrase", "paraphrase_exact_match", "neighbourhood", "score")
    lines = []
    for name, row in rows.items():
        change = row["perplexity"] / rows["base"]["perplexity"] - 1
        cells = [*(f"{row[key]:.2f}" for key in scores), f"{row['perplexity']:.2f} ({change:+.2%})"]
        lines.append([f"**{name}**: {row['what']}", *cells, f"{row.get('seconds', 0):.0f}"])
    return table(head, lines)


if __name__ == "__main__":
    main()
