"""Run part of a model: stop early, resume in the middle, compute logits only where they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device

__all__ = [
    "CACHE",
    "BlockOutput",
    "block_tuple_length",
    "capture",
    "capture_inputs",
    "hidden_state",
    "inputs_of",
    "keeps_keys_alone",
    "logits_at",
    "positioned",
    "resumed",
]


# What models call their keys and values, in what they take and give: renamed in transformers 5.24.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


BlockOutput: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""What a block puts out: the hidden state (batch, tokens, hidden_size), or a tuple that starts with it."""


class _EnoughError(Exception):
    """End a forward pass once the last hidden state that is needed has been computed."""


def hidden_state(output: BlockOutput) -> torch.Tensor:
    """Return the hidden state (batch, tokens, hidden_size) in a block's output: that, or a tuple with it first."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def capture(
    model: PreTrainedModel, decoder: Decoder, layers: Sequence[int], **inputs: torch.Tensor
) -> list[torch.Tensor]:
    """Return the outputs of some blocks, from one forward pass that stops after the last of them.

    Args:
        model: The causal LM.
        decoder: Its parts.
        layers: Block indices in rising order.
        inputs: What the model's `forward` takes.

    Returns:
        One tensor (batch, tokens, hidden_size) a layer, in the model's dtype, before anything that acts on the
        blocks' outputs through hooks registered later than this call's.
    """
    states: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: BlockOutput) -> None:
        states.append(hidden_state(output))
        if len(states) == len(layers):
            raise _EnoughError

    handles = [decoder.blocks[layer].register_forward_hook(keep, prepend=True) for layer in layers]
    try:
        model(**inputs, use_cache=False)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return states


@contextmanager
def logits_at(decoder: Decoder, mask: torch.Tensor) -> Iterator[None]:
    """Let the head, within this context, compute logits only where `mask` (batch, tokens) is true.

    The model then returns logits of shape (1, mask.sum(), vocabulary).
    """

    def select(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][mask].unsqueeze(0), *args[1:])

    handle = decoder.head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def block_tuple_length(model: PreTrainedModel, decoder: Decoder, layer: int) -> int:
    """Return how many entries block `layer` puts out, the hidden state first; 0 if it is the hidden state alone."""
    lengths: list[int] = []

    def count(_module: nn.Module, _args: Any, output: BlockOutput) -> None:
        lengths.append(len(output) if isinstance(output, tuple) else 0)

    handle = decoder.blocks[layer].register_forward_hook(count)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=execution_device(decoder.embeddings)))
    finally:
        handle.remove()
    return lengths[0]


def keeps_keys_alone(cache: Any) -> bool:
    """Return whether a cache holds keys and values, and no states of linear attention or convolutions."""
    layers = getattr(cache, "layers", None) or []
    keys_alone = [hasattr(layer, "keys") and not hasattr(layer, "conv_states") for layer in layers]
    return bool(keys_alone) and all(keys_alone)


def positioned(model: PreTrainedModel, mask: torch.Tensor, past: int = 0) -> dict[str, torch.Tensor]:
    """Return `attention_mask` and, where the model takes them, `position_ids` counted in it (rows, tokens).

    Args:
        model: The causal LM.
        mask: (rows, past + tokens), with padding on the left.
        past: Tokens whose keys and values are in a cache.
    """
    inputs = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
    return inputs


@contextmanager
def resumed(decoder: Decoder, layer: int, states: torch.Tensor, *, tuple_length: int) -> Iterator[None]:
    """Let block `layer`, within this context, put out `states`, and the blocks below only pass their input through.

    The model's own `forward` runs, so masks, positions and whatever else it computes are its own.

    Args:
        decoder: Parts of the model.
        layer: Block index.
        states: (batch, tokens, hidden_size), as the inputs that the model is then given.
        tuple_length: How many entries the model's blocks put out; see `block_tuple_length`.
    """

    rest = [None] * (tuple_length - 1)

    def passed_on(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *rest) if tuple_length else hidden

    def stored(*_args: Any, **_kwargs: Any) -> Any:
        return (states, *rest) if tuple_length else states

    blocks = [decoder.blocks[i] for i in range(layer + 1)]
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks[:-1]:
        block.forward = passed_on
    blocks[-1].forward = stored
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def inputs_of(modules: Sequence[nn.Module], receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `receive(i, x)`, within this context, with the input x of `modules[i]` at each of its calls."""

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, args: receive(index, args[0])

    handles = [module.register_forward_pre_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def capture_inputs(model: PreTrainedModel, modules: Sequence[nn.Module], **inputs: Any) -> list[torch.Tensor]:
    """Return the inputs of some modules, from one forward pass that stops when the last of them is reached.

    Args:
        model: The causal LM.
        modules: Modules in the order in which the model runs them.
        inputs: What the model's `forward` takes.
    """
    found: dict[int, torch.Tensor] = {}

    def receive(index: int, value: torch.Tensor) -> None:
        found[index] = value
        if index == len(modules) - 1:
            raise _EnoughError

    try:
        with inputs_of(modules, receive):
            model(**inputs, use_cache=False)
    except _EnoughError:
        pass
    return [found[i] for i in range(len(modules))]
