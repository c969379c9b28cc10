"""The target vector z of each subject: what the stream should be at its last token (MEMIT, eq. 16).

δ starts at 0, is added to the output of the last edited block at the subject's last token in every context, and is
moved by Adam to lower

    mean over facts and contexts of −Σ log p(target tokens) / their number  +  kl_factor · KL(edited ‖ base)
    +  weight_decay · ‖δ‖ / ‖h₀‖²,

with ‖δ‖ ≤ clamp · ‖h₀‖ after every step; z = h₀ + δ. One δ serves all facts about its
subject. Subjects are independent, so many are moved at once, each with its
own moments, clamp and end. Per step only the tokens from the subject on run, through the blocks above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.modes import bfloat16_weights, computes_in_bfloat16, plain_attention
from memory_adapters.base_model.nonfinite import rows_not_finite
from memory_adapters.base_model.partial_forward import block_tuple_length, capture, logits_at, resumed
from memory_adapters.memit.prompts import RowBatch

if TYPE_CHECKING:
    from memory_adapters.memit.config import MemitConfig

__all__ = ["TargetBatch", "find_targets"]

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
COMPACT_BELOW = 0.8


@dataclass
class TargetBatch:
    """Store a batch of rows, and what the loss reads in it.

    Attributes:
        batch: The rows.
        states: Output of the last edited block without δ (rows, tokens, hidden_size).
        read: Positions whose logits are read (rows, tokens).
        targets: The token that should follow each of them; −1 where the base's own prediction is to be kept.
        weights: The share of each in its fact's loss.
        base: Log-probabilities of the base where it is to be kept (their number, vocabulary).
    """

    batch: RowBatch
    states: Tensor
    read: Tensor
    targets: Tensor
    weights: Tensor
    base: Tensor | None = None

    @classmethod
    def of(cls, batch: RowBatch, states: Tensor, num_contexts: int, kl_factor: float) -> TargetBatch:
        """Make a batch from rows and the states that they have at the last edited block."""
        read = torch.zeros(batch.ids.shape, dtype=torch.bool)
        targets, weights = [], []
        for i, row in enumerate(batch.rows):
            if row.context < 0:
                read[i, batch.start] = True
                targets.append(-1)
                weights.append(row.share * kl_factor)
            else:
                labels = row.ids[row.first_label :]
                read[i, batch.start + row.first_label - 1 - row.subject :] = True
                targets += labels
                weights += [row.share / (len(labels) * num_contexts)] * len(labels)
        device = states.device
        return cls(
            batch,
            states,
            read.to(device),
            torch.tensor(targets, device=device),
            torch.tensor(weights, device=device, dtype=torch.float32),
        )

    def select(self, keep: Tensor) -> TargetBatch:
        """Return a batch of the rows with these indices."""
        owner = self.read.nonzero()[:, 0]
        chosen = torch.isin(owner, keep)
        base = None if self.base is None else self.base[chosen[self.targets < 0]]
        return TargetBatch(
            self.batch.select(keep),
            self.states[keep],
            self.read[keep],
            self.targets[chosen],
            self.weights[chosen],
            base,
        )


class TargetFinder:
    """Evaluate the loss of many facts at once.

    Args:
        model: The causal LM, frozen.
        decoder: Its parts.
        layer: The last edited block.
        precision: `"model"` or `"bfloat16"`, as in `MemitConfig`.
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, layer: int, precision: str) -> None:
        self.model, self.decoder, self.layer = model, decoder, layer
        self.tuple_length = block_tuple_length(model, decoder, layer)
        self.device = execution_device(decoder.embeddings)
        self.bfloat16 = computes_in_bfloat16(precision, self.device)

    def states(self, batch: RowBatch) -> Tensor:
        """Return the output of the last edited block at all tokens of `batch` (rows, tokens, hidden_size)."""
        inputs = batch.model_inputs()
        return capture(self.model, self.decoder, [self.layer], **inputs)[0]

    def logits(self, problem: TargetBatch, delta: Tensor) -> Tensor:
        """Return logits (positions read, vocabulary) in float32, with δ (facts, hidden_size) added at the subjects."""
        states = problem.states.clone()
        states[:, problem.batch.start] += delta[problem.batch.facts].to(states.dtype)
        with (
            resumed(self.decoder, self.layer, states, tuple_length=self.tuple_length),
            logits_at(self.decoder, problem.read),
            torch.autocast(states.device.type, torch.bfloat16, enabled=self.bfloat16),
            plain_attention(states.device),
        ):
            return self.model(**problem.batch.model_inputs(), use_cache=True).logits[0].float()

    def prepared(self, problem: TargetBatch) -> TargetBatch:
        """Convert the states, keys and values of a batch to bfloat16, if that is the `precision`."""
        if not self.bfloat16:
            return problem
        cache = problem.batch.fresh_cache()
        for layer in [] if cache is None else cache.layers[self.layer + 1 :]:
            keys, values = layer.keys, layer.values  # type: ignore[union-attr]  # no linear attention here
            layer.keys, layer.values = keys.to(torch.bfloat16), values.to(torch.bfloat16)  # type: ignore[union-attr]
        return replace(problem, batch=replace(problem.batch, cache=cache), states=problem.states.to(torch.bfloat16))

    @contextmanager
    def fast_weights(self) -> Iterator[None]:
        """Convert the weights that are used to bfloat16 within this context, if that is the `precision`."""
        above = [m for block in self.decoder.blocks[self.layer + 1 :] for m in block.modules()]
        with bfloat16_weights([*above, self.decoder.head] if self.bfloat16 else []):
            yield

    def losses(self, problem: TargetBatch, delta: Tensor) -> Tensor:
        """Return what the rows contribute to each fact's loss (facts,)."""
        logits = self.logits(problem, delta)
        kept = problem.targets < 0
        each = torch.zeros(len(logits), device=logits.device, dtype=torch.float32)
        learned = F.cross_entropy(logits[~kept], problem.targets[~kept], reduction="none")
        each = each.masked_scatter(~kept, learned)
        if kept.any():
            now = logits[kept].log_softmax(-1)
            if problem.base is None:
                problem.base = now.detach()
            each = each.masked_scatter(kept, (now.exp() * (now - problem.base)).sum(-1))
        owner = problem.batch.facts[problem.read.nonzero()[:, 0]]
        return torch.zeros(len(delta), device=each.device, dtype=torch.float32).index_add(
            0, owner, each * problem.weights
        )


def find_targets(
    finder: TargetFinder,
    problems: Sequence[TargetBatch],
    h0: Tensor,
    active: Tensor,
    config: MemitConfig,
    progress: tqdm,
    prompts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Move every fact's δ until its loss is below `config.target_loss`, or `config.steps` − 1 times.

    (MEMIT's last evaluation only looks at the loss; it is left out.)

    Args:
        finder: Evaluates the loss.
        problems: The rows of all facts.
        h0: The stream at each subject in the bare prompt (facts, hidden_size), float32.
        active: Which facts to move (facts,); the others keep h₀.
        config: Steps, learning rate, clamp, weights.
        progress: Bar, moved by a fact when it is done.
        prompts: Of the facts, for errors.

    Returns:
        z = h₀ + δ (facts, hidden_size) and the last loss of each fact (facts,), in float32.

    Raises:
        ValueError: If a loss, gradient or step is NaN or infinite; names the fact.
    """
    norms = h0.norm(dim=-1)
    rates = config.learning_rate * norms[:, None] / math.sqrt(h0.shape[1])
    delta, moment, square = (torch.zeros_like(h0) for _ in range(3))
    losses = torch.zeros(len(h0), device=h0.device, dtype=torch.float32)
    problems = [finder.prepared(problem) for problem in _unfinished(problems, active)]
    for step in range(1, config.steps):
        gradient = torch.zeros_like(delta)
        found = torch.zeros_like(losses)
        for problem in problems:
            with torch.enable_grad():
                variable = delta.clone().requires_grad_(True)
                part = finder.losses(problem, variable)
            gradient += torch.autograd.grad(part.sum(), variable)[0]
            found += part.detach()
        size = delta.norm(dim=-1)
        found += config.weight_decay * size / norms.square()
        losses = torch.where(active, found, losses)
        _check(losses, "loss", prompts)
        done = active & (losses < config.target_loss)
        progress.update(int(done.sum()))
        active = active & ~done
        if not active.any():
            break
        direction = delta / size.clamp(min=torch.finfo(delta.dtype).tiny)[:, None]
        gradient += config.weight_decay * direction / norms.square()[:, None]
        moment = BETA_1 * moment + (1 - BETA_1) * gradient
        square = BETA_2 * square + (1 - BETA_2) * gradient.square()
        move = (moment / (1 - BETA_1**step)) / ((square / (1 - BETA_2**step)).sqrt() + EPSILON)
        moved = delta - rates * move
        moved *= (config.clamp * norms / moved.norm(dim=-1)).clamp(max=1)[:, None]
        _check(torch.where(active[:, None], moved, delta), "gradient, or the step along it,", prompts)
        delta = torch.where(active[:, None], moved, delta)
        problems = _unfinished(problems, active)
    progress.update(int(active.sum()))
    return h0 + delta, losses


def _check(values: Tensor, what: str, prompts: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first fact whose row of `values` is not finite."""
    if bad := rows_not_finite(values.view(len(prompts), -1)):
        raise ValueError(
            f"The {what} of the fact {prompts[bad[0]]!r} is NaN or infinite: lower `learning_rate` or `clamp`, or use "
            "the model in bfloat16 or float32."
        )


def _unfinished(problems: Sequence[TargetBatch], active: Tensor) -> list[TargetBatch]:
    """Drop the rows of facts that are done, once these are many enough to be worth the copy."""
    left = []
    for problem in problems:
        rows = active[problem.batch.facts]
        share = rows.float().mean().item()
        if share > 0:
            left.append(problem.select(rows.nonzero()[:, 0]) if share < COMPACT_BELOW else problem)
    return left
