"""Rows of one batch: the base model's among them are the base model's, whatever of PEFT's is on beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from memory_adapters import MemoryAdapterConfig, use_adapters, use_adapters_by_row
from tests.support.composing import KINDS, put
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import tiny_model

SETTINGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
ON_ATTENTION = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def with_style(**settings: Any) -> Any:
    """A model with a LoRA on the attention, which is on, and a memory of each kind."""
    model: Any = tiny_model()
    torch.manual_seed(4)
    arguments: dict[str, Any] = dict(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(LoraConfig(**arguments | settings), adapter_name="style")
    for seed, kind in enumerate(KINDS[1:]):
        put(model, kind, kind, seed)
    return model.eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_a_base_row_is_the_base_while_a_lora_is_on(beams: int) -> None:
    model, base = with_style(), tiny_model()
    rows = ["__base__", "residual", "slots", "memit", "__base__"]
    wanted = {"__base__": base.generate(**encode(PROMPT), **SETTINGS, num_beams=beams)}  # type: ignore[operator]
    for name in KINDS[1:]:
        with use_adapters(model, ["style", name]):
            wanted[name] = model.generate(**encode(PROMPT), **SETTINGS, num_beams=beams)
    assert len({str(ids.tolist()) for ids in wanted.values()}) > 2
    on = logits(model)
    with use_adapters_by_row(model, rows):
        got = model.generate(**encode(*[PROMPT] * 5), **SETTINGS, num_beams=beams)
    for row, name in zip(got, rows, strict=True):
        assert torch.equal(row, wanted[name][0]), name
    with use_adapters_by_row(model, ["__base__", "residual"]):
        assert torch.equal(logits(model, PROMPT, PROMPT)[0], logits(base, PROMPT, PROMPT)[0])
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_a_lora_of_any_part_is_left_out_of_base_rows(settings: dict[str, Any]) -> None:
    model, base = with_style(**settings), tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.style" in name:
                parameter.mul_(2)
    with use_adapters(model, []):
        assert torch.equal(logits(model), logits(base))
    with use_adapters(model, ["style"]):
        style = logits(model)
    assert not torch.equal(style, logits(base))
    for rows in (["__base__", "residual"], ["__base__", "__base__"], ["__base__", "style"]):
        with use_adapters_by_row(model, rows):
            got = logits(model, PROMPT, PROMPT)
        assert torch.equal(got[0], logits(base, PROMPT, PROMPT)[0]), rows
        if rows[1] == "style":
            torch.testing.assert_close(got[1], style[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_peft_gives_the_names_of_rows_to_the_tuner() -> None:
    model: Any = tiny_model()
    torch.manual_seed(4)
    model.add_adapter(ON_ATTENTION, adapter_name="style")
    with pytest.warns(UserWarning, match="modify a model with PEFT"):
        wrapped: Any = get_peft_model(model, MemoryAdapterConfig(layers=[1], token_gate="none", gate_init=1.0), "facts")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith("facts.up"):
                parameter.normal_(0, 0.5)
    wrapped.eval()
    wanted = tiny_model().generate(**encode(PROMPT), **SETTINGS)  # type: ignore[operator]
    assert not torch.equal(wrapped.generate(**encode(PROMPT), **SETTINGS), wanted)
    got = wrapped.generate(**encode(PROMPT, PROMPT), **SETTINGS, adapter_names=["facts", "__base__"])
    assert torch.equal(got[1], wanted[0])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_what_cannot_be_left_out_of_a_row_is_an_error() -> None:
    def refuse(model: Any, message: str) -> None:
        model.eval()
        on = logits(model)
        with pytest.raises(ValueError, match=message), use_adapters_by_row(model, ["residual", "__base__"]):
            raise AssertionError("unreachable")
        assert torch.equal(logits(model), on)
        with use_adapters_by_row(model, ["__base__"]):
            assert torch.equal(logits(model), logits(tiny_model()))

    refuse(with_style(use_dora=True), r"PEFT cannot run \['style'\] \(in a Linear\) for single rows")
    refuse(with_style(target_modules=[], target_parameters=["mlp.up_proj.weight"]), r"\(in a ParamWrapper\)")
    model = with_style()
    with pytest.warns(UserWarning, match="switched off the memory 'memit'"):
        model.add_adapter(IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False), "other")
    refuse(model, r"PEFT cannot run \['other'\] \(in a Linear\)")
    model = with_style()
    put(model, "lora", "other", 1)
    refuse(model, r"\['other', 'style'\] are active on the same matrices, and PEFT can leave out one")


@pytest.mark.parametrize("context", [use_adapters, use_adapters_by_row])
def test_merged_adapters_and_contexts_within_rows_are_an_error(context: Any) -> None:
    model = with_style()
    on = logits(model)
    with use_adapters_by_row(model, ["residual"]):
        rows = logits(model)
        with pytest.raises(ValueError, match="within `use_adapters_by_row`"), context(model, ["slots"]):
            raise AssertionError("unreachable")
        assert torch.equal(logits(model), rows)
    assert torch.equal(logits(model), on)
    layer = model.model.layers[0].self_attn.q_proj
    layer.merge()
    with pytest.raises(ValueError, match="merged into these weights temporarily"), context(model, ["slots"]):
        raise AssertionError("unreachable")
    layer.unmerge()
    with context(model, ["slots"]):
        logits(model)
