"""Two residual memories on one model, each with facts of its own: what they damage, with and without a router.

    python benchmarks/router.py --data FOLDER [--records 20] [--output FILE]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. The base model, the memories without a router and with one
are measured in the same process, on the same records and text.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemoryAdapterConfig, inject_memory, memories, route_memories
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity

DESIGNS: dict[str, tuple[str, MemoryAdapterConfig]] = {
    "experiment": (
        "the FEVER experiment's module, open at every token, 70–80%",
        MemoryAdapterConfig.fever_experiment(router_keys=True),
    ),
    "open early": (
        "open at every token, stream scale, block 5",
        MemoryAdapterConfig(token_gate="none", gate_init=1.0, router_keys=True),
    ),
    "default": ("keys of the subjects, block 5: the default", MemoryAdapterConfig()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--perplexity-tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("docs/results/router.json"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = load_counterfact(Path(arguments.data) / "counterfact" / "edit.json", arguments.records)
    text = load_wikitext(Path(arguments.data) / "wikitext2" / "test.txt")
    half = len(records) // 2
    sources = {"first": records[:half], "second": records[half:]}

    def measure() -> dict[str, Any]:
        scores = score_edits(model, tokenizer, records).to_dict()
        kept = ("exact_match", "efficacy", "paraphrase", "neighbourhood", "score")
        drift = perplexity(model, tokenizer, text, max_tokens=arguments.perplexity_tokens)
        return {**{key: scores[key] for key in kept}, "perplexity": drift}

    rows: dict[str, Any] = {"base": measure()}
    for design, (what, config) in DESIGNS.items():
        for source, part in sources.items():
            inject_memory(model, config, tokenizer=tokenizer, adapter_name=source)
            for other in memories(model).values():
                other.active = other.adapter_name == source
            memories(model)[source].write([record.fact for record in part])
        for memory in memories(model).values():
            memory.active = True
        rows[design] = {"what": what, "without": measure()}
        with route_memories(model) as router:
            rows[design]["with"] = measure()
            rows[design]["choices"] = {
                f"{kind} of the {source}": {
                    str(chosen): router.choose(prompts, tokenizer).count(chosen) / len(prompts)
                    for chosen in (*sources, None)
                }
                for source, part in sources.items()
                for kind, prompts in {
                    "prompts": [record.fact.prompt for record in part],
                    "paraphrases": [prompt for record in part for prompt in record.paraphrases],
                    "neighbours": [prompt for record in part for prompt, *_ in record.neighbours],
                }.items()
                if prompts
            }
        for memory in list(memories(model).values()):
            memory.remove()
        print(design, json.dumps(rows[design], indent=1), flush=True)
    about = {"records": len(records), "perplexity_tokens": arguments.perplexity_tokens, "torch": torch.__version__}
    arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
