"""Find keys of more and more subjects: how often they open where a subject is named, and where none is.

    python -m benchmarks.keys --data FOLDER [--subjects 100 1000 10000]

Keys are those of a gated LoRA (block, threshold, rows), of the first CounterFact subjects, found in chunks. At each
number, paraphrases, chat questions, neighbours and chat questions about these of at most 200 records, and WikiText-2,
are read, with the second witness (the name must stand there) and without. A text opens *falsely* to a thing that it
does not name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import DEVICE, BenchmarkParser, counterfact, load_model, save, stored, wikitext
from memory_adapters import GatedLoraConfig, inject_memory
from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.modes import computes_in_bfloat16
from memory_adapters.base_model.names import occurs
from memory_adapters.base_model.sampling import sample_text
from memory_adapters.base_model.tokens import tokenize
from memory_adapters.evaluation.questions import record_questions
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.keys.gate import KeySet
from memory_adapters.keys.learning import learn_keys
from memory_adapters.keys.things import things_of
from memory_adapters.training.stored_states import row_states

CHUNK, ASKED, WIKI_ROW = 100, 200, 256


def main() -> None:
    parser = BenchmarkParser(__doc__, "keys", data=True)
    parser.add_argument("--subjects", type=int, nargs="*", default=[100, 300, 1000, 3000, 10_000], quick=[2])
    parser.add_argument("--tokens", type=int, default=8192, quick=256, help="of WikiText-2")
    arguments = parser.parse()
    in_bfloat16 = computes_in_bfloat16("bfloat16", torch.device(DEVICE))
    model, tokenizer = load_model(arguments, torch.bfloat16 if in_bfloat16 else torch.float32)
    records = list({r.fact.subject: r for r in counterfact(arguments, 2 * max(arguments.subjects))}.values())
    memory: Any = inject_memory(model, GatedLoraConfig(seed=arguments.seed), tokenizer=tokenizer)
    decoder, block = find_decoder(model), memory.config.block
    unrelated = [text for text in sample_text(model, tokenizer, [""] * 24, num_tokens=64, seed=0) if text.strip()]
    gate = KeySet(decoder.hidden_size, [], [], [], held=True).to(DEVICE)
    names: list[tuple[str, ...]] = []
    seconds, rows = 0.0, stored(arguments, "rows")
    for number in arguments.subjects:
        for start in range(len(gate.names), number, CHUNK):
            began = time.process_time()
            things = things_of([r.fact for r in records[start : min(start + CHUNK, number)]], tokenizer)
            found, _ = learn_keys(memory, decoder, things, unrelated=unrelated)
            gate.add(found.keys, found.bias, found.owners, found.names, found.windows)
            names += [thing.spellings for thing in things]
            seconds += time.process_time() - began
        asked = records[: min(ASKED, number)]
        rows[str(number)] = {"CPU seconds a subject": seconds / number, "keys": len(gate.keys)} | {
            label: measure(model, decoder, block, tokenizer, gate, names, asked, arguments, witness=witness)
            for label, witness in (("keys and names", True), ("keys alone", False))
        }
        print(number, rows[str(number)], flush=True)
        save(arguments, {"rows": rows}, dtype=str(model.dtype))


def measure(
    model: Any,
    decoder: Any,
    block: int,
    tokenizer: Any,
    gate: KeySet,
    names: Sequence[tuple[str, ...]],
    asked: Sequence[EditRecord],
    arguments: Any,
    *,
    witness: bool,
) -> dict[str, Any]:
    def opened(rows: Sequence[list[int]]) -> list[tuple[set[int], int]]:
        """The things that each row is open to, and at how many tokens it is to any."""
        found = []
        for row, (state,) in zip(rows, row_states(model, decoder, [block], rows), strict=True):
            ids = torch.tensor([row], device=DEVICE) if witness else None
            open_to = gate.opened(state[None].to(DEVICE), ids)
            found.append((set(open_to.things.tolist()), int(open_to.mask.any(-1).sum())))
        return found

    def named(text: str, thing: int) -> bool:
        return any(occurs(name.casefold(), text.casefold()) for name in names[thing])

    def shares(texts: Sequence[str], wanted: Sequence[int | None], chat: bool) -> dict[str, float]:
        rendered = [(rendered_question(tokenizer, text) or (text, 0))[0] if chat else text for text in texts]
        every = opened([tokenize(tokenizer, text, rendered=chat) for text in rendered])
        right = [thing in things for (things, _), thing in zip(every, wanted, strict=True) if thing is not None]
        false = [any(not named(text, t) for t in things) for (things, _), text in zip(every, texts, strict=True)]
        found = {"open falsely": sum(false) / len(false)}
        return {"open to their subject": sum(right) / len(right), **found} if right else found

    place = {record.fact.subject: i for i, record in enumerate(asked)}
    questions = [(q.prompt, place[r.fact.subject]) for r in asked for q in record_questions([r]).asked]
    paraphrases = [(text, place[r.fact.subject]) for r in asked for text in r.paraphrases]
    neighbours = [prompt for r in asked for prompt, *_ in r.neighbours]
    others = list(record_questions(asked).others)
    text = tokenize(tokenizer, wikitext(arguments, "test")[: 8 * arguments.tokens])[: arguments.tokens]
    wiki = [text[i : i + WIKI_ROW] for i in range(0, len(text), WIKI_ROW)]
    read = [(tokenizer.decode(row), *one) for row, one in zip(wiki, opened(wiki), strict=True)]
    return {
        "paraphrases": shares(*zip(*paraphrases, strict=True), chat=False),  # type: ignore[arg-type]
        "chat questions": shares(*zip(*questions, strict=True), chat=True),  # type: ignore[arg-type]
        "neighbours": shares(neighbours, [None] * len(neighbours), chat=False),
        "chat questions about others": shares(others, [None] * len(others), chat=True),
        "WikiText: tokens open": sum(count for *_, count in read),
        "WikiText: things open, not named": sum(not named(part, t) for part, things, _ in read for t in things),
        "WikiText: things open, named": sum(named(part, t) for part, things, _ in read for t in things),
    }


if __name__ == "__main__":
    main()
