"""Let one thread at a time choose which adapters are active: that choice is the model's state, not a thread's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import base_model

__all__ = ["exclusive_use"]

REMEDY = (
    "Give each thread a model of its own, put the requests into one batch with `use_adapters_by_row`, or let the "
    "threads take turns with a lock."
)


@dataclass
class _Owner:
    """Note which thread has the model, and in how many nested contexts."""

    thread: int
    handle: RemovableHandle
    depth: int = 0


_owners: WeakKeyDictionary[nn.Module, _Owner] = WeakKeyDictionary()
_guard = Lock()


@contextmanager
def exclusive_use(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Keep other threads, within this context, from running the model and from switching its adapters.

    A pass that another thread has begun before is not noticed: one thread should switch adapters, and start the passes
    of others afterwards. Outside of such contexts nothing is added to passes. The context is re-entrant; what runs in
    it must run in its thread.

    Args:
        model: A Hugging Face model, or a PeftModel around one.

    Raises:
        RuntimeError: If another thread is in such a context. Nothing is changed.
    """
    base = base_model(model)
    stack = getattr(base, "base_model", base)  # every pass goes through the model without its head
    with _guard:
        owner = _owners.get(stack)
        if owner is None:
            handle = stack.register_forward_pre_hook(_refuse_other_threads, prepend=True)
            owner = _owners[stack] = _Owner(get_ident(), handle)
        elif owner.thread != get_ident():
            raise RuntimeError(f"Another thread is switching the adapters of this model. {REMEDY}")
        owner.depth += 1
    try:
        yield
    finally:
        with _guard:
            owner.depth -= 1
            if not owner.depth:
                owner.handle.remove()
                del _owners[stack]


def _refuse_other_threads(stack: nn.Module, _args: Any) -> None:
    """Refuse a pass of another thread: a forward pre-hook, there only within `exclusive_use`."""
    if torch.compiler.is_compiling():
        return
    owner = _owners.get(stack)  # None for a copy or a replica
    if owner is not None and owner.thread != get_ident():
        raise RuntimeError(
            f"Another thread is switching the adapters of this model, so this pass would use that thread's. {REMEDY} A "
            "context such as `use_adapters` belongs into the thread that runs the model."
        )
