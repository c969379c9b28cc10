"""Try whether a model reads slots in the same way with a cache, in parts, with padding, and without any of these."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import CACHE, positioned
from memory_adapters.base_model.trial import differs
from memory_adapters.memory_slots.layer import Entry, SlotReader

__all__ = ["try_reading"]


def try_reading(model: PreTrainedModel, decoder: Decoder, reader: SlotReader, entry: Entry) -> None:
    """Read two slots of an entry, and let the reader put them among the embeddings if they are read only so.

    Raises:
        ValueError: If they are not read alike in either way.
    """
    before = entry.vectors, entry.mask
    ids = torch.tensor([[9, 7, 8]], device=execution_device(decoder.embeddings)) % decoder.vocab_size
    try:
        # Between two tokens: some models look up what else they read of a token by its very embedding.
        entry.vectors = decoder.embeddings(torch.cat([ids, ids + 1])).detach().float().mean(0, keepdim=True)[:, :2]
        entry.mask = torch.ones(1, 2, dtype=torch.long, device=ids.device)
        if not reader.as_embeddings and not _reads_alike(model, ids):
            reader.as_embeddings = True
        if reader.as_embeddings and not _reads_alike(model, ids):
            raise ValueError("other logits")
    finally:
        entry.vectors, entry.mask = before


def _reads_alike(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether two rows of tokens, one of them padded, are read in parts with a cache as they are whole."""
    rows = torch.cat([torch.nn.functional.pad(ids[:, 1:], (1, 0)), ids])  # the first begins with padding
    mask = torch.ones_like(rows)
    mask[0, 0] = 0
    whole = [
        model(input_ids=row[own.bool()][None], use_cache=False).logits[0, -1]
        for row, own in zip(rows, mask, strict=True)
    ]
    first = model(input_ids=rows[:, :-1], **positioned(model, mask[:, :-1]), use_cache=True)
    if first.get(CACHE) is None:
        raise ValueError("its passes give no cache of keys and values")
    rest = {**positioned(model, mask, rows.shape[1] - 1), CACHE: first[CACHE]}
    in_parts = model(input_ids=rows[:, -1:], **rest, use_cache=True).logits[:, -1]
    without_positions = model(input_ids=rows, attention_mask=mask, use_cache=True).logits[:, -1]
    found = zip([*in_parts, *without_positions], whole * 2, strict=True)
    return not any(differs(one, other) for one, other in found)
