"""Ask in a chat about the entries of a slot memory: alone, beside 1,000 others, and with the text in the message.

    python -m benchmarks.entries --data FOLDER [--others 1000] [--parts own_words others …]

FOLDER holds counterfact/edit.json, things/things.json and wikitext2. Greedy answers are scored as in
`benchmarks/own_words.py`. *Own words*: the first CounterFact facts, things with three facts each. *Others*: the same
with facts about `--others` other subjects in the store, WikiText-2's perplexity with them, and how many answers about
things that are not written stay as they were. *Records*: exact match and neighbourhood score of 100 records.
*Portability*: what follows from 50 zsRE facts, with entries and with all facts before every prompt. *Manual*: ten
questions about a text of 718 words. *Time*: milliseconds to make an entry, and, for growing stores, a prompt that names
nothing in them ÷ the same without a memory. *Repeated*: a pass over a question about a thing ÷ the same without a
memory, where its facts are read for the first time, and where they were read before. Rows are saved as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    DEVICE,
    BenchmarkParser,
    counterfact,
    in_turn,
    load_model,
    save_parts,
    score,
    timed,
    wikitext,
)
from benchmarks.own_words import Asked, counterfact_set, with_text
from memory_adapters import Document, Fact, MemorySlotsConfig, inject_memory
from memory_adapters.base_model.modes import computes_in_bfloat16
from memory_adapters.base_model.names import occurs
from memory_adapters.evaluation.questions import load_documents, load_things, thing_questions
from memory_adapters.evaluation.records import load_zsre
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions, score_own_words
from memory_adapters.evaluation.scores.perplexity import perplexity
from memory_adapters.memory_slots.cached_reading import PromptStarts
from memory_adapters.memory_slots.entries import make_entries
from memory_adapters.memory_slots.layer import SlotReader

MANUAL, MANUAL_OF = Path(__file__).with_name("manual.json"), "Tamarin 6"
PARTS = ("own_words", "others", "records", "portability", "manual", "time", "repeated")


def main() -> None:
    parser = BenchmarkParser(__doc__, "entries", data=True)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--others", type=int, default=1000, quick=3)
    parser.add_argument("--counterfact", type=int, default=24, quick=2)
    parser.add_argument("--records", type=int, default=100, quick=2)
    parser.add_argument("--portability", type=int, default=50, quick=2, help="zsRE records")
    parser.add_argument("--perplexity-tokens", type=int, default=16_384, quick=128)
    parser.add_argument("--store", type=int, nargs="*", default=[100, 1000, 10_000], quick=[5])
    arguments = parser.parse()
    in_bfloat16 = computes_in_bfloat16("bfloat16", torch.device(DEVICE))
    model, tokenizer = load_model(arguments, torch.bfloat16 if in_bfloat16 else torch.float32)
    measures: dict[str, Callable[[Any, Any, Any], Any]] = {
        "own_words": own_words,
        "others": with_others,
        "records": records_of,
        "portability": portability,
        "manual": manual,
        "time": times,
        "repeated": repeated,
    }
    save_parts(arguments, measures, model, tokenizer, dtype=str(model.dtype))


def sets(arguments: Any) -> dict[str, Asked]:
    """The facts that are asked about: CounterFact's, and things with three each (the first four, and all)."""
    things = [replace(t, facts=t.facts[:3]) for t in load_things(arguments.data / "things" / "things.json")]
    found = {f"CounterFact, {arguments.counterfact}": counterfact_set(arguments, arguments.counterfact)}
    for count in (4, len(things)):
        facts = [fact for thing in things[:count] for fact in thing.facts]
        every = tuple(question for fact in facts for question in fact.questions)
        questions = replace(thing_questions(things[:count], load_things()), asked=every)
        about = [fact.fact for fact in facts for _ in fact.questions]
        found[f"things, {count} with {len(facts)} facts"] = Asked([f.fact for f in facts], questions, [], about, [])
    return found


def written(model: Any, tokenizer: Any, items: Sequence[Any], **settings: Any) -> Any:
    memory: Any = inject_memory(model, MemorySlotsConfig(**settings), tokenizer=tokenizer)
    memory.write(list(items), progress=False, measure=False)
    return memory


def own_words(arguments: Any, model: Any, tokenizer: Any) -> Any:
    for name, asked in sets(arguments).items():
        questions = asked.questions.with_base_answers(model, tokenizer)
        of_subject: dict[str, list[str]] = {}
        for fact in asked.facts:
            of_subject.setdefault(fact.subject, []).append(f"{fact.prompt}{fact.continuation}.")
        told: Callable[[Fact], str] = lambda fact: " ".join(of_subject[fact.subject]) + "\n\n"  # noqa: B023, E731
        in_message = OwnWordsQuestions(with_text(questions.asked, asked.about, told))
        yield f"{name}: base", shares(score_own_words(model, tokenizer, replace(questions, base_answers=None)))
        yield f"{name}: in the message", shares(score_own_words(model, tokenizer, in_message))
        memory = written(model, tokenizer, asked.facts)
        yield f"{name}: entries", shares(score_own_words(model, tokenizer, questions))
        memory.remove()


def with_others(arguments: Any, model: Any, tokenizer: Any) -> Any:
    every = counterfact(arguments, 10 * arguments.others)
    text = wikitext(arguments, "test")
    base = perplexity(model, tokenizer, text, max_tokens=arguments.perplexity_tokens)
    for name, asked in sets(arguments).items():
        own = {fact.subject.casefold() for fact in asked.facts}
        others = {r.fact.subject: r.fact for r in every if r.fact.subject.casefold() not in own}
        more = list(others.values())[: arguments.others]
        away = tuple(q for q in asked.questions.others if not any(occurs(fact.subject, q) for fact in more))
        questions = replace(asked.questions, others=away).with_base_answers(model, tokenizer)
        memory = written(model, tokenizer, [*asked.facts, *more])
        row = shares(score_own_words(model, tokenizer, questions))
        found = perplexity(model, tokenizer, text, max_tokens=arguments.perplexity_tokens)
        yield f"{name}: beside {len(more)} others", {**row, "perplexity": found, "base perplexity": base}
        memory.remove()


def records_of(arguments: Any, model: Any, tokenizer: Any) -> Any:
    records, text = counterfact(arguments, arguments.records), wikitext(arguments, "test")
    yield f"{len(records)} records: base", score(model, tokenizer, records, text, arguments.perplexity_tokens)
    for read in ("names", "bm25"):
        memory = written(model, tokenizer, [record.fact for record in records], read=read)
        found = score(model, tokenizer, records, text, arguments.perplexity_tokens)
        yield f"{len(records)} records: entries, read={read!r}", found
        memory.remove()


def portability(arguments: Any, model: Any, tokenizer: Any) -> Any:
    records = load_zsre(arguments.data / "zsre" / "edit.json", arguments.portability)
    facts = [record.fact for record in records]
    name = f"portability, {len(facts)} zsRE records"
    yield f"{name}: base", what_follows(score_edits(model, tokenizer, records))
    memory = written(model, tokenizer, facts)
    yield f"{name}: entries", what_follows(score_edits(model, tokenizer, records))
    memory.remove()
    memory = inject_memory(model, MemorySlotsConfig(read="all"), tokenizer=tokenizer)
    memory.write(facts, compress=False, measure=False, progress=False)
    yield f"{name}: all facts before every prompt", what_follows(score_edits(model, tokenizer, records))
    memory.remove()


def what_follows(scores: Any) -> dict[str, float | None]:
    names = ("exact_match", "portability_exact_match", "portability_token_accuracy")
    return {name: getattr(scores, name) for name in names}


def manual(_arguments: Any, model: Any, tokenizer: Any) -> Any:
    (document,) = load_documents(MANUAL)
    text, asked = document.text, document.questions
    whole = tuple(q._replace(prompt=f"{text}\n\n{q.prompt}") for q in asked)
    unnamed = tuple(q._replace(prompt=without(MANUAL_OF, q.prompt)) for q in asked)
    yield "manual: base", shares(score_own_words(model, tokenizer, OwnWordsQuestions(asked)), answers=True)
    yield "manual: in the message", shares(score_own_words(model, tokenizer, OwnWordsQuestions(whole)), answers=True)
    for read, top_k, questions in (("names", 1, asked), ("names", 2, asked), ("bm25", 1, asked), ("bm25", 1, unnamed)):
        memory: Any = inject_memory(model, MemorySlotsConfig(read=read, top_k=top_k), tokenizer=tokenizer)
        taken, _ = timed(memory.write, [Document(text)], progress=False, measure=False)
        row = shares(score_own_words(model, tokenizer, OwnWordsQuestions(questions)), answers=True)
        label = "" if questions is asked else ", questions without its name"
        yield f"manual: entries, read={read!r}, top_k={top_k}{label}", {**row, "write seconds": taken.wall}
        memory.remove()


def without(name: str, question: str) -> str:
    """Leave a name out of a question, with the word before it."""
    before, _, after = question.partition(f" {name}")
    return before.rsplit(" ", 2)[0] + after


def times(arguments: Any, model: Any, tokenizer: Any) -> Any:
    every = counterfact(arguments, 2 * max(arguments.store))
    facts = list({record.fact.subject: record.fact for record in every}.values())
    question = "Which vegetables can I grow on a balcony in the shade, and how often do they need water?"
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {name: own.to(DEVICE) for name, own in ids.items()}
    memory: Any = inject_memory(model, MemorySlotsConfig(), tokenizer=tokenizer)

    @torch.no_grad()
    def read() -> None:
        model(**inputs)

    def without_memory() -> None:
        with memory.disabled():
            read()

    for count in arguments.store:
        making, entries = timed(make_entries, facts[:count], tokenizer, memory.config.part_tokens)
        memory._read_entries(entries)
        found = in_turn({"base": without_memory, "memory": read}, 3 if arguments.quick else 25)
        yield (
            f"{len(entries)} entries",
            {
                "milliseconds to make one": 1000 * making.cpu / count,
                "prompt": (found["memory"] / found["base"])._asdict(),
            },
        )
    memory.remove()


def repeated(arguments: Any, model: Any, tokenizer: Any) -> Any:
    thing = load_things(arguments.data / "things" / "things.json")[0]
    memory = written(model, tokenizer, [one.fact for one in thing.facts])
    chat = [{"role": "user", "content": thing.facts[0].questions[0].prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reader = SlotReader.of(memory._stack)
    for batch in (1, 8):
        inputs = {name: own.repeat(batch, 1).to(DEVICE) for name, own in ids.items()}

        @torch.no_grad()
        def read(inputs: dict[str, Any] = inputs) -> None:
            model(**inputs, logits_to_keep=1)

        def without_memory(read: Callable[[], None] = read) -> None:
            with memory.disabled():
                read()

        def first(read: Callable[[], None] = read) -> None:
            reader.prompt_starts = PromptStarts()
            read()

        rounds = 3 if arguments.quick else 25
        found = in_turn({"base": without_memory, "again": read, "first": first}, rounds)
        yield (
            f"repeated, batch {batch}",
            {
                "tokens of the question": ids["input_ids"].shape[1],
                "tokens of the entry": memory.entries[0].num_tokens,
                "seconds without": found["base"].wall,
                "first": (found["first"] / found["base"])._asdict(),
                "again": (found["again"] / found["base"])._asdict(),
            },
        )
    memory.remove()


def shares(scores: Any, answers: bool = False) -> dict[str, Any]:
    row = {name: getattr(scores, name) for name in ("own_words", "same", "leak", "spill")}
    said = {"answers": [[a.question.splitlines()[-1], a.says, a.named] for a in scores.answers]} if answers else {}
    return {**row, **said}


if __name__ == "__main__":
    main()
