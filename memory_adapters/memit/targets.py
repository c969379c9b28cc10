"""The change of each edited block at each subject's last token: what MEMIT's targets ask for (eq. 16), block by block.

The changes δ₁ … δₙ of the outputs of the edited MLP projections start at 0, are in place together at the subject's last
token in every context, and are moved by Adam to lower

    mean over facts and contexts of −Σ log p(target tokens) / their number  +  kl_factor · KL(edited ‖ base)
    +  weight_decay · ‖δ‖ / ‖h₀‖²,

with ‖Σ δᵢ‖ ≤ clamp · ‖h₀‖ after every step, h₀ being the stream at the last edited block in the bare prompt, and ‖h₀‖
at most twice its median over the subject's contexts. MEMIT's authors find one δ at the last block, and ask
(z − h) / (n − i) of the i-th: what the lower ones do to the tokens behind is not seen by the loss. Found together, the
changes are what the edited model makes of them, and less is needed.

Adam's second moment is one number a subject: a step goes along the gradient, and not as far in coordinates that matter
little as in those that matter.

All facts about a subject share its changes. Subjects are independent, so many are moved at once, each with its own
moments, clamp and end. Per step only the tokens from the subject on run, from the first edited block on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.modes import bfloat16_weights, computes_in_bfloat16, plain_attention
from memory_adapters.base_model.nonfinite import rows_not_finite
from memory_adapters.base_model.partial_forward import block_tuple_length, capture, capture_inputs, logits_at, resumed
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.prompts import RowBatch

if TYPE_CHECKING:
    from memory_adapters.memit.config import MemitConfig

__all__ = ["TargetBatch", "TargetFinder", "added", "find_targets", "subject_keys"]

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
COMPACT_BELOW = 0.8
TOLERANCE = 0.02  # of a gain that is 1


@dataclass
class TargetBatch:
    """Store a batch of rows, and what the loss reads in it.

    Attributes:
        batch: The rows.
        states: Output of the block below the edited ones (rows, tokens, hidden_size); None if there is none.
        read: Positions whose logits are read (rows, tokens).
        targets: The token that should follow each of them; −1 where the base's own prediction is to be kept.
        weights: The share of each in its fact's loss.
        base: Log-probabilities of the base where it is to be kept (their number, vocabulary).
    """

    batch: RowBatch
    states: Tensor | None
    read: Tensor
    targets: Tensor
    weights: Tensor
    base: Tensor | None = None

    @classmethod
    def of(cls, batch: RowBatch, states: Tensor | None, num_contexts: int, kl_factor: float) -> TargetBatch:
        """Make a batch from rows and the states that they have below the edited blocks."""
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
        device = batch.ids.device
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
            None if self.states is None else self.states[keep],
            self.read[keep],
            self.targets[chosen],
            self.weights[chosen],
            base,
        )


class TargetFinder:
    """Run many facts at once from the first edited block on, with changes at the edited projections.

    Args:
        model: The causal LM, frozen.
        decoder: Its parts.
        layers: The edited blocks, in rising order.
        precision: `"model"` or `"bfloat16"`, as in `MemitConfig`.

    Attributes:
        gains: By how much the stream changes at each edited block when its projection's output does (blocks,).
    """

    def __init__(self, model: PreTrainedModel, decoder: Decoder, layers: Sequence[int], precision: str) -> None:
        self.model, self.decoder, self.layers = model, decoder, list(layers)
        self.projections = [mlp_projection(decoder, layer).module for layer in layers]
        self.below = self.layers[0] - 1  # -1: the lowest block is edited, and nothing is left out
        self.tuple_length = block_tuple_length(model, decoder, max(self.below, 0))
        self.device = execution_device(decoder.embeddings)
        self.bfloat16 = computes_in_bfloat16(precision, self.device)
        self.gains = self._gains()

    def states(self, batch: RowBatch) -> tuple[Tensor | None, Tensor]:
        """Return the outputs of the block below the edited ones, if any, and of the last of these.

        Both are (rows, tokens, hidden_size), at all tokens of `batch`, without changes.
        """
        wanted = [*([self.below] if self.below >= 0 else []), self.layers[-1]]
        *below, last = capture(self.model, self.decoder, wanted, **batch.model_inputs())
        return (below[0] if below else None), last

    @contextmanager
    def changed(self, problem: TargetBatch, changes: Tensor) -> Iterator[None]:
        """Let the model, within this context, start at the first edited block, with changes at the subjects.

        Args:
            problem: The rows that it is run on.
            changes: Of the projections' outputs (facts, edited blocks, hidden_size).
        """
        place, length = problem.batch.start, problem.batch.ids.shape[1]
        own = changes[problem.batch.facts]
        with ExitStack() as stack:
            if problem.states is not None:
                stack.enter_context(resumed(self.decoder, self.below, problem.states, tuple_length=self.tuple_length))
            for module, change in zip(self.projections, own.unbind(1), strict=True):
                everywhere = F.pad(change[:, None], (0, 0, place, length - place - 1))  # 0 at all other tokens
                stack.enter_context(added(module, everywhere))
            yield

    def logits(self, problem: TargetBatch, changes: Tensor) -> Tensor:
        """Return logits (positions read, vocabulary) in float32, with changes (facts, edited blocks, hidden_size)."""
        with (
            self.changed(problem, changes),
            logits_at(self.decoder, problem.read),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
            plain_attention(self.device),
        ):
            return self.model(**problem.batch.model_inputs(), use_cache=True).logits[0].float()

    def keys(self, problem: TargetBatch, changes: Tensor) -> list[Tensor]:
        """Return the inputs (rows, d_in) of the edited projections at the subjects, the changes below each in place."""
        with self.changed(problem, changes):
            found = capture_inputs(self.model, self.projections, **problem.batch.model_inputs())
        return [keys.reshape(*problem.batch.ids.shape, -1)[:, problem.batch.start] for keys in found]  # OPT's are flat

    @torch.no_grad()
    def _gains(self) -> Tensor:
        """Return by how much the stream changes at each edited block, as a share of its projection's change (blocks,).

        It is 1 in most models. Gemma 2 and 3 normalise the MLP's output before it joins the stream, Granite scales it.
        """
        ids = torch.tensor([[i % self.decoder.vocab_size for i in range(5, 14)]], device=self.device)
        found = []
        for layer, module in zip(self.layers, self.projections, strict=True):
            sizes: list[Tensor] = []

            def probe(output: Tensor, sizes: list[Tensor] = sizes) -> Tensor:
                sizes.append(output.float().norm(dim=-1).flatten())
                return output.flip(-1)  # as large as each token's own

            before = capture(self.model, self.decoder, [layer], input_ids=ids)[0]
            with added(module, probe):
                after = capture(self.model, self.decoder, [layer], input_ids=ids)[0]
            found.append(((after.float() - before.float()).norm(dim=-1).flatten() / sizes[0]).median())
        gains = torch.stack(found)
        as_it_is = (gains - 1).abs() < TOLERANCE
        return torch.where(as_it_is | ~(gains > 0), 1.0, gains)  # of a projection that puts out 0, nothing is known

    def prepared(self, problem: TargetBatch) -> TargetBatch:
        """Convert the states, keys and values of a batch to bfloat16, if that is the `precision`."""
        if not self.bfloat16:
            return problem
        cache = problem.batch.fresh_cache()
        for layer in [] if cache is None else cache.layers[self.below + 1 :]:
            keys, values = layer.keys, layer.values  # type: ignore[union-attr]  # no linear attention here
            layer.keys, layer.values = keys.to(torch.bfloat16), values.to(torch.bfloat16)  # type: ignore[union-attr]
        states = None if problem.states is None else problem.states.to(torch.bfloat16)
        return replace(problem, batch=replace(problem.batch, cache=cache), states=states)

    @contextmanager
    def fast_weights(self) -> Iterator[None]:
        """Convert the weights that are used to bfloat16 within this context, if that is the `precision`."""
        above = [m for block in self.decoder.blocks[self.below + 1 :] for m in block.modules()]
        with bfloat16_weights([*above, self.decoder.head] if self.bfloat16 else []):
            yield

    def losses(self, problem: TargetBatch, changes: Tensor) -> Tensor:
        """Return what the rows contribute to each fact's loss (facts,)."""
        logits = self.logits(problem, changes)
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
        return torch.zeros(len(changes), device=each.device, dtype=torch.float32).index_add(
            0, owner, each * problem.weights
        )


@contextmanager
def added(module: nn.Module, change: Tensor | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add to the output of a module, within this context, a tensor or what a function makes of that output."""

    def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        found = change(output) if callable(change) else change
        return output + found.to(output).reshape(output.shape)  # OPT's MLPs read all tokens as one row

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def find_targets(
    finder: TargetFinder,
    problems: Sequence[TargetBatch],
    norms: Tensor,
    config: MemitConfig,
    progress: tqdm,
    prompts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Move every fact's changes until its loss is below `config.target_loss`, or `config.steps` − 1 times.

    (MEMIT's last evaluation only looks at the loss; it is left out.)

    Args:
        finder: Evaluates the loss.
        problems: The rows of all facts.
        norms: ‖h₀‖, of the stream at the last edited block, at each subject (facts,), float32.
        config: Steps, learning rate, clamp, weights.
        progress: Bar, moved by a fact when it is done.
        prompts: Of the facts, for errors.

    Returns:
        The changes of the edited projections' outputs (facts, edited blocks, hidden_size) and the last loss of each
        fact (facts,), in float32.

    Raises:
        ValueError: If a loss, gradient or step is NaN or infinite; names the fact.
    """
    blocks, width = len(finder.layers), finder.decoder.hidden_size
    gains = finder.gains[:, None]  # (edited blocks, 1)
    # All blocks together move the stream as far as a step of the learning rate at the last one would.
    rates = config.learning_rate * norms[:, None, None] / math.sqrt(width) / (blocks * gains)
    changes, moment = (norms.new_zeros(len(norms), blocks, width) for _ in range(2))
    square = norms.new_zeros(len(norms), 1, 1)
    losses = torch.zeros_like(norms)
    active = torch.ones_like(norms, dtype=torch.bool)
    problems = [finder.prepared(problem) for problem in problems]
    for step in range(1, config.steps):
        gradient = torch.zeros_like(changes)
        found = torch.zeros_like(losses)
        for problem in problems:
            with torch.enable_grad():
                variable = changes.clone().requires_grad_(True)
                part = finder.losses(problem, variable)
            gradient += torch.autograd.grad(part.sum(), variable)[0]
            found += part.detach()
        size = (gains * changes).flatten(1).norm(dim=-1)
        found += config.weight_decay * size / norms.square()
        losses = torch.where(active, found, losses)
        _check(losses, "loss", prompts)
        done = active & (losses < config.target_loss)
        progress.update(int(done.sum()))
        active = active & ~done
        if not active.any():
            break
        direction = gains.square() * changes / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None, None]
        gradient += config.weight_decay * direction / norms.square()[:, None, None]
        gradient /= gains  # with regard to the stream
        moment = BETA_1 * moment + (1 - BETA_1) * gradient
        square = BETA_2 * square + (1 - BETA_2) * gradient.square().mean((1, 2), keepdim=True)
        move = (moment / (1 - BETA_1**step)) / ((square / (1 - BETA_2**step)).sqrt() + EPSILON)
        moved = changes - rates * move
        total = (gains * moved).sum(1).norm(dim=-1)
        moved *= (config.clamp * norms / total).clamp(max=1)[:, None, None]
        _check(torch.where(active[:, None, None], moved, changes), "gradient, or the step along it,", prompts)
        changes = torch.where(active[:, None, None], moved, changes)
        problems = _unfinished(problems, active)
    progress.update(int(active.sum()))
    return changes, losses


@torch.no_grad()
def subject_keys(
    finder: TargetFinder, problems: Sequence[TargetBatch], groups: Sequence[int], each: int, changes: Tensor
) -> dict[int, Tensor]:
    """Return the keys of subjects at every edited block, the changes of the blocks below in place.

    Every subject sees its own changes, as if they were realised exactly, and no other's: its keys are its own, and it
    can be added, replaced and forgotten without another pass of the model.

    Args:
        finder: Runs the model.
        problems: The rows of all facts.
        groups: For each context, which of a subject's keys it belongs to: contexts of one group share their mean.
        each: Keys a subject: as many as groups, or 1, the mean over groups.
        changes: Of the projections' outputs (facts, edited blocks, hidden_size).

    Returns:
        Layer to keys (subjects · each, d_in), float32, as in the ledger.
    """
    count = max(groups) + 1
    weight_of = [1 / (groups.count(group) * (count / each) * each**0.5) for group in groups]
    keys: dict[int, Tensor] = {}
    for problem in problems:
        rows = problem.batch.rows
        in_context = [i for i, row in enumerate(rows) if row.context >= 0]
        if not in_context:
            continue
        read = problem.select(torch.tensor(in_context, device=changes.device))
        chosen = [rows[i] for i in in_context]
        weights = changes.new_tensor([[row.share * weight_of[row.context]] for row in chosen])
        places = torch.tensor([row.fact * each + groups[row.context] % each for row in chosen], device=changes.device)
        for layer, own in zip(finder.layers, finder.keys(read, changes), strict=True):
            if layer not in keys:
                keys[layer] = changes.new_zeros(len(changes) * each, own.shape[-1])
            keys[layer].index_add_(0, places, own.to(changes) * weights)
    return keys


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
