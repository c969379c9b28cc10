"""Threads on one model: the same as one at a time, or refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from memory_adapters import (
    CovarianceFitter,
    Memory,
    MemorySlots,
    inject_memory,
    merge_lora,
    route_memories,
    save_adapters,
    use_adapters,
    use_adapters_by_row,
)
from memory_adapters.base_model.exclusive import _owners
from tests.keys.test_router import OTHER, SUBJECTS, routed_model
from tests.support.composing import KINDS, SUITES, put
from tests.support.contract import PROMPT, encode, logits
from tests.support.models import byte_tokenizer, tiny_model

SETTINGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def together(*works: Callable[[], Any]) -> list[Any]:
    """Results of works that start at once, or their RuntimeErrors."""
    barrier = Barrier(len(works))

    def one(work: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return work()
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(one, works))


def test_threads_with_different_memories_are_right_or_refused() -> None:
    model: Any = tiny_model()
    for seed, kind in enumerate(KINDS):
        put(model, kind, kind, seed)
    wanted = {}
    for kind in KINDS:
        with use_adapters(model, [kind]):
            wanted[kind] = model.generate(**encode(PROMPT), **SETTINGS)
    assert len({str(ids.tolist()) for ids in wanted.values()}) > 1

    def use(kind: str) -> Any:
        with use_adapters(model, [kind]):
            return model.generate(**encode(PROMPT), **SETTINGS)

    right = refused = 0
    for _ in range(6):
        for kind, got in zip(KINDS, together(*[lambda k=kind: use(k) for kind in KINDS]), strict=True):
            if isinstance(got, RuntimeError):
                assert "Another thread" in str(got)
                assert "use_adapters_by_row" in str(got)
                refused += 1
            else:
                assert torch.equal(got, wanted[kind])
                right += 1
    assert right >= 6
    assert right + refused == 24
    rows = model.generate  # and in one batch all of them are right
    with use_adapters_by_row(model, list(KINDS)):
        found = rows(**encode(*[PROMPT] * len(KINDS)), **SETTINGS)
    for row, kind in zip(found, KINDS, strict=True):
        assert torch.equal(row, wanted[kind][0])
    assert not _owners


@pytest.mark.parametrize("kind", ["residual", "memit", "slots"])
def test_threads_that_only_generate_are_right(kind: str) -> None:
    model: Any = tiny_model()
    memory = put(model, kind, kind, 1)
    prompts = [PROMPT, OTHER, "Rome is old", "The sea"]
    wanted = [model.generate(**encode(prompt), **SETTINGS) for prompt in prompts]
    for _ in range(4):
        if isinstance(memory, Memory) and kind == "slots":
            memory.use(memory.slots)  # type: ignore[attr-defined]  # computed anew, by several threads at once
        for got, expected in zip(
            together(*[lambda p=prompt: model.generate(**encode(p), **SETTINGS) for prompt in prompts]),
            wanted,
            strict=True,
        ):
            assert torch.equal(got, expected)


def test_each_threads_input_has_its_own_route() -> None:
    model: Any = routed_model()
    prompts = [f"{SUBJECTS['red']} is", OTHER, f"{SUBJECTS['blue']} is", OTHER * 2]
    with route_memories(model) as router:
        wanted = [model.generate(**encode(prompt), **SETTINGS) for prompt in prompts]
        for _ in range(5):
            works = [lambda p=prompt: model.generate(**encode(p), **SETTINGS) for prompt in prompts]
            for got, expected in zip(together(*works), wanted, strict=True):
                assert torch.equal(got, expected)
        assert not router._passes


def test_a_pass_over_slots_has_a_route_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = routed_model()
    put(model, "slots", "slots", 1)
    inputs = encode("Eiffel Tower", OTHER * 2)
    masks: list[Any] = []
    with route_memories(model) as router:
        choose = router._choose_rows
        monkeypatch.setattr(router, "_choose_rows", lambda x, mask: masks.append(mask) or choose(x, mask))
        model(**inputs, use_cache=True)
    slots, prompt = masks
    assert slots.shape[1] == 5
    assert torch.equal(prompt, inputs["attention_mask"])


def changes(model: Any, memory: Memory) -> dict[str, Callable[[], Any]]:
    """All that another thread must not do meanwhile."""
    slots = MemorySlots(torch.ones(2, 32), (2,), 4, memory.config.base_fingerprint or {}, None, "0")

    def context(made: Callable[[], Any]) -> Callable[[], Any]:
        def enter() -> None:
            with made():
                raise AssertionError("it was let in")

        return enter

    return {
        "a pass": lambda: logits(model),
        "generate": lambda: model.generate(**encode(PROMPT), **SETTINGS),
        "use_adapters": context(lambda: use_adapters(model, [])),
        "use_adapters_by_row": context(lambda: use_adapters_by_row(model, ["__base__"])),
        "disabled": context(memory.disabled),
        "active": lambda: setattr(memory, "active", False),
        "write": lambda: SUITES["slots"].write(memory),
        "use": lambda: memory.use(slots),  # type: ignore[attr-defined]
        "remove": memory.remove,
        "inject": lambda: inject_memory(model, SUITES["residual"].make_config()),
        "merge": lambda: merge_lora(model, "lora"),
        "route": context(lambda: route_memories(model, ["residual"])),
        "fit": lambda: CovarianceFitter(model, byte_tokenizer(), [1]).sample(64, progress=False),
    }


def test_other_threads_are_refused_while_one_switches_adapters(tmp_path: Any) -> None:
    model: Any = tiny_model()
    put(model, "lora", "lora", 1)
    put(model, "residual", "residual", 1)
    memory = put(model, "slots", "slots", 1)
    assert memory is not None
    with memory.disabled():
        expected = logits(model)
        for name, change in changes(model, memory).items():
            with pytest.raises(RuntimeError, match=r"Another thread is switching .* Give each thread a model"):
                in_thread(change)
            assert torch.equal(logits(model), expected), name
        with use_adapters(model, []), memory.disabled():  # nested, in one thread
            logits(model)
        in_thread(lambda: save_adapters(model, tmp_path))  # it only reads
    assert not torch.equal(logits(model), expected)
    assert in_thread(lambda: torch.equal(logits(model), expected)) is False


def test_nothing_is_left_on_the_model() -> None:
    model: Any = tiny_model()
    memory = put(model, "residual", "residual", 1)
    assert memory is not None
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(KeyError), memory.disabled():
        raise KeyError
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    in_thread(lambda: setattr(memory, "active", False))
    assert not memory.active
