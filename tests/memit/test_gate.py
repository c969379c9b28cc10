"""Edits with a gate: they act where keys are open, and everything else is the base, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from memory_adapters import Fact, MemitConfig, MemitMemory, inject_memory, load_memory, use_adapters_by_row
from memory_adapters.composition.merging import merge_lora
from tests.memit.test_write import FACTS, SMALL
from tests.support.contract import encode, logits
from tests.support.models import byte_tokenizer, tiny_model

FACT, OTHER = FACTS[0], FACTS[2]
SHUT = "He sold the house at last."


def written(*facts: Fact, chat: bool = False, **settings: Any) -> MemitMemory:
    config = MemitConfig(**{**SMALL, "gate": "keys", **settings})
    memory = inject_memory(tiny_model(), config, tokenizer=byte_tokenizer(chat=chat))
    assert isinstance(memory, MemitMemory)
    memory.write(facts or (FACT, OTHER), progress=False)
    return memory


def base(memory: MemitMemory, *texts: str) -> torch.Tensor:
    with memory.disabled():
        return logits(memory.model, *texts)


def test_it_acts_from_the_subject_on_and_other_text_is_the_base() -> None:
    memory = written()
    assert torch.equal(logits(memory.model, SHUT), base(memory, SHUT))
    changed = (logits(memory.model, FACT.prompt) != base(memory, FACT.prompt)).any(-1)[0]
    first = int(changed.nonzero()[0])
    start = FACT.subject_start
    assert start < first < FACT.subject_end  # a byte is a token
    assert memory.config.key_block == 0
    assert len(memory.config.names) == 2


def test_rows_of_a_batch_are_gated_apart_and_switched_by_row() -> None:
    memory = written()
    found, off = logits(memory.model, FACT.prompt, SHUT), base(memory, FACT.prompt, SHUT)
    assert not torch.equal(found[0], off[0])
    assert torch.equal(found[1], off[1])
    with use_adapters_by_row(memory.model, ["knowledge", "__base__"]):
        rows = logits(memory.model, FACT.prompt, FACT.prompt)
    torch.testing.assert_close(rows[0], logits(memory.model, FACT.prompt)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1], base(memory, FACT.prompt)[0], rtol=1e-4, atol=1e-5)


def test_generation_is_the_same_with_a_cache_and_without() -> None:
    memory = written()
    inputs = encode(FACT.prompt)
    settings: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)
    with_cache = memory.model.generate(**inputs, use_cache=True, **settings)
    assert torch.equal(with_cache, memory.model.generate(**inputs, use_cache=False, **settings))


def test_forgetting_drops_keys_and_is_what_never_writing_would_have_given() -> None:
    memory = written()
    owners = memory.config.key_owners
    memory.forget(FACT)
    assert len(memory.config.names) == 1
    assert memory.config.key_owners == [0] * owners.count(1)
    assert torch.equal(logits(memory.model, FACT.prompt), base(memory, FACT.prompt))
    assert not torch.equal(logits(memory.model, OTHER.prompt), base(memory, OTHER.prompt))
    memory.forget(OTHER)
    assert memory.config.key_owners == memory.config.names == []
    assert torch.equal(logits(memory.model, OTHER.prompt), base(memory, OTHER.prompt))


def test_a_second_write_keeps_the_keys_of_the_first() -> None:
    memory = written(FACT)
    before = memory._keys().keys.clone()
    memory.write(OTHER, progress=False)
    assert torch.equal(memory._keys().keys[: len(before)], before)
    assert sorted(set(memory.config.key_owners)) == [0, 1]


def test_saved_and_loaded_it_is_the_same_and_plain_peft_has_no_gate(tmp_path: Path) -> None:
    memory = written()
    memory.save_pretrained(tmp_path)
    loaded = load_memory(tiny_model(), tmp_path, tokenizer=byte_tokenizer())
    for text in (FACT.prompt, OTHER.prompt, SHUT):
        assert torch.equal(logits(loaded.model, text), logits(memory.model, text))
    loaded.forget(FACT)
    memory.forget(FACT)
    assert torch.equal(logits(loaded.model, OTHER.prompt), logits(memory.model, OTHER.prompt))
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not torch.equal(logits(plain, SHUT), base(memory, SHUT))


def test_merging_loses_the_gate() -> None:
    memory = written()
    with memory.disabled():
        untouched = logits(memory.model, SHUT)
    model = merge_lora(memory.model, memory.adapter_name)
    assert not torch.equal(logits(model, SHUT), untouched)
    assert not any("gate_state" in name or "key_reader" in name for name, _ in model.named_modules())


def test_a_failed_write_leaves_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = written(FACT)
    keys, before = memory._keys(), logits(memory.model, FACT.prompt)

    restore = memory._set_factors

    def fail(ledger: Any = None, factors: Any = None) -> None:
        if ledger is not None:
            raise KeyboardInterrupt
        restore(factors=factors)

    monkeypatch.setattr(memory, "_set_factors", fail)
    with pytest.raises(KeyboardInterrupt):
        memory.write(OTHER, progress=False)
    monkeypatch.undo()
    assert len(keys.names) == len(memory.config.names) == 1
    assert torch.equal(logits(memory.model, FACT.prompt), before)


def test_a_gate_needs_a_block_below() -> None:
    with pytest.raises(ValueError, match=r"`gate='keys'` finds keys in the block below.*choose blocks above it"):
        inject_memory(tiny_model(), MemitConfig(layers=[0, 1], gate="keys"), tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="`gate` must be one of"):
        MemitConfig(gate="words")
    for settings in (dict(names=[[1]]), dict(names=[[[-1]]]), dict(key_owners=[0])):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must"):
            MemitConfig(**settings)  # type: ignore[arg-type]


def test_chat_is_taught_where_the_template_renders() -> None:
    memory = written(FACT, chat=True)
    assert memory.config.chat is True
    assert memory.ledger.keys_per_subject == 3
    memory = written(FACT)
    assert memory.config.chat is False
    assert memory.ledger.keys_per_subject == 2
