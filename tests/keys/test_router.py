"""The router: the memory whose keys the input meets takes part, or none, and then the model is exactly the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_adapters import (
    MemitConfig,
    MemoryAdapterConfig,
    inject_memory,
    memories,
    route_memories,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.decoder import find_decoder
from memory_adapters.base_model.partial_forward import capture
from tests.support.contract import architectures, encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

SUBJECTS = {"red": "Eiffel Tower", "blue": "Mount Etna"}
OTHER = "He sold the house at last and moved to town."


def routed_model(architecture: str = "llama", **settings: Any) -> PreTrainedModel:
    """Two always-open memories on two blocks; each has a key at the last token of its subject."""
    model = tiny_model(architecture)
    for seed, (name, subject) in enumerate(SUBJECTS.items()):
        fields: dict[str, Any] = dict(layers=[1, 2], memory_dim=8, token_gate="none", gate_init=0.5, router_keys=True)
        memory = inject_memory(model, MemoryAdapterConfig(**fields | settings, seed=10 * seed), adapter_name=name)
        with use_adapters(model, []):
            (states,) = capture(model, find_decoder(model), [1], **encode(subject))
        key = torch.nn.functional.layer_norm(states[0, -1], states.shape[-1:])
        for layer in memory.tuner_layers():
            layer.memory_adapter_mlp[name].add_keys(10 * key[None] / key.square().sum(), -9.5 * torch.ones(1))  # type: ignore[attr-defined]
        memory.config.num_keys = 1  # type: ignore[attr-defined]
    return model


@architectures
def test_the_memory_whose_keys_are_met_takes_part_or_none_does(architecture: str) -> None:
    model = routed_model(architecture)
    base, both = logits(tiny_model(architecture), OTHER), logits(model, OTHER)
    assert not torch.equal(both, base)
    expected = {}
    for name, subject in SUBJECTS.items():
        with use_adapters(model, [name]):
            expected[name] = logits(model, subject)
    with route_memories(model) as router:
        assert router.choose([OTHER, *SUBJECTS.values()], byte_tokenizer()) == [None, "red", "blue"]
        assert torch.equal(logits(model, OTHER), base)
        for name, subject in SUBJECTS.items():
            assert torch.equal(logits(model, subject), expected[name])
    assert torch.equal(logits(model, OTHER), both)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_the_route_of_its_prompt(beams: int) -> None:
    model = routed_model()
    prompts = [f"{subject} is" for subject in SUBJECTS.values()] + [OTHER]
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    wanted = []
    for names, prompt in zip([["red"], ["blue"], []], prompts, strict=True):
        with use_adapters(model, names):
            wanted.append(model.generate(**encode(prompt), **settings)[0, -6:])
    with route_memories(model) as router:
        got = model.generate(**encode(*prompts, side="left"), **settings)[:, -6:]
        assert router.choose(prompts, byte_tokenizer()) == ["red", "blue", None]
    for row, expected in zip(got, wanted, strict=True):
        assert torch.equal(row, expected)


def test_padding_opens_nothing_and_inactive_memories_are_not_chosen() -> None:
    model = routed_model()
    with route_memories(model) as router:
        assert router.choose(["Eiffel Tower", OTHER * 2], byte_tokenizer()) == ["red", None]
        memories(model)["red"].active = False
        assert router.choose("Eiffel Tower", byte_tokenizer()) == [None]
        memories(model)["red"].active = True
        memories(model)["red"].remove()
        assert router.choose(list(SUBJECTS.values()), byte_tokenizer()) == [None, "blue"]
    assert torch.equal(logits(model), logits(model))


def test_writing_and_training_are_not_routed() -> None:
    model = routed_model()
    memory = memories(model)["red"]
    memory.tokenizer = byte_tokenizer()
    with route_memories(model):
        before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
        unrelated = [OTHER, "The birds sing early.", "Some text about the sea."]
        report = memory.write(OTHER, unrelated=unrelated, training_args=dict(max_steps=3, disable_tqdm=True))  # type: ignore[call-arg]
        assert report.losses
        after = memory.state_dict()
        assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items() if "keys" not in name)
        with torch.enable_grad():
            model.train()
            routed = model(**encode(OTHER)).logits
    torch.testing.assert_close(model(**encode(OTHER)).logits, routed)


def test_what_cannot_be_routed() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no memory that can be routed"):
        route_memories(model)
    inject_memory(model, MemoryAdapterConfig(layers=[1], token_gate="none"), adapter_name="open")
    inject_memory(model, MemitConfig(layers=[1]), adapter_name="edit")
    with pytest.raises(ValueError, match=r"\['open'\], which keep no keys"):
        route_memories(model)
    with pytest.raises(ValueError, match=r"\['edit'\], but the memories that can be routed are \['open'\]"):
        route_memories(model, ["edit"])
    inject_memory(model, MemoryAdapterConfig(layers=[1]), adapter_name="low")
    inject_memory(model, MemoryAdapterConfig(layers=[2]), adapter_name="high")
    with pytest.raises(ValueError, match="must begin at the same block"):
        route_memories(model, ["low", "high"])
    with route_memories(model, ["low"]):
        with pytest.raises(ValueError, match="within `route_memories` already"), route_memories(model, ["low"]):
            raise AssertionError("unreachable")
        with pytest.raises(ValueError, match="within `route_memories`, which"), use_adapters_by_row(model, ["low"]):
            raise AssertionError("unreachable")


def test_nothing_is_routed_until_the_context_is_entered() -> None:
    model = routed_model()
    before, with_memory = fingerprint(model), logits(model, OTHER)
    router = route_memories(model)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, OTHER), with_memory)
    with pytest.raises(RuntimeError, match="does nothing until it is entered"):
        router.choose(OTHER, byte_tokenizer())
    with router:
        assert router.choose(OTHER, byte_tokenizer()) == [None]
    assert fingerprint(model) == before
