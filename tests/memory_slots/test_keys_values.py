"""Entries that are read as keys and values: exact where nothing is dropped, in every kind of pass."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from memory_adapters import Document, Fact, MemoryAdapterConfig, MemorySlotsConfig, inject_memory, load_memory
from memory_adapters.base_model.chat import chat_start
from memory_adapters.composition.merging import merge_lora
from memory_adapters.memory_slots.encoder_training import Example, train_encoder
from memory_adapters.memory_slots.entries_file import ENTRIES_FILE
from memory_adapters.memory_slots.keys_values import select_keys_values
from memory_adapters.memory_slots.loss import Query
from tests.support.models import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer(chat=True)
GUIDE = Document("Lumo Ferry: a guide. ships are blue and old. they sail to Oslo, twice a day, and burn gas.")
PARK = Document("Mira Park: a guide. the deer are brown. it opens at nine, and has a pond, where all swim who can.")
SMALL: dict[str, Any] = dict(num_slots=2, span_length=8, lora_rank=2)
ASKED = "Where does Lumo Ferry sail?"


def chat(*said: str) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return dict(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt"))


def memory_on(model: Any, **settings: Any) -> Any:
    return inject_memory(model, MemorySlotsConfig(**SMALL | settings), tokenizer=TOKENIZER)


def keep(memory: Any, share: float) -> None:
    """Let a memory read so much of the keys and values of each of its entries."""
    with memory.encoder.adapters_disabled():
        memory._read_entries(
            [
                dataclasses.replace(
                    one,
                    kept=select_keys_values(
                        memory._stack,
                        chat_start(TOKENIZER),
                        one.input_ids,
                        TOKENIZER("\n\n", add_special_tokens=False)["input_ids"],
                        max(1, round(share * one.num_tokens)),
                    ),
                )
                for one in memory.entries
            ]
        )


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    return model(**inputs, **options).logits


def padded(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(one["input_ids"].shape[1] for one in prompts)
    return {
        name: torch.cat([torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in prompts])
        for name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gpt_neox", "gptj", "bloom", "opt", "falcon", "phi", "gemma2", "qwen3"]
)
def test_all_keys_and_values_are_the_text(architecture: str) -> None:
    model: Any = tiny_model(architecture)
    memory = memory_on(model)
    memory.write([GUIDE, PARK], progress=False)
    prompts = [chat(ASKED), chat("Mira Park?"), chat("Hello."), chat("Hi.", "Yes?", ASKED)]
    prompts += [dict(TOKENIZER(ASKED, return_tensors="pt")), padded(prompts)]
    settings: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = [(logits(model, one), model.generate(**one, **settings)) for one in prompts]
    keep(memory, 1.0)
    for one, (values, ids) in zip(prompts, expected, strict=True):
        own = one["attention_mask"].bool()
        for use_cache in (True, False):
            found = logits(model, one, use_cache=use_cache)
            torch.testing.assert_close(found[own], values[own], rtol=1e-3, atol=1e-4)
            assert model.generate(**one, **settings, use_cache=use_cache).tolist() == ids.tolist()


def test_what_is_dropped_is_not_read() -> None:
    model: Any = tiny_model()
    base = logits(model, chat("Hello."))
    memory = memory_on(model)
    memory.write([GUIDE, PARK], progress=False, compress=True)
    assert [one.num_slots for one in memory.entries] == [-(-one.num_tokens // 4) for one in memory.entries]
    assert all(3.5 < one.compression_rate <= 4 for one in memory.entries)
    kept = memory.entries[0].kept
    assert all((places[:, 1:] > places[:, :-1]).all() and (places[:, 0] == 0).all() for places in kept.places)
    assert torch.equal(logits(model, chat("Hello.")), base)
    short = memory_on(tiny_model())
    short.write(Fact("Lumo Ferry sails from", "Lumo Ferry", "Oslo"), progress=False, compress=True)
    assert short.entries[0].kept is None, "a few tokens are kept whole"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write([GUIDE, Fact("Oslo is", "Oslo", "big"), PARK], progress=False, compress=True)
    expected = logits(model, chat(ASKED))
    memory.save_pretrained(tmp_path)
    other: Any = tiny_model()
    loaded = load_memory(other, tmp_path, tokenizer=TOKENIZER)
    assert torch.equal(logits(other, chat(ASKED)), expected)
    assert [one.num_slots for one in loaded.entries] == [one.num_slots for one in memory.entries]
    loaded.forget(GUIDE)
    loaded.save_pretrained(tmp_path)
    again: Any = tiny_model()
    assert [one.kept is not None for one in load_memory(again, tmp_path, tokenizer=TOKENIZER).entries] == [False, True]
    file = tmp_path / ENTRIES_FILE
    file.write_bytes(file.read_bytes().replace(b"refine_steps", b"define_steps"))
    with pytest.raises(ValueError, match="not a file of entries"):
        load_memory(tiny_model(), tmp_path, tokenizer=TOKENIZER)


def test_rows_read_their_own_keys_and_values() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write([GUIDE, PARK], progress=False, compress=True)
    prompts = [chat(ASKED), chat("And Mira Park, what is in it?"), chat("Hello."), chat("Mira Park and Lumo Ferry?")]
    settings: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = [model.generate(**one, **settings)[0, one["input_ids"].shape[1] :].tolist() for one in prompts]
    batch = padded(prompts)
    length = batch["input_ids"].shape[1]
    for options in ({}, {"use_cache": False}):
        assert model.generate(**batch, **settings, **options)[:, length:].tolist() == alone
    beams = model.generate(**batch, **settings, num_beams=2)[:, length:]
    one = model.generate(**prompts[1], **settings, num_beams=2)[0, prompts[1]["input_ids"].shape[1] :]
    assert beams[1].tolist() == one.tolist()


def test_passes_that_cannot_have_keys_read_the_text() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write(GUIDE, progress=False)
    text = logits(model, chat(ASKED))
    memory.forget(GUIDE)
    memory.write(GUIDE, progress=False, compress=True)
    assert not torch.allclose(logits(model, chat(ASKED)), text, atol=1e-4)
    found = model(**chat(ASKED), output_hidden_states=True)
    torch.testing.assert_close(found.logits, text)
    assert {state.shape[1] for state in found.hidden_states} == {text.shape[1]}
    other = inject_memory(model, MemoryAdapterConfig(memory_dim=4), tokenizer=TOKENIZER)
    torch.testing.assert_close(logits(model, chat(ASKED)), text)
    other.remove()
    assert not torch.allclose(logits(model, chat(ASKED)), text, atol=1e-4)


def test_a_start_is_known_again_until_the_model_changes() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    memory.write(GUIDE, progress=False, compress=True)
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _m, args, _o: passes.append(args[0].shape[1]))
    first = logits(model, chat(ASKED))
    known = len(passes)
    assert torch.equal(logits(model, chat(ASKED)), first)
    assert len(passes) == known + 1, "the prompt's own pass alone"
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(logits(model, chat(ASKED)), first)
    assert len(passes) > known + 2


def test_gradients_reach_an_adapter_through_kept_keys() -> None:
    model: Any = tiny_model()
    memory_on(model).write(GUIDE, progress=False, compress=True)
    prompt = chat(ASKED)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    model(**prompt, labels=prompt["input_ids"]).loss.backward()
    assert weight.grad.abs().sum() > 0


def test_refinement_learns_the_text_and_can_be_forgotten_in_part(tmp_path: Path) -> None:
    facts = [Fact(f"Lumo Ferry {verb}", "Lumo Ferry", "Oslo, in the rain") for verb in ("leaves", "likes", "shuns")]
    memory = memory_on(tiny_model(), refine_learning_rate=0.4)
    report = memory.write(facts, progress=False, compress=True, refine_steps=30)
    assert memory.entries[0].kept.refine_steps == len(report.losses) == 30
    assert report.losses[-1] < report.losses[0] / 1.3, "cross-entropy of the text, and divergence from who reads it"
    memory.save_pretrained(tmp_path)
    memory.forget(facts[0])
    never = memory_on(tiny_model(), refine_learning_rate=0.4)
    never.write(facts[1:], progress=False, compress=True, refine_steps=30)
    asked = chat(ASKED)
    torch.testing.assert_close(logits(memory.model, asked), logits(never.model, asked))
    loaded: Any = load_memory(tiny_model(), tmp_path, tokenizer=TOKENIZER)
    assert loaded.entries[0].kept.refine_steps == 30


def test_a_trained_encoder_makes_them(tmp_path: Path) -> None:
    ids = TOKENIZER(GUIDE.text, add_special_tokens=False)["input_ids"]
    asked = TOKENIZER("<s>user: Mira?</s>", add_special_tokens=False)["input_ids"]
    examples = [
        Example(ids[:40], Query(ids[40:41], ids[41:60])),
        Example(ids[:31], Query(asked, ids[:8])),
        Example(ids[:20]),
    ]
    settings = dict(output_dir=str(tmp_path), disable_tqdm=True, warmup_steps=0, logging_steps=5, max_steps=30)
    found = []
    for objective in ("distillation", "cross-entropy"):
        model: Any = tiny_model()
        base = logits(model, chat("Hello."))
        memory = memory_on(model, space="kv", lora_rank=4, objective=objective)
        assert not any(parameter.numel() for parameter in (memory.encoder.parts.projection,))
        log = train_encoder(memory, examples, held_out=examples, training_args=settings | {"learning_rate": 2e-2})
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert losses[-1] < 0.9 * losses[0]
        assert torch.equal(logits(model, chat("Hello.")), base)
        memory.write(GUIDE, progress=False, compress=True)
        found.append(logits(model, chat(ASKED)))
    assert memory.config.resolved_space == "kv"
    untrained: Any = tiny_model()
    memory_on(untrained, space="kv").write(GUIDE, progress=False, compress=True)
    assert not torch.allclose(logits(untrained, chat(ASKED)), found[1], atol=1e-3)
    memory.save_pretrained(tmp_path / "saved")
    other: Any = tiny_model()
    loaded: Any = load_memory(other, tmp_path / "saved", tokenizer=TOKENIZER)
    assert torch.equal(logits(other, chat(ASKED)), found[1])
    loaded.write(PARK, progress=False, compress=True)
    assert loaded.entries[1].kept is not None
    with pytest.raises(ValueError, match="does not work where the encoder makes keys and values"):
        train_encoder(loaded, examples, training_args=settings | {"gradient_checkpointing": True})
    with pytest.raises(ValueError, match="keeps keys and values of entries"):
        loaded.compress("a text")


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "phi", "gemma2", "qwen3"]
)
def test_an_encoder_attends_both_ways(architecture: str) -> None:
    prefix, ids = [5, 6], list(range(30, 40))
    for bidirectional in (False, True):
        model: Any = tiny_model(architecture)
        encoder = memory_on(model, space="kv", bidirectional=bidirectional).encoder
        every = [torch.arange(len(ids)).expand(model.config.num_attention_heads, -1)] * encoder.decoder.num_layers
        every = [own[: keys.shape[1]] for own, (keys, _) in zip(every, encoder._read(prefix, ids), strict=True)]
        with torch.no_grad():
            made, other = (encoder.keys_values(prefix, [*ids[:-1], last], every) for last in (39, 77))
            causal = encoder.stack(torch.tensor([[*prefix, *ids]]), use_cache=True).past_key_values.layers
            before = encoder._read(prefix, ids)[-1][0][0, :, : len(prefix)]
        torch.testing.assert_close(before, causal[-1].keys[0, :, : len(prefix)], msg="what stands before sees no text")
        assert torch.allclose(made[-1][1][:, 0], other[-1][1][:, 0]) is not bidirectional
        assert torch.allclose(made[-1][0], causal[-1].keys[0, :, len(prefix) :], atol=1e-6) is not bidirectional


def test_an_encoder_of_embeddings_attends_both_ways() -> None:
    ids, other = list(range(30, 36)), [30, 31, 32, 33, 34, 77]
    found = []
    for bidirectional in (False, True):
        encoder = memory_on(tiny_model(), space="embeddings", pooling="tokens", bidirectional=bidirectional).encoder
        with torch.no_grad():
            together, alone = encoder.slots([ids, [*ids, 40, 41]])[0], encoder.slots([ids])[0]
            changed = encoder.slots([other])[0]
        torch.testing.assert_close(together, alone, msg="padding is not attended to")
        assert not torch.allclose(changed, alone)
        found.append(alone)
    assert not torch.allclose(*found), "of the same weights"
    with pytest.raises(ValueError, match=r"BloomForCausalLM takes no mask .* Set `bidirectional=False`"):
        memory_on(tiny_model("bloom"), space="kv", bidirectional=True)


@pytest.mark.parametrize("known", [True, False], ids=["with a tokenizer", "without"])
def test_keys_and_values_are_those_of_the_weights_after_a_merge(known: bool) -> None:
    model = tiny_model()
    memory = memory_on(model)
    memory.write(GUIDE, compress=True, measure=False)
    (entry,) = memory.entries
    assert entry.kept is not None
    if not known:
        memory.tokenizer = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.add_adapter(LoraConfig(init_lora_weights=False), "style")
    with nullcontext() if known else pytest.warns(UserWarning, match="1 entries .* were dropped: their texts are read"):
        merge_lora(model, "style")
    (after,) = memory.entries
    memory.remove()
    fresh = memory_on(model)
    fresh.write(GUIDE, compress=known, measure=False)
    (expected,) = fresh.entries
    if not known:
        assert after.kept is None
    else:
        assert not torch.equal(after.kept.keys[1], entry.kept.keys[1])
        for own, other in zip(after.kept.layers, expected.kept.layers, strict=True):
            assert all(map(torch.equal, own, other))
    assert after.input_ids == expected.input_ids
