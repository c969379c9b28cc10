"""Writing, for all methods alike: whatever the caller's settings, what a report says, what is written twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_adapters import (
    Document,
    Fact,
    MemitConfig,
    Memory,
    MemoryAdapterConfig,
    MemorySlotsConfig,
    QuestionAnswer,
    inject_memory,
    load_memory,
    memories,
)
from memory_adapters.config import MemoryConfig
from memory_adapters.report import WriteReport
from tests.support.contract import encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [Fact("{} is in the city of", "Eiffel Tower", "Rome"), Fact("The capital of {} is", "France", "Lyon")]
CONFIGS: dict[str, Callable[[], MemoryConfig]] = {
    "residual": lambda: MemoryAdapterConfig(num_train_epochs=2, min_steps=4, memory_dim=8),
    "memit": lambda: MemitConfig(steps=3, covariance_tokens=512, num_prefixes=2, prefix_length=4),
    "slots": lambda: MemorySlotsConfig(read="all", num_slots=4, span_length=16, lora_rank=4, refine_steps=3),
}
every_method = pytest.mark.parametrize("method", CONFIGS)


def memory_on(model: Any, method: str, chat: bool = False) -> Memory:
    return inject_memory(model, CONFIGS[method](), tokenizer=byte_tokenizer(chat))


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_write_sets_what_it_needs(method: str, mode: Callable[[], Any]) -> None:
    model = tiny_model()
    base = logits(model)
    with mode():
        memory = memory_on(model, method)
        memory.write(FACTS, progress=False)
    expected = memory_on(tiny_model(), method)
    expected.write(FACTS, progress=False)
    assert not torch.equal(logits(model), base)
    torch.testing.assert_close(logits(model), logits(expected.model), rtol=1e-5, atol=1e-5)


@every_method
def test_a_write_that_measures_nothing_writes_the_same(method: str) -> None:
    expected = memory_on(tiny_model(), method)
    assert expected.write(FACTS, progress=False).recall is not None
    memory = memory_on(tiny_model(), method)
    report = memory.write(FACTS, measure=False, progress=False)
    assert (report.recall, report.perplexity, report.same, report.results) == (None, None, None, [])
    assert report.num_items == {"Fact": 2}
    assert torch.equal(logits(memory.model), logits(expected.model))


@every_method
def test_another_default_dtype_changes_nothing(method: str) -> None:
    expected = memory_on(tiny_model(), method)
    expected.write(FACTS, progress=False)
    model = tiny_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        memory_on(model, method).write(FACTS, progress=False)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(logits(model), logits(expected.model), rtol=1e-5, atol=1e-5)


@every_method
def test_a_model_that_is_cast_later_is_written_again(method: str) -> None:
    model = tiny_model()
    memory = memory_on(model, method)
    memory.write(FACTS, progress=False)
    model.bfloat16()
    model.generate(**encode("Rome is"), max_new_tokens=2)
    memory.write([Fact("{} is tall", "Everest", "yes")], progress=False)
    assert logits(model).isfinite().all()


@every_method
def test_a_cell_that_is_run_twice_is_noticed(method: str) -> None:
    model = tiny_model()
    memory_on(model, method).write(FACTS, progress=False)
    second = memory_on(model, method)
    with pytest.warns(UserWarning, match=r"2 of the 2 items are written in the active memory 'knowledge' too"):
        second.write(FACTS, progress=False)
    memories(model)["knowledge"].active = False
    second.write([FACTS[0], Fact("{} is tall", "Everest", "yes")], progress=False)  # no warning


@every_method
def test_a_report_has_a_line_for_each_fact(method: str) -> None:
    memory = memory_on(tiny_model(), method, chat=True)
    report = memory.write(FACTS, progress=False)
    assert [(result.prompt, result.target) for result in report.results] == [(f.prompt, f.target) for f in FACTS]
    assert report.recall == sum(result.recalled for result in report.results) / 2
    assert all(isinstance(result.answered_in_chat, bool) for result in report.results)
    assert 0 <= report.same <= 1
    assert any("about well-known other things changed" in note for note in report.notes) is (report.same < 0.95)
    assert report.nothing_learned is (report.recall == 0)
    assert "'The capital of France is' → 'Lyon'" in repr(report)
    assert WriteReport.from_dict(report.to_dict()) == report
    again = memory.write([Fact("{} is tall", "Everest", "yes")], progress=False)
    assert report.earlier_recall is None
    assert [result.earlier for result in again.results] == [False, True, True]
    assert again.earlier_recall == sum(result.recalled for result in again.results[1:]) / 2
    assert set(memory.items) == {*FACTS, Fact("{} is tall", "Everest", "yes")}
    assert memory.config.writes[-1]["results"] == []  # thousands would fill the file


def test_slots_read_an_item_once() -> None:
    memory = memory_on(tiny_model(), "slots")
    memory.write([*FACTS, FACTS[0]], progress=False)
    slots = memory._num_virtual_tokens()
    report = memory.write(FACTS, progress=False)
    assert memory._num_virtual_tokens() == slots
    assert memory.items == FACTS
    assert report.num_items == {}
    assert "2 of 2 items are read already: left out" in report.notes


def test_what_cannot_be_learned_is_refused_before_any_work() -> None:
    memory = memory_on(tiny_model(), "residual")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"`items\[1\]` is a Document of a single token \('x'\)"):
        memory.write([FACTS[0], Document("x")], progress=False)
    assert time.perf_counter() - start < 5


def test_notes_say_how_items_were_understood() -> None:
    memory = memory_on(tiny_model(), "memit")
    report = memory.write([Fact("Ada is a ", "Ada", "poet")], progress=False)
    assert "the space at the end of the prompt was moved" in report.notes[0]


@every_method
def test_processors_and_names_of_tokenizers(method: str) -> None:
    class Processor:
        def __init__(self) -> None:
            self.tokenizer, self.chat_template = byte_tokenizer(), "{{ messages[0]['content'] }}"

    processor: Any = Processor()
    memory = inject_memory(tiny_model(), CONFIGS[method](), tokenizer=processor)
    assert memory.tokenizer.chat_template == processor.chat_template
    assert processor.tokenizer.chat_template is None
    with pytest.raises(TypeError, match=r"`tokenizer` is a str.*AutoTokenizer.from_pretrained\('gpt2'\)"):
        inject_memory(tiny_model(), CONFIGS[method](), tokenizer="gpt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`model` is a str.*AutoModelForCausalLM.from_pretrained\('gpt2'\)"):
        inject_memory("gpt2", CONFIGS[method]())  # type: ignore[arg-type]


@every_method
def test_heads_and_embeddings_are_found_anew(method: str) -> None:
    model = tiny_model()
    memory = memory_on(model, method)
    memory.write(FACTS, progress=False)
    model.resize_token_embeddings(280, mean_resizing=False)
    if method != "slots":  # whose model is another now
        with pytest.raises(ValueError, match=r"base model has changed|head"):
            memory.write(QuestionAnswer("Who?", "Bo") if method == "residual" else FACTS, progress=False)
    assert logits(model).shape[-1] == 280


@every_method
def test_names_that_torch_uses_are_refused_and_nothing_is_left(method: str) -> None:
    model = tiny_model()
    before = fingerprint(model)
    for name in ("keys", "training", "forward", ["a"]):
        with pytest.raises(ValueError, match="`adapter_name="):
            inject_memory(model, CONFIGS[method](), adapter_name=name)  # type: ignore[arg-type]
    assert fingerprint(model) == before


def test_what_fails_within_peft_leaves_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("memory_adapters.residual_mlp.layer.ResidualLayer.update_layer", fail)
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="no room"):
        memory_on(model, "residual")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("unrelated", "text"),
        ("unrelated", [3]),
        ("training_args", {"a": 1}),
        ("training_args", "x"),
        ("callbacks", None),
        ("callbacks", [3]),
    ],
)
def test_options_are_checked_before_any_work(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"`{option}` must"):
        memory_on(tiny_model(), "residual").write(FACTS, **{option: value})


def test_paths_are_checked() -> None:
    memory = memory_on(tiny_model(), "memit")
    for wrong in ("", None, 3):
        with pytest.raises((TypeError, ValueError), match="`save_directory`"):
            memory.save_pretrained(wrong)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match="`path_or_repo_id`"):
            load_memory(tiny_model(), wrong)  # type: ignore[arg-type]


@every_method
def test_another_default_device_changes_nothing(method: str) -> None:
    model = tiny_model()
    torch.set_default_device("meta")
    try:
        memory_on(model, method).write(FACTS, progress=False)
    finally:
        torch.set_default_device(None)
    assert logits(model).isfinite().all()


def test_a_misspelt_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="`eiffel-towr` is no folder here"):
        load_memory(tiny_model(), "eiffel-towr", local_files_only=True)
