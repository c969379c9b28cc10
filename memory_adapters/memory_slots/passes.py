"""What callers give a pass, with room for slots: positions, attention mask, and what there is for each token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.memory_slots.placement import inserted, slot_positions

__all__ = ["TOKEN_TYPES", "among_embeddings", "make_room", "pass_shape", "prompt_mask_of"]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # 0 for text; what multimodal models take for each token


def pass_shape(given: dict[str, Any]) -> tuple[int, int]:
    """Return rows and tokens of a pass."""
    embedded = given.get("inputs_embeds")
    batch, tokens = (given["input_ids"] if embedded is None else embedded).shape[:2]
    return batch, tokens


def prompt_mask_of(given: Any, mask: Tensor, length: int) -> Tensor:
    """Return the attention mask (batch, tokens) of a prompt, which is all ones where none is given."""
    if given is None:
        return mask.new_ones(len(mask), length)
    if not isinstance(given, Tensor) or given.ndim != 2:
        form = f"of the shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ValueError(
            f"`attention_mask` must be (batch, tokens) while slots are read, and is {form}, such as `generate_batch` "
            "(continuous batching) makes: use `generate`, or switch the slots off (`memory.disabled()`)."
        )
    return given


def make_room(
    stack: PreTrainedModel,
    given: dict[str, Any],
    prompt_mask: Tensor,
    mask: Tensor,
    taken: Tensor,
    leading: Tensor | None,
) -> dict[str, Any]:
    """Return a pass whose positions and attention mask have room for slots.

    Args:
        stack: The decoder stack.
        given: The pass, which is changed.
        prompt_mask: Of all tokens so far (batch, tokens).
        mask: Of the slots (batch, slots).
        taken: Positions that they take (batch, 1).
        leading: Tokens of each row before them (batch,); None for none.
    """
    if "position_ids" in inspect.signature(stack.forward).parameters:
        (batch, tokens), length = pass_shape(given), prompt_mask.shape[1]
        positions: Any = given.get("position_ids")
        if positions is None:
            positions = (prompt_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        # Multimodal models have several positions a token: (kinds, batch, tokens).
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        behind: Any = 1
        if leading is not None:
            behind = torch.arange(length - tokens, length, device=positions.device)[None] >= leading[:, None]
        given["position_ids"] = positions + taken * behind
    given["attention_mask"] = inserted(prompt_mask, mask.to(prompt_mask.dtype), leading)  # (batch, slots + tokens)
    return given


def among_embeddings(
    given: dict[str, Any], embedded: Tensor, vectors: Tensor, mask: Tensor, prompt_mask: Tensor, leading: Tensor | None
) -> dict[str, Any]:
    """Return a pass with the slots' embeddings among those of the prompt, and what else it gives for each token."""
    given["input_ids"], given["inputs_embeds"] = None, inserted(embedded, vectors.to(embedded), leading)
    for kind in TOKEN_TYPES:
        if isinstance(given.get(kind), Tensor):
            given[kind] = inserted(given[kind], torch.zeros_like(mask, dtype=given[kind].dtype), leading)
    if (positions := given.get("position_ids")) is not None:
        own = slot_positions(mask)
        if leading is not None:  # behind the prompt's tokens that stand before the slots
            before = torch.arange(prompt_mask.shape[1], device=own.device) < leading[:, None]
            own = own + (prompt_mask * before).sum(1, keepdim=True)
        kinds = [inserted(one, own, leading) for one in positions.reshape(-1, *embedded.shape[:2])]
        given["position_ids"] = torch.stack(kinds).view(*positions.shape[:-1], -1)
    return given
