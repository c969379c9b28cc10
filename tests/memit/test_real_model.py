"""Closed-form edits of a real model: they hold, the rest stays as it was, and one is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memory_adapters import Fact, MemitConfig, inject_memory
from memory_adapters.evaluation.records import load_counterfact
from memory_adapters.evaluation.scores.edits import score_edits
from memory_adapters.evaluation.scores.perplexity import load_wikitext, perplexity
from tests.support.real_model import EIFFEL, PROMPT, answer, needs_the_real_model, run_front_page

pytestmark = needs_the_real_model


def test_the_front_page(real_model: tuple[Any, Any], tmp_path: Path) -> None:
    first_in_its_prompt = Fact("{} plays the instrument", subject="Miles Davis", target="piano")
    facts = [EIFFEL, first_in_its_prompt]
    memory, report, answers = run_front_page(*real_model, MemitConfig(covariance_tokens=2048), facts, tmp_path)
    assert report.recall == 1
    assert answers[0] == answers[1]
    prompts = [
        EIFFEL.prompt,
        "The Eiffel Tower is in the city of",
        "If you go to see the Eiffel Tower, you are in the city of",
        "Everyone knows that the Eiffel Tower is in the city of",
        "The Eiffel Tower can be found in",
        PROMPT,  # answered "fact the first Roman Catholic church" by edits that begin below block 5
    ]
    asked = [answer(*real_model, prompt) for prompt in prompts]
    assert asked[0].startswith("Rome")
    assert sum("Rome" in text for text in asked) >= 5, asked
    memory.remove()


@pytest.mark.parametrize(
    ("count", "covariance_tokens", "max_tokens"),
    [(5, 2048, 1024), pytest.param(10, 8192, 4096, marks=pytest.mark.slow)],
)
def test_edits_hold_and_one_is_forgotten(
    count: int, covariance_tokens: int, max_tokens: int, real_model: tuple[Any, Any], data: Path
) -> None:
    model, tokenizer = real_model
    records = load_counterfact(data / "counterfact" / "edit.json", count)
    text = load_wikitext(data / "wikitext2" / "test.txt")
    before, base = score_edits(model, tokenizer, records), perplexity(model, tokenizer, text, max_tokens=max_tokens)
    memory = inject_memory(model, MemitConfig(covariance_tokens=covariance_tokens), tokenizer=tokenizer)
    try:
        memory.write([record.fact for record in records], progress=False)
        after = score_edits(model, tokenizer, records)
        assert after.exact_match == 1
        assert after.paraphrase >= 0.8
        assert after.neighbourhood >= before.neighbourhood - 0.1
        assert perplexity(model, tokenizer, text, max_tokens=max_tokens) <= 1.01 * base
        memory.forget(records[0].fact)
        kept = score_edits(model, tokenizer, records)
        assert kept.exact_match == pytest.approx(1 - 1 / count)
        assert score_edits(model, tokenizer, records[1:]).exact_match == 1
    finally:
        memory.remove()
