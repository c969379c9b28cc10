"""Score keys and values chosen of a text beside the whole text: continuations, answers, word for word, and speed.

    python -m benchmarks.keys_values --data FOLDER [--encoder FOLDER] [--parts continuation answers given_back …]

FOLDER holds wikitext2 and qa/contexts.jsonl. *Continuation*: perplexity of the 32 tokens of WikiText-2 behind a context
÷ that behind the whole context, inside the user's turn, at several rates: keys and values chosen, made by the encoder,
refined (what the encoder made, if there is one), and the first and last tokens. *Answers*: F1 of the first questions
about each of the last 100 contexts, in a chat, by rate, beside the context in the message. *Given back*: how well the
first 64 tokens of such contexts follow the request to repeat them, and the check of the ICAE paper, whether the model's
own knowledge of language does it: texts with other tokens. *Repetition*: how many steps of refinement bring back texts
of 64 tokens, word for word, from 16 keys and values a head. *Speed*: seconds to generate behind 2,048 tokens, what was
kept of them, and as many embeddings. Rows are saved as they come.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import DEVICE, BenchmarkParser, in_turn, load_model, save_parts, timed, wikitext
from benchmarks.slots import contexts
from memory_adapters import Document, MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.base_model.chat import chat_start, rendered_question
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.memory_slots.distillation import REPEAT, refine_keys_values
from memory_adapters.memory_slots.keys_values import at_places, select_keys_values
from memory_adapters.memory_slots.prompts import END
from memory_adapters.memory_slots.question_answering import answer_scores, question_prompt
from memory_adapters.memory_slots.reconstruction import other_texts
from memory_adapters.memory_slots.slot_cache import KeyValue, first_tokens, joined, run_behind

PARTS = ("continuation", "answers", "given_back", "repetition", "speed")
CONTINUED = 32
QUESTIONS = 100
PROMPT = "Tell me, in {} words, what you think about the {} of this."


def main() -> None:
    parser = BenchmarkParser(__doc__, "keys_values", data=True)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--encoder", type=Path, help="made by benchmarks/train_encoder.py --space kv")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512], quick=[72])
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 4, 8], quick=[4])
    parser.add_argument("--texts", type=int, default=24, quick=2, help="of a length")
    parser.add_argument("--refined", type=int, default=4, quick=1, help="texts of a length that are refined, too")
    parser.add_argument("--steps", type=int, default=30, quick=2, help="of refinement")
    parser.add_argument("--questions", type=int, default=QUESTIONS, quick=2)
    parser.add_argument("--asked", type=int, default=1, help="questions about each context, at most")
    parser.add_argument("--refined-questions", type=int, default=20, quick=1)
    parser.add_argument("--given-back", type=int, default=40, quick=2, help="texts to ask for")
    parser.add_argument("--repeated", type=int, default=6, quick=1, help="texts to bring back")
    parser.add_argument("--tokens", type=int, default=2048, quick=256, help="of the context whose speed is measured")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], quick=[1])
    parser.add_argument("--new-tokens", type=int, default=128, quick=4)
    parser.add_argument("--rounds", type=int, default=3, quick=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse()
    model, tokenizer = load_model(arguments, getattr(torch, arguments.dtype))
    measures: dict[str, Callable[[Any, Any, Any], Any]] = {
        "continuation": continuation,
        "answers": answers,
        "given_back": given_back,
        "repetition": repetition,
        "speed": speed,
    }
    save_parts(arguments, measures, model, tokenizer, dtype=str(model.dtype))


def memory_on(model: Any, tokenizer: Any, rate: int, encoder: Path | None = None, **settings: Any) -> Any:
    settings |= dict(num_slots=512 // rate, span_length=512)
    if encoder is None:
        return inject_memory(model, MemorySlotsConfig(space="kv", **settings), tokenizer=tokenizer)
    memory = load_memory(model, encoder, tokenizer=tokenizer)
    for name, value in settings.items():
        setattr(memory.config, name, value)
    return memory


def continuation(arguments: Any, model: Any, tokenizer: Any) -> Any:
    text = tokenize(tokenizer, wikitext(arguments, "test"))
    prefix, separator = chat_start(tokenizer), tokenize(tokenizer, END, rendered=True)
    trained: Any = memory_on(model, tokenizer, 4, arguments.encoder) if arguments.encoder else None
    for length in arguments.lengths:
        step = len(text) // arguments.texts
        parts = [text[i * step :][: length + CONTINUED] for i in range(arguments.texts)]
        losses: dict[str, list[float]] = {}
        for number, part in enumerate(parts):
            ids, tail = part[:length], part[length:]
            read = torch.tensor([[*prefix, *ids]], device=DEVICE)
            with torch.no_grad():
                whole = run_behind(model.model, [], 0, input_ids=read)[1]
            before = first_tokens(whole, len(prefix))

            def add(name: str, layers: Sequence[KeyValue], tail: list[int] = tail) -> None:
                losses.setdefault(name, []).append(loss(model, layers, len(prefix) + length, tail))  # noqa: B023

            add("whole", whole)
            add("nothing", before)
            for rate in arguments.rates:
                count = length // rate
                kept = select_keys_values(model.model, prefix, ids, separator, count)
                every = [(k[0, :, len(prefix) :], v[0, :, len(prefix) :]) for k, v in whole]
                add(f"{rate}: chosen", joined(before, kept.layers))
                ends = torch.tensor([*range(count // 2), *range(length - count + count // 2, length)])
                at_ends = [
                    (at_places(k, ends.expand(len(k), -1)), at_places(v, ends.expand(len(v), -1))) for k, v in every
                ]
                add(f"{rate}: first and last", joined(before, at_ends))
                if trained is not None:
                    with torch.no_grad():
                        made_by = trained.encoder.keys_values(prefix, ids, kept.places)
                    add(f"{rate}: encoder", joined(before, made_by))
                    keys, values = zip(*made_by, strict=True)
                    kept = replace(kept, keys=keys, values=values)
                if number < arguments.refined:
                    memory = memory_on(model, tokenizer, rate, read="all")
                    made, _ = refine_keys_values(
                        memory.encoder, tokenizer, kept, ids, separator, arguments.steps, False
                    )
                    memory.remove()
                    add(f"{rate}: refined", joined(before, made.layers))
        row: dict[str, Any] = {"whole": round(math.exp(mean(losses["whole"])), 2)}
        for name, own in losses.items():
            row[name] = row["whole"] if name == "whole" else round(ratio(own, losses["whole"]), 3)
            if name.endswith("refined"):
                begun = "chosen" if trained is None else "encoder"
                of_same = losses[name.replace("refined", begun)][: len(own)]
                row[f"{name} (of the same texts, {begun})"] = round(ratio(of_same, losses["whole"]), 3)
        yield f"continuation, {length} tokens", row
    if trained is not None:
        trained.remove()


def ratio(losses: Sequence[float], whole: Sequence[float]) -> float:
    """Perplexity ÷ that behind the whole text, of the texts that have both."""
    return math.exp(mean(losses) - mean(whole[: len(losses)]))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def loss(model: Any, layers: Sequence[KeyValue], position: int, tail: Sequence[int]) -> float:
    """Mean cross-entropy of tokens, from the second on, behind keys and values."""
    ids = torch.tensor([list(tail)], device=DEVICE)
    states = run_behind(model.model, layers, position, input_ids=ids[:, :-1])[0].last_hidden_state
    return float(F.cross_entropy(model.lm_head(states)[0].float(), ids[0, 1:]))


def answers(arguments: Any, model: Any, tokenizer: Any) -> Any:
    rows, most = contexts(arguments.data)[-QUESTIONS:][: arguments.questions], arguments.asked
    kind = "answers" if most == 1 else f"answers, {most} questions each"
    yield f"{kind}: whole", answered(model, tokenizer, rows, most, 1)
    for rate in arguments.rates:
        yield f"{kind}: {rate}", answered(model, tokenizer, rows, most, rate)
        if arguments.encoder:
            made = answered(model, tokenizer, rows, most, rate, encoder=arguments.encoder)
            yield f"{kind}: {rate}, encoder", made
    first = rows[: arguments.refined_questions]
    if not first:
        return
    for name, rate, steps in (("whole", 1, 0), ("4", 4, 0), ("4, refined", 4, arguments.steps)):
        yield f"{kind}, first {len(first)}: {name}", answered(model, tokenizer, first, most, rate, steps)


def answered(
    model: Any, tokenizer: Any, rows: Sequence[Any], most: int, rate: int, steps: int = 0, encoder: Path | None = None
) -> dict[str, Any]:
    """F1 of the first questions about each context, at most `most`."""
    memory = memory_on(model, tokenizer, rate, encoder, part_tokens=1024)
    documents = [Document(row["context"]) for row in rows]
    times, _ = timed(memory.write, documents, progress=False, measure=False, compress=rate > 1, refine_steps=steps)
    scores = []
    template = question_prompt(tokenizer)
    for row, entry in zip(rows, memory.entries, strict=True):
        memory.use(lambda prompts, entry=entry: [[entry] for _ in prompts])
        prompts = [template.replace("{question}", question) for question in row["questions"][:most]]
        inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
        ids = model.generate(**inputs.to(DEVICE), max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for said, answer in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), row["answers"], strict=False):
            scores.append(answer_scores((said.strip().splitlines() or [""])[0], answer))
    entries = memory.entries
    memory.remove()
    f1, _, contained = zip(*scores, strict=True)
    achieved = sum(one.num_tokens for one in entries) / sum(one.num_slots for one in entries)
    return {
        "questions": len(scores),
        "F1": round(mean(f1), 3),
        "standard error": round(statistics.stdev(f1) / math.sqrt(len(f1)), 3) if len(f1) > 1 else None,
        "contained": round(mean(contained), 3),
        "achieved rate": round(achieved, 2),
        "seconds a context to write": round(times.wall / len(rows), 2),
    }


def given_back(arguments: Any, model: Any, tokenizer: Any) -> Any:
    rows = contexts(arguments.data)[-QUESTIONS:][: arguments.given_back]
    cut = [tokenizer.decode(tokenize(tokenizer, row["context"], rendered=True)[:64]) for row in rows]
    prefix, separator = chat_start(tokenizer), tokenize(tokenizer, END, rendered=True)
    rendered = rendered_question(tokenizer, REPEAT)
    assert rendered is not None, "the model has a chat template"
    asked = tokenize(tokenizer, rendered[0], rendered=True)[len(prefix) :]
    encoder: Any = memory_on(model, tokenizer, 4, arguments.encoder).encoder if arguments.encoder else None
    for kind, texts in other_texts(tokenizer, cut).items():
        found: dict[str, list[tuple[float, float]]] = {}
        read: dict[str, list[list[KeyValue]]] = {}
        listed = [tokenize(tokenizer, text, rendered=True) for text in texts]
        for ids in listed:
            with torch.no_grad():
                whole = run_behind(model.model, [], 0, input_ids=torch.tensor([[*prefix, *ids]], device=DEVICE))[1]
                before = first_tokens(whole, len(prefix))
                layers = {"whole": whole, "nothing": before}
                for rate in arguments.rates[:2]:
                    kept = select_keys_values(model.model, prefix, ids, separator, max(len(ids) // rate, 1))
                    layers[f"{rate}: chosen"] = joined(before, kept.layers)
                    if encoder is not None:
                        layers[f"{rate}: encoder"] = joined(before, encoder.keys_values(prefix, ids, kept.places))
            for name, own in layers.items():
                read.setdefault(name, []).append(own)
        for name in [name for name in read if ":" in name]:
            read[f"{name}, of another text"] = [*read[name][1:], read[name][0]]
        for name, every in read.items():
            found[name] = [
                repeated(model, own, len(prefix) + len(ids), asked, ids) for own, ids in zip(every, listed, strict=True)
            ]
        row = {
            name: {"cross-entropy": round(mean(column[0]), 2), "tokens right": round(mean(column[1]), 3)}
            for name, scores in found.items()
            for column in [list(zip(*scores, strict=True))]
        }
        yield f"given back: {kind}", row


@torch.no_grad()
def repeated(
    model: Any, layers: Sequence[KeyValue], position: int, asked: Sequence[int], ids: Sequence[int]
) -> tuple[float, float]:
    """Mean cross-entropy of the tokens of a text that is asked for, and the share that is the first choice."""
    row = torch.tensor([[*asked, *ids]], device=DEVICE)
    states = run_behind(model.model, layers, position, input_ids=row[:, :-1])[0].last_hidden_state
    logits = model.lm_head(states[0, len(asked) - 1 :]).float()
    wanted = row[0, len(asked) :]
    return float(F.cross_entropy(logits, wanted)), float((logits.argmax(-1) == wanted).float().mean())


def repetition(arguments: Any, model: Any, tokenizer: Any) -> Any:
    rows = contexts(arguments.data)[-QUESTIONS:][: arguments.repeated]
    prefix, separator = chat_start(tokenizer), tokenize(tokenizer, END, rendered=True)
    found = []
    for row in rows:
        ids = tokenize(tokenizer, row["context"], rendered=True)[:64]
        memory = memory_on(model, tokenizer, 4, read="all", refine_fraction=1.0)
        kept = select_keys_values(model.model, prefix, ids, separator, 16)
        _, losses = refine_keys_values(memory.encoder, tokenizer, kept, ids, separator, 200, False)
        memory.remove()
        found.append(len(losses) if len(losses) < 200 else None)
    done: list[float] = [steps for steps in found if steps is not None]
    yield (
        "repetition, 64 tokens from 16",
        {
            "texts": len(found),
            "word for word": len(done),
            "steps": found,
            "mean": round(mean(done), 1) if done else None,
        },
    )


def speed(arguments: Any, model: Any, tokenizer: Any) -> Any:
    text = tokenize(tokenizer, wikitext(arguments, "test"))[: arguments.tokens]
    new = arguments.new_tokens
    settings: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    message = [{"role": "user", "content": PROMPT.format("a few", "length")}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prefix, separator = chat_start(tokenizer), tokenize(tokenizer, END, rendered=True)
    memory = memory_on(model, tokenizer, 4, read="all", part_tokens=arguments.tokens)
    memory.write(Document("A text."), progress=False, measure=False)
    (entry,) = memory.entries
    counts = (arguments.tokens // 4, arguments.tokens // 16)
    entries = {"whole": replace(entry, input_ids=tuple(text))}
    embeddings, slots = {}, {}
    for count in counts:
        kept = select_keys_values(model.model, prefix, text, separator, count)
        entries[f"{count} kept"] = replace(entry, input_ids=tuple(text), kept=kept)
        config = MemorySlotsConfig(space="embeddings", num_slots=512 * count // arguments.tokens, span_length=512)
        name = f"{count} embeddings"
        embeddings[name] = inject_memory(model, config, tokenizer=tokenizer, adapter_name=f"embeddings{count}")
        slots[name] = embeddings[name].compress(tokenizer.decode(text), refine_steps=0, progress=False)

    def generate(name: str, inputs: Any) -> None:
        # Nothing is known of earlier prompts.
        memory._read_entries([entries[name]] if name in entries else [])
        for own, reading in embeddings.items():
            reading.use(slots[own] if own == name else None)
        model.generate(**inputs, **settings)

    for batch in arguments.batches:
        inputs = {name: value.expand(batch, -1).to(DEVICE) for name, value in prompt.items()}
        times = in_turn({name: partial(generate, name, inputs) for name in [*entries, *slots]}, arguments.rounds)
        row = {
            name: {"seconds": round(own.wall, 2), "whole ÷ it": round((times["whole"] / own).wall, 2)}
            for name, own in times.items()
        }
        yield f"speed, {arguments.tokens} tokens, batch {batch}, {arguments.dtype}", row
    for reading in reversed(embeddings.values()):
        reading.remove()
    memory.remove()


if __name__ == "__main__":
    main()
