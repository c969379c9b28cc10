"""A long life, shortened: nothing grows, and results stay what they were the first time, bit for bit.

`python -m benchmarks.long_life` does it ten thousand times.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.long_life import BIG_BEN, EIFFEL, METHODS, TOKENIZER, live, logits, written
from memory_adapters import inject_memory, memories
from memory_adapters.config import MOST_WRITES
from memory_adapters.report import WriteReport
from tests.support.models import tiny_model

TURNS = {"passes": 200, "writes": 8, "loads": 12}
SLACK = 4 << 20  # bytes that an allocator may keep; a leak of one tensor of logits a turn would be more


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario", ["passes", *(f"{what}, {method}" for what in ("writes", "loads") for method in METHODS)]
)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_nothing_grows_and_results_stay(scenario: str) -> None:
    found = live(scenario, TURNS[scenario.partition(",")[0]], warm_up=0.5)
    first, last = dict(found["after warm-up"]), dict(found["at the end"])
    assert found["different from the first"] == 0
    assert last.pop("memory") <= first.pop("memory") + SLACK
    assert last.pop("turns") > first.pop("turns")
    entries = last.pop("entries"), first.pop("entries")
    grown = TURNS["writes"] // 2 if scenario.startswith("writes") and "residual" not in scenario else 0
    assert entries[0] <= entries[1] + grown, "but for one record of each write"
    assert last == first


@pytest.mark.parametrize("method", METHODS)
def test_only_the_last_writes_are_on_record(method: str) -> None:
    memory = inject_memory(tiny_model(), METHODS[method](), tokenizer=TOKENIZER)
    for number in range(MOST_WRITES + 5):
        memory.config.record(WriteReport("a method", {"Fact": number + 1}))
    assert len(memory.config.writes) == MOST_WRITES
    assert memory.config.writes[-1]["num_items"] == {"Fact": MOST_WRITES + 5}


@pytest.mark.filterwarnings("ignore:1 of the 1 items are written in the active memory")
@pytest.mark.parametrize("method", METHODS)
def test_off_and_on_again_is_the_same_whatever_came_later(method: str) -> None:
    model = tiny_model()
    kept: list[Any] = [written(model, method, item) for item in (EIFFEL, BIG_BEN, EIFFEL)]
    together = logits(model)
    for memory in kept:
        memory.active = False
        memory.active = True
        assert torch.equal(logits(model), together)
    for memory in reversed(kept):
        memory.active = False
    for memory in kept[1:] + kept[:1]:
        memory.active = True
    assert torch.equal(logits(model), together)
    assert list(memories(model)) == ["knowledge", "knowledge_2", "knowledge_3"]
