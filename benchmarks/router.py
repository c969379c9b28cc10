"""Measure what two memories on one model damage, without and with a router, beside the base model in the same process.

    python benchmarks/router.py --data FOLDER [--records 20] [--designs default ...]

FOLDER holds counterfact/edit.json and wikitext2/test.txt. Each of the two residual memories has half of the facts.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import BenchmarkParser, counterfact, dumps, load_model, save, score, wikitext
from memory_adapters import MemoryAdapterConfig, inject_memory, memories, route_memories

SCORES = ("exact_match", "efficacy", "paraphrase", "neighbourhood", "score", "perplexity")
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
    parser = BenchmarkParser(__doc__, "router", data=True)
    parser.add_records(20, perplexity_tokens=8192)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), quick=["default"])
    arguments = parser.parse()
    model, tokenizer = load_model(arguments)
    records, text = counterfact(arguments, arguments.records), wikitext(arguments, "test")
    half = len(records) // 2
    sources = {"first": records[:half], "second": records[half:]}

    def measure() -> dict[str, float]:
        scores = score(model, tokenizer, records, text, arguments.perplexity_tokens)
        row = {key: scores[key] for key in SCORES}
        return row | {"perplexity ÷ base": row["perplexity"] / rows["base"]["perplexity"] if rows else 1.0}

    rows: dict[str, Any] = {}
    rows["base"] = measure()
    for design in arguments.designs:
        what, config = DESIGNS[design]
        config.seed = arguments.seed
        for source, part in sources.items():
            memory = inject_memory(model, config, tokenizer=tokenizer, adapter_name=source)
            for other in memories(model).values():
                other.active = other is memory
            memory.write([record.fact for record in part])
        for memory in memories(model).values():
            memory.active = True
        rows[design] = {"what": what, "without": measure()}
        with route_memories(model) as router:
            rows[design]["with"] = measure()
            rows[design]["choices"] = choices(router, tokenizer, sources)
        for memory in list(memories(model).values()):
            memory.remove()
        print(design, dumps(rows[design]), flush=True)
    save(arguments, {"rows": rows}, records=len(records), perplexity_tokens=arguments.perplexity_tokens)


def choices(router: Any, tokenizer: Any, sources: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each kind of prompts, the share for which the router chooses each memory, or none."""
    shares = {}
    for source, part in sources.items():
        kinds = {
            "prompts": [record.fact.prompt for record in part],
            "paraphrases": [prompt for record in part for prompt in record.paraphrases],
            "neighbours": [prompt for record in part for prompt, _ in record.neighbours],
        }
        for kind, prompts in kinds.items():
            if prompts:
                chosen = router.choose(prompts, tokenizer)
                share = {str(name): chosen.count(name) / len(prompts) for name in (*sources, None)}
                shares[f"{kind} of the {source}"] = share
    return shares


if __name__ == "__main__":
    main()
