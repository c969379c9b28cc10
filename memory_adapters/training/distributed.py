"""Sharing work among the processes of `accelerate launch` or `torchrun`; alone, everything is this process's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

__all__ = ["all_reduce_sum", "gathered", "is_main_process", "share_of", "weight_of_share", "world_size"]

T = TypeVar("T")


def world_size() -> int:
    """How many processes work together; joins them if they were launched together and have not met yet."""
    if not distributed.is_available():
        return 1
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState()
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _alone() -> bool:
    return world_size() == 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return _alone() or distributed.get_rank() == 0


def share_of(items: Sequence[T]) -> list[T]:
    """This process's part of `items`: every n-th, starting with its rank."""
    return list(items) if _alone() else list(items)[distributed.get_rank() :: distributed.get_world_size()]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, which all must call this; the argument stays as it is."""
    if _alone():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def weight_of_share(count: int) -> float:
    """Factor on this process's mean over `count` values, so that the mean over processes is the mean over all values.

    All processes must call this; 0 where there is no value at all.
    """
    if _alone():
        return 1.0
    total = float(all_reduce_sum(torch.tensor(float(count), device=PartialState().device)))
    return count * world_size() / total if total else 0.0


def gathered(parts: list[T], length: int) -> list[T]:
    """Undo `share_of`: all `length` items in order, on every process, from each one's share."""
    if _alone():
        return parts
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, parts)
    return [shares[i % len(shares)][i // len(shares)] for i in range(length)]
