"""Let one thread or asyncio task at a time choose which adapters are active: that choice is the model's state.

Each context that is entered is a turn. A context variable holds the turns that the running code is in: asyncio gives
each task a context of its own, which the tasks and `asyncio.to_thread` calls that start in it inherit; plain threads
inherit none. Who has the innermost turn has the model.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Event, RLock, get_ident
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import base_model

__all__ = ["ExclusiveUse", "exclusive_use"]

TAKE_TURNS = (
    "Put the requests into one batch with `use_adapters_by_row`, let them queue with `use_adapters(..., wait=True)`, "
    "or give each a model of its own."
)

Change: TypeAlias = Callable[[ExitStack], None]


@dataclass(eq=False)
class _Turn:
    """Store one entered context: what undoes its changes, and, for its queue, what it was entered within."""

    wake: Callable[[], object]
    within: frozenset[_Turn]
    thread: int = field(default_factory=get_ident)
    undo: ExitStack = field(default_factory=ExitStack)
    left: bool = False


@dataclass(eq=False)
class _Turns:
    """Store a model's turns, the innermost last, and those that wait, the first to come first."""

    open: list[_Turn] = field(default_factory=list)
    waiting: deque[_Turn] = field(default_factory=deque)
    handle: RemovableHandle | None = None

    def may_begin(self, within: frozenset[_Turn]) -> bool:
        """Return whether who is within these turns may begin another."""
        return not self.open or self.open[-1] in within

    def end(self, turn: _Turn) -> None:
        """End a turn, or stop waiting for it. One around others that go on is undone after them."""
        if turn in self.waiting:
            self.waiting.remove(turn)
            return
        turn.left = True
        while self.open and self.open[-1].left:
            self.open.pop().undo.close()
        for waiting in [one for one in self.waiting if self.may_begin(one.within)]:
            self.waiting.remove(waiting)
            self.open.append(waiting)
            try:
                waiting.wake()
                return
            except RuntimeError:  # its event loop is closed
                self.open.pop()


_turns: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_entered: ContextVar[frozenset[_Turn]] = ContextVar("_entered", default=frozenset())
_guard = RLock()  # a generator that is collected may leave its context anywhere, also while this thread has the lock


class ExclusiveUse(AbstractContextManager[None], AbstractAsyncContextManager[None]):
    """Have a model to oneself, within `with` or `async with`; see `exclusive_use`."""

    def __init__(self, model: PreTrainedModel | PeftModel, change: Change | None, wait: bool) -> None:
        base = base_model(model)
        self._stack = getattr(base, "base_model", base)  # every pass goes through the model without its head
        self._change, self._wait = change, wait
        self._turn: _Turn | None = None

    def __enter__(self) -> None:
        ready = Event()
        turn = self._ask(ready.set, blocking=True)
        try:
            ready.wait()
            self._begin(turn)
        except BaseException:
            self._leave(turn)
            raise

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def finish() -> None:
            if not ready.done():
                ready.set_result(None)

        turn = self._ask(lambda: loop.call_soon_threadsafe(finish), blocking=False)
        try:
            await ready
            self._begin(turn)
        except BaseException:
            self._leave(turn)
            raise

    def __exit__(self, *_: object) -> None:
        assert self._turn is not None
        self._leave(self._turn)

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def _ask(self, wake: Callable[[], object], *, blocking: bool) -> _Turn:
        """Return a turn that has begun, or waits; `wake` is called as soon as it begins."""
        with _guard:
            if self._turn is not None:
                raise RuntimeError("This context is entered already: make one for each thread or task that uses it.")
            turn = _Turn(wake, _entered.get())
            turns = _turns.get(self._stack) or _Turns()
            if turns.may_begin(turn.within):
                turns.open.append(turn)
                _turns[self._stack] = turns
                if turns.handle is None:
                    turns.handle = self._stack.register_forward_pre_hook(_refuse_others, prepend=True)
                wake()
            elif not self._wait:
                raise RuntimeError(f"Another thread or task is switching the adapters of this model. {TAKE_TURNS}")
            elif blocking and (_in_event_loop() or any(one.thread == turn.thread for one in turns.open)):
                raise RuntimeError(
                    "With `wait=True` this thread would wait for its own tasks, which could not go on: enter the "
                    "context with `async with`."
                )
            else:
                turns.waiting.append(turn)
            self._turn = turn
        return turn

    def _begin(self, turn: _Turn) -> None:
        _entered.set(frozenset(one for one in turn.within if not one.left) | {turn})
        turn.within = frozenset()  # else those that have ended would be kept
        if self._change is not None:
            self._change(turn.undo)

    def _leave(self, turn: _Turn) -> None:
        _entered.set(_entered.get() - {turn})  # not reset: this may be another context, such as a generator's that ends
        with _guard:
            self._turn = None
            turns = _turns.get(self._stack)
            if turns is None:  # it waited in an event loop that was closed
                return
            turns.end(turn)
            if not turns.open:
                assert turns.handle is not None
                turns.handle.remove()
                del _turns[self._stack]


def exclusive_use(
    model: PreTrainedModel | PeftModel, change: Change | None = None, *, wait: bool = False
) -> ExclusiveUse:
    """Keep other threads and tasks, within this context, from running the model and from switching its adapters.

    Tasks that start within the context, and `asyncio.to_thread`, may run the model and enter contexts of their own;
    while they are in those, nobody else may. A pass that another thread has begun before is not noticed: one thread
    should switch adapters, and start the passes of others afterwards. Outside of such contexts nothing is added to
    passes.

    Args:
        model: A Hugging Face model, or a PeftModel around one.
        change: Changes the model once it is free; what it registers is undone at the end, or, if contexts that were
            entered within are left later, after theirs.
        wait: Whether to wait for the model, first come, first served; `async with` lets other tasks go on meanwhile.

    Raises:
        RuntimeError: If another thread or task is in such a context, or `with` would have to wait for a task of its own
            thread. Nothing is changed.
    """
    return ExclusiveUse(model, change, wait)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _refuse_others(stack: nn.Module, _args: Any) -> None:
    """Refuse a pass of another thread or task: a forward pre-hook, there only within `exclusive_use`."""
    if torch.compiler.is_compiling():
        return
    turns = _turns.get(stack)  # None for a copy or a replica
    if turns is not None and not turns.may_begin(_entered.get()):
        raise RuntimeError(
            "Another thread or task is switching the adapters of this model, so this pass would use its adapters. "
            f"{TAKE_TURNS} A context such as `use_adapters` belongs into the thread or task that runs the model."
        )
