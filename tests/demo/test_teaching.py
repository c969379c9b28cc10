"""What the page does, without the page: teach, ask, forget, start over, save and load, on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Document, Fact, QuestionAnswer, memories, registry
from memory_adapters.cli.options import TAUGHT_WITH
from memory_adapters.demo.choices import AUTO, Choice, choice_of, choices, choose
from memory_adapters.demo.teaching import Teaching
from memory_adapters.registry import methods, register_method
from tests.cli.test_registered_method import ToyConfig, ToyMemory
from tests.support.models import byte_tokenizer, tiny_model

HOME = Fact("The home port of {} is", "Lumen Ferry", "Lisbon")
FUEL = Fact("The ships of {} run on", "Lumen Ferry", "methanol")
CODE = QuestionAnswer("What is the wifi code?", "7351")
TEXT = Document("The lighthouse of Hollowmere was built in 1874.")
ASKED = "Where is Lumen Ferry at home?"


@pytest.fixture
def teaching() -> Teaching:
    return Teaching(tiny_model(), byte_tokenizer(chat=True))


def logits(teaching: Teaching) -> torch.Tensor:
    with torch.no_grad():
        return teaching.model(torch.arange(5, 25)[None]).logits


def taught(teaching: Teaching, items: Any, method: str = AUTO, **options: Any) -> str:
    return teaching.teach(items, method, progress=False, measure=False, **options).choice.name


def quick_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(covariance_tokens=128, steps=2, num_prefixes=1, layers=[1])
    before = Choice.config
    monkeypatch.setattr(
        Choice,
        "config",
        lambda self: (
            self.method.config_class(**self.settings, **settings) if "solver" in self.settings else before(self)
        ),
    )


def test_taught_asked_forgotten_and_removed(teaching: Teaching) -> None:
    base, before = logits(teaching), teaching.ask_without(ASKED)
    assert teaching.ask_with(ASKED) == before
    assert teaching.explain(ASKED) is None
    done = teaching.teach([HOME, FUEL], progress=False)
    assert (done.choice.name, done.report.num_items) == ("slots", {"Fact": 2})
    assert done.report.recall is not None
    assert taught(teaching, CODE) == "slots"
    assert teaching.items == [HOME, FUEL, CODE]
    assert teaching.ask_without(ASKED) == before != teaching.ask_with(ASKED)
    explanation = teaching.explain(ASKED)
    assert explanation is not None
    assert list(explanation.acts) == ["Lumen Ferry"]
    teaching.forget([HOME])
    assert teaching.items == [FUEL, CODE]
    with pytest.raises(ValueError, match="is not written"):
        teaching.forget([HOME])
    teaching.start_over()
    assert (teaching.items, teaching.choice) == ([], None)
    assert torch.equal(logits(teaching), base)
    assert not memories(teaching.model)


def test_what_holds_something_keeps_its_method(teaching: Teaching, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_edits(monkeypatch)
    assert taught(teaching, HOME, exact=True) == "gated_memit"
    assert "gate='keys'" in repr(teaching.memory and teaching.memory.config)
    with pytest.raises(ValueError, match=r"`method='slots'`, but the memory holds items written with gated_memit"):
        taught(teaching, FUEL, "slots")
    with pytest.raises(ValueError, match=r"A Document cannot be taught now: .* which takes none. Start over"):
        taught(teaching, TEXT)
    assert taught(teaching, FUEL) == "gated_memit"
    teaching.forget([HOME, FUEL])
    assert taught(teaching, TEXT) == "slots"
    assert (list(memories(teaching.model)), teaching.items) == (
        [teaching.memory and teaching.memory.adapter_name],
        [TEXT],
    )


def test_an_error_changes_nothing(teaching: Teaching) -> None:
    base = logits(teaching)
    with pytest.raises(TypeError, match="this memory takes Fact"):
        taught(teaching, [HOME, TEXT], "memit")
    assert teaching.memory is None
    assert not memories(teaching.model)
    assert torch.equal(logits(teaching), base)
    for wrong, why in (("edit", "`method` must be one of"), ("", "got ''")):
        with pytest.raises(ValueError, match=why):
            taught(teaching, HOME, wrong)
    with pytest.raises(ValueError, match="`question` is ' ': ask something"):
        teaching.ask_with(" ")
    for use in (lambda: teaching.save("x"), lambda: teaching.push("me/x"), lambda: teaching.forget([HOME])):
        with pytest.raises(ValueError, match=r"teach something first|nothing is taught"):
            use()


def test_saved_and_loaded(teaching: Teaching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_edits(monkeypatch)
    taught(teaching, HOME, "memit")
    teaching.save(tmp_path / "edit")
    after = logits(teaching)
    teaching.load(tmp_path / "edit")  # beside itself, without a warning
    assert torch.equal(logits(teaching), after)
    teaching.start_over()
    taught(teaching, TEXT)
    with pytest.raises(FileNotFoundError):
        teaching.load(tmp_path / "nothing")
    assert teaching.items == [TEXT]
    teaching.load(tmp_path / "edit")
    assert teaching.items == [HOME]
    assert torch.equal(logits(teaching), after)
    assert teaching.choice is not None
    assert teaching.choice.name == "memit"


@pytest.mark.parametrize(
    ("items", "exact", "name", "why"),
    [
        ([HOME], False, "slots", "nothing is trained"),
        ([HOME, CODE], False, "slots", "nothing is trained"),
        ([HOME, TEXT], False, "slots", "by its parts"),
        ([HOME, FUEL], True, "gated_memit", "word for word"),
        ([HOME, CODE], True, "slots", "only facts can be"),
    ],
)
def test_chosen_by_what_is_taught(items: Sequence[Any], exact: bool, name: str, why: str) -> None:
    choice, reason = choose(items, exact)
    assert choice.name == name
    assert why in reason


def test_choices_are_of_registered_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    known = choices()
    assert list(known) == list(TAUGHT_WITH)
    assert {choice.method.name for choice in known.values()} == set(methods())
    assert [choice_of(choice.config()) for choice in known.values()] == list(known.values())
    monkeypatch.setattr(registry, "_METHODS", methods())
    register_method("toy", ToyConfig, ToyMemory)
    assert choices()["toy"].label == "Toy"
