"""Run a model in another mode for a while, and put it back: evaluation, bfloat16 weights, plain attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["bfloat16_weights", "computes_in_bfloat16", "evaluating", "left_as_it_was", "plain_attention"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; afterwards in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """As `evaluating`, for transformers' Trainer: what it changes on a model beside its parameters is put back too, the
    attributes that accelerate marks it by and the config's `use_cache`, which it turns off."""
    attributes, config = set(vars(model)), vars(model.config)
    use_cache = {name: config[name] for name in config if name == "use_cache"}
    with evaluating(model):
        try:
            yield
        finally:
            for name in set(vars(model)) - attributes:
                del vars(model)[name]
            config.pop("use_cache", None)
            config.update(use_cache)


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether passes asked for in `precision` run in bfloat16.

    They do not on a CPU that has no instructions for it: it takes many times as long as in float32 there.
    """
    if precision != "bfloat16" or device.type != "cpu":
        return precision == "bfloat16"
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def bfloat16_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context these modules' own float32 parameters are bfloat16, and need no gradient.

    Autocast alone would convert them again in every pass.
    """
    every = set(modules)
    own = [(module, name, p) for module in every for name, p in module.named_parameters(recurse=False)]
    places = [(m, name) for m, name, p in own if p.dtype == torch.float32 and not p.is_meta]  # meta: offloaded
    before = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name, weight in before:
            setattr(module, name, nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False))
        yield
    finally:
        for module, name, weight in before:
            setattr(module, name, weight)


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch's fused attention has a slow backward pass on the CPU for few tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
