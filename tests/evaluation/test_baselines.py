"""What memories are compared with: each holds the knowledge, can be saved, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from memory_adapters import Document, Fact, MemitConfig, MemoryAdapterConfig, inject_memory
from memory_adapters.evaluation.comparison.baselines import (
    Baseline,
    FineTuned,
    InPrompt,
    Lora,
    Memorised,
    Unchanged,
)
from memory_adapters.evaluation.comparison.finetuning import Recipe, train
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"), Fact("{} plays the", "Miles Davis", "piano")]
QUIET = {"disable_tqdm": True}
RECIPE = Recipe(learning_rate=1e-2, min_steps=20, num_train_epochs=1, num_prefixes=1, training_args=QUIET)


def baselines() -> dict[str, Baseline]:
    return {
        "memit": Memorised(MemitConfig(covariance_tokens=128, steps=4, num_prefixes=1), {"progress": False}),
        "lora": Lora(rank=2, recipe=RECIPE),
        "all weights": FineTuned(RECIPE),
        "prompt": InPrompt(),
        "nothing": Unchanged(),
    }


@pytest.mark.parametrize("name", list(baselines()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_holds_the_facts_and_leaves_no_trace(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(dtype=dtype), byte_tokenizer()
    before, state = logits(model), fingerprint(model)
    baseline = baselines()[name]
    baseline.check(model, tokenizer)
    with baseline.holding(model, tokenizer, FACTS) as held:
        assert held.report.num_items == {"Fact": 2}
        assert torch.equal(logits(model), before) == (name == "nothing")
        assert model.dtype == dtype
        held.save(tmp_path / "kept")
        if held.disabled is not None:
            with held.disabled():
                assert torch.equal(logits(model), before)
            assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == state
    assert (tmp_path / "kept").exists() == (name != "nothing")


@pytest.mark.parametrize("name", ["lora", "all weights", "prompt"])
def test_a_failure_leaves_no_trace(name: str) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    state = fingerprint(model)
    with pytest.raises(KeyboardInterrupt), baselines()[name].holding(model, tokenizer, FACTS):
        raise KeyboardInterrupt
    assert fingerprint(model) == state
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_trained_lora_is_one_that_peft_loads(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    with baselines()["lora"].holding(model, tokenizer, FACTS) as held:
        expected = logits(model)
        held.save(tmp_path)
        assert held.report.losses[-1] < held.report.losses[0]
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path)), expected)


def test_lora_has_about_as_many_numbers_as_asked_for() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    with Lora(num_parameters=2000, recipe=RECIPE).holding(model, tokenizer, FACTS) as held:
        per_rank = held.report.num_parameters / next(iter(model.peft_config.values())).r
        assert abs(held.report.num_parameters - 2000) <= per_rank / 2


def test_lora_beside_a_memory_leaves_it_active() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    memory = inject_memory(model, MemoryAdapterConfig(token_gate="none", gate_init=1.0), tokenizer=tokenizer)
    before = logits(model)
    with baselines()["lora"].holding(model, tokenizer, FACTS) as held, held.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert memory.active


def test_prompt_is_read_as_the_text_would_be_and_forgets() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    tokenizer.add_bos_token = False
    text = "Rome is in Italy."
    with InPrompt().holding(model, tokenizer, [Document(text)]):
        ids = tokenizer("And Paris?", return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            read = model(input_ids=ids).logits
    whole = tokenizer(f"{text}\nAnd Paris?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=whole).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    with InPrompt().holding(model, tokenizer, FACTS) as held:
        assert held.forget is not None
        both = logits(model)
        held.forget(FACTS[0])
        left = logits(model)
    with InPrompt().holding(model, tokenizer, FACTS[1:]):
        assert torch.equal(logits(model), left)
    assert not torch.equal(both, left)


def test_only_the_given_parameters_are_trained() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    losses = train(model, tokenizer, FACTS, RECIPE, [chosen])
    assert losses[-1] < losses[0]
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_a_recipe_sets_nothing_twice() -> None:
    with pytest.raises(ValueError, match=r"`per_device_train_batch_size=2`.* `batch_size=2` instead"):
        Recipe(learning_rate=1e-2, training_args={"per_device_train_batch_size": 2})
    assert Recipe(learning_rate=1e-2, training_args={"bf16": True}).training_args == {"bf16": True}


def test_training_all_weights_casts_no_buffer() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    rotary = model.model.rotary_emb
    rotary.inv_freq = before = rotary.inv_freq.float() * 1.001  # float32, as in a model that was loaded
    said = logits(model)
    with FineTuned(RECIPE).holding(model, byte_tokenizer(), FACTS):
        assert torch.equal(rotary.inv_freq, before)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), said)
