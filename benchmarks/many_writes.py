"""Write many facts in several writes, and forget one: what is left of the first, what else changes, and how fast it is.

    python -m benchmarks.many_writes --data FOLDER [--method gated_lora] [--records 1000] [--a-write 100]

The first records of CounterFact are written in groups. After each write a row has the recall of the first group and of
the last, and its seconds; the memory is saved in `--folder` with it, so a run that was stopped goes on. At the end all
records are scored, perplexity on WikiText-2 is taken, questions about `--asked` of them are asked in other words, and
one is forgotten: in how many milliseconds, and whether logits on its prompt are the base's and those of others as they
were. On a CPU with AVX-512 and on a GPU the model is in bfloat16, else in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DEVICE, BenchmarkParser, counterfact, load_model, save, score, stored, timed, wikitext
from memory_adapters import inject_memory, load_memory
from memory_adapters.base_model.modes import computes_in_bfloat16
from memory_adapters.base_model.names import occurs
from memory_adapters.base_model.tokens import pad_rows
from memory_adapters.evaluation.questions import record_questions
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.own_words import score_own_words
from memory_adapters.registry import methods


def main() -> None:
    parser = BenchmarkParser(__doc__, "many_writes", data=True)
    parser.add_argument("--method", default="gated_lora", help="a registered method that can forget")
    parser.add_records(1000, 16_384)
    parser.add_argument("--a-write", type=int, default=100, quick=1, help="records of each write")
    parser.add_argument("--asked", type=int, default=100, quick=1, help="records that are asked about in other words")
    parser.add_argument("--folder", type=Path, default=Path("experiments/many_writes"), help="of the saved memories")
    arguments = parser.parse()
    in_bfloat16 = computes_in_bfloat16("bfloat16", torch.device(DEVICE))
    model, tokenizer = load_model(arguments, torch.bfloat16 if in_bfloat16 else torch.float32)
    records = counterfact(arguments, arguments.records)
    groups = [records[i : i + arguments.a_write] for i in range(0, len(records), arguments.a_write)]
    key = f"{arguments.method}, {len(records)} in writes of {arguments.a_write}"
    every = stored(arguments, "runs")
    found: dict[str, Any] = every.get(key, {"writes": []})
    text = wikitext(arguments, "test")
    folder = arguments.folder / arguments.method

    def keep() -> None:
        save(arguments, {"runs": {**stored(arguments, "runs"), key: found}}, dtype=str(model.dtype))

    def exact(part: Sequence[EditRecord]) -> float:
        return score_edits(model, tokenizer, part).exact_match

    asked = records[:: max(len(records) // arguments.asked, 1)]
    if "base" not in found:
        found["base"] = score(model, tokenizer, records, text, arguments.perplexity_tokens)
    questions = record_questions(asked)
    others = tuple(q for q in questions.others if not any(occurs(r.fact.subject, q) for r in records))
    questions = replace(questions, others=others).with_base_answers(model, tokenizer)
    if found["writes"]:
        memory: Any = load_memory(model, folder, tokenizer=tokenizer)
    else:
        config = methods()[arguments.method].config_class(seed=arguments.seed)
        memory = inject_memory(model, config, tokenizer=tokenizer)
    for number in range(len(found["writes"]), len(groups)):
        times, report = timed(memory.write, [record.fact for record in groups[number]], progress=False)
        facts = sum(map(len, groups[: number + 1]))
        row = {"facts": facts, "seconds a fact": (times / len(groups[number]))._asdict(), "report": report.perplexity}
        row |= {"first group": exact(groups[0]), "this group": exact(groups[number]), "notes": report.notes}
        found["writes"].append(row)
        print(row, flush=True)
        memory.save_pretrained(folder)
        keep()
    found["all"] = score(model, tokenizer, records, text, arguments.perplexity_tokens)
    own_words = asdict(score_own_words(model, tokenizer, questions))
    found["own words"] = {name: share for name, share in own_words.items() if name != "answers"}
    found["own words"]["questions"] = len(questions.asked)
    found["forget"] = forget(model, tokenizer, memory, records)
    keep()
    print(found["all"], found["own words"], found["forget"], sep="\n")


@torch.no_grad()
def forget(model: Any, tokenizer: Any, memory: Any, records: Sequence[EditRecord]) -> dict[str, Any]:
    """Forget a record in the middle, and compare logits."""
    gone = records[len(records) // 2]
    others = [record for record in records if record.fact.subject != gone.fact.subject][:20]

    def logits(record: EditRecord) -> torch.Tensor:
        return model(**pad_rows([tokenizer(record.fact.prompt)["input_ids"]], DEVICE)).logits

    with memory.disabled():
        base = logits(gone)
    before = [logits(record) for record in others]
    written = logits(gone)
    times, _ = timed(memory.forget, gone.fact)
    return {
        "milliseconds": {name: 1000 * seconds for name, seconds in times._asdict().items()},
        "changed its prompt before": not torch.equal(written, base),
        "its prompt as the base": torch.equal(logits(gone), base),
        "others as before": all(torch.equal(logits(r), b) for r, b in zip(others, before, strict=True)),
    }


if __name__ == "__main__":
    main()
