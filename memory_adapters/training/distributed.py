"""Share work among the processes that `accelerate launch` or `torchrun` started; a single process does it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from torch import Tensor, distributed

__all__ = ["all_reduce_sum", "gather_items", "is_main_process", "mean_weight", "share_of", "world_size"]

T = TypeVar("T")


def _state() -> PartialState:
    """Return accelerate's state of this process, which joins the others if they were launched together.

    On CPUs `PartialState()` starts a process group but counts one process, unless it is told so: `cpu=True`.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    counted: int = state.num_processes  # type: ignore[has-type]  # accelerate sets it in untyped code
    if on_cpu and distributed.is_initialized() and counted < distributed.get_world_size():
        PartialState._reset_state()  # as `TrainingArguments` does
        state = PartialState(cpu=True)
    return state


def world_size() -> int:
    """Return how many processes work together."""
    return _state().num_processes  # type: ignore[has-type]


def is_main_process() -> bool:
    """Return whether this process is the one that writes files."""
    return _state().is_main_process


def share_of(items: Sequence[T]) -> list[T]:
    """Return this process's part of `items`: every n-th, starting with its rank."""
    state = _state()
    return list(items)[state.process_index :: state.num_processes]  # type: ignore[has-type]


def gather_items(share: list[T], length: int) -> list[T]:
    """Return all `length` items in order, on every process, given what became of each one's `share_of` them."""
    _state()
    shares: list[list[T]] = gather_object([share])
    return [shares[i % len(shares)][i // len(shares)] for i in range(length)]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all processes, which all must call this; the argument stays as it is."""
    _state()
    return reduce(tensor, "sum")


def mean_weight(count: int) -> float:
    """Return a factor for this process's mean over `count` values: the mean over processes is then that of all values.

    All processes must call this. It is 0 where none has a value.
    """
    total = float(all_reduce_sum(torch.tensor(float(count), device=_state().device)))
    return count * world_size() / total if total else 0.0
