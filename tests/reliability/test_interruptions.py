"""Interrupted at any line, a model is what it was: the short run of `python -m tests.reliability.interrupting`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memory_adapters import CovarianceFitter
from memory_adapters.peft_layers.rollback import rollback_on_error
from tests.reliability.interrupting import interrupted, operations, save_each
from tests.support.models import byte_tokenizer, tiny_model

POINTS = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_each(folder)
    return folder


@pytest.mark.parametrize("name", operations(Path()))
def test_an_interruption_changes_nothing(name: str, saved: Path) -> None:
    found = interrupted(operations(saved)[name], POINTS)
    assert found["as before"] + found.get("done", 0) == found["interruptions"] == POINTS


def test_what_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.names = {"a"}
    first, weight, number = model[0], model[0].weight, model[1].weight
    values = number.detach().clone()
    books = {"list": [1], "set": model.names}
    owner = type("Owner", (), {})()
    owner.listed = books["list"]

    def change() -> None:
        first.register_forward_hook(lambda *_: None)
        first.weight = nn.Parameter(torch.zeros(2, 2))
        first.forward = lambda x: x
        model[1] = nn.Identity()
        model.extra = nn.Linear(2, 2)
        model.names.add("b")
        owner.listed.append(2)
        owner.more = 1
        weight.requires_grad_(False)
        number.data.zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), rollback_on_error(model, owner, tensors=[number]):
        change()
    assert first.weight is weight
    assert weight.requires_grad
    assert model[1].weight is number
    assert torch.equal(number, values)
    assert not first._forward_hooks
    assert "forward" not in vars(first)
    assert not hasattr(model, "extra")
    assert model.names == {"a"} == books["set"]
    assert vars(owner) == {"listed": [1]}


def test_what_succeeds_is_kept() -> None:
    model = nn.Linear(2, 2)
    with rollback_on_error(model, tensors=[model.weight]):
        model.weight.data.zero_()
        model.extra = 1
    assert not model.weight.any()
    assert model.extra == 1


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
