"""Score memory slots: what refinement and an encoder keep, and what a reader gets from them, beside the text itself.

    python benchmarks/slots.py --data FOLDER [--encoder FOLDER] [--parts refinement capacity ...]

FOLDER holds qa/contexts.jsonl. The last 100 contexts are held out from the encoder that comes with the project (see
train_encoder.py). The baselines (no slots, another text's slots, the whole text) are rows of the same tables; the parts
of refinement alone have none. Results are saved part by part.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BenchmarkParser, dumps, load_model, save, save_tables, stored, timed
from memory_adapters import MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.evaluation.plots import score_curves
from memory_adapters.memory_slots.encoder_training import Example, train_encoder
from memory_adapters.memory_slots.question_answering import question_prompt, score_answers
from memory_adapters.memory_slots.reconstruction import (
    markdown,
    other_texts,
    score_continuations_after,
    score_reconstruction,
    ways_to_read,
)

HELD_OUT = 100
OVERFITTING_STEPS = 240
ANSWER_STEPS = 40
Row = dict[str, Any]


class Study:
    """Hold one model and its held-out texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.tokenizer = load_model(arguments)
        self.encoder, self.seed, self.steps = arguments.encoder, arguments.seed, arguments.steps
        self.rows = contexts(arguments.data)[-HELD_OUT:][: arguments.texts]
        self.texts = [row["context"] for row in self.rows]

    def limited(self, steps: int) -> int:
        """Lower a number of steps to `--steps`."""
        return steps if self.steps is None else min(steps, self.steps)

    def refining(self, slots: int, span: int) -> Any:
        """Inject a memory without a trained encoder."""
        config = MemorySlotsConfig(read="all", num_slots=slots, span_length=span, precision="bfloat16", seed=self.seed)
        return inject_memory(self.model, config, tokenizer=self.tokenizer)

    def trained(self) -> Any:
        """Load the encoder."""
        if self.encoder is None:
            raise SystemExit("This part needs `--encoder`: a folder that `memory.save_pretrained` wrote.")
        return load_memory(self.model, self.encoder, tokenizer=self.tokenizer)

    def passages(self, tokens: int, count: int) -> list[str]:
        """Cut the beginnings of held-out contexts that are long enough into texts of exactly so many tokens."""
        found = []
        for text in self.texts:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
            passage = self.tokenizer.decode(ids)
            if len(ids) == tokens and self.tokenizer(passage, add_special_tokens=False)["input_ids"] == ids:
                found.append(passage)
        return found[:count]


def contexts(data: Path) -> list[dict[str, Any]]:
    """Load texts with questions and answers."""
    return [json.loads(line) for line in (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()]


def refinement(study: Study) -> dict[str, Row]:
    """64 tokens in 16 slots, from pooled embeddings."""
    return _refined(study, study.refining(16, 64), study.passages(64, 20))


def capacity(study: Study) -> dict[str, Row]:
    """How many tokens slots hold: 4 passages each, from pooled embeddings, at most 150 steps."""
    rows = {}
    for tokens, slots in ((8, 1), (16, 1), (32, 1), (64, 1), (64, 2), (64, 4), (64, 8), (64, 16)):
        found = _refined(study, study.refining(slots, tokens), study.passages(tokens, 4), 150)["all"]
        rows[f"{tokens} tokens in {slots}"] = {name: found[name] for name in found if name != "seconds a text"}
    return rows


def overfitting(study: Study) -> dict[str, Row]:
    """An encoder from scratch on 64 passages of 32 tokens, each in 16 slots: does the training code learn them?"""
    config = MemorySlotsConfig(read="all", num_slots=16, span_length=32, lora_rank=32, seed=study.seed)
    model = copy.deepcopy(study.model).to(torch.bfloat16)
    memory: Any = inject_memory(model, config, tokenizer=study.tokenizer)
    texts = study.passages(32, 64)
    examples = [Example(study.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, max_steps=study.limited(OVERFITTING_STEPS), per_device_train_batch_size=16)
        settings |= dict(learning_rate=2e-3, warmup_steps=10, logging_steps=study.limited(20), disable_tqdm=True)
        log = train_encoder(memory, examples, training_args=settings)
    rows: dict[str, Row] = {f"updates to {row['step']}": {"loss": row["loss"]} for row in log if "loss" in row}
    scores = score_reconstruction(memory, texts, memory.compress(texts, progress=False))
    return rows | {"afterwards": scores.to_dict()}


def encoder(study: Study) -> dict[str, Row]:
    """Reconstruction by length, with controls."""
    memory, rows = study.trained(), {}
    for tokens in (16, 32, 64, 128):
        texts = study.passages(tokens, 40)
        slots = memory.compress(texts, progress=False)
        ways = {"slots": slots, "another text's slots": [*slots[1:], slots[0]], "no slots": [None] * len(texts)}
        for name, read in ways.items():
            scores = score_reconstruction(memory, texts, read, decode=name == "slots")
            rows[f"{tokens} tokens, {name}"] = scores.to_dict()
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
        rows[f"{number} slots"] = score_reconstruction(memory, texts, slots).to_dict()
    memory.remove()
    return rows


def honesty(study: Study) -> dict[str, Row]:
    """Normal text against text that is none."""
    memory, rows = study.trained(), {}
    for name, texts in other_texts(study.tokenizer, study.passages(64, 40)).items():
        rows[name] = score_reconstruction(memory, texts, memory.compress(texts, progress=False)).to_dict()
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
    for name, read in ways_to_read(memory, study.texts, memory.compress(study.texts, progress=False)).items():
        rows[name] = score_answers(memory, questions, read)
    template = question_prompt(study.tokenizer)
    head = "Answer the question"  # as users put it: the text in the message, before what is asked of it
    inside = [template.replace(head, f"{row['context']}\n\n{head}") for row in study.rows]
    queries = [
        (text.replace("{question}", question), answer)
        for text, (question, answer) in zip(inside, questions, strict=True)
    ]
    rows["full context, in the message"] = score_answers(memory, queries, [None] * len(queries), prompt="{question}")
    memory.config.precision = "bfloat16"
    steps = study.limited(ANSWER_STEPS)
    times, refined = timed(memory.compress, study.texts, refine_steps=steps, progress=False)
    spent = {"steps": _mean([one.refine_steps for one in refined]), "seconds a text": times.wall / len(refined)}
    rows["refined slots"] = score_answers(memory, questions, refined) | spent
    memory.remove()
    return rows


def refined_from_the_encoder(study: Study) -> dict[str, Row]:
    """64 tokens in 32 slots, from the encoder's slots."""
    memory = study.trained()
    memory.config.precision = "bfloat16"
    return _refined(study, memory, study.passages(64, 20))


PARTS: dict[str, Callable[[Study], dict[str, Row]]] = {
    part.__name__: part
    for part in (
        refinement,
        capacity,
        overfitting,
        encoder,
        slots_of_a_span,
        honesty,
        continuation,
        answers,
        refined_from_the_encoder,
    )
}


def _refined(study: Study, memory: Any, texts: list[str], steps: int = 100) -> dict[str, Row]:
    """Refine texts together and score each; remove the memory."""
    times, slots = timed(memory.compress, texts, refine_steps=study.limited(steps), progress=False)
    every = [score_reconstruction(memory, [text], [own]) for text, own in zip(texts, slots, strict=True)]
    taken = [own.refine_steps for own in slots]
    rows: dict[str, Row] = {
        f"passage {i + 1}": {**scores.to_dict(), "steps": own}
        for i, (scores, own) in enumerate(zip(every, taken, strict=True))
    }
    rows["all"] = {
        **score_reconstruction(memory, texts, slots).to_dict(),
        "steps": _mean(taken),
        "seconds a text": times.wall / len(texts),
        "share with BLEU ≥ 99": _mean([(scores.bleu or 0) >= 99 for scores in every]),
    }
    memory.remove()
    print(dumps(rows["all"]), flush=True)
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plots(parts: dict[str, dict[str, Row]], folder: Path) -> None:
    """Draw curves of what was measured, as in the ICAE paper: over the length, over the number of slots."""
    scores = ["cross_entropy", "token_accuracy", "bleu", "exact_prefix"]
    if "encoder" in parts:
        lines: dict[str, list[tuple[float, Row]]] = {}
        for name, row in parts["encoder"].items():
            lines.setdefault(name.partition(", ")[2], []).append((row["num_tokens"], row))
        score_curves(lines, scores, folder / "slots_by_length.png", across="tokens of the text")
    if "slots_of_a_span" in parts:
        points = [(row["num_slots"], row) for row in parts["slots_of_a_span"].values()]
        score_curves({"64 tokens": points}, scores, folder / "slots_by_number.png", across="slots")
    if "capacity" in parts:
        found: dict[str, list[tuple[float, Row]]] = {"one slot": [], "64 tokens": []}
        for row in parts["capacity"].values():
            for name, own in (("one slot", row["num_slots"] == 1), ("64 tokens", row["num_tokens"] == 64)):
                found[name] += [(row["compression_rate"], row)] if own else []
        score_curves(found, scores, folder / "slot_capacity.png", across="tokens a slot")


def main() -> None:
    parser = BenchmarkParser(__doc__, "slots", data=True)
    parser.add_argument("--encoder", type=Path, quick=Path("examples/slot-encoder"), help="folder of a trained encoder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), quick=["refinement", "answers"])
    parser.add_argument("--texts", type=int, quick=2, help="held-out contexts; by default all")
    parser.add_argument("--steps", type=int, quick=2, help="at most so many steps of any training")
    arguments = parser.parse()
    study, parts = Study(arguments), stored(arguments, "parts")
    for part in arguments.parts:
        parts[part] = PARTS[part](study)
        about = save(arguments, {"parts": parts})
        tables = [f"## {PARTS[name].__doc__}\n\n{markdown(rows)}" for name, rows in parts.items()]
        save_tables(arguments, about, "\n".join(tables))
        print(f"{part}\n{markdown(parts[part])}", flush=True)
    plots(parts, arguments.output.parent)


if __name__ == "__main__":
    main()
