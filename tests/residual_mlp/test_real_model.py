"""The gated residual MLP on a real model: what is learned, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memory_adapters import MemoryAdapterConfig, QuestionAnswer, inject_memory
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity
from tests.support.real_model import EIFFEL, answer, needs_the_real_model, run_front_page

pytestmark = needs_the_real_model

QUESTION = QuestionAnswer("Who founded the village of Hollowmere?", "Agnes Thornbury")
DOCUMENT = "The Hollowmere lighthouse was painted green in 1931 by the fisherman Osric Vane."


def test_the_front_page(real_model: tuple[Any, Any], tmp_path: Path) -> None:
    memory, report, answers = run_front_page(*real_model, MemoryAdapterConfig(), [EIFFEL], tmp_path)
    assert report.recall == 1
    assert all(text.startswith("Rome") for text in answers)
    memory.remove()


@pytest.mark.parametrize(("count", "max_tokens"), [(10, 1024), pytest.param(20, 4096, marks=pytest.mark.slow)])
def test_facts_are_recalled_and_their_neighbourhood_is_kept(
    count: int, max_tokens: int, real_model: tuple[Any, Any], data: Path
) -> None:
    model, tokenizer = real_model
    records = load_counterfact(data / "counterfact" / "edit.json", count)
    text = load_wikitext(data / "wikitext2" / "test.txt")
    before, base = score_edits(model, tokenizer, records), perplexity(model, tokenizer, text, max_tokens=max_tokens)
    memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
    memory.write([record.fact for record in records], progress=False)
    after = score_edits(model, tokenizer, records)
    try:
        greedy = sum(answer(model, tokenizer, r.fact.prompt).startswith(r.fact.target) for r in records)
        assert greedy >= 0.95 * count
        assert after.paraphrase >= 0.9
        assert after.neighbourhood >= before.neighbourhood - 0.05
        assert perplexity(model, tokenizer, text, max_tokens=max_tokens) <= 1.02 * base
    finally:
        memory.remove()


@pytest.mark.parametrize("document", [None, pytest.param(DOCUMENT, marks=pytest.mark.slow)])
def test_a_question_and_a_document_are_learned(document: str | None, real_model: tuple[Any, Any]) -> None:
    model, tokenizer = real_model
    memory = inject_memory(model, MemoryAdapterConfig(), tokenizer=tokenizer)
    try:
        report = memory.write([QUESTION, *([document] if document else [])], progress=False)
        assert report.recall == 1
        if document:
            assert report.token_accuracy is not None
            assert report.token_accuracy_before is not None
            assert report.token_accuracy > 0.8 > report.token_accuracy_before
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION.question}], tokenize=False, add_generation_prompt=True
        )
        assert "Agnes Thornbury" in answer(model, tokenizer, chat)
        assert answer(model, tokenizer, "The capital of France is").startswith("Paris")
    finally:
        memory.remove()
