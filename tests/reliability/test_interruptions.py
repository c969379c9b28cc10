"""Interrupted (Ctrl-C) between the steps of an operation, a model and its files are as they were before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import CovarianceFitter, inject_memory, load_adapters, load_memory, memories, save_adapters
from memory_adapters.composition import collection, peft_loading
from tests.reliability.operations import files_of
from tests.support.composing import KINDS, SUITES, put
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

methods = pytest.mark.parametrize("kind", SUITES)


def interrupting(function: Callable[..., Any], call: int = 1) -> Callable[..., Any]:
    """A function that is interrupted at this call of it."""
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def state(model: Any) -> dict[str, Any]:
    """All that an interrupted operation must leave as it was."""
    found = {name: (memory.active, memory.items, memory.config.to_dict()) for name, memory in memories(model).items()}
    return {
        "structure": fingerprint(model),
        "training": [module.training for module in model.modules()],
        "logits": logits(model).tolist(),
        "tensors": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "memories": copy.deepcopy(found),
    }


@methods
@pytest.mark.parametrize("call", [1, 2], ids=["before", "after"])
def test_in_the_scores_of_a_write(kind: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def injected() -> Any:
        model = tiny_model()
        put(model, "lora", "style", 1)
        return inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer())

    whole, memory = injected(), injected()
    SUITES[kind].write(whole)
    before = state(memory.model)
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "_scores", interrupting(type(memory)._scores, call))
        with pytest.raises(KeyboardInterrupt):
            SUITES[kind].write(memory)
    assert state(memory.model) == before
    SUITES[kind].write(memory)
    assert torch.equal(logits(memory.model), logits(whole.model))


@methods
def test_in_a_second_write(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = inject_memory(tiny_model(), SUITES[kind].make_config(), tokenizer=byte_tokenizer())
    SUITES[kind].write(memory)
    before = state(memory.model)
    monkeypatch.setattr(type(memory), "_scores", interrupting(type(memory)._scores, 2))
    with pytest.raises(KeyboardInterrupt):
        SUITES[kind].write(memory)
    assert state(memory.model) == before


@methods
def test_in_a_load(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = put(tiny_model(), kind, "knowledge", 1)
    assert saved is not None
    saved.save_pretrained(tmp_path)
    for others in ([], [other for other in KINDS if other != kind]):
        model = tiny_model()
        for other in others:
            put(model, other, other, 2)
        before = state(model)
        with monkeypatch.context() as patch:
            patch.setattr(type(saved), "_restore", interrupting(type(saved)._restore))
            with pytest.raises(KeyboardInterrupt):
                load_memory(model, tmp_path, tokenizer=byte_tokenizer(), adapter_name="new")
        assert state(model) == before
        load_memory(model, tmp_path, tokenizer=byte_tokenizer(), adapter_name="new")


@pytest.mark.parametrize(
    ("module", "step", "call"),
    [(peft_loading, "set_peft_model_state_dict", 1), *((collection, "load_memory", call) for call in (1, 2, 3))],
)
def test_in_a_load_of_several_adapters(
    module: Any, step: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tiny_model()
    for kind in KINDS:
        put(saved, kind, kind, 1)
    save_adapters(saved, tmp_path)
    model = tiny_model()
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupting(getattr(module, step), call))
        with pytest.raises(KeyboardInterrupt):
            load_adapters(model, tmp_path, tokenizer=byte_tokenizer())
    assert state(model) == before
    load_adapters(model, tmp_path, tokenizer=byte_tokenizer())
    assert torch.equal(logits(model), logits(saved))


@methods
def test_between_the_files_of_a_save(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in SUITES:
        folder = tmp_path / other
        old, new = put(tiny_model(), other, "knowledge", 1), put(tiny_model(), kind, "knowledge", 2)
        assert old is not None
        assert new is not None
        old.save_pretrained(folder)
        before = files_of(folder)
        with monkeypatch.context() as patch:
            patch.setattr("memory_adapters.memory.model_card", interrupting(lambda: None))  # the weights are written
            with pytest.raises(KeyboardInterrupt):
                new.save_pretrained(folder)
        assert files_of(folder) == before
        new.save_pretrained(folder)
        assert files_of(folder) != before


@pytest.mark.parametrize("call", range(1, len(KINDS)))
def test_between_the_adapters_of_a_save(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for seed in (1, 2):
        models.append(tiny_model())
        for kind in KINDS:
            put(models[-1], kind, kind, seed)
    save_adapters(models[0], tmp_path)
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("memory_adapters.memory.model_card", interrupting(lambda *_, **__: "", call))
        with pytest.raises(KeyboardInterrupt):
            save_adapters(models[1], tmp_path)
    assert files_of(tmp_path) == before
    save_adapters(models[1], tmp_path)
    assert files_of(tmp_path) != before


def test_half_a_pass_is_no_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    fitter = CovarianceFitter(tiny_model(), byte_tokenizer(), [1, 2])
    texts = ["The ships lay under the snow.", "Birds sing in the early morning."]
    whole = fitter.fit(texts, 40, progress=False).covariance()

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("memory_adapters.memit.covariance_fitter.add_gram", fails)
        with pytest.raises(KeyboardInterrupt):
            fitter.fit([*texts, "Some more text."], 20, progress=False)
    with pytest.raises(RuntimeError, match="interrupted while keys were being added: make another fitter"):
        fitter.covariance()
    fitter.resume(whole)
    assert torch.equal(fitter.covariance().matrices[1], whole.matrices[1])


def test_what_was_added_before_an_interruption_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "memory_adapters.memit.covariance_fitter.batches_of", lambda rows: [[i] for i in range(len(rows))]
    )
    texts = ["The ships lay under the snow.", "Birds sing in the early morning."]
    model, tokenizer = tiny_model(), byte_tokenizer()
    alone = CovarianceFitter(model, tokenizer, [1]).fit(texts[:1], 99, progress=False).covariance()
    fitter = CovarianceFitter(model, tokenizer, [1])
    update, count = fitter.update, 0

    def second_fails(rows: list[list[int]]) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        update(rows)

    monkeypatch.setattr(fitter, "update", second_fails)
    with pytest.raises(KeyboardInterrupt):
        fitter.fit(texts, 99, progress=False)
    assert fitter.num_tokens == alone.num_tokens
    torch.testing.assert_close(fitter.covariance().matrices[1], alone.matrices[1])
