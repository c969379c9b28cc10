"""What is measured of slots: against plain computations, on a tiny model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

from memory_adapters.memory_slots.question_answering import answer_scores, question_prompt, score_answers
from memory_adapters.memory_slots.reconstruction import (
    markdown,
    other_texts,
    score_continuations_after,
    score_reconstruction,
    ways_to_read,
)
from tests.memory_slots.test_slots import memory_on
from tests.support.contract import encode
from tests.support.models import byte_tokenizer, tiny_model

TEXTS = ["Rome is old.", "The wind is cold today", "Nobody knows."]


def loss_after(model: Any, vectors: torch.Tensor, text: str, first: int) -> tuple[float, int]:
    """Summed loss of a text's tokens from `first` on, behind embeddings."""
    ids = encode(text)["input_ids"]
    embedded = torch.cat([vectors[None], model.get_input_embeddings()(ids)], 1)
    logits = model(inputs_embeds=embedded).logits[0, len(vectors) - 1 + first : -1]
    return float(F.cross_entropy(logits, ids[0, first:], reduction="sum")), ids.shape[1] - first


@torch.no_grad()
def test_cross_entropy_is_that_behind_the_slots_and_the_request() -> None:
    model: Any = tiny_model()
    memory = memory_on(model, span_length=100, num_slots=25)
    slots = memory.compress(TEXTS, progress=False)
    scores = score_reconstruction(memory, TEXTS, slots, decode=False)
    request = memory.encoder.parts.reconstruct
    with memory.disabled():
        parts = [
            loss_after(model, torch.cat([own.vectors, request]), text, 0)
            for own, text in zip(slots, TEXTS, strict=True)
        ]
    assert scores.cross_entropy == pytest.approx(sum(p[0] for p in parts) / sum(p[1] for p in parts), rel=1e-4)
    assert scores.compression_rate == sum(map(len, TEXTS)) / sum(own.num_slots for own in slots)
    assert (scores.bleu, scores.exact_prefix) == (None, None)
    nothing = score_reconstruction(memory, TEXTS, [None] * 3, decode=False)
    assert nothing.cross_entropy != pytest.approx(scores.cross_entropy)
    assert nothing.num_slots == 0
    assert math.isinf(nothing.compression_rate)


def test_a_text_that_is_given_back_scores_full_marks() -> None:
    memory = memory_on(tiny_model(), num_slots=16, refine_target_loss=3.0)
    text = "abcabc"
    slots = memory.compress(text, refine_steps=400, progress=False)
    assert 0 < slots.refine_steps < 400  # it ended by itself
    read = memory.compress(TEXTS[0], progress=False)
    memory.use(read)
    scores = score_reconstruction(memory, [text], [slots])
    assert memory.slots == [read]
    assert (scores.exact, scores.exact_prefix, scores.token_accuracy) == (1, 1, 1)
    other = score_reconstruction(memory, [text], [read])
    assert other.exact == 0
    assert other.exact_prefix < 1


@torch.no_grad()
def test_ways_to_read_are_compared_on_the_same_continuations() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    ways = ways_to_read(memory, TEXTS, memory.compress(TEXTS, progress=False))
    found = {name: score_continuations_after(memory, ["and so on"] * 3, slots) for name, slots in ways.items()}
    table = model.get_input_embeddings()
    for name, last in (("full context", 0), ("as many last tokens", 1), ("no context", None)):
        losses = []
        for i, text in enumerate(TEXTS):
            ids = encode(text)["input_ids"][0]
            taken = ids[len(ids) :] if last is None else ids[-(ways["slots"][i].num_slots if last else len(ids)) :]
            with memory.disabled():
                losses.append(loss_after(model, table(taken), "and so on", 1))
        expected = math.exp(sum(p[0] for p in losses) / sum(p[1] for p in losses))
        assert found[name] == pytest.approx(expected, rel=1e-4)
    assert ways["another text's slots"][0] is ways["slots"][1]
    with pytest.raises(ValueError, match="two are needed"):
        ways_to_read(memory, TEXTS[:1], ways["slots"][:1])
    with pytest.raises(ValueError, match="2 entries for 3"):
        score_reconstruction(memory, TEXTS, ways["slots"][:2])


def test_answers_behind_the_whole_context_are_those_of_the_whole_prompt() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    tokenizer = byte_tokenizer()
    ways = ways_to_read(memory, TEXTS, memory.compress(TEXTS, progress=False))
    plain = "{question}"
    for i, text in enumerate(TEXTS):
        with memory.disabled():
            ids = model.generate(**encode(text + "What?"), max_new_tokens=8, do_sample=False)[0]
        said = tokenizer.decode(ids[len(text) + 5 :], skip_special_tokens=True).strip().splitlines() or [""]
        questions = [("What?", said[0])]
        scores = score_answers(memory, questions, ways["full context"][i : i + 1], prompt=plain, max_new_tokens=8)
        assert scores == {"f1": 1.0, "exact": 1.0, "contained": 1.0}
    assert memory.slots == []


def test_answers_are_scored_as_squad_does() -> None:
    assert answer_scores("The Eiffel Tower!", "eiffel tower") == (1, 1, 1)
    f1, *others = answer_scores("in Paris, France", "Paris")
    assert (f1, others) == (pytest.approx(0.5), [0, 1])
    assert answer_scores("Tower of Eiffel", "Eiffel Tower")[2] == 0
    assert answer_scores("", "Paris") == (0, 0, 0)


def test_questions_are_put_as_the_chat_template_says() -> None:
    assert question_prompt(byte_tokenizer()).endswith("\nQuestion: {question}\nAnswer:")
    asked = question_prompt(byte_tokenizer(chat=True))
    assert asked.startswith("<s>user: ")
    assert asked.endswith("Question: {question}</s><s>assistant: ")
    adding = byte_tokenizer(chat=True)
    adding.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert question_prompt(adding) == asked.removeprefix("<s>")


def test_the_honesty_check_keeps_lengths_and_loses_language() -> None:
    found = other_texts(byte_tokenizer(), TEXTS)
    assert found["normal"] == TEXTS
    assert other_texts(byte_tokenizer(), ["Nobody"])["patterned random"] == ["Opcpez"]
    assert found == other_texts(byte_tokenizer(), TEXTS)


def test_tables_leave_what_is_missing_blank() -> None:
    table = markdown({"slots": {"bleu": 99.123456, "f1": None}, "none": {"f1": 0.5}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows == [["slots", "99.12", ""], ["none", "", "0.5"]]
