"""Measure the perplexity of a text or of held-out sentences, and read WikiText."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device, find_decoder
from memory_adapters.base_model.scoring import scored

__all__ = ["held_out_perplexity", "load_wikitext", "perplexity"]


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
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    *,
    window: int = 512,
    max_tokens: int | None = None,
) -> float:
    """Return the exp of the mean next-token loss over windows of `window` tokens.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        text: Running text, or texts that are joined by newlines.
        window: Tokens a window; each window is read alone.
        max_tokens: Stop after so many tokens.
    """
    joined = text if isinstance(text, str) else "\n".join(text)
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"][:max_tokens]
    device = execution_device(find_decoder(model).embeddings)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        row = torch.tensor([ids[start : start + window]], device=device)
        if row.shape[1] > 1:
            # With a cache, slots that a memory puts before every text are not computed again in every pass.
            logits = model(input_ids=row, use_cache=True).logits[0, :-1].float()
            total += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            count += row.shape[1] - 1
    return math.exp(total / count)


def held_out_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the perplexity on the held-out English sentences that every `WriteReport` is about."""
    return scored(model, tokenizer, []).perplexity
