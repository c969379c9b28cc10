"""Decode a model's greedy answers to prompts, as plain text and in the chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import execution_device
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.tokens import pad_rows, tokenize

__all__ = ["answered_in_chat", "greedy_answers"]

CHAT_TOKENS = 24


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], num_tokens: int
) -> list[str]:
    """Return greedy continuations of rows of token ids, in one batch with padding on the left."""
    device = execution_device(model.get_input_embeddings())
    backwards = pad_rows([row[::-1] for row in rows], device)
    inputs = {name: tensor.flip(1) for name, tensor in backwards.items()}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    with evaluating(model):
        ids = model.generate(  # type: ignore[operator]  # PreTrainedModel is no GenerationMixin
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=next(pad for pad in pads if pad is not None),
        )
    return list(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def answered_in_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]], longest: int
) -> list[bool | None]:
    """Return whether the model's greedy answer to each prompt, in the chat template, names its target.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        asked: (prompt, target).
        longest: Most tokens of a chat with its answer; a longer one is not tried.

    Returns:
        For each, None where it was not tried: no chat template, or one that does not render the prompt as it is.
    """
    found: list[bool | None] = [None] * len(asked)
    rendered = [rendered_question(tokenizer, prompt) for prompt, _ in asked]
    rows = {i: tokenize(tokenizer, chat[0], rendered=True) for i, chat in enumerate(rendered) if chat is not None}
    rows = {i: row for i, row in rows.items() if 0 < len(row) <= longest - CHAT_TOKENS}
    if rows:
        answers = greedy_answers(model, tokenizer, list(rows.values()), CHAT_TOKENS)
        for i, answer in zip(rows, answers, strict=True):
            found[i] = asked[i][1].strip().casefold() in answer.casefold()
    return found
