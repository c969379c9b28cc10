"""Decode a model's greedy answers to prompts, as plain text and in the chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.chat import rendered_question
from memory_adapters.base_model.decoder import execution_device
from memory_adapters.base_model.modes import generating
from memory_adapters.base_model.tokens import batches_of, pad_rows, tokenize

__all__ = ["CHAT_TOKENS", "answered_in_chat", "asked_row", "chat_answers", "greedy_answers"]

CHAT_TOKENS = 24
PLAIN_QUESTION = "Question: {question}\nAnswer:"  # to models without a chat template


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], num_tokens: int
) -> list[str]:
    """Return greedy continuations of rows of token ids, in one batch with padding on the left."""
    device = execution_device(model.get_input_embeddings())
    backwards = pad_rows([row[::-1] for row in rows], device)
    inputs = {name: tensor.flip(1) for name, tensor in backwards.items()}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    with generating(model):
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


def chat_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    num_tokens: int = CHAT_TOKENS,
    batch_tokens: int = 4096,
) -> list[str]:
    """Return the model's greedy answer to each question as a user asks it, up to where the model stops by itself.

    A question without a chat template to render it is asked as plain text, and the answer's first line is taken. Equal
    questions in equal order are asked in equal batches, so that answers can be compared letter for letter.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        questions: What is asked.
        num_tokens: Most tokens of an answer.
        batch_tokens: Most tokens of questions and answers in a batch, with padding.
    """
    asked = [asked_row(tokenizer, question) for question in questions]
    rows = [row for row, _ in asked]
    answers = [""] * len(rows)
    for batch in batches_of([[*row, *[0] * num_tokens] for row in rows], batch_tokens):
        said = greedy_answers(model, tokenizer, [rows[i] for i in batch], num_tokens)
        for i, answer in zip(batch, said, strict=True):
            answers[i] = answer if asked[i][1] else next(iter(answer.strip().splitlines()), "")
    return answers


def asked_row(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[list[int], bool]:
    """Return the tokens of a question up to where the model answers, and whether they are in the chat template."""
    chat = rendered_question(tokenizer, question)
    if chat is None:
        return tokenize(tokenizer, PLAIN_QUESTION.format(question=question)), False
    return tokenize(tokenizer, chat[0], rendered=True), True
