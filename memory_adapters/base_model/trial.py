"""Try a model on a few tokens at injection: what will not work is found before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.partial_forward import BlockOutput, hidden_state

__all__ = ["check_stream", "differs", "is_runnable", "trial"]

TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}  # relative; of other dtypes ROUGH
ROUGH = 0.05


def is_runnable(decoder: Decoder) -> bool:
    """Return whether a model has weights to run with: on the meta device it has none."""
    return execution_device(decoder.embeddings).type != "meta" and all(
        not parameter.is_meta or hasattr(module, "_hf_hook")
        for module in decoder.model.modules()
        for parameter in module.parameters(recurse=False)
    )


@contextmanager
def trial(model: PreTrainedModel, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a pass of the model raises within this context into a `ValueError` that says what does not work."""
    try:
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            yield
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{type(model).__name__} {what} ({reason.splitlines()[0][:200]}). {remedy}") from error


def check_stream(decoder: Decoder) -> None:
    """Raise a `ValueError` unless the model reads two tokens of text, in one residual stream, and predicts the next."""
    model, ends = decoder.model, sorted({0, decoder.num_layers - 1})
    ids = torch.ones(1, 2, dtype=torch.long, device=execution_device(decoder.embeddings))
    outputs: list[Any] = []

    def keep(_block: nn.Module, _args: Any, output: BlockOutput) -> None:
        outputs.append(hidden_state(output))

    handles = [decoder.blocks[layer].register_forward_hook(keep, prepend=True) for layer in ends]
    try:
        with trial(model, "does not read two tokens of text", "Load it as a causal LM of text."):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    shapes = {
        decoder.block_name(layer): getattr(output, "shape", None) for layer, output in zip(ends, outputs, strict=True)
    }
    for name, shape in shapes.items():
        if shape != (1, 2, decoder.hidden_size):
            raise ValueError(
                f"`{name}` of {type(model).__name__} puts out {tuple(shape or ())} for two tokens, where a memory "
                f"needs one residual stream (1, 2, {decoder.hidden_size}): models with several cannot have one."
            )
    if logits.shape[:2] != (1, 2):
        raise ValueError(
            f"{type(model).__name__} predicts {tuple(logits.shape)} for two tokens: it is no causal LM, which predicts "
            "the next token."
        )


def differs(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits are other than those expected, by more than rounding; never if these are not finite."""
    if not torch.isfinite(expected).all():  # a write says where NaN and infinity come from
        return False
    distance = (found.float() - expected.float()).norm()
    return not bool(distance <= TOLERANCE.get(expected.dtype, ROUGH) * expected.float().norm())
