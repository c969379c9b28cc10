"""Put slots before the rows of a batch, or behind the padding that rows start with, and take them off again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import attention_window, context_length

__all__ = [
    "behind_turns",
    "check_length",
    "inserted",
    "leading_padding",
    "padding_before_slots",
    "removed",
    "slot_positions",
    "turn_starts",
]


def padding_before_slots(stack: PreTrainedModel, mask: Tensor, count: int, always: bool) -> Tensor | None:
    """Return how much padding each row starts with (rows,), if slots must stand behind it; None if they can be first.

    A sliding window, or chunks of attention, count padding too, and so would lose slots that stand before it.

    Args:
        stack: The decoder stack.
        mask: The attention mask (rows, tokens).
        count: Slots that are not in the mask yet.
        always: Whether slots must stand behind padding anyway.
    """
    config = stack.config.get_text_config(decoder=True)
    if not always and mask.shape[1] + count <= attention_window(config):
        return None
    leading = leading_padding(mask)
    return leading if bool(leading.any()) else None


def behind_turns(leading: Tensor | None, mask: Tensor, starts: Sequence[int | None]) -> Tensor | None:
    """Return how many tokens stand before the slots in each row (rows,): up to what the user says, where that is known.

    Args:
        leading: The padding that slots must stand behind; None if they can be first.
        mask: The attention mask (rows, tokens).
        starts: For each row, the tokens up to what the user says, without padding.
    """
    if all(start is None for start in starts):
        return leading
    return leading_padding(mask) + torch.tensor([start or 0 for start in starts], device=mask.device)


def leading_padding(mask: Tensor) -> Tensor:
    """Return how much padding each row of an attention mask (rows, tokens) starts with (rows,)."""
    return (mask.cumsum(-1) == 0).sum(-1)


def turn_starts(rows: Sequence[Sequence[int]], opening: Sequence[int]) -> list[int | None]:
    """Return where what the user says last begins in each row of token ids: behind the last `opening`, if any."""
    size, wanted = len(opening), list(opening)
    return [
        next((end for end in range(len(row), size - 1, -1) if list(row[end - size : end]) == wanted), None)
        if size
        else None
        for row in rows
    ]


def inserted(rows: Tensor, part: Tensor, leading: Tensor | None) -> Tensor:
    """Return `part` (batch, slots, ...) before `rows` (batch, tokens, ...), or behind the first `leading` of each."""
    joined = torch.cat([part, rows], 1)
    if leading is None:
        return joined
    count, place = part.shape[1], torch.arange(joined.shape[1], device=rows.device)[None]
    start = leading[:, None]
    source = torch.where(place < start, place + count, torch.where(place < start + count, place - start, place))
    return joined[torch.arange(len(rows), device=rows.device)[:, None], source]


def removed(rows: Tensor, count: int, leading: Tensor | None) -> Tensor:
    """Undo `inserted` for `count` slots."""
    if leading is None:
        return rows[:, count:]
    place = torch.arange(rows.shape[1] - count, device=rows.device)[None]
    source = torch.where(place < leading[:, None], place, place + count)
    return rows[torch.arange(len(rows), device=rows.device)[:, None], source]


def slot_positions(mask: Tensor) -> Tensor:
    """Return the positions of the slots (rows, slots): counted from the first that is not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def check_length(stack: PreTrainedModel, slots: Tensor, most: int, prompt_mask: Tensor) -> None:
    """Raise a `ValueError` unless slots and prompt of each row fit in the model's positions.

    Args:
        stack: The decoder stack.
        slots: Positions that the slots of each row take (batch, 1).
        most: The most of them.
        prompt_mask: 0 for padding (batch, tokens).
    """
    limit = context_length(stack)
    if most + prompt_mask.shape[1] <= limit:  # without a look at what is on an accelerator
        return
    tokens = prompt_mask.sum(1, keepdim=True)
    longest = int((slots + tokens).argmax())
    if slots[longest] + tokens[longest] > limit:
        raise ValueError(
            f"{int(slots[longest])} slots and {int(tokens[longest])} tokens of the prompt exceed the {limit} positions "
            "of the model: shorten the prompt, or compress at a higher rate."
        )
