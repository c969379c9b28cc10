"""Methods compared on the same facts: what is measured, what is refused, and that nothing is left on the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_adapters import Fact, MemitConfig, Memory, MemoryAdapterConfig, MemorySlotsConfig, inject_memory, memories
from memory_adapters.config import MemoryConfig
from memory_adapters.evaluation.comparison import Comparison, compare
from memory_adapters.evaluation.editing import score_edits
from memory_adapters.evaluation.records import EditRecord
from memory_adapters.evaluation.retention import perplexity
from tests.contract import fingerprint, logits
from tests.models import byte_tokenizer, tiny_model

RECORDS = [
    EditRecord(
        Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"),
        "Paris",
        ("To see the Eiffel Tower go to",),
        (("Big Ben is in", "London"),),
    ),
    EditRecord(Fact("{} plays the", "Miles Davis", "piano"), "trumpet"),
]
TEXT = "Rome was not built in a day, nor was Paris, and both were rebuilt more than once."


def configs() -> dict[str, MemoryConfig]:
    return {
        "trained": MemoryAdapterConfig(min_steps=10, num_train_epochs=1, num_prefixes=1, learning_rate=1e-2),
        "edit": MemitConfig(covariance_tokens=128, steps=4, num_prefixes=1),
        "slots": MemorySlotsConfig(lora_rank=2, refine_steps=2),
    }


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, PreTrainedModel]:
    model = tiny_model()
    before, state = logits(model), fingerprint(model)
    result = compare(model, byte_tokenizer(), RECORDS, configs(), text=TEXT, progress=False)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == state
    return result, model


def test_base_and_every_method_are_measured(compared: tuple[Comparison, PreTrainedModel]) -> None:
    result, model = compared
    tokenizer = byte_tokenizer()
    assert result.base.scores == score_edits(model, tokenizer, RECORDS)
    assert result.base.perplexity == pytest.approx(perplexity(model, tokenizer, TEXT))
    assert list(result.methods) == ["trained", "edit", "slots"]
    for found in result.methods.values():
        assert found.write.num_items == {"Fact": 2}
        assert found.write.seconds > 0
        assert found.write.num_parameters > 0
        assert found.report.num_records == 2


def test_scores_are_those_of_a_memory_written_by_hand(compared: tuple[Comparison, PreTrainedModel]) -> None:
    found = compared[0].methods["edit"]
    model, tokenizer = tiny_model(), byte_tokenizer()
    memory = inject_memory(model, configs()["edit"], tokenizer=tokenizer)
    memory.write([record.fact for record in RECORDS])
    assert found.report.scores == score_edits(model, tokenizer, RECORDS)
    assert found.report.perplexity == pytest.approx(perplexity(model, tokenizer, TEXT), rel=1e-5)
    assert found.report.perplexity != compared[0].base.perplexity
    assert found.write.num_parameters == memory.num_parameters()


def test_shown_and_sent(compared: tuple[Comparison, PreTrainedModel]) -> None:
    result = compared[0]
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    title, header, base, *methods = repr(result).splitlines()
    assert title == "Comparison (2 facts; scores in %)"
    assert header.split() == ["S", "ES", "PS", "NS", "exact", "perplexity", "write,", "s", "stored", "numbers"]
    assert base.split()[0] == "base"
    assert base.split()[-2:] == ["–", "–"]
    assert [line.split()[0] for line in methods] == list(result.methods)
    assert len({len(line) for line in (header, base, *methods)}) == 1
    assert methods[1].endswith(f"{result.methods['edit'].write.num_parameters:,}")
    marked = Comparison(result.base, {"<edit>": result.methods["edit"]})._repr_html_()
    assert "<th>&lt;edit&gt;</th>" in marked
    assert marked.count("<tr>") == 3


def test_text_is_sampled_if_none_is_given() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    results = [
        compare(model, tokenizer, RECORDS[1:], {"edit": configs()["edit"]}, max_text_tokens=300, progress=False)
        for _ in range(2)
    ]
    first, second = (result.base.perplexity for result in results)
    assert first == second
    assert first is not None
    lines = repr(results[0]).splitlines()
    assert lines[1].split() == ["ES", "exact", "perplexity", "write,", "s", "stored", "numbers"], "no empty columns"


def test_what_cannot_be_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr("memory_adapters.evaluation.comparison.evaluate_edits", refuse)
    edit = {"edit": configs()["edit"]}
    for records, given, settings, why in (
        ([], edit, {}, "`records` is empty"),
        (RECORDS, {}, {}, "`configs` is empty"),
        (RECORDS, edit, {"edits": {}}, r"`write_settings` is for \['edits'\]"),
        (RECORDS, edit | {"deep": MemitConfig(layers=[9])}, {}, "`layers` has 9"),
    ):
        with pytest.raises(ValueError, match=why):
            compare(model, tokenizer, records, given, write_settings=settings)
    assert not memories(model)


def test_a_failed_write_leaves_nothing_and_settings_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    state, given = fingerprint(model), []

    def fail(_self: Memory, _items: Any, **settings: Any) -> Any:
        given.append(settings)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("memory_adapters.MemitMemory.write", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(
            model,
            byte_tokenizer(),
            RECORDS,
            {"edit": configs()["edit"]},
            text=TEXT,
            write_settings={"edit": {"progress": False}},
            progress=False,
        )
    assert given == [{"progress": False}]
    assert fingerprint(model) == state
