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

__all__ = ["held_out_perplexity", "load_wikitext", "perplexity", "perplexity_and_divergence", "predictions"]


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
    return perplexity_and_divergence(model, tokenizer, text, (), window=window, max_tokens=max_tokens)[0]


def perplexity_and_divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    base: Sequence[Tensor],
    *,
    window: int = 512,
    max_tokens: int | None = None,
) -> tuple[float, float | None]:
    """Return the perplexity of a text, and KL(base ‖ model) at its beginning: how far predictions moved, either way.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        text: As in `predictions`.
        base: What the base predicts in the first windows (tokens − 1, vocabulary), in any precision.
        window: As in `predictions`.
        max_tokens: As in `predictions`.

    Returns:
        The exp of the mean next-token loss, and nats a token; None for the latter where `base` is empty.

    Raises:
        ValueError: If `base` has other windows than the text.
    """
    loss, count, apart, compared, windows = 0.0, 0, 0.0, 0, list(base)
    for number, (found, following) in enumerate(
        predictions(model, tokenizer, text, window=window, max_tokens=max_tokens)
    ):
        loss += F.nll_loss(found, following, reduction="sum").item()
        count += len(following)
        if number < len(windows):
            if windows[number].shape != found.shape:
                break
            was = windows[number].to(found).log_softmax(-1)  # sums to 1 again after rounding
            apart += F.kl_div(found, was, reduction="sum", log_target=True).item()
            compared += len(found)
    if compared != sum(map(len, windows)):
        raise ValueError("`base` has other windows than the text: make it with the same text, window and max_tokens.")
    return math.exp(loss / count), apart / compared if compared else None


def held_out_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the perplexity on the held-out English sentences that every `WriteReport` is about."""
    return scored(model, tokenizer, []).perplexity
