"""Measure the perplexity of a text or of held-out sentences, and how far predictions moved; read WikiText."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.scoring import scored

__all__ = ["divergence", "held_out_perplexity", "load_wikitext", "perplexity", "predictions"]


def load_wikitext(path: str | os.PathLike[str]) -> str:
    """Read a WikiText file and undo its tokenisation: `@-@`, `<unk>`, detached punctuation and headings."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    text = re.sub(r" ?<unk>", "", text)
    text = re.sub(r"^ *=.*= *$", "", text, flags=re.MULTILINE)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" 's\b", "'s", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


@torch.no_grad()
def predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    window: int = 512,
    max_tokens: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what a model predicts in each window of a text, and what follows.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        text: Running text, or texts that are joined by newlines.
        window: Tokens a window; each window is read alone.
        max_tokens: Stop after so many tokens.

    Yields:
        Log-probabilities (tokens − 1, vocabulary), float32, and the tokens that follow (tokens − 1,).
    """
    joined = text if isinstance(text, str) else "\n".join(text)
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"][:max_tokens]
    device = execution_device(find_decoder(model).embeddings)
    for start in range(0, len(ids) - 1, window):
        row = torch.tensor([ids[start : start + window]], device=device)
        if row.shape[1] > 1:
            # With a cache, slots that a memory puts before every text are not computed again in every pass.
            yield model(input_ids=row, use_cache=True).logits[0, :-1].float().log_softmax(-1), row[0, 1:]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    window: int = 512,
    max_tokens: int | None = None,
) -> float:
    """Return the exp of the mean next-token loss over windows of a text. Arguments as in `predictions`."""
    total, count = 0.0, 0
    for found, following in predictions(model, tokenizer, text, window=window, max_tokens=max_tokens):
        total += F.nll_loss(found, following, reduction="sum").item()
        count += len(following)
    return math.exp(total / count)


def divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    base: Sequence[Tensor],
    *,
    window: int = 512,
    max_tokens: int | None = None,
) -> float:
    """Return KL(base ‖ model) in nats, the mean over the tokens of a text: how far predictions moved, for good or bad.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        text: As in `predictions`.
        base: What the base predicts there, window by window (tokens − 1, vocabulary), in any precision.
        window: As in `predictions`.
        max_tokens: As in `predictions`.

    Raises:
        ValueError: If `base` has other windows than the text.
    """
    total, count, windows = 0.0, 0, iter(base)
    for found, _ in predictions(model, tokenizer, text, window=window, max_tokens=max_tokens):
        was = next(windows, None)
        if was is None or was.shape != found.shape:
            raise ValueError(
                "`base` has other windows than the text: make it with the same text, window and max_tokens."
            )
        was = was.to(found).log_softmax(-1)  # sums to 1 again after rounding
        total += F.kl_div(found, was, reduction="sum", log_target=True).item()
        count += len(found)
    return total / count


def held_out_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the perplexity on the held-out English sentences that every `WriteReport` is about."""
    return scored(model, tokenizer, []).perplexity
