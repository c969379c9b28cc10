"""Slots of texts, improved by gradient descent on the frozen model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memory_adapters.memory_slots.encoder import Encoder
from memory_adapters.memory_slots.loss import Row, in_batches, predict

__all__ = ["Goal", "refine"]
BETAS = (0.6, 0.7)  # of Adam: what is asked changes with every token that comes right, so a short memory serves


@dataclass(frozen=True)
class Goal:
    """Store rows that refinement asks of the slots of a text's spans; `weight` is that of their tokens' mean loss."""

    rows: Sequence[Row]
    weight: float


def refine(
    encoder: Encoder,
    start: Sequence[Sequence[Tensor]],
    goals: Sequence[Sequence[Goal]],
    steps: int,
    progress: bool,
    texts: Sequence[str],
) -> list[tuple[list[Tensor], list[float]]]:
    """Refine the slots of texts with Adam, the model frozen, with a learning rate that falls to 0 as a cosine.

    Texts do not affect each other: they share passes. One is done, before all steps, once the model gives every token
    asked, below the loss `refine_target_loss`.

    Args:
        encoder: Of the model.
        start: Slots of each text's spans (slots, embedding_size), float32.
        goals: What the slots of each text should make the model say; spans are counted within the text.
        steps: Most updates.
        progress: Show a bar.
        texts: For errors.

    Returns:
        Of each text, its slots, and the loss before each update that was made.

    Raises:
        ValueError: If a loss, gradient or step is NaN or infinite; names the text.
    """
    slots = [[tensor.detach().clone().requires_grad_(True) for tensor in text] for text in start]
    rate = encoder.config.resolved_refine_learning_rate * encoder.parts.embedding_rms
    optimizers = [torch.optim.Adam(text, lr=rate, betas=BETAS) for text in slots]
    losses: list[list[float]] = [[] for _ in start]
    unfinished = list(range(len(start)))
    with tqdm(total=steps, unit="step", desc="refining", disable=not progress) as bar:
        for step in range(steps):
            for text in unfinished:
                optimizers[text].zero_grad()
            found = _backward(encoder, slots, {text: goals[text] for text in unfinished})
            for text, (loss, _) in found.items():
                gradients = [own.grad for own in slots[text] if own.grad is not None]
                _check("loss" if not math.isfinite(loss) else "gradient", step, texts[text], loss, gradients)
            target = encoder.config.refine_target_loss
            unfinished = [text for text, (loss, right) in found.items() if not right or loss >= target]
            for text in unfinished:
                optimizers[text].param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizers[text].step()
                _check("update", step, texts[text], 0.0, slots[text])
                losses[text].append(found[text][0])
            if not unfinished:
                break
            highest = max(losses[text][-1] for text in unfinished)
            bar.set_postfix(texts=len(unfinished), highest_loss=f"{highest:.3f}", refresh=False)
            bar.update()
    return [([tensor.detach() for tensor in text], own) for text, own in zip(slots, losses, strict=True)]


def _check(what: str, step: int, text: str, loss: float, tensors: Sequence[Tensor]) -> None:
    """Raise a `ValueError` that names the text unless all numbers are finite."""
    if not (math.isfinite(loss) and all(torch.isfinite(tensor).all() for tensor in tensors)):
        raise ValueError(
            f"The {what} of refinement at step {step} is not finite for {text[:40]!r}: lower `refine_learning_rate`, "
            "or use the model in bfloat16 or float32."
        )


def _backward(
    encoder: Encoder, slots: Sequence[Sequence[Tensor]], goals: dict[int, Sequence[Goal]]
) -> dict[int, tuple[float, bool]]:
    """Compute gradients of every text's loss; return the loss, and whether each token asked is the first choice."""
    first: dict[int, int] = {}
    every: list[Tensor] = []
    for text in goals:
        first[text] = len(every)
        every += slots[text]
    owners, weights, rows = [], [], []
    for text, asked in goals.items():
        for goal in asked:
            tokens = sum(len(row.asked.target) for row in goal.rows)
            owners += [text] * len(goal.rows)
            weights += [goal.weight / tokens] * len(goal.rows)
            rows += [replace(row, spans=[first[text] + i for i in row.spans]) for row in goal.rows]
    loss, right = dict.fromkeys(goals, 0.0), dict.fromkeys(goals, True)
    for batch in in_batches(rows, every):
        part = [rows[i] for i in batch]
        counts = [len(row.asked.target) for row in part]
        with torch.enable_grad():
            losses, hits = predict(encoder, every, part)
            weighted = losses * losses.new_tensor([weights[i] for i in batch]).repeat_interleave(
                torch.tensor(counts, device=losses.device)
            )
            weighted.sum().backward()
        sums = torch.stack([own.sum() for own in weighted.detach().split(counts)]).tolist()
        all_right = torch.stack([own.all() for own in hits.split(counts)]).tolist()
        for i, own, hit in zip(batch, sums, all_right, strict=True):
            loss[owners[i]] += own
            right[owners[i]] &= hit
    return {text: (loss[text], right[text]) for text in goals}
