"""PEFT's own switches beside memories: what is added leaves memories on, or says that it does not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from memory_adapters import load_adapters, memories, save_adapters, use_adapters
from tests.support.composing import KINDS, put
from tests.support.contract import fingerprint, logits
from tests.support.models import tiny_model

LORA = LoraConfig(r=2, target_modules=["q_proj"])  # adds nothing before it is trained
PEFT_SAYS = "ignore:Already found a `peft_config`:UserWarning"
ADDING: dict[str, Callable[[Any], Any]] = {
    "add_adapter": lambda model: model.add_adapter(copy.deepcopy(LORA), "style"),
    "get_peft_model": lambda model: get_peft_model(model, copy.deepcopy(LORA), "style"),
    "inject_adapter_in_model": lambda model: inject_adapter_in_model(copy.deepcopy(LORA), model, "style"),
}


@pytest.mark.parametrize("adding", ADDING)
@pytest.mark.parametrize("kind", ["residual", "slots"])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", PEFT_SAYS)
def test_adding_a_lora_leaves_a_memory_on(kind: str, adding: str) -> None:
    model: Any = tiny_model()
    memory = put(model, kind, "facts", 1)
    assert memory is not None
    on = logits(model)
    ADDING[adding](model)
    assert memory.active
    assert torch.equal(logits(model.eval()), on)
    memory.active = False
    model.disable_adapters()
    model.enable_adapters()
    assert not memory.active


@pytest.mark.parametrize("adding", ADDING)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", PEFT_SAYS)
def test_adding_a_lora_says_that_it_switches_an_edit_off(adding: str) -> None:
    model: Any = tiny_model()
    for name in ("facts", "more"):
        put(model, "memit", name, 1)
    on = logits(model)
    says = r"switched off the memory '(facts|more)': .* `memories\(model\)\['\1'\].active = True`"
    with pytest.warns(UserWarning, match=says) as caught:
        ADDING[adding](model)
    assert len([warning for warning in caught if "switched off" in str(warning.message)]) == 2  # one for each
    for memory in memories(model).values():
        assert not memory.active
        memory.active = True
    assert torch.equal(logits(model.eval()), on)


def test_activating_a_lora_says_once_that_it_switches_an_edit_off() -> None:
    model: Any = tiny_model()
    put(model, "lora", "style", 2)
    base = fingerprint(model)
    memory = put(model, "memit", "facts", 1)
    assert memory is not None
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = memories(other)["facts"]
        on = logits(other)
        for _ in range(2):
            with pytest.warns(UserWarning, match="'facts'") as caught:
                other.set_adapter("style")
            assert len(caught) == 1
            assert not own.active
            other.set_adapter("style")  # it is off already
            own.active = True
            assert torch.equal(logits(other), on)
    model.set_adapter(["style", "facts"])
    model.set_adapter("facts")
    memory.remove()
    assert fingerprint(model)[2:] == base[2:]  # modules, hooks, attributes


@pytest.mark.filterwarnings(PEFT_SAYS)
def test_the_librarys_own_switches_say_nothing(tmp_path: Any) -> None:
    model: Any = tiny_model()
    for kind in KINDS:
        put(model, kind, kind, 1)
    memory = memories(model)["memit"]
    with memory.disabled(), use_adapters(model, ["lora"]):
        logits(model)
    memory.active = False
    memory.active = True
    model.disable_adapters()
    model.enable_adapters()
    put(model, "memit", "other", 2)
    save_adapters(model, tmp_path)
    other = tiny_model()
    load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    for name in ("memit", "other"):
        memories(model)[name].remove()
