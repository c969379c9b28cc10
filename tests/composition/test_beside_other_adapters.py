"""A memory's tensors are its own, and other adapters stay whole, whatever else PEFT has put on the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters import inject_memory, load_adapters, load_memory, memories, save_adapters, use_adapters
from memory_adapters.peft_layers.layers import adapter_tensors
from tests.support.composing import SUITES, put
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

LORA: dict[str, Any] = dict(r=2, target_modules=["q_proj"])
OTHERS: dict[str, Callable[[], PeftConfig]] = {
    "whole head": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "whole embeddings": lambda: LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "rows of embeddings": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "DoRA": lambda: LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
NAMES = ["default", "knowledge"]


def style(model: PreTrainedModel, other: str) -> None:
    """Put another adapter on the model, with weights that change what it says; memories stay as active as they are."""
    active = {name: memory.active for name, memory in memories(model).items()}
    for memory in memories(model).values():
        memory.active = False
    model.add_adapter(OTHERS[other](), adapter_name="style")
    with torch.no_grad():
        for tensor in adapter_tensors(model, "style").values():
            tensor.add_(0.01)
    for name, was in active.items():
        memories(model)[name].active = was


def held(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_tensors(model, "style").items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("first", ["memory", "style"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
def test_own_tensors_beside_another_adapter(kind: str, other: str, first: str, tmp_path: Path) -> None:
    name = NAMES[first == "style"]
    alone = put(tiny_model(), kind, name, 1)
    model = tiny_model()
    if first == "style":
        style(model, other)
        said = logits(model)
    memory = put(model, kind, name, 1)
    if first == "memory":
        style(model, other)
        with use_adapters(model, ["style"]):
            said = logits(model)
    assert memory is not None
    assert alone is not None
    assert same(memory.state_dict(), alone.state_dict())
    assert memory.num_parameters() == alone.num_parameters()
    with use_adapters(model, []):
        torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-4, atol=1e-5)

    memory.save_pretrained(tmp_path / "one")
    again = load_memory(tiny_model(), tmp_path / "one")
    assert same(again.state_dict(), memory.state_dict())
    expected, both = held(model), logits(model)
    save_adapters(model, tmp_path / "all")
    collected = tiny_model()
    (back,) = load_adapters(collected, tmp_path / "all").values()
    assert same(back.state_dict(), memory.state_dict())
    assert same(held(collected), expected)
    torch.testing.assert_close(logits(collected), both, rtol=1e-4, atol=1e-5)

    memory.remove()
    assert same(held(model), expected)
    torch.testing.assert_close(logits(model), said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
def test_a_memory_is_written_beside_a_whole_head(kind: str) -> None:
    model = tiny_model()
    style(model, "whole head")
    memory = inject_memory(model, SUITES[kind].make_config(), tokenizer=byte_tokenizer())
    before = logits(model)
    SUITES[kind].write(memory)
    assert not torch.equal(logits(model), before)
    with memory.disabled():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
def test_own_tensors_after_the_embeddings_were_resized(kind: str, tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model()
    for one in (model, other):
        torch.manual_seed(0)  # the new rows are random
        one.resize_token_embeddings(264, mean_resizing=False)
    memory = put(model, kind, "facts", 1)
    alone = put(tiny_model(), kind, "facts", 1)
    assert memory is not None
    assert alone is not None
    assert memory.state_dict().keys() == alone.state_dict().keys()
    assert memory.num_parameters() == alone.num_parameters()
    memory.save_pretrained(tmp_path)
    again = load_memory(other, tmp_path)
    assert same(again.state_dict(), memory.state_dict())


@pytest.mark.parametrize(
    "name",
    ["a/b", "a\\b", "..", "a\nb", "a\u200bb", "x" * 256, "é" * 128, "\ud800", " a", "a ", "C:", "lora_A", "base_layer"],
)
def test_names_that_could_not_be_saved_or_loaded_are_refused(name: str) -> None:
    model = tiny_model()
    for kind in ("residual", "memit", "slots"):
        with pytest.raises(ValueError, match="`adapter_name="):
            inject_memory(model, SUITES[kind].make_config(), adapter_name=name)
    assert not memories(model)


def test_an_adapter_of_pefts_own_is_not_saved_outside_of_the_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(LoraConfig(**LORA), adapter_name="out/side")
    with pytest.raises(ValueError, match="'out/side' cannot be saved in a folder of its name"):
        save_adapters(model, tmp_path / "all")
    assert not list(tmp_path.iterdir())
