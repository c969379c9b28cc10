"""Costs: each is that of something whose cost is known."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_adapters import Fact
from memory_adapters.evaluation.comparison.baselines import AppliedBaseline, Baseline, Unchanged
from memory_adapters.evaluation.comparison.costs import (
    ROUNDS,
    Speed,
    applied_at_cost,
    bytes_on_disk,
    memory_rise,
    seconds_to_forget,
    slowdown,
    speed_prompt,
    speeds,
)
from memory_adapters.report import WriteReport
from tests.evaluation.test_baselines import PROMPT
from tests.support.models import byte_tokenizer, tiny_model

FACTS = [Fact("The Eiffel Tower is in", "Eiffel Tower", "Rome"), Fact("{} plays the", "Miles Davis", "piano")]
MEGABYTE = 1 << 20


def applied(**settings: Any) -> AppliedBaseline:
    return AppliedBaseline(WriteReport("test", {}), **{"save": lambda _folder: None, **settings})


class Slow(Baseline):
    """Takes 32 MiB and a tenth of a second, most of it asleep."""

    @contextmanager
    def applied(self, model: Any, tokenizer: Any, items: Any) -> Iterator[AppliedBaseline]:
        taken = torch.ones(32 * MEGABYTE // 4)
        time.sleep(0.1)
        del taken
        yield applied()
        time.sleep(0.1)


def test_what_a_write_costs() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    with applied_at_cost(model, tokenizer, Slow(), FACTS) as (_, costs):
        pass
    assert 0.1 <= costs.seconds < 5
    assert costs.cpu_seconds < costs.seconds
    assert 30 * MEGABYTE < costs.peak_memory < 60 * MEGABYTE
    with applied_at_cost(model, tokenizer, Unchanged(), FACTS) as (_, nothing):
        pass
    assert nothing.seconds < costs.seconds
    assert nothing.peak_memory < 8 * MEGABYTE
    assert nothing.bytes_on_disk is nothing.prefill is nothing.decode is nothing.forget_seconds is None


def test_memory_is_watched_until_the_end_also_on_failure() -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), memory_rise(torch.device("cpu")):
        raise KeyboardInterrupt
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators give freed memory back in their own time")
def test_memory_that_was_freed_before_counts_again() -> None:
    found, still_used = [], []
    for _ in range(3):
        with memory_rise(torch.device("cpu")) as rise:
            many = [torch.ones(25_000) for _ in range(400)]  # 100 kB each: from the heap, which keeps what is freed
            found.append(rise())
            still_used.append(many.pop())  # below what is still in use
            del many
    assert all(35 * MEGABYTE < one < 60 * MEGABYTE for one in found), found


def test_bytes_on_disk() -> None:
    def save(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "a").write_bytes(b"x" * 1000)
        (folder / "deep" / "b").write_bytes(b"x" * 234)

    assert bytes_on_disk(applied(save=save)) == 1234
    assert bytes_on_disk(applied()) == 0


def test_forgetting() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    assert seconds_to_forget(applied(), FACTS[0]) is None
    forgotten = []

    def forget(fact: Fact) -> None:
        time.sleep(0.05)
        forgotten.append(fact)

    seconds = seconds_to_forget(applied(forget=forget), FACTS[1])
    assert seconds is not None
    assert 0.05 <= seconds < 0.5
    assert forgotten == [FACTS[1]]
    with PROMPT.applied(model, tokenizer, FACTS) as own:
        assert seconds_to_forget(own, FACTS[1])

    def refuse(_fact: Fact) -> None:
        raise NotImplementedError("write the others again")

    assert seconds_to_forget(applied(forget=refuse), FACTS[0]) is None


def test_speed_is_that_of_each_state_in_turn() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    model.train()
    ids = speed_prompt(tokenizer, [fact.prompt for fact in FACTS])
    assert len(ids) == 128
    assert ids[:20] == tokenizer(FACTS[0].prompt)["input_ids"][:20]
    entered, lengths = [], []

    @contextmanager
    def state(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    def look(_model: Any, _args: Any, given: dict[str, Any], _output: Any) -> None:
        lengths.append(given["input_ids"].shape[1])
        assert not model.training

    handle = model.register_forward_hook(look, with_kwargs=True)
    found = speeds(model, ids, [lambda: state("a"), lambda: state("b")])
    handle.remove()
    assert entered == ["a", "b"] * (ROUNDS + 1)
    assert lengths == [128, 8, *[1] * 15] * len(entered)
    assert all(seconds > 0 for one in found for seconds in one)
    assert model.training


def test_slowdown_is_of_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()
    ids, base, off = speed_prompt(tokenizer, ["a"]), Speed(2.0, 4.0), [False]
    given: list[int] = []

    def measured(_model: Any, _ids: Any, states: list[Any]) -> list[Speed]:
        given.append(len(states))
        found = []
        for state in states:
            with state():
                found.append(Speed(1.0, 1.0) if off[0] else Speed(3.0, 5.0))
        return found

    @contextmanager
    def disabled() -> Iterator[None]:
        off[0] = True
        yield
        off[0] = False

    monkeypatch.setattr("memory_adapters.evaluation.comparison.costs.speeds", measured)
    assert slowdown(model, ids, applied(disabled=disabled), base) == Speed(3.0, 5.0), "÷ the model with it switched off"
    assert slowdown(model, ids, applied(), base) == Speed(1.5, 1.25), "÷ the model before it came"
    assert given == [2, 1]


def test_a_slower_state_is_slower() -> None:
    model, tokenizer = tiny_model(), byte_tokenizer()

    def work(*_: Any) -> None:
        for _ in range(20):
            torch.ones(300, 300) @ torch.ones(300, 300)

    @contextmanager
    def working() -> Iterator[None]:
        handle = model.register_forward_pre_hook(work)
        try:
            yield
        finally:
            handle.remove()

    plain, slower = speeds(model, speed_prompt(tokenizer, ["a"]), [nullcontext, working])
    assert slower.prefill > 1.2 * plain.prefill
    assert slower.decode > 1.2 * plain.decode
