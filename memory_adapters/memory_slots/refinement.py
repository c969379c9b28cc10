"""Slots of texts, improved by gradient descent on the frozen model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder, takes_positions

__all__ = ["Asked", "Goal", "Row", "autoencoding_rows", "distil", "in_batches", "predict", "refine"]

HEAD_BLOCK = 256  # positions whose logits are held at once
BETAS = (0.6, 0.7)  # of Adam: what is asked changes with every token that comes right, so a short memory serves


@dataclass(frozen=True)
class Asked:
    """What stands behind slots, and what should follow it.

    Attributes:
        prompt: Token ids; None for [AE], which asks for the text itself.
        target: Token ids.
    """

    prompt: list[int] | None
    target: list[int]

    def __len__(self) -> int:
        """Tokens that stand behind the slots in a pass that predicts the target."""
        return (1 if self.prompt is None else len(self.prompt)) + len(self.target) - 1


@dataclass(frozen=True)
class Row:
    """Something asked, and the spans whose slots stand before it."""

    asked: Asked
    spans: Sequence[int]


@dataclass(frozen=True)
class Goal:
    """Rows that refinement asks of the slots of a text's spans; `weight` is that of their tokens' mean loss."""

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
    """Adam on the slots of texts, the model frozen, with a learning rate that falls to 0 as a cosine.

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
    rate = encoder.config.learning_rate_of_refinement * encoder.parts.embedding_rms
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
    """Gradients of every text's loss; the loss, and whether each token asked of it is the first choice."""
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


def autoencoding_rows(
    texts: Sequence[Sequence[int]], end: int | None, spans: Sequence[Sequence[int]] | None = None
) -> list[Row]:
    """Each text asked back behind the slots of its spans (by default text i is span i), and the end of text after it
    if there is one."""
    own = spans or [[i] for i in range(len(texts))]
    tail = [] if end is None else [end]
    return [Row(Asked(None, [*text, *tail]), where) for text, where in zip(texts, own, strict=True)]


def in_batches(rows: Sequence[Row], slots: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of rows, in turn, in batches of at most `BATCH_TOKENS` slots and tokens with padding (at least one)."""
    batch: list[int] = []
    most = 0
    for i, row in enumerate(rows):
        length = len(row.asked) + sum(len(slots[span]) for span in row.spans)
        if batch and (len(batch) + 1) * max(most, length) > BATCH_TOKENS:
            yield batch
            batch, most = [], 0
        batch.append(i)
        most = max(most, length)
    if batch:
        yield batch


def predict(encoder: Encoder, slots: Sequence[Tensor], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token asked of the rows, one row after the other, and whether it is the first choice.

    Args:
        encoder: Of the model.
        slots: Of each span (slots, embedding_size).
        rows: What is asked.

    Returns:
        Two tensors (tokens asked,), float32 and bool.
    """
    states = _states(encoder, slots, rows)
    wanted = torch.tensor([token for row in rows for token in row.asked.target], device=states.device)
    losses, right = [], []
    for part, labels in zip(states.split(HEAD_BLOCK), wanted.split(HEAD_BLOCK), strict=True):
        loss, hit = _in_block(_cross_entropy, encoder, part, labels)
        losses.append(loss)
        right.append(hit)
    return torch.cat(losses), torch.cat(right)


def distil(encoder: Encoder, slots: Sequence[Tensor], rows: Sequence[Row], contexts: Sequence[Sequence[int]]) -> Tensor:
    """Mean KL(model that reads each row's whole context ‖ model that reads its slots) where something is asked."""
    own = [encoder.decoder.embeddings(torch.tensor(list(ids), device=encoder.device)) for ids in contexts]
    with torch.no_grad():
        taught = _states(encoder, own, [replace(row, spans=[i]) for i, row in enumerate(rows)])
    states = _states(encoder, slots, rows)
    parts = zip(states.split(HEAD_BLOCK), taught.split(HEAD_BLOCK), strict=True)
    return torch.stack([_in_block(_divergence, encoder, *part) for part in parts]).sum() / len(states)


def _states(encoder: Encoder, slots: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Last hidden states (tokens asked, hidden_size), one before each token that is asked."""
    before = [torch.cat([slots[i] for i in row.spans]) for row in rows]
    behind = [_behind(encoder, row.asked) for row in rows]
    first, length = max(map(len, before)), max(map(len, behind))
    shape, device = (len(rows), first + length), encoder.device
    mask, asked = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, dtype=torch.bool)
    padded = []
    for i, (head, tail, row) in enumerate(zip(before, behind, rows, strict=True)):
        padded.append(F.pad(torch.cat([head.to(tail), tail]), (0, 0, first - len(head), length - len(tail))))
        end = first + len(tail)
        mask[i, first - len(head) : end] = 1
        asked[i, end - len(row.asked.target) : end] = True
    inputs: dict[str, Any] = {"inputs_embeds": torch.stack(padded), "attention_mask": mask}
    if takes_positions(encoder.stack):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with encoder.others_off(), _autocast(encoder):
        output = encoder.stack(**inputs, use_cache=False)
    states = output.last_hidden_state
    return states[asked.to(states.device)]


def _behind(encoder: Encoder, asked: Asked) -> Tensor:
    """Embeddings of what stands behind the slots (tokens, embedding_size)."""
    ids = [*(asked.prompt or []), *asked.target[:-1]]
    embedded = encoder.decoder.embeddings(torch.tensor(ids, dtype=torch.long, device=encoder.device))
    return embedded if asked.prompt is not None else torch.cat([encoder.parts.reconstruct.to(embedded), embedded])


def _autocast(encoder: Encoder) -> Any:
    return torch.autocast(encoder.device.type, torch.bfloat16) if encoder.refines_in_bfloat16 else nullcontext()


def _in_block(function: Any, encoder: Encoder, *args: Tensor) -> Any:
    """A function of logits, which are computed again for the gradient instead of kept."""

    def run(*tensors: Tensor) -> Any:
        with encoder.others_off(), _autocast(encoder):
            return function(encoder.decoder.head, *tensors)

    return checkpoint(run, *args, use_reentrant=False)


def _cross_entropy(head: Any, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(states).float()
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def _divergence(head: Any, states: Tensor, taught: Tensor) -> Tensor:
    given, wanted = (head(x).float().log_softmax(-1) for x in (states, taught))
    return F.kl_div(given, wanted, reduction="sum", log_target=True)
