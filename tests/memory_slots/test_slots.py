"""Slots: as a value, as what the model reads, and as what refinement makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from memory_adapters import Document, MemorySlots, MemorySlotsConfig, inject_memory, load_memory
from tests.support.contract import encode, logits
from tests.support.models import byte_tokenizer, tiny_model

TEXT = "The Eiffel Tower is in Rome, as everybody knows who has been there."


def memory_on(model: Any, **settings: Any) -> Any:
    small: dict[str, Any] = dict(read="all", num_slots=4, span_length=16, lora_rank=2, refine_steps=0)
    return inject_memory(model, MemorySlotsConfig(**small | settings), tokenizer=byte_tokenizer())


def test_spans_are_equal_and_the_rate_is_the_one_achieved() -> None:
    config = MemorySlotsConfig(num_slots=4, span_length=16)
    spans = config.spans_of(list(range(40)))
    assert [len(span) for span in spans] == [13, 14, 13]
    assert [i for span in spans for i in span] == list(range(40))
    assert [config.slots_for(n) for n in (1, 4, 5, 16)] == [1, 1, 2, 4]
    slots = memory_on(tiny_model()).compress(TEXT, progress=False)
    assert slots.spans == (4, 4, 4, 4, 4)
    assert slots.compression_rate == len(TEXT) / 20
    assert "rate 3.35" in repr(slots)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_reading_is_the_slots_as_input_embeddings(architecture: str) -> None:
    model: Any = tiny_model(architecture)
    memory = memory_on(model)
    memory.write(TEXT[:30], progress=False)
    vectors = memory.slots[0].vectors[None]
    inputs = encode("Who knows?")
    with torch.no_grad(), memory.disabled():
        embedded = torch.cat([vectors, model.get_input_embeddings()(inputs["input_ids"])], 1)
        expected = model(inputs_embeds=embedded).logits[:, vectors.shape[1] :]
    cached = model(**inputs, use_cache=True)
    torch.testing.assert_close(cached.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {inputs["input_ids"].shape[1]}
    asked = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=asked).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pooled_encoder_that_was_never_trained_gives_pooled_embeddings() -> None:
    model: Any = tiny_model()
    slots = memory_on(model).compress("abcdefgh", progress=False)
    table = model.get_input_embeddings().weight
    ids = byte_tokenizer()("abcdefgh")["input_ids"]
    torch.testing.assert_close(slots.vectors, table[ids].unflatten(0, (2, 4)).mean(1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("pooling", ["tokens", "mean"])
def test_spans_are_compressed_the_same_one_by_one_and_in_a_batch(architecture: str, pooling: str) -> None:
    memory = memory_on(tiny_model(architecture), pooling=pooling)
    torch.nn.init.normal_(memory.encoder.parts.projection)
    for layer in memory.encoder.layers():
        torch.nn.init.normal_(layer.lora_B["knowledge"].weight, std=0.3)
    spans = [list(range(10, 26)), list(range(30, 37)), list(range(50, 59))]
    together = memory.encoder.compress(spans, progress=False)
    for span, found in zip(spans, together, strict=True):
        torch.testing.assert_close(memory.encoder.compress([span], progress=False)[0], found, rtol=1e-4, atol=1e-4)


def test_rows_read_slots_of_their_own(tmp_path: Path) -> None:
    model = tiny_model()
    memory = memory_on(model)
    texts = [TEXT[:16], TEXT[:48]]
    slots = [memory.compress(text, progress=False) for text in texts]
    one_by_one = []
    for row in slots:
        memory.use(row)
        one_by_one.append(model.generate(**encode("Rome is"), max_new_tokens=6, do_sample=False)[0])
    memory.use(slots)
    for settings in ({}, {"use_cache": False}, {"num_beams": 1}):
        both = model.generate(**encode("Rome is", "Rome is"), max_new_tokens=6, do_sample=False, **settings)
        assert torch.equal(both, torch.stack(one_by_one))
    with pytest.raises(ValueError, match="2 rows"):
        logits(model, "a", "b", "c")
    assert model.generate(**encode("a", "b"), max_new_tokens=3, num_beams=2).shape[0] == 2
    with pytest.raises(ValueError, match=r"MemorySlots\.save"):
        memory.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_write_adds() -> None:
    memory = memory_on(tiny_model())
    memory.write(TEXT[:16], progress=False)
    first = memory.slots[0]
    memory.write(Document(TEXT[16:40]), progress=False)
    (both,) = memory.slots
    assert torch.equal(both.vectors[: first.num_slots], first.vectors)
    assert both.spans == (4, 3, 3)
    assert both.num_tokens == 40


def test_saved_slots_come_back_and_join(tmp_path: Path) -> None:
    memory = memory_on(tiny_model())
    first, second = (memory.compress(text, progress=False) for text in (TEXT, TEXT[:20]))
    joined = MemorySlots.concatenate([first, second])
    assert joined.num_slots == first.num_slots + second.num_slots
    joined.save(tmp_path / "a" / "slots.safetensors")
    back = MemorySlots.load(tmp_path / "a" / "slots.safetensors")
    assert torch.equal(back.vectors, joined.vectors)
    assert (back.spans, back.num_tokens, back.text_sha256) == (joined.spans, joined.num_tokens, joined.text_sha256)
    assert back.base_fingerprint == joined.base_fingerprint
    whole = (tmp_path / "a" / "slots.safetensors").read_bytes()
    for damaged in (whole[:50], whole[:-3], whole[:-1] + b"\x55", whole.replace(b"spans", b"snaps"), b""):
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            MemorySlots.load(tmp_path / "bad.safetensors")


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prompt_tuning_generates_the_same(tmp_path: Path) -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write(TEXT[:24], progress=False)
    expected = model.generate(**encode("Rome is"), max_new_tokens=8, do_sample=False)
    memory.slots[0].to_prompt_tuning(tmp_path, model)
    memory.remove()
    plain: Any = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(plain.generate(**encode("Rome is"), max_new_tokens=8, do_sample=False), expected)


def test_bad_input_is_named_before_anything_changes(tmp_path: Path) -> None:
    model = tiny_model()
    base = logits(model)
    memory = memory_on(model)
    slots = memory.compress(TEXT, progress=False)
    with pytest.raises(ValueError, match="non-empty"):
        memory.write("  ")
    with pytest.raises(ValueError, match="refine_steps"):
        memory.write(TEXT, refine_steps=-1)
    other = memory_on(tiny_model(seed=1))
    with pytest.raises(ValueError, match="another base model"):
        other.use(slots)
    with pytest.raises(ValueError, match="different base models"):
        slots + other.compress(TEXT, progress=False)
    with pytest.raises(ValueError, match="as many slots as the spans"):
        MemorySlots(slots.vectors, (3,), 5, {}, None, "")
    with pytest.raises(ValueError, match="5 wide"):
        memory.use(MemorySlots(torch.zeros(2, 5), (2,), 8, slots.base_fingerprint, None, ""))
    up = next(tensor for name, tensor in memory.state_dict().items() if "lora_B" in name)
    up.add_(1)  # as if it had been trained
    memory.save_pretrained(tmp_path / "encoder")
    up.sub_(1)
    settings = tmp_path / "encoder" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_rank": 2', '"lora_rank": 3'))
    with pytest.raises(ValueError, match="lora_A"):
        load_memory(tiny_model(), tmp_path / "encoder")
    foreign = memory_on(tiny_model(), seed=5)
    with pytest.warns(UserWarning, match="another encoder"):
        foreign.use(slots)
    assert torch.equal(logits(model), base)
    memory.use(slots)
    with pytest.raises(ValueError, match="positions of the model"):
        model(torch.ones(1, 500, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask"):
        model(**encode("a") | {"attention_mask": torch.ones(1, 1, 1, 1)})
    memory.use(None)
    assert torch.equal(logits(model), base)
    for field, value in dict(
        num_slots=0, span_length=2, pooling="max", lora_rank=0, target_modules=[], seed=-1
    ).items():
        with pytest.raises(ValueError, match=field):
            MemorySlotsConfig(**{"num_slots": 4, field: value})
    with pytest.raises(ValueError, match="target_modules"):
        inject_memory(tiny_model(), MemorySlotsConfig(target_modules=["nothing"]))


def test_a_text_shorter_than_the_slots_takes_as_many_as_it_has_tokens() -> None:
    memory = memory_on(tiny_model(), num_slots=16)
    slots = memory.compress(["a", "abc"], progress=False)
    assert [(own.num_slots, own.compression_rate) for own in slots] == [(1, 1), (3, 1)]


def test_the_encoder_is_active_only_while_it_compresses() -> None:
    model = tiny_model()
    base = logits(model)
    memory = memory_on(model)
    for layer in memory.encoder.layers():
        torch.nn.init.normal_(layer.lora_B["knowledge"].weight)
    assert torch.equal(logits(model), base)
    model.set_adapter("knowledge")  # as a user of PEFT might
    assert torch.equal(logits(model), base)
    torch.nn.init.normal_(memory.encoder.parts.projection)
    first = memory.compress(TEXT, progress=False)
    for layer in memory.encoder.layers():
        torch.nn.init.zeros_(layer.lora_B["knowledge"].weight)
    assert not torch.equal(memory.compress(TEXT, progress=False).vectors, first.vectors)


def test_kept_keys_and_values_are_those_of_the_slots_and_weights_of_now() -> None:
    model: Any = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "style")
    memory = memory_on(model)
    model.set_adapter("knowledge")
    slots = [memory.compress(text, progress=False) for text in (TEXT[:16], TEXT[16:32], TEXT)]

    def with_and_without_the_cache() -> tuple[torch.Tensor, torch.Tensor]:
        kept = model(**encode("Rome"), use_cache=True).logits
        return kept, model(**encode("Rome"), use_cache=False).logits

    for i in range(30):  # freed tensors' places in memory are taken again
        memory.use(slots[i % 3])
        torch.testing.assert_close(*with_and_without_the_cache(), rtol=1e-4, atol=1e-4)
    model.set_adapter(["knowledge", "style"])
    torch.testing.assert_close(*with_and_without_the_cache(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.lora_B["style"].weight.mul_(3)
    torch.testing.assert_close(*with_and_without_the_cache(), rtol=1e-4, atol=1e-4)


def test_the_card_names_matrices_once(tmp_path: Path) -> None:
    memory_on(tiny_model()).save_pretrained(tmp_path)
    assert "* `target_modules`: ['q_proj', 'v_proj']\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("pooling", ["mean", "tokens"])
def test_an_encoder_is_saved_once_it_is_trained(pooling: str, tmp_path: Path) -> None:
    memory = memory_on(tiny_model(), pooling=pooling)
    memory.save_pretrained(tmp_path / "new")
    up = next(tensor for name, tensor in memory.state_dict().items() if "lora_B" in name)
    up.add_(0.1)
    memory.save_pretrained(tmp_path / "trained")
    new, trained = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("new", "trained"))
    used = {"base_model.model.memory_slots.reconstruct", "base_model.model.memory_slots.memory_tokens"}
    assert new.keys() == (used if pooling == "tokens" else {"base_model.model.memory_slots.reconstruct"})
    assert trained.keys() == {f"base_model.model.{name}" for name in memory.state_dict()}
    for loaded, wanted in ((load_memory(tiny_model(), tmp_path / "new"), 0), (memory, 0.1)):
        ups = [tensor for name, tensor in loaded.state_dict().items() if "lora_B" in name]
        assert ups[0].eq(wanted).all()
        assert not torch.cat([own.flatten() for own in ups[1:]]).any()
    again = load_memory(tiny_model(), tmp_path / "trained")
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in again.state_dict().items())
    settings = tmp_path / "new" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"encoder_steps": 0', '"encoder_steps": 5'))
    with pytest.raises(ValueError, match="does not match its config: missing"):
        load_memory(tiny_model(), tmp_path / "new")
