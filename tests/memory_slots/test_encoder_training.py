"""Training of an encoder: what is learned, what stays, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from memory_adapters.memory_slots.encoder_training import Example, TextExamples, instruction_examples, train_encoder
from memory_adapters.memory_slots.loss import Query, Row, distil
from tests.memory_slots.test_slots import memory_on
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

TEXT = "The sea is wide. The wind is cold. The ships are far away, and nobody knows when they will come back. " * 3
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"  # its name in earlier versions of transformers
QUIET: dict[str, Any] = dict(disable_tqdm=True, warmup_steps=0, per_device_train_batch_size=4, logging_steps=5)


def text_examples(count: int = 40, **settings: Any) -> TextExamples:
    ids = byte_tokenizer()(TEXT)["input_ids"]
    return TextExamples(ids, **{"lengths": (8, 40), "continuation": 8, "share": 0.5, "count": count, **settings})


def test_examples_are_windows_of_the_text_and_always_the_same() -> None:
    examples = text_examples()
    assert [examples[i] for i in range(40)] == [examples[i] for i in range(40)]
    autoencoding = sum(examples[i].asked is None for i in range(40))
    assert 10 < autoencoding < 30
    for i in range(40):
        example = examples[i]
        following = [] if example.asked is None else [*example.asked.prompt, *example.asked.target]
        assert byte_tokenizer().decode([*example.context, *following]) in TEXT
        assert 8 <= len(example.context) <= 40
    with pytest.raises(ValueError, match="give more text"):
        TextExamples([1, 2, 3], (4, 8), 4, 0.5, 10)


def test_instructions_end_with_the_end_of_text() -> None:
    rows = [{"context": "Rome is old.", "prompt": "How is Rome?", "response": " Old."}]
    (example,) = instruction_examples(rows, byte_tokenizer())
    assert byte_tokenizer().decode(example.context) == "Rome is old."
    assert example.asked is not None
    assert byte_tokenizer().decode(example.asked.prompt) == "How is Rome?"
    assert byte_tokenizer().decode(example.asked.target) == " Old.</s>"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pooling", ["tokens", "mean"])
def test_training_lowers_the_loss_and_changes_only_the_encoder(architecture: str, pooling: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = logits(model)
    memory = memory_on(model, pooling=pooling, lora_rank=8)
    examples = [Example(text_examples()[i].context) for i in range(2)]
    examples += [Example([10, 11, 12, 13, 14, 15], Query([20], [21, 22]))] * 2
    settings = QUIET | dict(output_dir=str(tmp_path), max_steps=80, learning_rate=2e-2)
    log = train_encoder(memory, examples, held_out=examples, training_args=settings)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert memory.config.encoder_steps == 80
    assert memory.config.resolved_refine_steps == 0
    assert torch.equal(logits(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    memory.remove()
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_resumed_training_gives_the_same_encoder(tmp_path: Path) -> None:
    whole, stopped = memory_on(tiny_model()), memory_on(tiny_model())
    settings = QUIET | dict(max_steps=6, save_steps=3, save_strategy="steps", learning_rate=1e-2)
    train_encoder(whole, text_examples(), training_args=settings | {"output_dir": str(tmp_path / "whole")})
    train_encoder(stopped, text_examples(), training_args=settings | {"output_dir": str(tmp_path / "parts")})
    fresh = memory_on(tiny_model())
    checkpoint = str(tmp_path / "parts" / "checkpoint-3")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in Path(checkpoint).iterdir()}
    arguments = settings | {"output_dir": str(tmp_path / "parts")}
    train_encoder(fresh, text_examples(), training_args=arguments, resume_from_checkpoint=checkpoint)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_training_resumes_only_with_the_same_examples(tmp_path: Path) -> None:
    settings = QUIET | dict(output_dir=str(tmp_path), max_steps=4, save_steps=2, save_strategy="steps")
    memory = memory_on(tiny_model())
    train_encoder(memory, text_examples(), training_args=settings)
    fresh = memory_on(tiny_model())
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    for other in (text_examples(seed=1), text_examples(count=60)):
        with pytest.raises(ValueError, match=r"`resume_from_checkpoint`: .* was trained on other data"):
            train_encoder(fresh, other, training_args=settings, resume_from_checkpoint=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    train_encoder(fresh, text_examples(), training_args=settings, resume_from_checkpoint=True)
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(architecture: str, tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        model: Any = tiny_model(architecture)
        memory = memory_on(model)
        settings = QUIET | dict(output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2)
        passes, inner = [0], memory.encoder.layers()[0]
        handle = inner.register_forward_pre_hook(lambda *_, passes=passes: passes.__setitem__(0, passes[0] + 1))
        settings |= {CHECKPOINTING: checkpointing}
        train_encoder(memory, text_examples(), training_args=settings)
        handle.remove()
        assert not model.training
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        trained.append((memory.state_dict(), passes[0]))
    for name, tensor in trained[0][0].items():
        torch.testing.assert_close(trained[1][0][name], tensor, rtol=1e-4, atol=1e-5)
    assert trained[1][1] > trained[0][1]  # blocks were run again


def test_distillation_is_the_divergence_from_the_whole_context() -> None:
    model: Any = tiny_model()
    memory = memory_on(model)
    contexts, asked = [[10, 11, 12, 13, 14], [30, 31, 32]], [Query([20], [21, 22]), Query([40, 41], [42])]
    slots = [torch.randn(2, model.config.hidden_size) for _ in contexts]
    rows = [Row(one, [i]) for i, one in enumerate(asked)]
    with torch.no_grad(), memory.disabled():
        found = distil(memory.encoder, slots, rows, contexts)
        table, total, count = model.get_input_embeddings(), 0.0, 0
        for context, one, own in zip(contexts, asked, slots, strict=True):
            tail = table(torch.tensor([*one.prompt, *one.target]))
            heads = (table(torch.tensor(context)), own)
            taught, given = (
                model(inputs_embeds=torch.cat([head, tail])[None]).logits[0, -len(one.target) - 1 : -1].log_softmax(-1)
                for head in heads
            )
            total, count = total + float((taught.exp() * (taught - given)).sum()), count + len(one.target)
    assert float(found) == pytest.approx(total / count, rel=1e-4)
    assert float(distil(memory.encoder, [table(torch.tensor(c)) for c in contexts], rows, contexts)) < 1e-5


def test_distillation_is_learned(tmp_path: Path) -> None:
    memory = memory_on(tiny_model(), objective="distillation", lora_rank=8)
    examples = [Example([10, 11, 12, 13, 14, 15], Query([20], [21, 22]))] * 4
    settings = QUIET | dict(output_dir=str(tmp_path), max_steps=60, learning_rate=1e-2)
    losses = [entry["loss"] for entry in train_encoder(memory, examples, training_args=settings) if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
