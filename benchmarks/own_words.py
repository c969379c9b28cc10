"""Ask about what was written in other words, and about other things, in a chat: every method on the same questions.

    python -m benchmarks.own_words --data FOLDER [--counterfact 24] [--things 8] [--methods base residual …] [--show 20]

FOLDER holds counterfact/edit.json. Two sets are written, each in one write: the first CounterFact records, one fact a
subject, and invented companies, people and places of the package, three facts each. Greedy chat answers of at most 24
tokens are scored: *own words* on held-out questions, *training questions* on those that a method may be trained on
(as `QuestionAnswer`, where its entry in `METHODS` says so), *same* and *leak* on questions about other subjects of the
same relations or other invented things, and about well-known things, *spill* on other questions about the subjects that
are written. Rows are saved as they come; those that are there are not measured again. On a CPU with AVX-512 and on a
GPU the model is in bfloat16, else in float32.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.common import DEVICE, BenchmarkParser, counterfact, load_model, save, save_tables, stored, table, timed
from benchmarks.many_things import many_things
from memory_adapters import Fact, QuestionAnswer, inject_memory
from memory_adapters.base_model.modes import computes_in_bfloat16
from memory_adapters.evaluation.questions import load_things, record_questions, relation_questions, thing_questions
from memory_adapters.evaluation.records import EditRecord, Question
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.own_words import OwnWordsQuestions, score_own_words
from memory_adapters.items import Item
from memory_adapters.registry import methods

FACTS_A_THING = 3
COLUMNS = {
    "own_words": "own words",
    "training_questions": "training questions",
    "same": "same",
    "leak": "leak",
    "spill": "spill",
    "exact": "taught prompts",
}


@dataclass(frozen=True)
class Written:
    """Describe a memory to write: the name of a registered method, its settings and its options of `write`.

    Attributes:
        training_questions: Whether the training questions are written too, as `QuestionAnswer`.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    training_questions: bool = False


@dataclass(frozen=True)
class InMessage:
    """Put facts before each question in the user's message: the one that it is about, or all."""

    every: bool


METHODS: dict[str, Written | InMessage | None] = {
    "base": None,
    "its fact in the message": InMessage(every=False),
    "all facts in the message": InMessage(every=True),
    "residual": Written("residual"),
    "residual, with training questions": Written("residual", training_questions=True),
    "residual, per key": Written("residual", dict(values="per_key")),
    "residual, per key, num_others=0": Written("residual", dict(values="per_key", num_others=0)),
    "MEMIT": Written("memit", dict(chat=False)),
    "MEMIT, chat": Written("memit", dict(chat=True)),
    "MEMIT, gate": Written("memit", dict(gate="keys")),
    "slots": Written("slots"),
    "gated LoRA": Written("gated_lora"),
    "gated LoRA, all blocks above the keys": Written("gated_lora", dict(layers=None)),
    "gated LoRA, num_others=0": Written("gated_lora", dict(num_others=0)),
    "gated LoRA, with training questions": Written("gated_lora", training_questions=True),
}


@dataclass(frozen=True)
class Asked:
    """Store what is written, and what is asked about it: for each question the fact that it is about."""

    facts: list[Fact]
    questions: OwnWordsQuestions
    training: list[Question]
    about: list[Fact]
    training_about: list[Fact]


def main() -> None:
    parser = BenchmarkParser(__doc__, "own_words", data=True)
    parser.add_argument("--counterfact", type=int, default=24, quick=2, help="records; 0 for none")
    parser.add_argument("--things", type=int, default=8, quick=1, help="things, of all kinds in turn; 0 for none")
    parser.add_argument(
        "--methods", nargs="*", choices=list(METHODS), default=list(METHODS), quick=["base", "residual"]
    )
    parser.add_argument("--show", type=int, default=0, help="print the first so many answers of every row")
    arguments = parser.parse()
    in_bfloat16 = computes_in_bfloat16("bfloat16", torch.device(DEVICE))
    model, tokenizer = load_model(arguments, torch.bfloat16 if in_bfloat16 else torch.float32)
    rows = stored(arguments, "rows")
    sets = {
        f"CounterFact, {arguments.counterfact}": (arguments.counterfact, counterfact_set),
        f"things, {arguments.things}": (arguments.things, things_set),
    }
    for name, (count, make) in sets.items():
        if not count:
            continue
        asked = make(arguments, count)
        base_answers: OwnWordsQuestions | None = None
        for method in arguments.methods:
            key = f"{name}: {method}"
            if key in rows:
                continue
            base_answers = base_answers or asked.questions.with_base_answers(model, tokenizer)
            row, answers = measure(model, tokenizer, METHODS[method], replace(asked, questions=base_answers))
            rows |= {**stored(arguments, "rows"), key: row}  # what another process has measured in the meantime stays
            about = save(arguments, {"rows": rows}, dtype=str(model.dtype))
            save_tables(arguments, about, markdown(rows))
            print(key, row, flush=True)
            for answer in answers[: arguments.show]:
                print(
                    f"  {answer.question.splitlines()[-1]} [{answer.wanted}] {answer.says!r} {answer.named}", flush=True
                )
            gc.collect()
    print(markdown(rows))


def counterfact_set(arguments: argparse.Namespace, count: int) -> Asked:
    """Return the first records, of each relation's three questions one to train on; others are their neighbours'."""
    records: list[EditRecord] = counterfact(arguments, count)
    held_out, training, about, training_about = [], [], [], []
    for record in records:
        own = [Question(text, record.fact.target) for text in relation_questions(record.relation, record.fact.subject)]
        training += own[:1]
        held_out += own[1:]
        training_about += [record.fact] * len(own[:1])
        about += [record.fact] * len(own[1:])
    questions = replace(record_questions(records), asked=tuple(held_out))
    return Asked([record.fact for record in records], questions, training, about, training_about)


def things_set(arguments: argparse.Namespace, count: int) -> Asked:
    """Return the first facts of things from all of the package's kinds; others are the things that are left.

    Where the package has too few, things like them are invented, and all of the package's are left.
    """
    things = [replace(thing, facts=thing.facts[:FACTS_A_THING]) for thing in load_things()]
    if count < len(things):
        chosen = [things[int(i * len(things) / count)] for i in range(count)]
    else:
        chosen = many_things(things, count, arguments.seed)
    facts = [fact for thing in chosen for fact in thing.facts]
    every = tuple(question for fact in facts for question in fact.questions)
    return Asked(
        [fact.fact for fact in facts],
        replace(thing_questions(chosen, things), asked=every),
        [question for fact in facts for question in fact.training_questions],
        [fact.fact for fact in facts for _ in fact.questions],
        [fact.fact for fact in facts for _ in fact.training_questions],
    )


def measure(model: Any, tokenizer: Any, method: Written | InMessage | None, asked: Asked) -> tuple[dict[str, Any], Any]:
    """Return the row of a method, and its answers to the held-out questions."""
    before: Callable[[Fact | None], str] = lambda fact: ""  # noqa: E731
    if isinstance(method, InMessage):
        told = {fact: f"{fact.prompt}{fact.continuation}." for fact in asked.facts}
        whole = " ".join(told.values()) + "\n\n"
        every = method.every
        before = lambda fact: whole if every else "" if fact is None else f"{told[fact]}\n\n"  # noqa: E731
    with written(model, tokenizer, method, asked) as report:
        questions = asked.questions
        held_out = with_text(questions.asked, asked.about, before)
        others = tuple(before(None) + question for question in questions.others)
        known = method is None or (isinstance(method, InMessage) and not method.every)
        beside = () if isinstance(method, InMessage) else questions.beside
        seen = replace(questions, asked=held_out, others=others, beside=beside)
        scores = score_own_words(model, tokenizer, replace(seen, base_answers=None) if known else seen)
        training = OwnWordsQuestions(with_text(asked.training, asked.training_about, before))
        row = {name: share for name, share in asdict(scores).items() if name != "answers"}
        row["training_questions"] = score_own_words(model, tokenizer, training).own_words
        if not isinstance(method, InMessage):
            row["exact"] = score_edits(model, tokenizer, [EditRecord(fact) for fact in asked.facts]).exact_match
    counts = dict(facts=len(asked.facts), questions=len(held_out), others=len(others))
    return {**counts, **row, **report}, scores.answers


def with_text(
    questions: Sequence[Question], about: Sequence[Fact], before: Callable[[Fact], str]
) -> tuple[Question, ...]:
    return tuple(q._replace(prompt=before(fact) + q.prompt) for q, fact in zip(questions, about, strict=True))


@contextmanager
def written(model: Any, tokenizer: Any, method: Written | InMessage | None, asked: Asked) -> Iterator[dict[str, Any]]:
    """Write a memory for this context, and give what its report says."""
    if not isinstance(method, Written):
        yield {}
        return
    config = methods()[method.method].config_class(**method.settings)
    memory = inject_memory(model, config, tokenizer=tokenizer)
    items: list[Item] = list(asked.facts)
    if method.training_questions:
        items += [QuestionAnswer(question.prompt, question.answer) for question in asked.training]
    try:
        times, report = timed(memory.write, items, progress=False, **method.options)
        each = times.cpu / len(asked.facts)
        yield {"perplexity": report.perplexity, "seconds": times.wall, "cpu": times.cpu, "cpu_a_fact": each}
    finally:
        memory.remove()


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format all rows as a table."""
    lines, order = [], {method: place for place, method in enumerate(METHODS)}
    for name in sorted(rows, key=lambda name: (name.partition(": ")[0], order.get(name.partition(": ")[2], 0))):
        row = rows[name]
        shares = [row.get(column) for column in COLUMNS]
        seconds = row.get("seconds")
        cells = ["–" if share is None else f"{share:.2f}" for share in shares]
        lines.append([name, *cells, "–" if seconds is None else f"{seconds:.0f} s"])
    return table(["", *COLUMNS.values(), "write"], lines)


if __name__ == "__main__":
    main()
