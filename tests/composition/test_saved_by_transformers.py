"""Memories saved and loaded by transformers and PEFT: they are at home there, or the error says what loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, pipeline

from memory_adapters import (
    Fact,
    MemitConfig,
    MemitMemory,
    MemorySlotsConfig,
    SlotMemory,
    inject_memory,
    load_memory,
    memories,
)
from tests.support.composing import put
from tests.support.contract import fingerprint, logits
from tests.support.models import byte_tokenizer, tiny_model
from tests.training.test_own_training import QUIET, TEXT

METHODS = ("residual", "memit", "slots")
UNMARKED = "does not say which base model"  # an edit's LoRA does not


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def base(home: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(home).eval()


def loaded(model: PreTrainedModel, folder: Path, method: str) -> Any:
    if method != "memit":
        return load_memory(model, folder, tokenizer=byte_tokenizer())
    with pytest.warns(UserWarning, match=UNMARKED):
        return load_memory(model, folder, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("method", METHODS)
def test_what_the_model_saves_is_loaded_by_load_memory(method: str, home: Path, tmp_path: Path) -> None:
    model = base(home)
    put(model, method, "facts", 1)
    assert model.active_adapters() == ["facts"]
    model.save_pretrained(tmp_path)
    other = base(home)
    clean = logits(other)
    memory = loaded(other, tmp_path, method)
    assert torch.equal(logits(other), logits(model))
    memory.remove()
    assert torch.equal(logits(other), clean)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainers_checkpoint_holds_the_memory(method: str, home: Path, tmp_path: Path) -> None:
    model = base(home)
    put(model, method, "facts", 1)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    ids = byte_tokenizer()(TEXT)["input_ids"]
    settings: dict[str, Any] = dict(max_steps=1, save_strategy="steps", save_steps=1, **QUIET)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, learning_rate=0.0, **settings
    )
    rows: Any = [{"input_ids": ids, "labels": ids}]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    other = base(home)
    loaded(other, tmp_path / "checkpoint-1", method)
    model.config.use_cache = True  # Trainer leaves it switched off, and sums are rounded otherwise without a cache
    assert torch.equal(logits(other), logits(model.eval()))


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_model_around_a_memory_saves_it_too(method: str, home: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(base(home), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="style")
    put(wrapped.get_base_model(), method, "facts", 1)
    with_both = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    other = base(home)
    other.load_adapter(tmp_path / "style", adapter_name="style")
    loaded(other, tmp_path / "facts", method)
    torch.testing.assert_close(logits(other), with_both, rtol=1e-4, atol=1e-5)


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "AutoModelForCausalLM": lambda home, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda home, folder: _adapter(base(home), folder),
    "PeftModel": lambda home, folder: PeftModel.from_pretrained(base(home), folder),
    "AutoPeftModel": lambda home, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "pipeline": lambda home, folder: pipeline("text-generation", str(folder), tokenizer=byte_tokenizer()).model,
}


def _adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    before = fingerprint(model)
    try:
        model.load_adapter(folder)
    except ValueError:
        assert fingerprint(model) == before
        raise
    return model


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", METHODS)
def test_loaders_of_transformers_and_peft(method: str, loader: str, home: Path, tmp_path: Path) -> None:
    model = base(home)
    memory = put(model, method, "facts", 1)
    assert memory is not None
    memory.save_pretrained(tmp_path)
    if method == "slots":
        with pytest.raises(ValueError, match="load_memory"):
            LOADERS[loader](home, tmp_path)
    else:
        found = LOADERS[loader](home, tmp_path).eval().to("cpu")
        assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("config", [MemitConfig, MemorySlotsConfig])
def test_peft_says_what_makes_a_memory(config: Any) -> None:
    model = tiny_model()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="inject_memory"):
        get_peft_model(model, config())
    with pytest.raises(ValueError, match="inject_memory"):
        tiny_model().add_adapter(config())
    assert fingerprint(model) == before


def test_rows_with_slots_of_their_own_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    memory = put(model, "slots", "facts", 1)
    assert isinstance(memory, SlotMemory)
    memory.use(memory.slots * 2)
    with pytest.raises(ValueError, match=r"2 rows read slots .* `MemorySlots.save`"):
        model.save_pretrained(tmp_path)


def test_a_memorys_config_makes_a_new_one_without_its_slots(tmp_path: Path) -> None:
    memory = put(tiny_model(), "slots", "facts", 1)
    assert memory is not None
    fresh = inject_memory(tiny_model(), memory.config)
    fresh.save_pretrained(tmp_path)
    assert not (tmp_path / "slots.safetensors").exists()


def test_an_edit_without_its_ledger_works_but_cannot_be_changed(home: Path, tmp_path: Path) -> None:
    model, other = base(home), base(home)
    put(model, "memit", "facts", 1)
    model.save_pretrained(tmp_path / "by the model")
    clean, edited = logits(other), logits(model)
    memory = loaded(other, tmp_path / "by the model", "memit")
    assert isinstance(memory, MemitMemory)
    fact = Fact("{} is in", "Paris", "Rome")
    for change in (lambda: memory.items, lambda: memory.forget(fact), lambda: memory.write(fact)):
        with pytest.raises(NotImplementedError, match="without its ledger"):
            change()
    assert torch.equal(logits(other), edited)
    with memory.disabled():
        assert torch.equal(logits(other), clean)
    memory.save_pretrained(tmp_path / "again")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == names
    merged = AutoModelForCausalLM.from_pretrained(memory.export(tmp_path / "merged", format="merged"))
    torch.testing.assert_close(logits(merged), edited, rtol=1e-4, atol=1e-5)
    memory._write_repository(tmp_path / "pushed", "org/name")
    memory.remove()
    assert torch.equal(logits(other), clean)
    loaded(other, tmp_path / "again", "memit")
    assert torch.equal(logits(other), edited)


@pytest.mark.filterwarnings(f"ignore:.*{UNMARKED}")
@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["q_proj"], lora_alpha=4),
        dict(target_modules=["q_proj", "down_proj"], lora_alpha=4),
        dict(target_modules=["down_proj"], lora_alpha=8),
        dict(target_modules=["down_proj"], lora_alpha=4, use_rslora=True),
        dict(target_modules=["down_proj"], lora_alpha=4, use_dora=True),
        dict(target_modules=["up_proj"], lora_alpha=4),
    ],
)
def test_any_other_lora_is_left_to_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model()
    model.add_adapter(LoraConfig(r=4, **settings))
    model.save_pretrained(tmp_path)
    before = fingerprint(other)
    with pytest.raises(ValueError, match=r"Load it with PEFT \(`model\.load_adapter\(\.\.\.\)`\)"):
        load_memory(other, tmp_path)
    assert fingerprint(other) == before
    assert not memories(other)
