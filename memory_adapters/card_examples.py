"""Answer what was written, without a memory and with it, for its model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.answering import greedy_answers
from memory_adapters.base_model.decoder import context_length
from memory_adapters.base_model.tokens import tokenize
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
    with enabled():
        after = greedy_answers(model, tokenizer, list(rows.values()), ANSWER_TOKENS)
    with disabled():
        before = greedy_answers(model, tokenizer, list(rows.values()), ANSWER_TOKENS)
    return [CardExample(*one) for one in zip(rows, before, after, strict=True)]
