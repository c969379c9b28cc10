"""Keys of subjects at every edited block, and the share of the change that each block makes (MEMIT, algorithm 1).

Blocks are taken in rising order. At the i-th of n, a subject's share is (z − h) / (n − i), where h is the stream at the
last block with the shares below in place; the key is the input of the MLP's output projection with them in place. Each
subject sees its own shares, as if they were realised exactly, and no other's. So a subject's keys and shares are its
own: subjects can be added, replaced and forgotten without another pass of the model. What a block fails to realise
because subjects compete is passed on when the linear system is solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder
from memory_adapters.base_model.partial_forward import capture, inputs_of, resumed
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.memit.projection_change import adds_unchanged, projection_change
from memory_adapters.memit.prompts import RowBatch

__all__ = ["LayerShares", "SubjectStates", "share_over_layers"]


@dataclass(frozen=True)
class SubjectStates:
    """Store rows at their subjects' last tokens, as the model without the edit has them.

    Attributes:
        batch: The rows.
        key: Input of the projection of the first edited block (rows, d_in).
        state: Output of that block (rows, tokens, hidden_size), at the tokens of the batch up to the subject's last.
        below: Output of the block below it, as `state`; None if it is the lowest.
    """

    batch: RowBatch
    key: Tensor
    state: Tensor
    below: Tensor | None


@dataclass(frozen=True)
class LayerShares:
    """Store what each subject asks of each edited block.

    Attributes:
        keys: Layer to keys (subjects · groups, d_in), float32, as in the ledger.
        shares: Layer to changes of the projection's output (subjects, hidden_size), float32.
    """

    keys: dict[int, Tensor]
    shares: dict[int, Tensor]


def _bare(states: SubjectStates) -> tuple[Tensor, Tensor]:
    """Return the indices (bare rows,) of the rows of bare prompts, and their shares in their subject (bare rows, 1)."""
    rows, device = states.batch.rows, states.state.device
    bare = [i for i, row in enumerate(rows) if row.context == 0]
    shares = torch.tensor([[rows[i].share] for i in bare], dtype=torch.float32, device=device).view(-1, 1)
    return torch.tensor(bare, dtype=torch.long, device=device), shares


def _append(captured: list[Tensor], _index: int, value: Tensor) -> None:
    captured.append(value)


@torch.no_grad()
def share_over_layers(
    model: PreTrainedModel,
    decoder: Decoder,
    layers: Sequence[int],
    subjects: Sequence[SubjectStates],
    groups: Sequence[int],
    keys_per_subject: int,
    h0: Tensor,
    z: Tensor,
    tuple_length: int,
) -> LayerShares:
    """Find the keys and shares of subjects whose targets are known.

    Args:
        model: The causal LM, without the edit.
        decoder: Its parts.
        layers: The blocks to edit, in rising order.
        subjects: Rows of all contexts of the subjects' facts.
        groups: For each context, which of a subject's keys it belongs to: contexts of one group share their mean.
        keys_per_subject: As many as groups, or 1: the mean over groups.
        h0: The stream at the last edited block in the bare prompts (subjects, hidden_size), float32.
        z: What it should be.
        tuple_length: How many entries the model's blocks put out, 0 for the hidden state alone.
    """
    # A subject's key is a weighted sum over its rows: `weights` is each row's weight, `places` the key it belongs to.
    each, count = keys_per_subject, max(groups) + 1
    weight_of = [1 / (groups.count(group) * (count / each) * each**0.5) for group in groups]
    weights, places = [], []
    for own in subjects:
        rows = own.batch.rows
        weights.append(
            torch.tensor([row.share * weight_of[row.context] for row in rows], device=h0.device, dtype=torch.float32)[
                :, None
            ]
        )  # (rows, 1)
        places.append(torch.tensor([row.fact * each + groups[row.context] % each for row in rows], device=h0.device))
    keys: dict[int, Tensor] = {}
    shares: dict[int, Tensor] = {}
    # What changes from block to block: the stream at the last block, and each row's key and states at this one.
    now = h0  # (subjects, hidden_size)
    found = [own.key for own in subjects]  # each (rows, d_in)
    states, below = [own.state for own in subjects], [own.below for own in subjects]  # (rows, tokens, hidden_size)
    for i, layer in enumerate(layers):
        total = torch.zeros(len(h0) * each, found[0].shape[-1], device=h0.device, dtype=torch.float32)
        for key, place, weight in zip(found, places, weights, strict=True):
            total.index_add_(0, place, key.float() * weight)
        keys[layer] = total  # (subjects · keys_per_subject, d_in)
        # What is still missing is shared out evenly among this block and those above it.
        wanted = (z - now) / (len(layers) - i)  # (subjects, hidden_size)
        shares[layer] = wanted.clone()
        if layer and not adds_unchanged(model, decoder, layer):
            # The block normalises its MLP's output (Gemma): find the change before the norm that gives `wanted` after.
            shares[layer].zero_()
            for own, lower in zip(subjects, below, strict=True):
                bare, part = _bare(own)
                if len(bare) and lower is not None:
                    facts = own.batch.facts[bare]
                    change = projection_change(
                        model, decoder, layer, own.batch.select(bare), lower[bare], wanted[facts], tuple_length
                    )
                    shares[layer].index_add_(0, facts, change * part)
        if i + 1 == len(layers):
            break
        # With this block's share in place, run on to the next edited block for its keys, and to the last for `now`.
        ahead = layers[i + 1]
        projection = mlp_projection(decoder, ahead).module
        now = torch.zeros_like(now)
        for j, own in enumerate(subjects):
            state = states[j].to(torch.float32, copy=True)
            state[:, -1] += wanted[own.batch.facts]
            captured: list[Tensor] = []
            with (
                inputs_of([projection], partial(_append, captured)),
                resumed(decoder, layer, state.to(states[j].dtype), tuple_length=tuple_length),
            ):
                read = sorted({ahead - 1, ahead, layers[-1]})
                outputs = dict(zip(read, capture(model, decoder, read, **own.batch.model_inputs(1)), strict=True))
            found[j] = captured[0].reshape(*state.shape[:2], -1)[:, -1]
            states[j], below[j] = outputs[ahead], outputs[ahead - 1]
            bare, part = _bare(own)
            now.index_add_(0, own.batch.facts[bare], outputs[layers[-1]][bare, -1].float() * part)
    return LayerShares(keys, shares)
