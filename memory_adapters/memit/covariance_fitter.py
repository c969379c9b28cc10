"""Fitting a covariance: over texts of the user's or the model's own, in any number of calls and processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memory_adapters.base_model.decoder import context_length, execution_device, find_decoder, resolve_layers
from memory_adapters.base_model.exclusive import exclusive_use
from memory_adapters.base_model.fingerprint import base_fingerprint, check_fingerprint
from memory_adapters.base_model.modes import evaluating
from memory_adapters.base_model.nonfinite import origin, rows_not_finite
from memory_adapters.base_model.partial_forward import capture_inputs, inputs_of
from memory_adapters.base_model.sampling import PLAIN_SENTENCES
from memory_adapters.base_model.tokens import batches_of, pad_rows, tokenize
from memory_adapters.memit.corpus import Portion, Texts, portions, sample_tokens
from memory_adapters.memit.covariance import Covariance
from memory_adapters.memit.projection import mlp_projection
from memory_adapters.peft_layers.virtual_tokens import virtual_tokens_disabled
from memory_adapters.training.distributed import all_reduce_sum, is_main_process, share_of

__all__ = ["CovarianceFitter"]

ROW_LENGTH = 1024
SAMPLE_LENGTH = 64
SAMPLE_ROWS = 128
BUFFERED_KEYS = 2048
COLUMN_BLOCKS = 6


class CovarianceFitter:
    """Accumulate Σ k kᵀ over texts, in any number of calls and processes.

    Args:
        model: A Hugging Face causal LM. What is active on it takes part, but for memory slots.
        tokenizer: Its tokenizer.
        layers: Block indices, or a range of depth, as in `MemitConfig`.
        layers_path: Dotted name of the model's list of decoder blocks, where it is not recognised.

    Attributes:
        num_tokens: Keys so far, over all processes.
        num_texts: Texts so far: a stream is resumed after so many.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[int | float],
        *,
        layers_path: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.decoder = find_decoder(model, layers_path)
        self.layers = resolve_layers(layers, self.decoder.num_layers)
        self.base_fingerprint = base_fingerprint(model, layers_path)
        projections = [mlp_projection(self.decoder, layer) for layer in self.layers]
        self.modules = [projection.module for projection in projections]
        self.device = execution_device(self.decoder.embeddings)
        self.sums = [
            torch.zeros(p.in_features, p.in_features, dtype=torch.float32, device=self.device) for p in projections
        ]
        self.num_tokens = self.num_texts = 0
        self.sources: list[str] = []
        self.texts_sha256: str | None = None
        self.halfway = False  # while some keys of a pass are added, and others are not

    def fit(
        self,
        texts: Texts,
        num_tokens: int,
        *,
        column: str = "text",
        source: str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> CovarianceFitter:
        """Read texts until `num_tokens` tokens have been seen, in rows of at most 1,024.

        Args:
            texts: Strings; the path of a text file (a paragraph a line); or rows with a text column, such as a
                `datasets` dataset, streaming or not. In several processes, each takes its share of the same texts.
            num_tokens: Budget of this call; if it goes on from a checkpoint, of all calls.
            column: Name of the text column.
            source: What the text is, for the record.
            checkpoint: A file to keep the state in. If it exists, fitting goes on from it.
            progress: Show a bar.

        Raises:
            ValueError: If the texts give no token, or the checkpoint belongs to another model, other layers or other
                texts.
        """
        saved = Covariance.load(checkpoint) if checkpoint is not None and Path(checkpoint).is_file() else None
        if saved is not None:
            self._check(saved)
            num_tokens -= saved.num_tokens
        found = portions(
            texts,
            self.tokenizer,
            column=column,
            skip=self.num_texts if saved is None else saved.num_texts,
            num_tokens=num_tokens,
            row_length=min(ROW_LENGTH, context_length(self.model)),
            skipped_sha256=None if saved is None else saved.texts_sha256,
        )
        first = list(islice(found, 1))  # or else it is of other texts
        if saved is not None:
            self.resume(saved)
        self.sources.append(source or (str(texts) if isinstance(texts, os.PathLike) else "given texts"))
        bar = tqdm(total=max(num_tokens, 0), unit="token", desc="covariance", disable=not progress)
        with exclusive_use(self.model), virtual_tokens_disabled(self.model), bar:
            for portion in chain(first, found):
                self._add(portion)
                self.num_tokens += portion.num_tokens
                self.num_texts += portion.num_texts
                self.texts_sha256 = portion.texts_sha256
                bar.update(portion.num_tokens)
                if checkpoint is not None:
                    result = self.covariance()
                    if is_main_process():
                        result.save(checkpoint)
                    self.resume(result)  # as a run that is killed now will: both come to the same bits
        if self.num_tokens == 0:
            raise ValueError("`texts` gave no tokens: give texts that are not empty.")
        return self

    def _add(self, portion: Portion) -> None:
        """Add the keys of a portion; if that fails or is interrupted, what was added by then is counted."""
        added = 0
        try:
            for batch in share_of(list(batches_of(portion.rows))):
                rows = [portion.rows[i] for i in batch]
                self.update(rows)
                added += sum(map(len, rows))
        except BaseException:
            self.num_tokens += added
            raise

    def sample(self, num_tokens: int, *, seed: int = 0, progress: bool = True) -> CovarianceFitter:
        """Add the keys of text that the model samples from itself: needs no data. Nothing is read twice."""
        buffers: list[list[Tensor]] = [[] for _ in self.modules]
        unfit: list[int] = []

        def receive(index: int, keys: Tensor) -> None:
            unfit.extend([] if torch.isfinite(keys).all() else [self.layers[index]])
            buffers[index].append(keys.reshape(-1, keys.shape[-1]))
            if sum(map(len, buffers[index])) >= BUFFERED_KEYS:
                add_gram(self.sums[index], torch.cat(buffers[index]))
                buffers[index].clear()

        self.halfway = True
        rows = min(SAMPLE_ROWS, -(-num_tokens // SAMPLE_LENGTH))
        rounds = range(seed, seed + -(-num_tokens // (rows * SAMPLE_LENGTH)))
        with (
            tqdm(total=num_tokens, unit="token", desc="covariance of sampled text", disable=not progress) as bar,
            exclusive_use(self.model),
            virtual_tokens_disabled(self.model),
            inputs_of(self.modules, receive),
            evaluating(self.model),
        ):
            for part in share_of(rounds):
                sample_tokens(self.model, self.tokenizer, rows=rows, length=SAMPLE_LENGTH, seed=part)
                bar.update(rows * SAMPLE_LENGTH)
                if unfit:
                    break
        if unfit:
            plain = pad_rows([tokenize(self.tokenizer, sentence) for sentence in PLAIN_SENTENCES], self.device)
            raise ValueError(
                f"The keys at block {unfit[0]} hold NaN or infinity in text sampled from the model: "
                f"{origin(self.model, self.decoder, plain)}. Make another fitter then."
            )
        for total, parts in zip(self.sums, buffers, strict=True):
            if parts:
                add_gram(total, torch.cat(parts))
        self.num_tokens += len(rounds) * rows * SAMPLE_LENGTH
        self.num_texts += len(rounds) * rows
        self.sources.append(f"text sampled from the model (seed {seed})")
        self.halfway = False
        return self

    def update(self, rows: Sequence[Sequence[int]]) -> None:
        """Add the keys at all tokens of `rows` (token ids), without counting them. Padding is left out."""
        inputs = pad_rows(rows, self.device)
        mask = inputs["attention_mask"].bool()
        whole = bool(mask.all())
        with evaluating(self.model):
            captured = capture_inputs(self.model, self.modules, **inputs)
        flat = [keys.reshape(-1, keys.shape[-1]) for keys in captured]  # OPT's are flat already
        flat = [keys if whole else keys[mask.flatten().to(keys.device)] for keys in flat]
        for layer, keys in zip(self.layers, flat, strict=True):
            if bad := rows_not_finite(keys):
                row = rows[int(mask.nonzero()[bad[0], 0])]
                raise ValueError(
                    f"The keys at block {layer} hold NaN or infinity for {self.tokenizer.decode(list(row[:16]))!r}: "
                    f"{origin(self.model, self.decoder, pad_rows([row], self.device))}."
                )
        self.halfway = True
        for total, keys in zip(self.sums, flat, strict=True):
            add_gram(total, keys)
        self.halfway = False

    def resume(self, saved: Covariance) -> None:
        """Go on from a covariance fitted before.

        Raises:
            ValueError: If it belongs to another model or other layers.
        """
        self._check(saved)
        self.halfway = True
        for total, layer in zip(self.sums, self.layers, strict=True):
            total.copy_(saved.matrices[layer] * saved.num_tokens if is_main_process() else torch.zeros_like(total))
        self.num_tokens, self.num_texts, self.sources = saved.num_tokens, saved.num_texts, [saved.source]
        self.texts_sha256, self.halfway = saved.texts_sha256, False

    def _check(self, saved: Covariance) -> None:
        check_fingerprint(saved.base_fingerprint, self.base_fingerprint)
        if sorted(saved.matrices) != self.layers:
            raise ValueError(
                f"The checkpoint has layers {sorted(saved.matrices)}, the fitter {self.layers}: give each its own file."
            )
        saved.check_widths({layer: len(total) for layer, total in zip(self.layers, self.sums, strict=True)})

    def covariance(self) -> Covariance:
        """Return C₀ so far, over all processes (which all must call this).

        Raises:
            RuntimeError: If a pass was interrupted, or failed, when it had added some of its keys.
        """
        if self.halfway:
            raise RuntimeError(
                "The fit was interrupted while keys were being added: make another fitter, and give it the "
                "`checkpoint` if there is one."
            )
        means = {}
        for layer, total in zip(self.layers, self.sums, strict=True):
            upper = all_reduce_sum(total.triu())
            means[layer] = ((upper + upper.triu(1).T) / self.num_tokens).cpu()
        sources = ", ".join(dict.fromkeys(self.sources))
        return Covariance(means, self.num_tokens, self.num_texts, sources, self.base_fingerprint, self.texts_sha256)


def add_gram(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to `total` in float32, on and above the diagonal alone (by blocks of columns)."""
    keys = keys.to(total.device, total.dtype)
    width = -(-keys.shape[1] // COLUMN_BLOCKS)
    for start in range(0, keys.shape[1], width):
        total[start : start + width, start:].addmm_(keys[:, start : start + width].T, keys[:, start:])
