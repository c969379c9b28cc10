"""Threads on one model: the same as one at a time, or refused."""

from __future__ import annotations

import asyncio
import contextvars
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
from memory_adapters.base_model.exclusive import _turns
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
                assert "Another thread or task" in str(got)
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
    assert not _turns


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
            with pytest.raises(RuntimeError, match=r"Another thread or task is switching .* Put the requests"):
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


def kinds_on_one_model() -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A model with an adapter of each kind, what it generates with each alone, and its logits with all."""
    model: Any = tiny_model()
    for seed, kind in enumerate(KINDS):
        put(model, kind, kind, seed)
    wanted = {}
    for kind in KINDS:
        with use_adapters(model, [kind]):
            wanted[kind] = model.generate(**encode(PROMPT), **SETTINGS)
    return model, wanted, logits(model)


def test_tasks_of_one_thread_are_right_or_refused() -> None:
    model, wanted, together_on = kinds_on_one_model()

    async def handle(kind: str, context: Any = use_adapters) -> Any:
        with context(model, [kind]):
            await asyncio.sleep(0)
            return model.generate(**encode(PROMPT), **SETTINGS)

    async def passes() -> Any:
        return model.generate(**encode(PROMPT), **SETTINGS)

    async def serve() -> list[Any]:
        works = [handle("lora"), handle("memit"), handle("slots", use_adapters_by_row), passes()]
        return await asyncio.gather(*works, return_exceptions=True)

    got, *refused = asyncio.run(serve())
    assert torch.equal(got, wanted["lora"])
    for error in refused:
        assert isinstance(error, RuntimeError)
        assert "Another thread or task" in str(error)
        assert "wait=True" in str(error)
    assert torch.equal(logits(model), together_on)
    assert not _turns


def test_what_starts_within_a_context_belongs_to_it() -> None:
    model, wanted, together_on = kinds_on_one_model()

    async def generate() -> Any:
        return model.generate(**encode(PROMPT), **SETTINGS)

    async def switch(kind: str, entered: asyncio.Event, leave: asyncio.Event) -> Any:
        with use_adapters(model, [kind]):
            entered.set()
            await leave.wait()
            return model.generate(**encode(PROMPT), **SETTINGS)

    async def serve() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        with use_adapters(model, ["residual"]):
            assert torch.equal(
                await asyncio.to_thread(model.generate, **encode(PROMPT), **SETTINGS), wanted["residual"]
            )
            assert torch.equal(await asyncio.create_task(generate()), wanted["residual"])
            inner = asyncio.create_task(switch("memit", entered, leave))
            await entered.wait()
            for work in (generate(), switch("slots", entered, leave)):  # only who entered last has the model
                with pytest.raises(RuntimeError, match="Another thread or task"):
                    await work
        with pytest.raises(RuntimeError, match="Another thread or task"):
            await generate()
        leave.set()  # the inner context is left last
        assert torch.equal(await inner, wanted["memit"])

    asyncio.run(serve())
    assert torch.equal(logits(model), together_on)
    assert not _turns


def test_contexts_that_are_left_in_another_order_leave_the_right_adapters() -> None:
    model, wanted, together_on = kinds_on_one_model()
    first, second, third = use_adapters(model, ["memit"]), use_adapters(model, []), use_adapters(model, ["residual"])
    for context in (first, second, third):
        context.__enter__()
    for context in (first, second):
        context.__exit__(None, None, None)
        assert torch.equal(model.generate(**encode(PROMPT), **SETTINGS), wanted["residual"])
    third.__exit__(None, None, None)
    assert torch.equal(logits(model), together_on)

    def stream() -> Any:
        with use_adapters(model, ["lora"]):
            yield model.generate(**encode(PROMPT), **SETTINGS)

    generator = stream()
    assert torch.equal(next(generator), wanted["lora"])
    with use_adapters(model, ["slots"]):
        in_thread(generator.close)  # in another context than it was entered in
        assert torch.equal(model.generate(**encode(PROMPT), **SETTINGS), wanted["slots"])
    assert torch.equal(logits(model), together_on)
    with first:  # a context can be entered again, but not twice at once
        with pytest.raises(RuntimeError, match="entered already"), first:
            raise AssertionError("unreachable")
        assert torch.equal(model.generate(**encode(PROMPT), **SETTINGS), wanted["memit"])
    assert torch.equal(logits(model), together_on)
    assert not _turns


def test_tasks_queue_for_the_model_and_each_has_its_own_adapters() -> None:
    model, wanted, together_on = kinds_on_one_model()
    kinds = [KINDS[i % 4] for i in range(24)]
    done: list[int] = []

    async def handle(number: int) -> None:
        kind = kinds[number]
        async with (use_adapters_by_row if kind == "lora" else use_adapters)(model, [kind], wait=True):
            got = await asyncio.to_thread(model.generate, **encode(PROMPT), **SETTINGS)
        done.append(number)
        assert torch.equal(got, wanted[kind])

    async def serve() -> None:
        async with use_adapters(model, []):
            async with use_adapters(model, ["lora"], wait=True):  # its own: it does not wait for itself
                pass
            tasks = []
            for number in range(len(kinds)):
                context = contextvars.Context()  # a request's own: else the tasks would be within this context
                tasks.append(context.run(asyncio.get_running_loop().create_task, handle(number)))
            await asyncio.sleep(0.01)
            assert not done
            for number in (0, 5, 23):
                tasks[number].cancel()
        tasks[1].cancel()  # the model is its own by now, and it does not know yet
        results = await asyncio.gather(*tasks, return_exceptions=True)
        gone = [number for number, result in enumerate(results) if isinstance(result, asyncio.CancelledError)]
        assert gone == [0, 1, 5, 23]
        assert done == [number for number in range(len(kinds)) if number not in gone]  # first come, first served
        assert not any(isinstance(result, Exception) for result in results)

    asyncio.run(serve())
    assert torch.equal(logits(model), together_on)
    assert not _turns


def test_threads_queue_for_the_model_and_each_has_its_own_adapters() -> None:
    model, wanted, together_on = kinds_on_one_model()

    def handle(kind: str) -> bool:
        with use_adapters(model, [kind], wait=True):
            return torch.equal(model.generate(**encode(PROMPT), **SETTINGS), wanted[kind])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(handle, KINDS * 5))
        with use_adapters(model, []):
            ready = [pool.submit(handle, kind) for kind in KINDS]
            assert not any(future.done() for future in ready)
            with pytest.raises(ValueError, match="`adapter_names`"), use_adapters(model, ["unknown"], wait=True):
                raise AssertionError("unreachable")
        assert all(future.result() for future in ready)
        with pytest.raises(ValueError, match="`adapter_names`"):  # and does not keep the model
            pool.submit(lambda: use_adapters(model, ["unknown"], wait=True).__enter__()).result()
        assert pool.submit(handle, "lora").result()
    assert torch.equal(logits(model), together_on)
    assert not _turns


def test_a_thread_does_not_wait_for_its_own_tasks() -> None:
    model: Any = tiny_model()
    put(model, "residual", "residual", 1)

    async def handle(context: Any) -> None:
        with context:
            await asyncio.sleep(0.01)

    async def serve() -> list[Any]:
        works = [handle(use_adapters(model, [], wait=True)), handle(use_adapters(model, [], wait=True))]
        return await asyncio.gather(*works, return_exceptions=True)

    first, second = asyncio.run(serve())
    assert first is None
    assert isinstance(second, RuntimeError)
    assert "`async with`" in str(second)
    with use_adapters(model, []), pytest.raises(RuntimeError, match="`async with`"):
        contextvars.Context().run(use_adapters(model, [], wait=True).__enter__)
    assert not _turns


def test_a_closed_event_loop_does_not_keep_the_model() -> None:
    model: Any = tiny_model()
    memory = put(model, "residual", "residual", 1)
    assert memory is not None
    loop = asyncio.new_event_loop()
    waiting = use_adapters(model, [], wait=True)

    async def wait() -> None:
        async with waiting:
            raise AssertionError("unreachable")

    with memory.disabled():
        task = contextvars.Context().run(loop.create_task, wait())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    memory.active = False  # it was asked, and could not answer
    with pytest.raises(KeyError), memory.disabled():
        raise KeyError
    assert not _turns
    coroutine: Any = task.get_coro()
    coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert not _turns
