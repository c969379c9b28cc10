"""Whatever finds states by their position in the prompt is right with slots before the prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_adapters import CovarianceFitter, inject_memory, memories
from memory_adapters.memit.tracing import trace_facts
from tests.memit.test_contract import FACT
from tests.support.composing import SUITES, put
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import byte_tokenizer, tiny_model

TEXTS = ["The ships lay under the snow until the ice broke.", "Birds sing in the early morning, and at night."]


def written(kind: str) -> Callable[[Any], Tensor]:
    def write(model: Any) -> Tensor:
        memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer())
        SUITES[kind].write(memory)
        return torch.cat([tensor.flatten() for tensor in memory.state_dict().values()])

    return write


def keys(model: Any) -> Tensor:
    memory: Any = inject_memory(model, SUITES["residual"].make_config(token_gate="keys"), tokenizer=byte_tokenizer())
    memory.fit_keys([FACT], unrelated=TEXTS)
    return torch.cat([tensor.flatten() for tensor in memory.state_dict().values()])


def fitted(model: Any) -> Tensor:
    fitter = CovarianceFitter(model, byte_tokenizer(), [1]).fit(TEXTS, 99, progress=False)
    return fitter.sample(64, progress=False).covariance().matrices[1]


def traced(model: Any) -> Tensor:
    found = trace_facts(model, byte_tokenizer(), [FACT], samples=1, only_known=False, progress=False)
    return torch.cat(list(found.effects.values()))


WORKS = {"edit": written("memit"), "residual": written("residual"), "keys": keys, "covariance": fitted, "trace": traced}


@pytest.mark.parametrize("work", WORKS)
def test_active_slots_change_nothing(work: str) -> None:
    found = []
    for active in (True, False):
        model = tiny_model()
        memory = put(model, "slots", "slots", 1)
        assert memory is not None
        memory.active = active
        said = logits(model)
        found.append(WORKS[work](model).nan_to_num(7))
        assert memory.active is active
        if work in ("covariance", "trace"):
            assert torch.equal(logits(model), said)
    assert torch.equal(*found)
    assert found[0].any()


@pytest.mark.parametrize("assistant", ["with slots", "without", "none"])
def test_assisted_decoding_is_plain_decoding(assistant: str) -> None:
    model: Any = tiny_model()
    put(model, "slots", "slots", 1)
    settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(**encode(PROMPT), **settings)
    if assistant == "none":
        assert torch.equal(model.generate(**encode(PROMPT), **settings, prompt_lookup_num_tokens=3), expected)
        return
    other = copy.deepcopy(model)
    if assistant == "without":
        memories(other)["slots"].remove()
    passes: list[int] = []
    with model.model.register_forward_pre_hook(lambda *_: passes.append(1)):
        got = model.generate(**encode(PROMPT), **settings, assistant_model=other)
    assert torch.equal(got, expected)
    assert assistant == "without" or len(passes) < 12  # several tokens a pass
