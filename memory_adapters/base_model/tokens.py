"""Rows of tokens: how text becomes them, how they are padded and batched, how a model scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import Decoder, execution_device
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.partial_forward import logits_at

__all__ = [
    "RowScores",
    "batches_of",
    "continued_prompt",
    "last_token_of",
    "pad_rows",
    "score_rows",
    "shared_length",
    "tokenize",
]

TOKENS_A_BATCH = 4096
VIRTUAL_TOKENS_A_BATCH = 65_536  # whose keys and values are copied for each row


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (rows, tokens) of rows padded on the right (with id 0, masked)."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches_of(
    rows: Sequence[Sequence[int]], tokens: int = TOKENS_A_BATCH, *, virtual_tokens: int = 0
) -> Iterator[list[int]]:
    """Yield indices of rows, in batches of like length and at most `tokens` tokens with padding (at least one row).

    Args:
        rows: Token ids.
        tokens: Most tokens a batch.
        virtual_tokens: How many a memory adds to each row. They cost mostly memory, for a row's own copy of their keys
            and values: a batch may have `VIRTUAL_TOKENS_A_BATCH` of them.
    """
    most = max(VIRTUAL_TOKENS_A_BATCH // virtual_tokens, 1) if virtual_tokens else len(rows)
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and ((len(batch) + 1) * len(rows[index]) > tokens or len(batch) == most):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool = False) -> list[int]:
    """Return token ids as the model reads a prompt: with the special tokens at the start, without one at the end.

    Args:
        tokenizer: The model's tokenizer.
        text: Any text.
        rendered: Whether it is a rendered chat, which has its special tokens already.
    """
    ids = list(tokenizer(text, add_special_tokens=not rendered)["input_ids"])
    ends = not rendered and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    # The end of text is left out if the tokenizer put it there, and not if the text has it.
    return ids[:-1] if ends and not text.rstrip().endswith(str(tokenizer.eos_token)) else ids


def continued_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, *, rendered: bool = False
) -> tuple[list[int], int]:
    """Return the tokens of a prompt with its continuation, and the index of the continuation's first token.

    The row begins with the very tokens that a model reads when it is asked the prompt. Where a token of the joined text
    would hold the end of the one and the beginning of the other, the continuation is tokenised apart: generation from
    the prompt cannot give such a token.

    Raises:
        ValueError: If the continuation has no tokens.
    """
    head = tokenize(tokenizer, prompt, rendered=rendered)
    joined = tokenize(tokenizer, prompt + continuation, rendered=rendered)
    if joined[: len(head)] != head:
        joined = head + _tokens_within(tokenizer, continuation)
    if len(joined) == len(head):
        raise ValueError(f"`target={continuation!r}` adds no token to `prompt={prompt!r}`: reword it.")
    return joined, len(head)


def _tokens_within(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of text that stands behind other text, without the space that some tokenizers put first."""
    for lead in ("\n", ".", "a"):
        before, ids = (tokenize(tokenizer, part, rendered=True) for part in (lead, lead + text))
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return tokenize(tokenizer, text, rendered=True)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common start of two token sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def last_token_of(
    tokenizer: PreTrainedTokenizerBase, text: str, end: int, ids: Sequence[int], *, rendered: bool = False
) -> int:
    """Return the index in `ids`, the tokens of `text`, of the token that holds character `end - 1`."""
    head = tokenize(tokenizer, text[:end], rendered=rendered)
    shared = shared_length(head, ids)
    return shared - 1 if shared == len(head) else min(shared, len(ids) - 1)


@dataclass(frozen=True)
class RowScores:
    """Report how well a model predicts the scored tokens of each row.

    Attributes:
        log_prob: Sum of their log-probabilities (rows,).
        right: How many are the model's first choice (rows,).
        count: How many there are (rows,).
    """

    log_prob: Tensor
    right: Tensor
    count: Tensor


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, decoder: Decoder, rows: Sequence[Sequence[int]], first: Sequence[int], tokens: int = 1024
) -> RowScores:
    """Score the tokens of each row from index `first` (at least 1) on, with logits computed only there.

    Args:
        model: A causal LM.
        decoder: Its parts.
        rows: Token ids.
        first: For each row, the index of the first token to score.
        tokens: Most tokens a batch, with padding.
    """
    scores = RowScores(*(torch.zeros(len(rows), dtype=torch.float32) for _ in range(3)))
    device = execution_device(decoder.embeddings)
    for batch in batches_of(rows, tokens):
        inputs = pad_rows([rows[i] for i in batch], device)
        wanted = inputs["attention_mask"].bool()
        for position, i in enumerate(batch):
            wanted[position, : first[i] - 1] = False
            wanted[position, len(rows[i]) - 1 :] = False
        targets = inputs["input_ids"].roll(-1, 1)[wanted]
        with exclusive_use(model), logits_at(decoder, wanted):
            logits = model(**inputs, use_cache=False).logits[0].float()
        owner = torch.tensor(batch)[wanted.nonzero()[:, 0].cpu()]
        scores.log_prob.index_add_(0, owner, -F.cross_entropy(logits, targets, reduction="none").cpu())
        scores.right.index_add_(0, owner, (logits.argmax(-1) == targets).float().cpu())
        scores.count.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float32))
    return scores
