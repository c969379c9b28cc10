"""What the frozen model says behind slots: the loss that encoder training and refinement share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memory_adapters.base_model.item_rows import Row as ItemRow
from memory_adapters.memory_slots.encoder import BATCH_TOKENS, Encoder, takes_positions

__all__ = [
    "Query",
    "Row",
    "as_queries",
    "autocast",
    "autoencoding_rows",
    "cross_entropy",
    "distil",
    "divergence",
    "in_batches",
    "in_block",
    "predict",
]

T = TypeVar("T")

HEAD_BLOCK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Query:
    """Store what stands behind slots, and what should follow it.

    Attributes:
        prompt: Token ids; None for [AE], which asks for the text itself.
        target: Token ids.
    """

    prompt: list[int] | None
    target: list[int]

    def __len__(self) -> int:
        """Return how many tokens stand behind the slots in a pass that predicts the target."""
        return (1 if self.prompt is None else len(self.prompt)) + len(self.target) - 1


def as_queries(rows: Sequence[ItemRow]) -> list[Query]:
    """Return the prompt and the continuation that each row of a fact or question wants."""
    return [Query(row.input_ids[: row.first_label], row.input_ids[row.first_label :]) for row in rows]


@dataclass(frozen=True)
class Row:
    """Store something asked, and the spans whose slots stand before it."""

    asked: Query
    spans: Sequence[int]


def autoencoding_rows(
    texts: Sequence[Sequence[int]], end: int | None, spans: Sequence[Sequence[int]] | None = None
) -> list[Row]:
    """Return rows that ask for each text behind the slots of its spans (by default text i is span i).

    The end of text follows, if there is one.
    """
    own = spans or [[i] for i in range(len(texts))]
    tail = [] if end is None else [end]
    return [Row(Query(None, [*text, *tail]), where) for text, where in zip(texts, own, strict=True)]


def in_batches(rows: Sequence[Row], slots: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield indices of rows in turn, in batches of at most `BATCH_TOKENS` slots and tokens with padding, or one row."""
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
    """Return the cross-entropy of each token asked, row after row, and whether it is the model's first choice.

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
        loss, hit = in_block(cross_entropy, encoder, part, labels)
        losses.append(loss)
        right.append(hit)
    return torch.cat(losses), torch.cat(right)


def distil(encoder: Encoder, slots: Sequence[Tensor], rows: Sequence[Row], contexts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean KL(model that reads each row's context ‖ model that reads its slots) where something is asked."""
    own = [encoder.decoder.embeddings(torch.tensor(list(ids), device=encoder.device)) for ids in contexts]
    with torch.no_grad():
        taught = _states(encoder, own, [replace(row, spans=[i]) for i, row in enumerate(rows)])
    states = _states(encoder, slots, rows)
    parts = zip(states.split(HEAD_BLOCK), taught.split(HEAD_BLOCK), strict=True)
    return torch.stack([in_block(divergence, encoder, *part) for part in parts]).sum() / len(states)


def _states(encoder: Encoder, slots: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Return last hidden states (tokens asked, hidden_size), one before each token that is asked."""
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
    inputs = {"inputs_embeds": torch.stack(padded), "attention_mask": mask}
    if takes_positions(encoder.stack):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with encoder.adapters_disabled(), autocast(encoder):
        output = encoder.stack(**inputs, use_cache=False)
    states = output.last_hidden_state
    return states[asked.to(states.device)]


def _behind(encoder: Encoder, asked: Query) -> Tensor:
    """Return the embeddings (tokens, embedding_size) of what stands behind the slots."""
    ids = [*(asked.prompt or []), *asked.target[:-1]]
    embedded = encoder.decoder.embeddings(torch.tensor(ids, dtype=torch.long, device=encoder.device))
    return embedded if asked.prompt is not None else torch.cat([encoder.parts.reconstruct.to(embedded), embedded])


def autocast(encoder: Encoder) -> AbstractContextManager[Any]:
    """Return a context for passes in the precision of refinement."""
    return torch.autocast(encoder.device.type, torch.bfloat16) if encoder.refines_in_bfloat16 else nullcontext()


def in_block(function: Callable[..., T], encoder: Encoder, *args: Tensor) -> T:
    """Run a function of logits, which are computed again for the gradient instead of kept."""

    def run(*tensors: Tensor) -> T:
        with encoder.adapters_disabled(), autocast(encoder):
            return function(encoder.decoder.head, *tensors)

    return checkpoint(run, *args, use_reentrant=False)


def cross_entropy(head: nn.Module, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token wanted behind a state, and whether it is the first choice (tokens,)."""
    logits = head(states).float()
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def divergence(head: nn.Module, states: Tensor, taught: Tensor) -> Tensor:
    """Return the sum over tokens of KL(head of `taught` ‖ head of `states`)."""
    given, wanted = (head(x).float().log_softmax(-1) for x in (states, taught))
    return F.kl_div(given, wanted, reduction="sum", log_target=True)
