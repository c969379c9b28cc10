"""What an MLP's output projection must add so that its block's output changes as wanted.

In most models the projection's output is added to the stream as it is, and the two are the same. Gemma 2 and 3
normalise it first, Granite scales it: there the change e solves f(e) − f(0) = wanted, with f the rest of the block, by
Gauss–Newton; each linear system J x = r by conjugate gradients on its normal equations (CGLS), a fact a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import BlockOutput, capture, resumed
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.prompts import RowBatch

__all__ = ["adds_unchanged", "projection_change"]

NEWTON_STEPS = 6
CG_STEPS = 8
DAMPING = 0.1  # relative to the square of the slope: what only a huge change would reach is left
STEP_SIZES = (1.0, 0.5, 0.25, 0.125)
PROBE_TOLERANCE = 0.02


def adds_unchanged(model: PreTrainedModel, decoder: Decoder, layer: int) -> bool:
    """Return whether the stream after block `layer` changes by just what is added to the projection's output."""
    device = execution_device(decoder.embeddings)
    probe = torch.zeros(decoder.hidden_size, device=device, dtype=torch.float32)
    outputs = []
    for _ in range(2):
        with added(decoder, layer, probe):
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            outputs.append(capture(model, decoder, [layer], input_ids=ids)[0].float().flatten())
        generator = torch.Generator().manual_seed(0)
        size = outputs[0].square().mean().sqrt()
        probe = torch.randn(decoder.hidden_size, generator=generator, dtype=torch.float32).to(device) * size
    return bool((outputs[1] - outputs[0] - probe).norm() < PROBE_TOLERANCE * probe.norm())


class added:  # noqa: N801 (a context manager)
    """Add `change`, within this context, to the output of the projection of block `layer`."""

    def __init__(self, decoder: Decoder, layer: int, change: Tensor) -> None:
        self.module, self.change = mlp_projection(decoder, layer).module, change

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(
            lambda _module, _args, output: (
                output + self.change.to(output.dtype).view(-1, *output.shape[1:])
                if self.change.ndim > 1
                else output + self.change.to(output.dtype)
            )
        )

    def __exit__(self, *_error: object) -> None:
        self.handle.remove()


def projection_change(
    model: PreTrainedModel,
    decoder: Decoder,
    layer: int,
    batch: RowBatch,
    below: Tensor,
    wanted: Tensor,
    tuple_length: int,
) -> Tensor:
    """Find e (rows, hidden_size) for which the output of block `layer` at the subjects changes by `wanted`.

    Args:
        model: The causal LM, without the edit.
        decoder: Its parts.
        layer: Block index, above 0.
        batch: The rows.
        below: Output of the block below, at the tokens of the batch up to the subjects (rows, tokens, hidden_size).
        wanted: The change (rows, hidden_size), float32.
        tuple_length: How many entries the model's blocks put out, 0 for the hidden state alone.
    """
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: BlockOutput) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[:, -1].float())

    def run(change: Tensor) -> Tensor:
        handle = decoder.blocks[layer].register_forward_hook(keep)
        at_subjects = F.pad(change[:, None], (0, 0, below.shape[1] - 1, 0))  # (rows, tokens, hidden_size)
        try:
            with added(decoder, layer, at_subjects), resumed(decoder, layer - 1, below, tuple_length=tuple_length):
                model.base_model(**batch.model_inputs(1), use_cache=True)
        finally:
            handle.remove()
        return outputs.pop()

    return gauss_newton(run, wanted)


def gauss_newton(f: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """Find e with f(e) − f(0) ≈ wanted, row by row: the smallest one where several do, the nearest where none does."""
    e = torch.zeros_like(wanted)
    start = None
    for _ in range(NEWTON_STEPS):
        with torch.enable_grad():
            variable = e.clone().requires_grad_(True)
            out = f(variable)
            start = out.detach() if start is None else start
            seed = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, variable, seed, create_graph=True)[0]
        r = wanted - (out.detach() - start)
        s = _pull(out, variable, r)
        p, x = s, torch.zeros_like(e)
        gamma = s.square().sum(-1, keepdim=True)
        damping = DAMPING * gamma / r.square().sum(-1, keepdim=True).clamp(min=1e-30)
        for _ in range(CG_STEPS):
            q = torch.autograd.grad(pulled, seed, p, retain_graph=True)[0]
            curvature = q.square().sum(-1, keepdim=True) + damping * p.square().sum(-1, keepdim=True)
            step = gamma / curvature.clamp(min=1e-30)
            x, r = x + step * p, r - step * q
            s = _pull(out, variable, r) - damping * x
            fresh = s.square().sum(-1, keepdim=True)
            p, gamma = s + fresh / gamma.clamp(min=1e-30) * p, fresh
        e = _best(f, start + wanted, e, x)
    return e


@torch.no_grad()
def _best(f: Callable[[Tensor], Tensor], goal: Tensor, e: Tensor, step: Tensor) -> Tensor:
    """Return e + t · step, with the t of a few that brings f nearest to the goal, row by row."""
    found, distance = e, (f(e) - goal).norm(dim=-1)
    for t in STEP_SIZES:
        tried = e + t * step
        far = (f(tried) - goal).norm(dim=-1)
        nearer = far < distance
        found, distance = torch.where(nearer[:, None], tried, found), torch.where(nearer, far, distance)
    return found


def _pull(out: Tensor, variable: Tensor, r: Tensor) -> Tensor:
    return torch.autograd.grad(out, variable, r, retain_graph=True)[0]
