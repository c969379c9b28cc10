"""The residual memory inside PEFT: every way to inject it gives the same, and what PEFT offers works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F

from memory_adapters import MemitConfig, MemoryAdapterConfig, inject_memory, load_memory, memories, use_adapters_by_row
from memory_adapters.residual_mlp.gated_mlp import GatedMLP
from tests.support.contract import PROMPT, encode, fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model


def config(**settings: Any) -> MemoryAdapterConfig:
    return MemoryAdapterConfig(**{"layers": [1, 2], "memory_dim": 8, "token_gate": "none", "gate_init": 0.5} | settings)


def plain_delta(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    """gate · LayerNorm(W_down · gelu(W_up · x)), straight from the formula, in float64."""
    p = {name: parameter.detach().double() for name, parameter in mlp.named_parameters()}
    hidden = F.gelu(x.double() @ p["up"].T + p["up_bias"]) @ p["down"].T + p["down_bias"]
    centered = hidden - hidden.mean(-1, keepdim=True)
    normal = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return p["gate"] * (normal * p["norm_weight"] + p["norm_bias"])


def test_module_is_the_formula() -> None:
    x = torch.randn(2, 5, 16) * 3
    mlp = GatedMLP(16, config(stream_scale=False))
    mlp.reset_parameters(torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(x).double(), plain_delta(mlp, x), rtol=1e-5, atol=1e-5)
    scaled = GatedMLP(16, config())
    scaled.load_state_dict(mlp.state_dict())
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(scaled(x).double(), plain_delta(mlp, n) * rms, rtol=1e-4, atol=1e-4)


def test_norm_cap() -> None:
    x = torch.randn(2, 5, 16)
    free, capped = (GatedMLP(16, config(norm_cap=cap, gate_init=3.0)) for cap in (None, 0.25))
    free.reset_parameters(torch.Generator().manual_seed(0))
    capped.load_state_dict(free.state_dict())
    ratio = capped(x).norm(dim=-1) / x.norm(dim=-1)
    assert ratio.max() <= 0.25 + 1e-6
    torch.testing.assert_close(F.normalize(capped(x), dim=-1), F.normalize(free(x), dim=-1))


def test_every_way_to_inject_gives_the_same() -> None:
    one, two, three = tiny_model(), tiny_model(), tiny_model()
    inject_memory(one, config())
    wrapped = get_peft_model(two, config())  # type: ignore[arg-type]
    three.add_adapter(config(), adapter_name="mine")
    expected = logits(one)
    assert torch.equal(logits(wrapped), expected)  # type: ignore[arg-type]
    assert torch.equal(logits(three), expected)
    assert not torch.equal(expected, logits(tiny_model()))
    assert list(memories(wrapped)) == ["default"]
    assert list(memories(three)) == ["mine"]
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert trainable == memories(wrapped)["default"].num_parameters()
    assert total > trainable
    status = wrapped.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))  # type: ignore[arg-type]


def test_config_given_is_not_changed() -> None:
    given = config(layers=0.25)
    first = inject_memory(tiny_model(), given)
    assert given.layers == [0.25]
    assert given.base_fingerprint is None
    assert first.config.layers == [1]
    get_peft_model(tiny_model("qwen2"), given)  # type: ignore[arg-type]
    get_peft_model(tiny_model(), given)  # type: ignore[arg-type]


def test_subsets_and_weights() -> None:
    model = tiny_model()
    base = logits(model)
    for seed, name in enumerate(("red", "blue")):
        inject_memory(model, config(seed=10 * seed), adapter_name=name)
    both = logits(model)
    model.set_adapter("red")
    one = logits(model)
    assert not torch.equal(one, both)
    assert [memory.active for memory in memories(model).values()] == [True, False]
    model.set_adapter(["red", "blue"])
    assert torch.equal(logits(model), both)
    memories(model)["blue"].weight = 0.0
    torch.testing.assert_close(logits(model), one)
    memories(model)["blue"].weight = 1.0
    assert torch.equal(logits(model), both)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter(["red", "blue"])
    model.delete_adapter("blue")
    assert torch.equal(logits(model), one)
    assert list(memories(model)) == ["red"]


def test_weight_is_saved(tmp_path: Path) -> None:
    model = tiny_model()
    memory = inject_memory(model, config())
    memory.weight = 0.5
    half = logits(model)
    memory.save_pretrained(tmp_path)
    other = tiny_model()
    load_memory(other, tmp_path)
    assert torch.equal(logits(other), half)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_memory_for_each_row(beams: int) -> None:
    model = tiny_model()
    for seed, name in enumerate(("red", "blue")):
        inject_memory(model, config(seed=10 * seed, gate_init=2.0), adapter_name=name)
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    expected = []
    for names in (["red"], ["blue"], []):
        for memory in memories(model).values():
            memory.active = memory.adapter_name in names
        expected.append(model.generate(**encode(PROMPT), **settings)[0])
    rows = ["red", "__base__", "blue", "red"]
    with use_adapters_by_row(model, rows):
        got = model.generate(**encode(*[PROMPT] * 4), **settings)
    for row, name in zip(got, rows, strict=True):
        assert torch.equal(row, expected[{"red": 0, "blue": 1, "__base__": 2}[name]])
    assert not torch.equal(got[0], got[2])


def test_rows_through_peft_and_bad_names() -> None:
    wrapped = get_peft_model(tiny_model(), config(), adapter_name="red")  # type: ignore[arg-type]
    wrapped.add_adapter("blue", config(seed=5))  # type: ignore[arg-type]
    inputs = encode(PROMPT, PROMPT)
    with torch.no_grad():
        rows = wrapped(**inputs, adapter_names=["__base__", "red"]).logits
        torch.testing.assert_close(rows[0], logits(tiny_model())[0])
        assert not torch.equal(rows[0], rows[1])
        with pytest.raises(ValueError, match=r"`adapter_names` has \['c'\], but the adapters are \['blue', 'red'\]"):
            wrapped(**inputs, adapter_names=["red", "c"])
        with pytest.raises(ValueError, match="3 entries for a batch of 2"):
            wrapped(**inputs, adapter_names=["red", "blue", "red"])
        assert not torch.equal(wrapped(**inputs).logits[0], rows[0])


def test_merging_is_refused_and_unloading_works() -> None:
    model = tiny_model()
    before = fingerprint(model)
    wrapped = get_peft_model(model, config())  # type: ignore[arg-type]
    with_memory = logits(wrapped)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        wrapped.merge_and_unload()
    wrapped.merge_adapter()
    assert torch.equal(logits(wrapped), with_memory)  # type: ignore[arg-type]
    wrapped.unmerge_adapter()
    bare = wrapped.unload()
    assert torch.equal(logits(bare), logits(tiny_model()))
    assert (fingerprint(bare)[0], fingerprint(bare)[2:4]) == (before[0], before[2:4])


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # what add_adapter of a second kind says
@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_lora(lora_first: bool, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = tiny_model()
    base = logits(model)
    if lora_first:
        model.add_adapter(lora, adapter_name="lora")
        only_lora = logits(model)
        memory = inject_memory(model, config())
    else:
        memory = inject_memory(model, config())
        model.add_adapter(lora, adapter_name="lora")
        memory.active = False
        only_lora = logits(model)
        memory.active = True
    both = logits(model)
    assert not torch.equal(both, only_lora)
    with memory.disabled():
        assert torch.equal(logits(model), only_lora)
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert torch.equal(logits(model), only_lora)
    load_memory(model, tmp_path)
    assert torch.equal(logits(model), both)
    model.disable_adapters()
    assert torch.equal(logits(model), base)


def test_inside_a_lora_peft_model(tmp_path: Path) -> None:
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    only_lora = logits(wrapped)  # type: ignore[arg-type]
    memory = inject_memory(wrapped, config())
    both = logits(wrapped)  # type: ignore[arg-type]
    assert not torch.equal(both, only_lora)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))  # type: ignore[arg-type]
    assert torch.equal(logits(wrapped), both)  # type: ignore[arg-type]
    memory.save_pretrained(tmp_path)
    memory.remove()
    assert torch.equal(logits(wrapped), only_lora)  # type: ignore[arg-type]
    assert list(wrapped.peft_config) == ["default"]


def test_low_cpu_memory_loading(tmp_path: Path) -> None:
    model = tiny_model()
    inject_memory(model, config()).save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(wrapped), logits(model))  # type: ignore[arg-type]
    assert {p.device.type for p in wrapped.parameters()} == {"cpu"}


def test_not_a_memory_config() -> None:
    with pytest.raises(TypeError, match=r"`config` is a LoraConfig; give one of .*MemitConfig, MemoryAdapterConfig"):
        inject_memory(tiny_model(), LoraConfig(), tokenizer=byte_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`config` is the class MemitConfig; give a config, such as `MemitConfig\(\)`"):
        inject_memory(tiny_model(), MemitConfig)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`model` is a str; give the model itself"):
        load_memory("folder", tiny_model())  # type: ignore[arg-type]


def test_refused_injection_changes_nothing() -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="`layers` has 9"):
        inject_memory(model, config(layers=[9]))
    assert fingerprint(model) == before
