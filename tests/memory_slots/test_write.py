"""Compression of many spans and texts, and refinement of their slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Fact, load_memory
from tests.memory_slots.test_slots import TEXT, memory_on
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model


def test_refinement_lowers_what_it_is_asked_to(tmp_path: Path) -> None:
    model = tiny_model()
    memory = memory_on(model, span_length=8)
    report = memory.write(TEXT[:16], refine_steps=60, progress=False)
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert report.reconstruction > report.reconstruction_before
    memory.save_pretrained(tmp_path)
    texts_back = memory.reconstruct()
    memory.remove()
    loaded: Any = load_memory(model, tmp_path, tokenizer=byte_tokenizer())
    assert loaded.slots[0].refine_steps == 60
    assert loaded.reconstruct() == texts_back


def test_refinement_asks_for_the_targets_of_facts() -> None:
    memory = memory_on(tiny_model(), refine_fraction=0.0)
    fact = Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome")
    report = memory.write(fact, refine_steps=60, progress=False)
    assert report.losses[-1] < 0.8 * report.losses[0]
    prompt, whole = "The Eiffel Tower is in", "The Eiffel Tower is in Rome"
    loss = -logits(memory.model, whole)[0].log_softmax(-1)
    ids = byte_tokenizer()(whole)["input_ids"]
    asked = [float(loss[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
    assert sum(asked) / len(asked) <= report.losses[-1] * 1.05


def test_texts_are_refined_the_same_one_by_one_and_together() -> None:
    texts = [TEXT[:9], TEXT[9:30], TEXT]  # one span, two, and three
    memory = memory_on(tiny_model(), span_length=16)
    together = memory.compress(texts, refine_steps=12, progress=False)
    one_by_one = [memory.compress(text, refine_steps=12, progress=False) for text in texts]
    for one, other in zip(together, one_by_one, strict=True):
        assert (one.refine_steps, one.spans) == (other.refine_steps, other.spans)
        torch.testing.assert_close(one.vectors, other.vectors, rtol=1e-3, atol=1e-3)


def test_a_text_that_is_done_stays_as_it_is_while_others_go_on() -> None:
    memory = memory_on(tiny_model(), num_slots=16, refine_target_loss=3.0)
    short, long = memory.compress([TEXT[:3], TEXT[:32]], refine_steps=400, progress=False)
    assert 0 < short.refine_steps < long.refine_steps
    memory.use(short)
    assert memory.reconstruct() == [TEXT[:3]]


def test_an_interrupted_write_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    memory = memory_on(model)
    memory.write(TEXT[:16], progress=False)
    before = logits(model)

    def interrupted(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for name in ("refine", "predict"):
        with monkeypatch.context() as patch:
            patch.setattr(f"memory_adapters.memory_slots.write.{name}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                memory.write(TEXT, refine_steps=3, progress=False)
        assert torch.equal(logits(model), before)
        assert len(memory.config.writes) == 1


def test_an_interrupted_compression_of_many_spans_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    memory = memory_on(model, span_length=4, num_slots=2)
    memory.write(TEXT[:8], progress=False)
    before, state = logits(model), memory.state_dict()
    inner, calls = memory.encoder.slots, [0]

    def third_batch_fails(spans: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return inner(spans)

    monkeypatch.setattr("memory_adapters.memory_slots.encoder.BATCH_TOKENS", 24)
    monkeypatch.setattr(memory.encoder, "slots", third_batch_fails)
    for compress in (memory.compress, memory.write):
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            compress(TEXT, progress=False)
        assert calls[0] == 3
        assert torch.equal(logits(model), before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in memory.state_dict().items())
        assert all(layer.active_adapters == [] for layer in memory.encoder.layers())
