"""Answers on the model card: the model's own, without the memory and with it, made when the memory is pushed."""

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
    WriteReport,
    inject_memory,
)
from memory_adapters.config import MemoryConfig
from memory_adapters.files.model_card import CardExample, model_card
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
        dict(unrelated=UNRELATED, progress=False),
    ),
    "edit": (MemitConfig(**EDITING, clamp=5.0, learning_rate=0.5), dict(progress=False)),
    "slots": (
        MemorySlotsConfig(read="all", num_slots=4, span_length=16, lora_rank=2, refine_steps=2),
        dict(progress=False),
    ),
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


def pushed_card(memory: Any, folder: Path) -> ModelCard:
    """The card that `push_to_hub` uploads."""
    folder.mkdir(exist_ok=True)
    memory._write_repository(folder)
    return ModelCard.load(folder / "README.md")


def shown(card: ModelCard) -> list[tuple[str, str]]:
    """Prompt and answer of each example."""
    return [(one["text"], one["output"]["text"]) for one in card.data.to_dict().get("widget", [])]


@methods
def test_examples_are_the_models_own(method: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    memory, arguments = memory_of(method, tokenizer)
    model = memory.model.train()
    memory.write([TOWER, LOUVRE] if method == "edit" else [TOWER, "A document.", QUESTION], **arguments)
    card = pushed_card(memory, tmp_path)
    assert model.training
    prompts = [TOWER.prompt, LOUVRE.prompt if method == "edit" else QUESTION.question]
    model.eval()
    assert shown(card) == [(prompt, said(model, prompt)) for prompt in prompts]
    assert "## Before and after" in card.text
    with memory.disabled():
        without = [said(model, prompt) for prompt in prompts]
    assert any(after != before for (_, after), before in zip(shown(card), without, strict=True))
    memory.save_pretrained(tmp_path / "saved")
    assert shown(ModelCard.load(tmp_path / "saved" / "README.md")) == [], "saving runs no model"


@methods
def test_asking_changes_nothing(method: str, tmp_path: Path) -> None:
    memory, arguments = memory_of(method)
    memory.write([TOWER], **arguments)
    model = memory.model
    examples = shown(pushed_card(memory, tmp_path))
    with_memory, before, state = logits(model), fingerprint(model), torch.get_rng_state()
    memory.active = False
    assert shown(pushed_card(memory, tmp_path)) == examples, "the memory takes part in its own examples"
    assert not memory.active
    memory.active = True
    assert torch.equal(logits(model), with_memory)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    model.disable_adapters()
    assert shown(pushed_card(memory, tmp_path)) == []


def test_the_last_four_prompts_of_modest_length_are_asked(tmp_path: Path) -> None:
    memory, arguments = memory_of("edit")
    others = [Fact(f"The {name} is", name, "old") for name in ("sun", "moon", "Earth")]
    memory.write([TOWER, LOUVRE, *others], **arguments)
    prompts = [fact.prompt for fact in (LOUVRE, *others)]
    assert [prompt for prompt, _ in shown(pushed_card(memory, tmp_path))] == prompts
    memory.write(Fact("x" * 300, "x", "y"), **arguments)
    assert [prompt for prompt, _ in shown(pushed_card(memory, tmp_path))] == prompts[1:], "too long to show"


def test_what_is_forgotten_or_replaced_is_not_shown(tmp_path: Path) -> None:
    edit, arguments = memory_of("edit")
    edit.write([TOWER, LOUVRE], **arguments)
    edit.write(Fact(TOWER.prompt, TOWER.subject, "Bonn"), **arguments)
    assert shown(pushed_card(edit, tmp_path)) == [(f.prompt, said(edit.model, f.prompt)) for f in (LOUVRE, TOWER)]
    edit.forget(LOUVRE)
    card = pushed_card(edit, tmp_path)
    assert [prompt for prompt, _ in shown(card)] == [TOWER.prompt]
    assert "Louvre" not in card.text

    slots, arguments = memory_of("slots")
    slots.write(TOWER, **arguments)
    own, examples = slots.slots, shown(pushed_card(slots, tmp_path))
    slots.use(slots.compress("Something else.", progress=False))
    assert slots.items == []
    assert shown(pushed_card(slots, tmp_path)) == []
    slots.use(own)
    assert slots.items == [TOWER]
    assert shown(pushed_card(slots, tmp_path)) == examples


def test_any_text_stays_text_on_the_card() -> None:
    odd = CardExample("a | b\n---\n* {x} <b>", "\x00`c`", "---\n_ü_ 你 | [d](e)")
    card = ModelCard(model_card(MemitConfig(), 3, [odd]))
    (widget,) = card.data.to_dict()["widget"]
    assert widget == {"text": odd.prompt, "example_title": odd.prompt, "output": {"text": odd.after}}
    assert r"| a \| b --- \* {x} \<b\> | \`c\` | --- \_ü\_ 你 \| \[d\](e) |" in card.text
    long = model_card(MemitConfig(), 3, [odd._replace(prompt="word " * 20)])
    assert len(ModelCard(long).data.to_dict()["widget"][0]["example_title"]) == 40


def test_the_card_lists_what_the_memory_holds_now() -> None:
    model = tiny_model()
    memory = inject_memory(model, MemorySlotsConfig(), tokenizer=byte_tokenizer())
    memory.write([TOWER, "a | b"], measure=False)
    memory.forget(TOWER)
    assert "1 items:\n\n* Document(text='a \\| b')\n\n## Writes" in model_card(memory.config, 3)
    memory.write([Fact(f"{n} is", str(n), "a") for n in range(21)], measure=False)
    card = model_card(memory.config, 3)
    assert "22 items:" in card
    assert "* and 2 more\n" in card
    assert "## What it holds\n\nNothing." in model_card(MemitConfig(), 3)


def test_every_note_of_every_write_is_on_the_card() -> None:
    config = MemitConfig()
    for number in range(2):
        config.record(WriteReport("MEMIT", {"Fact": 1}, notes=[f"first of {number}", f"second of {number}"]))
    card = model_card(config, 3)
    for number in range(2):
        assert f"first of {number}" in card
        assert f"second of {number}" in card


@pytest.mark.parametrize("items", ["text", [{}], [{"prompt": "a", "before": "b"}], [{"text": 1}]])
def test_items_of_another_form_are_refused(items: Any) -> None:
    for config in (MemitConfig, MemoryAdapterConfig, MemorySlotsConfig):
        with pytest.raises(ValueError, match="`items` must be a list"):
            config(items=items)


@pytest.mark.parametrize("writes", ["text", [{}], [{"method": "a", "num_items": {}, "seconds": "1.0"}], [1]])
def test_reports_of_another_form_are_refused(writes: Any) -> None:
    with pytest.raises(ValueError, match="`writes` must be a list"):
        MemitConfig(writes=writes)
