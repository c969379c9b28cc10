"""Several facts about one subject: they share a target and keys, and are written and forgotten together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Fact, MemitMemory, load_memory
from memory_adapters.items import by_subject
from tests.memit.test_write import FACTS, memory_on
from tests.support.contract import logits
from tests.support.models import byte_tokenizer, tiny_model

BORN = Fact("{} was born in", "Ada", "Paris")
PLAYS = Fact("The instrument of {} is the", "ADA", "harp")
LIVES = Fact("{} lives in", "Countess", "Rome", aliases=("Ada",))
OTHER = FACTS[0]


def written(*facts: Fact, **options: Any) -> MemitMemory:
    memory = memory_on(tiny_model())
    memory.write(facts, progress=False, **options)
    return memory


def alike(memory: MemitMemory, other: MemitMemory) -> None:
    texts = [fact.prompt for fact in (BORN, PLAYS, LIVES, OTHER)]
    torch.testing.assert_close(logits(memory.model, *texts), logits(other.model, *texts), rtol=1e-4, atol=1e-4)


def test_facts_are_grouped_by_subject_and_alias() -> None:
    assert by_subject([BORN, OTHER, PLAYS, LIVES]) == [[BORN, PLAYS, LIVES], [OTHER]]
    countess = Fact("{} sings", "Countess", "low")
    assert by_subject([BORN, countess]) == [[BORN], [countess]]
    assert by_subject([BORN, OTHER, countess, LIVES]) == [[BORN, countess, LIVES], [OTHER]]  # what joins two comes last
    assert by_subject([]) == []


def test_a_subject_has_one_target_and_one_column_of_keys() -> None:
    memory = written(BORN, OTHER, PLAYS)
    ledger = memory.ledger
    assert len(ledger.facts) == 3
    assert ledger.num_subjects == 2
    assert all(len(keys) == 2 * ledger.keys_per_subject for keys in ledger.keys.values())
    assert all(len(factors.A) == 2 for factors in ledger.solve().values())


def test_the_keys_of_a_subject_are_the_means_of_its_facts() -> None:
    together = written(BORN, PLAYS)
    first = min(together.ledger.layers)
    apart = [written(fact, covariance=together.covariance).ledger.keys[first] for fact in (BORN, PLAYS)]
    mean = (apart[0] + apart[1]) / 2
    half = 1e-3 * float(mean.abs().max())  # rows are kept in half precision
    torch.testing.assert_close(together.ledger.keys[first], mean, rtol=0, atol=half)


def test_facts_of_one_subject_can_be_written_one_after_the_other() -> None:
    together = written(BORN, OTHER, PLAYS)
    apart = written(BORN, OTHER, covariance=together.covariance)
    apart.write(PLAYS, covariance=together.covariance, progress=False)
    assert set(apart.items) == set(together.items)
    alike(apart, together)


def test_forgetting_one_fact_of_a_subject_leaves_what_never_writing_it_would_have(tmp_path: Path) -> None:
    memory = written(BORN, OTHER, PLAYS)
    memory.save_pretrained(tmp_path / "all", covariance=True)
    expected = written(OTHER, PLAYS, covariance=memory.covariance)
    memory.forget(BORN)
    assert set(memory.items) == {PLAYS, OTHER}
    alike(memory, expected)
    for layer, keys in memory.ledger.keys.items():
        assert len(keys) == len(expected.ledger.keys[layer])
    memory.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(load_memory(tiny_model(), tmp_path / "one").model), logits(memory.model))
    loaded = load_memory(tiny_model(), tmp_path / "all")
    before = logits(loaded.model)
    with pytest.raises(ValueError, match="tokenizer"):
        loaded.forget(BORN)
    assert set(loaded.items) == {BORN, OTHER, PLAYS}
    assert torch.equal(logits(loaded.model), before)
    loaded.forget(OTHER)  # needs no model pass, and so no tokenizer
    assert loaded.items == [BORN, PLAYS]
    loaded.tokenizer = byte_tokenizer()
    loaded.forget([BORN])
    assert loaded.items == [PLAYS]


def test_a_fact_about_the_same_thing_is_replaced() -> None:
    memory = written(BORN, PLAYS)
    other = Fact(BORN.template, BORN.subject, "Graz")
    report = memory.write(other, progress=False)
    assert any("replaced" in note for note in report.notes)
    assert set(memory.items) == {other, PLAYS}
    alike(memory, written(other, PLAYS, covariance=memory.covariance))
