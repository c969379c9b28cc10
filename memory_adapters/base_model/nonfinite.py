"""NaN and infinity, found where they arise: which block of a model, which parameter, whose gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import BlockOutput, hidden_state
from memory_adapters.base_model.tokens import RowScores, pad_rows

__all__ = ["check_gradients", "check_scores", "origin", "rows_not_finite"]


def rows_not_finite(values: Tensor) -> list[int]:
    """Return the indices of the rows of `values` (rows, ...) that hold NaN or infinity."""
    return (~torch.isfinite(values).flatten(1).all(1)).nonzero()[:, 0].tolist()


@torch.no_grad()
def origin(
    model: PreTrainedModel,
    decoder: Decoder,
    inputs: Mapping[str, Tensor],
    otherwise: str = "origin unknown: a second pass was finite",
) -> str:
    """Describe where a pass over `inputs` first gives NaN or infinity, and which parameter holds it, or that none does.

    Args:
        model: The causal LM.
        decoder: Its parts.
        inputs: What the model's `forward` takes.
        otherwise: What to say if all is finite, the weights too.
    """
    places: list[tuple[str, nn.Module]] = [("the embeddings", decoder.embeddings)]
    places += [(f"block {i}", block) for i, block in enumerate(decoder.blocks)]
    places += [("the head, or the norm before it,", decoder.head)]
    found: list[int] = []

    def look(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: BlockOutput) -> None:
            state = hidden_state(output)
            if not found and not torch.isfinite(state).all():
                found.append(index)

        return hook

    with ExitStack() as stack:
        for index, (_, module) in enumerate(places):
            stack.callback(module.register_forward_hook(look(index)).remove)
        model(**inputs, use_cache=False)
    name, module = places[found[0]] if found else ("padding", model)
    damaged = next(_damaged(module if found and found[0] < len(places) - 1 else model), None)
    if damaged is not None:
        return f"{name} gives the first, and `{damaged}` holds NaN or infinity: load it anew"
    if not found:
        return otherwise
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    remedy = "use the model in bfloat16 or float32" if dtype == "float16" else "look for an adapter that adds too much"
    return f"{name} gives the first, though its weights are finite: numbers grow too large for {dtype}; {remedy}"


def check_scores(scores: RowScores, model: PreTrainedModel, decoder: Decoder, rows: Sequence[Sequence[int]]) -> None:
    """Raise a `ValueError` that says where NaN or infinity arises if a row's log-probability is not finite."""
    if bad := rows_not_finite(scores.log_prob[:, None]):
        inputs = pad_rows([rows[bad[0]]], execution_device(decoder.embeddings))
        raise ValueError(f"The model's predictions hold NaN or infinity: {origin(model, decoder, inputs)}.")


def check_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise a `ValueError` that names the first parameter whose gradient holds NaN or infinity."""
    own = [(name, p.grad) for name, p in parameters if p.grad is not None]
    if not own or torch.isfinite(torch.stack([grad.float().norm() for _, grad in own]).sum()):
        return
    for name, grad in own:
        if not torch.isfinite(grad).all():
            raise ValueError(
                f"The gradient of `{name}` holds NaN or infinity: lower the learning rate, or use the model in "
                "bfloat16 or float32."
            )


def _damaged(module: nn.Module) -> Iterator[str]:
    for place, part in module.named_modules():
        with align_module_device(part):
            for name, parameter in part.named_parameters(recurse=False):
                plain = type(parameter.data) is Tensor and parameter.is_floating_point()  # not torchao's
                if plain and not torch.isfinite(parameter).all():
                    yield f"{place}.{name}" if place else name
