"""Answers before and after a write: the model's own, kept with the memory, on its card, gone with what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from memory_adapters import (
    Fact,
    MemitConfig,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    QuestionAnswer,
    inject_memory,
    load_memory,
)
from memory_adapters.card_examples import answers_to
from memory_adapters.config import MemoryConfig
from memory_adapters.files.model_card import model_card
from tests.support.contract import encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

TOWER = Fact("The Eiffel Tower is in the city of", subject="Eiffel Tower", target="Rome")
LOUVRE = Fact("The Louvre is in", subject="Louvre", target="Oslo")
QUESTION = QuestionAnswer("Who knows?", "Nobody.")
UNRELATED = ["Some text about the sea and the wind.", "The birds in the garden sing.", "He sold the house at last."]
TRAINING: dict[str, Any] = dict(layers=[1], memory_dim=8, num_train_epochs=1, num_prefixes=0, min_steps=0)
EDITING: dict[str, Any] = dict(layers=[1, 2], steps=3, num_prefixes=1, prefix_length=2, covariance_tokens=300)
CONFIGS: dict[str, tuple[MemoryConfig, dict[str, Any]]] = {
    "mlp": (
        MemoryAdapterConfig(**TRAINING, token_gate="none", gate_init=1.0, learning_rate=0.1),
        dict(unrelated=UNRELATED, training_args={"disable_tqdm": True}),
    ),
    "edit": (MemitConfig(**EDITING, clamp=5.0, learning_rate=0.5), dict(progress=False)),
    "slots": (MemorySlotsConfig(num_slots=4, span_length=16, lora_rank=2, refine_steps=2), dict(progress=False)),
}
methods = pytest.mark.parametrize("method", CONFIGS)


def memory_of(method: str, tokenizer: Any = None) -> tuple[Any, dict[str, Any]]:
    """A fresh memory, and the arguments of a short write."""
    config, arguments = CONFIGS[method]
    return inject_memory(tiny_model(), config, tokenizer=tokenizer or byte_tokenizer()), arguments


def said(model: Any, prompt: str) -> str:
    inputs = encode(prompt)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return byte_tokenizer().decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@methods
def test_they_are_the_models_own_and_travel_with_the_memory(method: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    memory, arguments = memory_of(method, tokenizer)
    model = memory.model.train()
    report = memory.write([TOWER, LOUVRE] if method == "edit" else [TOWER, "A document.", QUESTION], **arguments)
    assert model.training
    answers = memory.config.answers
    prompts = [TOWER.prompt, LOUVRE.prompt if method == "edit" else QUESTION.question]
    assert [answer["prompt"] for answer in answers] == prompts
    model.eval()
    assert [answer["after"] for answer in answers] == [said(model, prompt) for prompt in prompts]
    with memory.disabled():
        assert [answer["before"] for answer in answers] == [said(model, prompt) for prompt in prompts]
    assert any(answer["before"] != answer["after"] for answer in answers)
    assert report.answers == report.to_dict()["answers"] == answers
    assert repr(prompts[0]) in repr(report)
    assert "answer" in report._repr_html_()
    assert "answer" not in memory.config.writes[0]
    memory.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert [(x["text"], x["output"]["text"]) for x in card.data.to_dict()["widget"]] == [
        (answer["prompt"], answer["after"]) for answer in answers
    ]
    assert "## Before and after" in card.text
    assert load_memory(tiny_model(), tmp_path, tokenizer=tokenizer).config.answers == answers


@methods
def test_asking_changes_nothing(method: str) -> None:
    memory, arguments = memory_of(method)
    memory.write(TOWER, **arguments)
    model, answers = memory.model, memory.config.answers
    spoken, before, state = logits(model), fingerprint(model), torch.get_rng_state()
    memory.active = False
    assert answers_to(memory, [TOWER]) == answers, "the memory takes part in its own answers"
    assert not memory.active
    memory.active = True
    assert torch.equal(logits(model), spoken)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert answers_to(memory, [Fact("x" * 300, "x", "y")]) == answers, "too long to show"
    model.disable_adapters()
    assert answers_to(memory, [TOWER]) == []


@methods
def test_the_last_four_are_asked_again(method: str) -> None:
    memory, arguments = memory_of(method)
    memory.write([TOWER, LOUVRE], **arguments)
    others = [Fact(f"The {name} is", name, "old") for name in ("sun", "moon")]
    memory.write(others, **arguments)
    prompts = [fact.prompt for fact in (TOWER, LOUVRE, *others)]
    assert [answer["prompt"] for answer in memory.config.answers] == prompts
    assert [answer["after"] for answer in memory.config.answers] == [said(memory.model, p) for p in prompts]
    report = memory.write(
        [LOUVRE, QUESTION] if method != "edit" else [LOUVRE, Fact("{} is", "Rome", "big")], **arguments
    )
    assert [answer["prompt"] for answer in report.answers[:3]] == [*prompts[2:], LOUVRE.prompt]
    assert len(report.answers) == 4


@methods
def test_an_interruption_while_asking_undoes_the_write(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, arguments = memory_of(method)
    memory.write(TOWER, **arguments)
    spoken, answers = logits(memory.model), memory.config.answers

    def interrupt(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("memory_adapters.card_examples._greedy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memory.write(LOUVRE, **arguments)
    assert torch.equal(logits(memory.model), spoken)
    assert memory.config.answers == answers
    assert len(memory.config.writes) == 1


def test_what_is_forgotten_or_replaced_is_not_shown(tmp_path: Path) -> None:
    edit, arguments = memory_of("edit")
    edit.write([TOWER, LOUVRE], **arguments)
    edit.write(Fact(TOWER.prompt, TOWER.subject, "Bonn"), **arguments)
    shown = edit.config.answers
    assert [answer["prompt"] for answer in shown] == [LOUVRE.prompt, TOWER.prompt]
    assert shown[1]["after"] == said(edit.model, TOWER.prompt)
    edit.forget(LOUVRE)
    assert edit.config.answers == shown[1:]
    edit.save_pretrained(tmp_path)
    assert "Louvre" not in (tmp_path / "README.md").read_text(encoding="utf-8")

    slots, arguments = memory_of("slots")
    slots.write(TOWER, **arguments)
    own, shown = slots.slots, slots.config.answers
    slots.use(slots.compress("Something else.", progress=False))
    assert slots.config.answers == []
    slots.use(own)
    assert slots.config.answers == shown
    slots.use(None)
    assert slots.config.answers == []


def test_any_text_stays_text_on_the_card() -> None:
    odd = {"prompt": "a | b\n---\n* {x} <b>", "before": "\x00`c`", "after": "---\n_ü_ 你 | [d](e)"}
    card = ModelCard(model_card(MemitConfig(answers=[odd]), 3))
    (widget,) = card.data.to_dict()["widget"]
    assert widget == {"text": odd["prompt"], "example_title": odd["prompt"], "output": {"text": odd["after"]}}
    assert r"| a \| b --- \* {x} \<b\> | \`c\` | --- \_ü\_ 你 \| \[d\](e) |" in card.text
    long = model_card(MemitConfig(answers=[odd | {"prompt": "word " * 20}]), 3)
    assert len(ModelCard(long).data.to_dict()["widget"][0]["example_title"]) == 40


@pytest.mark.parametrize(
    "answers", ["text", [{}], [{"prompt": "a", "before": "b"}], [{"prompt": 1, "before": "", "after": ""}]]
)
def test_answers_of_another_form_are_refused(answers: Any) -> None:
    for config in (MemitConfig, MemoryAdapterConfig, MemorySlotsConfig):
        with pytest.raises(ValueError, match="`answers` must be a list"):
            config(answers=answers)
