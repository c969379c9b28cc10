"""One thread at a time chooses which adapters speak: that choice is the model's state, and no thread's own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from threading import Lock, get_ident
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationMixin

from memory_adapters.peft_layers.rollback import rollback_on_error

__all__ = ["alone", "exclusive_use"]

Method = TypeVar("Method", bound=Callable[..., Any])

REMEDY = (
    "Give each thread a model of its own, put the requests into one batch with `use_adapters_by_row`, or let the "
    "threads take turns with a lock."
)
_USES = (nn.Module._call_impl.__code__, inspect.unwrap(GenerationMixin.generate).__code__)


@dataclass
class _Turn:
    """Which thread has the model, and in how many contexts within each other."""

    thread: int
    depth: int = 0
    handle: Any = None


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_guard = Lock()


@contextmanager
def exclusive_use(model: nn.Module) -> Iterator[None]:
    """Within this context no other thread can run the model, or choose which of its adapters speak.

    Threads that do neither are not affected, and nothing is added to passes outside of such contexts. What is run in
    the context must run in its thread. It is re-entrant.

    Args:
        model: A Hugging Face model, or a PeftModel around one.

    Raises:
        RuntimeError: If another thread is in such a context, in a forward pass or in `generate`. Nothing is changed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    stack = _stack(base)
    turn, entered = _Turn(get_ident()), False
    try:
        with _guard:
            known = _turns.setdefault(stack, turn)
            if known.thread != turn.thread:
                raise RuntimeError(f"Another thread has chosen which adapters of this model speak. {REMEDY}")
            turn = known
            if turn.handle is None:
                turn.handle = stack.register_forward_pre_hook(_refuse_others, prepend=True)  # first: none can begin now
                if _in_use_elsewhere(base, stack):
                    raise RuntimeError(
                        f"Another thread runs this model, so its adapters cannot be switched now. {REMEDY}"
                    )
            turn.depth, entered = turn.depth + 1, True
        yield
    finally:
        with _guard:
            turn.depth -= entered
            if _turns.get(stack) is turn and not turn.depth:
                if turn.handle is not None:
                    turn.handle.remove()
                del _turns[stack]


def alone(method: Method) -> Method:
    """Let a method of something that has a `model` run within `exclusive_use`; no hook of one that fails is left."""

    @wraps(method)
    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with exclusive_use(self.model), rollback_on_error(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, within)


def _stack(base: nn.Module) -> nn.Module:
    """What every pass goes through: the model without its head."""
    stack = getattr(base, "base_model", base)
    return stack if isinstance(stack, nn.Module) else base


def _refuse_others(stack: nn.Module, _args: Any) -> None:
    """Forward pre-hook, there only within `exclusive_use`."""
    if torch.compiler.is_compiling():
        return
    turn = _turns.get(stack)  # None of a copy or a replica
    if turn is not None and turn.thread != get_ident():
        raise RuntimeError(
            "Another thread has chosen which adapters of this model speak, so this pass would get that thread's. "
            f"{REMEDY} A context such as `speaking` belongs into the thread that runs the model."
        )


def _in_use_elsewhere(base: nn.Module, stack: nn.Module) -> bool:
    """Whether any other thread is in a pass or in `generate`, as its stack of calls tells."""
    for thread, frame in sys._current_frames().items():
        at: Any = frame if thread != get_ident() else None
        while at is not None:
            if at.f_code in _USES and any(at.f_locals.get("self") is module for module in (base, stack)):
                return True
            at = at.f_back
    return False
