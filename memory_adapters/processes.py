"""Sharing work among the processes of `accelerate launch` or `torchrun`; alone, everything is this process's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

__all__ = ["gathered", "is_first", "share_of", "summed"]

T = TypeVar("T")


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return _alone() or distributed.get_rank() == 0


def share_of(items: Sequence[T]) -> list[T]:
    """This process's part of `items`: every n-th, starting with its rank."""
    return list(items) if _alone() else list(items)[distributed.get_rank() :: distributed.get_world_size()]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, which all must call this; the argument stays as it is."""
    if _alone():
        return tensor
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def gathered(parts: list[T], length: int) -> list[T]:
    """Undo `share_of`: all `length` items in order, on every process, from each one's share."""
    if _alone():
        return parts
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, parts)
    return [shares[i % len(shares)][i // len(shares)] for i in range(length)]
