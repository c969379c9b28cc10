"""Slots of one text, improved by gradient descent on the frozen model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from memory_adapters.memory_slots.encoder import Encoder, takes_positions

__all__ = ["Asked", "Rows", "asked_rows", "autoencoding_rows", "distil", "predict", "refine"]

HEAD_BLOCK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Asked:
    """A prompt behind the slots, and what should follow it.

    Attributes:
        prompt: Token ids.
        target: Token ids.
    """

    prompt: list[int]
    target: list[int]


@dataclass(frozen=True)
class Rows:
    """Rows to predict behind slots.

    Attributes:
        embedded: What follows the slots (rows, tokens, embedding_size), padded on the right.
        labels: Token that should follow each of these positions (rows, tokens); −100 where nothing is asked.
        lengths: Real tokens of each row.
        sources: Which spans' slots stand before each row.
        weight: Of these rows' mean loss.
    """

    embedded: Tensor
    labels: Tensor
    lengths: list[int]
    sources: Sequence[Sequence[int]]
    weight: float


def refine(
    encoder: Encoder, start: Sequence[Tensor], rows: Sequence[Rows], steps: int, progress: bool
) -> tuple[list[Tensor], list[float]]:
    """Adam on the slots, the model frozen, with a learning rate that falls to 0 as a cosine.

    It ends early once the model gives every token asked, below the loss `refine_target_loss`.

    Args:
        encoder: Of the model.
        start: Slots of each span (slots, embedding_size), float32.
        rows: What the slots should make the model say.
        steps: Updates.
        progress: Show a bar.

    Returns:
        The slots, and the loss before each update that was made.

    Raises:
        ValueError: If the loss is NaN or infinite.
    """
    slots = [tensor.detach().clone().requires_grad_(True) for tensor in start]
    rate = encoder.config.refine_learning_rate * encoder.parts.embedding_rms
    optimizer = torch.optim.Adam(slots, lr=rate)
    losses: list[float] = []
    with tqdm(total=steps, unit="step", desc="refining", disable=not progress) as bar:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            total, right = 0.0, True
            for part in rows:
                with torch.enable_grad():
                    loss, hits = predict(encoder, slots, part)
                    (part.weight * loss).backward()
                total, right = total + part.weight * loss.item(), right and bool(hits.all())
            if not math.isfinite(total):
                raise ValueError(f"The loss of refinement is {total} at step {step}: lower `refine_learning_rate`.")
            if right and total < encoder.config.refine_target_loss:
                break
            optimizer.step()
            losses.append(total)
            bar.set_postfix(loss=f"{total:.3f}", refresh=False)
            bar.update()
    return [tensor.detach() for tensor in slots], losses


def autoencoding_rows(
    encoder: Encoder,
    texts: Sequence[Sequence[int]],
    end: int | None,
    weight: float,
    sources: Sequence[Sequence[int]] | None = None,
) -> Rows:
    """[AE] and each text behind the slots of its spans (`sources`; by default text i is span i); the text, and the end
    of text if there is one, are asked."""
    wanted = [[*text, *([] if end is None else [end])] for text in texts]
    heads = [encoder.parts.reconstruct] * len(texts)
    return _rows(encoder, heads, wanted, sources or [[i] for i in range(len(texts))], weight)


def asked_rows(encoder: Encoder, asked: Sequence[Asked], sources: Sequence[Sequence[int]], weight: float) -> Rows:
    """Prompts behind bare slots, as a reader gives them."""
    heads = [encoder.decoder.embeddings(torch.tensor(a.prompt, device=encoder.device)) for a in asked]
    return _rows(encoder, heads, [a.target for a in asked], sources, weight)


def _rows(
    encoder: Encoder,
    heads: Sequence[Tensor],
    wanted: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]],
    weight: float,
) -> Rows:
    embedded, labels, lengths = [], [], []
    for head, tokens in zip(heads, wanted, strict=True):
        ids = torch.tensor(list(tokens), device=encoder.device)
        following = encoder.decoder.embeddings(ids[:-1])
        embedded.append(torch.cat([head.to(following), following]))
        labels.append(torch.cat([ids.new_full((len(head) - 1,), -100), ids]))
        lengths.append(len(embedded[-1]))
    longest = max(lengths)
    return Rows(
        torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in embedded]),
        torch.stack([F.pad(row, (0, longest - len(row)), value=-100) for row in labels]),
        lengths,
        sources,
        weight,
    )


def predict(encoder: Encoder, slots: Sequence[Tensor], rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of what is asked, and whether each token asked is the first choice (tokens,)."""
    states, wanted = _states(encoder, slots, rows), rows.labels[rows.labels != -100]
    losses, right = [], []
    for part, labels in zip(states.split(HEAD_BLOCK), wanted.split(HEAD_BLOCK), strict=True):
        loss, hit = _in_block(_cross_entropy, encoder, part, labels)
        losses.append(loss)
        right.append(hit)
    return torch.stack(losses).sum() / len(wanted), torch.cat(right)


def distil(encoder: Encoder, slots: Sequence[Tensor], rows: Rows, contexts: Sequence[Sequence[int]]) -> Tensor:
    """Mean KL(model that reads each row's whole context ‖ model that reads its slots) where something is asked."""
    own = [encoder.decoder.embeddings(torch.tensor(list(ids), device=encoder.device)) for ids in contexts]
    with torch.no_grad():
        taught = _states(encoder, own, replace(rows, sources=[[i] for i in range(len(own))]))
    states = _states(encoder, slots, rows)
    parts = zip(states.split(HEAD_BLOCK), taught.split(HEAD_BLOCK), strict=True)
    return torch.stack([_in_block(_divergence, encoder, *part) for part in parts]).sum() / len(states)


def _states(encoder: Encoder, slots: Sequence[Tensor], rows: Rows) -> Tensor:
    """Last hidden states (tokens asked, hidden_size), one before each token that is asked."""
    before = [torch.cat([slots[i] for i in source]) for source in rows.sources]
    longest = max(map(len, before))
    joined = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in before])
    device = rows.embedded.device
    mask = torch.ones(len(before), longest + rows.embedded.shape[1], dtype=torch.long, device=device)
    for i, (row, length) in enumerate(zip(before, rows.lengths, strict=True)):
        mask[i, : longest - len(row)] = 0
        mask[i, longest + length :] = 0
    embedded = torch.cat([joined.to(rows.embedded), rows.embedded], 1)
    inputs: dict[str, Any] = {"inputs_embeds": embedded}
    if takes_positions(encoder.stack):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with encoder.others_off(), _autocast(encoder):
        output = encoder.stack(**inputs, attention_mask=mask, use_cache=False)
    return output.last_hidden_state[:, longest:][rows.labels != -100]


def _autocast(encoder: Encoder) -> Any:
    bfloat16 = encoder.config.precision == "bfloat16"
    return torch.autocast(encoder.device.type, torch.bfloat16) if bfloat16 else nullcontext()


def _in_block(function: Any, encoder: Encoder, *args: Tensor) -> Any:
    """A function of logits, which are computed again for the gradient instead of kept."""

    def run(*tensors: Tensor) -> Any:
        with encoder.others_off(), _autocast(encoder):
            return function(encoder.decoder.head, *tensors)

    return checkpoint(run, *args, use_reentrant=False)


def _cross_entropy(head: Any, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(states).float()
    return F.cross_entropy(logits, wanted, reduction="sum"), logits.argmax(-1) == wanted


def _divergence(head: Any, states: Tensor, taught: Tensor) -> Tensor:
    given, wanted = (head(x).float().log_softmax(-1) for x in (states, taught))
    return F.kl_div(given, wanted, reduction="sum", log_target=True)
