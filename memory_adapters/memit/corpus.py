"""Rows of tokens from whatever text there is: strings, a file, a data set, a stream, or the model itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import execution_device
from memory_adapters.base_model.partial_forward import CACHE, positioned
from memory_adapters.base_model.seeding import seeded

__all__ = ["Portion", "Texts", "portions", "sample_tokens"]

Texts: TypeAlias = str | os.PathLike[str] | Iterable[str | Mapping[str, object]]
"""Strings, the path of a text file, or rows with a text column; see `read_texts`."""

PORTION_TOKENS = 32768


@dataclass(frozen=True)
class Portion:
    """Store the next rows of a source.

    Attributes:
        rows: Token ids.
        num_texts: How many texts of the source they come from.
        texts_sha256: Hash of all texts of the source so far, one chained to the next.
    """

    rows: list[list[int]]
    num_texts: int
    texts_sha256: str

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def portions(
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    skip: int,
    num_tokens: int,
    row_length: int,
    skipped_sha256: str | None = None,
) -> Iterator[Portion]:
    """Cut texts into rows of at most `row_length` tokens, until there are `num_tokens`; the last row is cut to fit.

    Args:
        texts: See `read_texts`.
        tokenizer: Turns text into tokens.
        column: Name of the text column.
        skip: Texts to leave out at the start.
        num_tokens: Budget.
        row_length: Longest row.
        skipped_sha256: What the texts that are left out must hash to, if that is known.

    Raises:
        ValueError: If they do not.
    """
    rows: list[list[int]] = []
    count = taken = number = 0
    digest = ""
    for number, text in enumerate(read_texts(texts, column)):
        if number == skip:
            _check_skipped(digest, skipped_sha256)
        if number >= skip and num_tokens <= 0:
            break
        digest = hashlib.sha256(f"{digest} {text}".encode("utf-8", "surrogatepass")).hexdigest()
        if number < skip:
            continue
        taken += 1
        ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])[:num_tokens]
        num_tokens -= len(ids)
        count += len(ids)
        rows += [ids[start : start + row_length] for start in range(0, len(ids), row_length)]
        if count >= PORTION_TOKENS:
            yield Portion(rows, taken, digest)
            rows, count, taken = [], 0, 0
    if number < skip:
        _check_skipped(digest, skipped_sha256)
    if rows:
        yield Portion(rows, taken, digest)


def _check_skipped(digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise ValueError("`checkpoint` is of other texts than `texts` begins with: give each text a file of its own.")


def read_texts(texts: Texts, column: str = "text") -> Iterator[str]:
    """Yield texts that are not blank, from strings, the path of a file (a paragraph a line), or rows with a column.

    Raises:
        TypeError: If `texts` is none of these.
        ValueError: If a row lacks the column.
    """
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and len(texts) < 4096 and os.path.isfile(texts)):
        with open(texts, encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
        return
    if isinstance(texts, str):
        yield texts
        return
    if not isinstance(texts, Iterable):
        raise TypeError(
            f"`texts` is a {type(texts).__name__}; give strings, a text file's path, or rows with a column."
        )
    row: object
    for row in texts:
        if isinstance(row, Mapping):
            if column not in row:
                raise ValueError(f"`column={column!r}` is not in the data's columns {sorted(row)}.")
            row = row[column]
        if not isinstance(row, str):
            raise TypeError(f"`texts` holds a {type(row).__name__}; give strings, or rows with a text column.")
        if row.strip():
            yield row


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int, length: int, seed: int
) -> Tensor:
    """Sample tokens (rows, length) that continue the model's beginning-of-text token, at temperature 1.

    A plain loop: one uniform number a token and the inverse of the distribution function are several times cheaper
    than `generate`'s noise for every word of the vocabulary, and the model reads each token just once.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    device = execution_device(model.get_input_embeddings())
    ids = torch.full((rows, 1), start or 0, device=device)
    found: list[Tensor] = []
    cache = None
    with seeded(seed):
        for _ in range(length):
            mask = torch.ones(rows, len(found) + 1, dtype=torch.long, device=device)
            # Positions are given where they are taken: some models would go on from those of an earlier `generate`.
            inputs = positioned(model, mask, len(found))
            out = model(input_ids=ids, **inputs, **{CACHE: cache}, use_cache=True)
            cache = out[CACHE]
            cumulated = out.logits[:, -1].float().softmax(-1).cumsum(-1)
            drawn = torch.rand(rows, 1, dtype=torch.float32).to(device) * cumulated[:, -1:]
            ids = torch.searchsorted(cumulated, drawn, right=True).clamp(max=cumulated.shape[-1] - 1)
            found.append(ids)
    return torch.cat(found, 1)
