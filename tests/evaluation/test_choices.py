"""Multiple choice: accuracy by hand, questions from files, questions made of known facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memory_adapters.evaluation.scores.choices import Choice, choice_accuracy, known_choices, load_choices
from tests.support.models import byte_tokenizer, tiny_model

QUESTIONS = [
    Choice("The Eiffel Tower is in", ("Rome", "Paris", "Oslo", "a"), 0),
    Choice("Two and two are", ("five", "four"), 1),
    Choice("Which is a fruit?", ("A table.", "An apple, which grows on trees.", "x"), 2),
]


@torch.no_grad()
def best(question: Choice) -> int:
    """The choice with the highest mean log-probability per token, each scored alone."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    found = []
    for choice in question.choices:
        ids = tokenizer(f"{question.question} {choice}", return_tensors="pt")["input_ids"]
        start = len(tokenizer(question.question)["input_ids"])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(log_probs[start - 1 :].gather(1, ids[0, start:, None]).mean())
    return int(torch.stack(found).argmax())


def test_accuracy_by_hand() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    picked = [best(question) for question in QUESTIONS]
    right = [Choice(q.question, q.choices, at) for q, at in zip(QUESTIONS, picked, strict=True)]
    wrong = [Choice(q.question, q.choices, (at + 1) % len(q.choices)) for q, at in zip(QUESTIONS, picked, strict=True)]
    assert choice_accuracy(model, tokenizer, right) == 1
    assert choice_accuracy(model, tokenizer, wrong) == 0
    assert choice_accuracy(model, tokenizer, [*right, wrong[0]]) == 3 / 4
    with pytest.raises(ValueError, match="`choices` is empty"):
        choice_accuracy(model, tokenizer, [])


def test_questions_are_read(tmp_path: Path) -> None:
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_choices(tmp_path / "a.json") == load_choices(tmp_path / "a.jsonl") == QUESTIONS
    assert load_choices(tmp_path / "a.json", limit=1) == QUESTIONS[:1]
    for change, why in (
        ({"answer": 4}, "`answer=4` must be an index of the 4"),
        ({"answer": "Rome"}, "`answer='Rome'` must be an index"),
        ({"choices": ["Rome"]}, "two or more different"),
        ({"choices": ["Rome", "Rome"]}, "two or more different"),
        ({"choices": "Rome"}, "must be a list"),
        ({"question": ""}, "non-empty"),
    ):
        (tmp_path / "b.json").write_text(json.dumps([rows[1], {**rows[0], **change}]))
        with pytest.raises(ValueError, match=rf"row 2: .*{why}"):
            load_choices(tmp_path / "b.json")


def test_questions_of_known_facts(tmp_path: Path) -> None:
    towns = {"Oslo": "Norway", "Rome": "Italy", "Bergen": "Norway", "Bonn": "Germany", "Nice": "France", "Bath": "UK"}
    facts = [{"prompt": f"{town} is in", "attribute": land, "relation_id": "P17"} for town, land in towns.items()]
    few = [{"prompt": f"{i} plays the", "attribute": f"piano {i}", "relation_id": "P1303"} for i in range(3)]
    file = tmp_path / "known_1000.json"
    file.write_text(json.dumps([*few, *facts]))
    found = known_choices(file)
    assert [one.question for one in found] == [fact["prompt"] for fact in facts], "three attributes are too few"
    assert [one.choices[one.answer] for one in found] == list(towns.values())
    for one in found:
        assert len(set(one.choices)) == 4
        assert set(one.choices) <= set(towns.values())
    assert len({one.answer for one in found}) > 1, "the right answer has no place of its own"
    assert known_choices(file) == found
    assert known_choices(file, seed=1) != found
    assert known_choices(file, limit=4) == found[:1]
