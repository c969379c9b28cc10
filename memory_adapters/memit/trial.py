"""Try at injection whether a model's passes can be cut as finding targets cuts them."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.partial_forward import CACHE, block_tuple_length, capture, resumed
from memory_adapters.base_model.trial import differs, trial
from memory_adapters.memit.prompts import FactRow, PrefixCache, keep_before

__all__ = ["check_resuming"]

REMEDY = "Closed-form editing needs that; MemoryAdapterConfig does not."


def check_resuming(decoder: Decoder, layer: int) -> None:
    """Raise a `ValueError` unless rows resumed behind a block, and behind what is kept, give what whole passes give.

    Args:
        decoder: Parts of the model.
        layer: The block below the edited ones; -1 if there is none, and only what is kept is tried.
    """
    model = decoder.model
    device = execution_device(decoder.embeddings)
    ids = [i % decoder.vocab_size for i in range(5, 14)]
    # Two contexts, of which rows differ in length before the subject: padding is tried too.
    rows = [FactRow(0, 0, ids[:5], 2, 4), FactRow(1, 0, [*ids[:2], *ids[4:7]], 2, 4), FactRow(0, 1, ids, 6, 8)]
    what = "does not go on from a state within it as a whole pass does"
    with trial(model, what, REMEDY):
        if model(input_ids=torch.tensor([rows[0].ids], device=device), use_cache=True).get(CACHE) is None:
            raise ValueError("its passes give no cache of keys and values")
        prefixes = PrefixCache.of(model, rows, 2)
        batch = keep_before(model, rows, prefixes)
        with ExitStack() as stack:
            if layer >= 0:
                tuple_length = block_tuple_length(model, decoder, layer)
                states = capture(model, decoder, [layer], **batch.model_inputs())[0]
                stack.enter_context(resumed(decoder, layer, states, tuple_length=tuple_length))
            found = model(**batch.model_inputs(), use_cache=True).logits[:, batch.start :]
        for row, logits in zip(rows, found, strict=True):
            whole = model(input_ids=torch.tensor([row.ids], device=device)).logits[0]
            if differs(logits, whole[row.subject : row.subject + row.num_read]):
                raise ValueError("other logits")
