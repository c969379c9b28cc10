"""Answer what was written, without a memory and with it, for its model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import context_length
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.tokens import pad_rows, tokenize
from memory_adapters.files.model_card import CardExample
from memory_adapters.items import Document, Item

__all__ = ["card_examples"]

MOST_PROMPTS = 4
PROMPT_TOKENS = 256  # longer prompts would fill the model card
ANSWER_TOKENS = 12


def card_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    enabled: Callable[[], AbstractContextManager[None]],
    disabled: Callable[[], AbstractContextManager[None]],
    virtual_tokens: int = 0,
) -> list[CardExample]:
    """Return greedy answers to the prompts of the facts and questions written last, without the memory and with it.

    Args:
        model: The model that the memory is on.
        tokenizer: Its tokenizer.
        items: What is written. Documents have no prompt.
        enabled: A context within which the memory takes part.
        disabled: A context within which it does not.
        virtual_tokens: How many positions the memory uses before the prompt.

    Returns:
        At most 4 examples. A prompt of over 256 tokens, or that does not fit in the model's positions, is left out.
    """
    longest = min(PROMPT_TOKENS, context_length(model) - virtual_tokens - ANSWER_TOKENS)
    prompts = dict.fromkeys(item.prompt for item in items if not isinstance(item, Document))
    rows = {prompt: tokenize(tokenizer, prompt) for prompt in list(prompts)[-MOST_PROMPTS:]}
    rows = {prompt: row for prompt, row in rows.items() if 0 < len(row) <= longest}
    if not rows:
        return []
    with evaluating(model):
        with enabled():
            after = _greedy(model, tokenizer, list(rows.values()))
        with disabled():
            before = _greedy(model, tokenizer, list(rows.values()))
    return [CardExample(*one) for one in zip(rows, before, after, strict=True)]


@torch.no_grad()
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    """Return greedy continuations of rows of token ids, in one batch with padding on the left."""
    backwards = pad_rows([row[::-1] for row in rows], model.device)
    inputs = {name: tensor.flip(1) for name, tensor in backwards.items()}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids = model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
        **inputs,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=next(pad for pad in pads if pad is not None),
    )
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
