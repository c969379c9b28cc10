"""Switch off what puts virtual tokens before a prompt, so that states are found by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn

from memory_adapters.base_model.modes import evaluating

__all__ = ["undisturbed", "virtual_tokens_disabled", "without_slots"]

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def virtual_tokens_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context nothing stands before the tokens that a model is given: states are found by position."""
    readers: list[Any] = [module for module in model.modules() if getattr(module, "precedes_tokens", False)]
    before = [reader._disable_adapters for reader in readers]
    try:
        for reader in readers:
            reader._disable_adapters = True
        yield
    finally:
        for reader, disabled in zip(readers, before, strict=True):
            reader._disable_adapters = disabled


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode, and reads no slots."""
    with evaluating(model), virtual_tokens_disabled(model):
        yield


def without_slots(method: Method) -> Method:
    """Let a method of something that has a `model` run within `virtual_tokens_disabled`."""

    @wraps(method)
    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        with virtual_tokens_disabled(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, within)
