"""What memories are compared with: each holds the knowledge, can be saved, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from memory_adapters import Document, Fact, MemitConfig, MemoryAdapterConfig, MemorySlotsConfig, inject_memory
from memory_adapters.evaluation.comparison.baselines import (
    Baseline,
    FineTuned,
    Lora,
    Together,
    Unchanged,
    WrittenMemory,
)
from memory_adapters.evaluation.comparison.finetuning import Recipe, train
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"), Fact("{} plays the", "Miles Davis", "piano")]
QUIET = {"disable_tqdm": True}
RECIPE = Recipe(learning_rate=1e-2, min_steps=20, num_train_epochs=1, num_prefixes=1, training_args=QUIET)
# The text itself before every prompt, as the variant "prompt" of the memory slots has it.
PROMPT = WrittenMemory(
    MemorySlotsConfig(read="all", num_slots=1, span_length=1, lora_rank=1), {"compress": False, "progress": False}
)
MEMIT = WrittenMemory(MemitConfig(covariance_tokens=128, steps=4, num_prefixes=1), {"progress": False})


def baselines() -> dict[str, Baseline]:
    return {
        "memit": MEMIT,
        "lora": Lora(rank=2, recipe=RECIPE),
        "lora, rehearsed": Lora(rank=2, recipe=replace(RECIPE, rehearsal=2)),
        "together": Together([MEMIT, PROMPT]),
        "all weights": FineTuned(RECIPE),
        "prompt": PROMPT,
        "nothing": Unchanged(),
    }


@pytest.mark.parametrize("name", list(baselines()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_holds_the_facts_and_leaves_no_trace(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(dtype=dtype), byte_tokenizer()
    before, state = logits(model), fingerprint(model)
    baseline = baselines()[name]
    baseline.check(model, tokenizer)
    with baseline.applied(model, tokenizer, FACTS) as applied:
        assert applied.report.num_items == {"Fact": 2}
        assert torch.equal(logits(model), before) == (name == "nothing")
        assert model.dtype == dtype
        applied.save(tmp_path / "kept")
        if applied.disabled is not None:
            with applied.disabled():
                assert torch.equal(logits(model), before)
            assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == state
    assert (tmp_path / "kept").exists() == (name != "nothing")


@pytest.mark.parametrize("name", ["lora", "all weights", "prompt"])
def test_a_failure_leaves_no_trace(name: str) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    state = fingerprint(model)
    with pytest.raises(KeyboardInterrupt), baselines()[name].applied(model, tokenizer, FACTS):
        raise KeyboardInterrupt
    assert fingerprint(model) == state
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_trained_lora_is_one_that_peft_loads(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    with baselines()["lora"].applied(model, tokenizer, FACTS) as applied:
        expected = logits(model)
        applied.save(tmp_path)
        assert applied.report.losses[-1] < applied.report.losses[0]
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path)), expected)


def test_lora_has_the_rank_that_was_asked_for() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    numbers = []
    for baseline in (Lora(rank=3, recipe=RECIPE), Lora(recipe=RECIPE)):
        with baseline.applied(model, tokenizer, FACTS) as applied:
            numbers.append((next(iter(model.peft_config.values())).r, applied.report.num_parameters))
    assert [rank for rank, _ in numbers] == [3, 8]
    assert numbers[0][1] * 8 == numbers[1][1] * 3 > 0


def test_lora_beside_a_memory_leaves_it_active() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    memory = inject_memory(model, MemoryAdapterConfig(token_gate="none", gate_init=1.0), tokenizer=tokenizer)
    before = logits(model)
    with baselines()["lora"].applied(model, tokenizer, FACTS) as applied, applied.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    assert memory.active


def test_prompt_is_read_as_the_text_would_be_and_forgets() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    tokenizer.add_bos_token = False
    text = "Rome is in Italy."
    with PROMPT.applied(model, tokenizer, [Document(text)]):
        ids = tokenizer("And Paris?", return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            read = model(input_ids=ids).logits
    whole = tokenizer(f"{text}\nAnd Paris?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=whole).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    with PROMPT.applied(model, tokenizer, FACTS) as applied:
        assert applied.forget is not None
        both = logits(model)
        applied.forget(FACTS[0])
        left = logits(model)
    with PROMPT.applied(model, tokenizer, FACTS[1:]):
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
    with FineTuned(RECIPE).applied(model, byte_tokenizer(), FACTS):
        assert torch.equal(rotary.inv_freq, before)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), said)


def test_files_count_by_what_they_hold(tmp_path: Path) -> None:
    named = []
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
        options = {"covariance": str(tmp_path / name), "refine_steps": 3}
        named.append(WrittenMemory(MemitConfig(), options).settings()["write_options"])
    assert named[0] == named[1] != named[2]
    assert named[0]["refine_steps"] == 3
