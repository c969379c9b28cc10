"""Run a model in another mode for a while, and put it back: evaluation, bfloat16 weights, plain attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

__all__ = [
    "bfloat16_weights",
    "computes_in_bfloat16",
    "evaluating",
    "generating",
    "left_as_it_was",
    "own_settings",
    "plain_attention",
]


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute, within this context, with gradients, in float32 by default and without autocast.

    Notebooks switch gradients off in an earlier cell, and servers run in inference mode or under autocast.
    """
    default = torch.get_default_dtype()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = {"cpu", "cpu" if accelerator is None else accelerator.type}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within this context; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Do as `evaluating`, and give the head contiguous states: else a batch of prompts takes many times as long.

    Of a batch's prompts `generate` gives the head the last states, a slice, for which PyTorch on a CPU copies frozen
    bfloat16 weights once a row.
    """
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        if head is not None:
            hook = head.register_forward_pre_hook(lambda _head, given: (given[0].contiguous(), *given[1:]))
            stack.callback(hook.remove)
        stack.enter_context(evaluating(model))
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo afterwards what transformers' Trainer changes on a model beside its parameters; otherwise as `evaluating`.

    These are the attributes that accelerate marks it by, and the config's `use_cache`, which Trainer turns off.
    """
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
    """Return whether passes asked for in `precision` run in bfloat16.

    They do not on a CPU that has no instructions for it: it takes many times as long as in float32 there.
    """
    if precision != "bfloat16" or device.type != "cpu":
        return precision == "bfloat16"
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def bfloat16_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Convert these modules' own float32 parameters to bfloat16, without gradients, within this context.

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
    """Use PyTorch's plain attention on a CPU, where the backward pass of the fused one is slow for few tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
