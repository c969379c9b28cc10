"""The covariance C₀ = E[k kᵀ] of the keys that a model has already: what an edit must leave alone.

All layers are accumulated in one pass that stops at the last of them. C₀ is a mean of outer products, not centred
(MEMIT, eq. 15).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from memory_adapters.checkpoint import base_fingerprint, check_fingerprint, read_metadata, read_tensors, write_tensors
from memory_adapters.decoder import execution_device, find_decoder, mlp_projection, resolve_layers
from memory_adapters.forward_passes import capture_inputs, evaluating, inputs_of
from memory_adapters.hub import OneFile, find_file
from memory_adapters.memit.texts import portions, sample_tokens
from memory_adapters.model_card import HERE, file_card
from memory_adapters.processes import is_first, share_of, summed
from memory_adapters.tokens import batches_of, pad_rows

__all__ = ["Covariance", "CovarianceFitter"]

SNIPPET = f"""from memory_adapters import Covariance

covariance = Covariance.load("{HERE}")
memory.write(facts, covariance=covariance)  # a `MemitMemory`'s"""
ROW_LENGTH = 1024
SAMPLE_LENGTH = 64
SAMPLE_ROWS = 128
BUFFERED_KEYS = 2048
COLUMN_BLOCKS = 6


@dataclass(frozen=True, repr=False)
class Covariance(OneFile):
    """C₀ of some layers, and what it was computed from.

    Attributes:
        matrices: Layer to the mean of k kᵀ, (d_in, d_in), float32, symmetric.
        num_tokens: How many keys were averaged.
        num_texts: How many texts they come from.
        source: The text, in words.
        base_fingerprint: Which base model it belongs to; see `memory_adapters.checkpoint.base_fingerprint`.
    """

    file: ClassVar[str] = "covariance.safetensors"

    matrices: dict[int, Tensor]
    num_tokens: int
    num_texts: int
    source: str
    base_fingerprint: dict[str, Any]

    def shrunk(self, layer: int, shrinkage: float | None = None) -> Tensor:
        """(1 − ρ) C₀ + ρ m I in float64: invertible also when tokens are few.

        m is the median of C₀'s diagonal, not its mean: the first token of a text has keys of enormous norm in many
        models. Without `shrinkage`, ρ is the oracle-approximating one (Chen et al. 2010, eq. 23).

        Raises:
            ValueError: If C₀ lacks the layer, or holds NaN or infinity.
        """
        if layer not in self.matrices:
            raise ValueError(
                f"`covariance` has layers {sorted(self.matrices)}, but block {layer} is to be edited: "
                "fit it on the layers of the memory."
            )
        matrix = self.matrices[layer].double()
        if not torch.isfinite(matrix).all():
            raise ValueError(f"`covariance` of block {layer} holds NaN or infinity: check the model's weights.")
        rho = oracle_shrinkage(matrix, self.num_tokens) if shrinkage is None else shrinkage
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return (1 - rho) * matrix + rho * matrix.diagonal().median() * identity

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {"num_tokens": self.num_tokens, "num_texts": self.num_texts, "source": self.source}
        metadata = {"covariance": json.dumps({**about, "base_fingerprint": self.base_fingerprint}, sort_keys=True)}
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write_tensors(staging, {f"layer.{i}": matrix for i, matrix in self.matrices.items()}, metadata)
            os.replace(staging, target)
        finally:
            staging.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path_or_repo_id: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> Covariance:
        """Read what `save` or `push_to_hub` wrote.

        Args:
            path_or_repo_id: A file, a folder with `covariance.safetensors`, or a repository on the Hub.
            revision: Branch, tag or commit on the Hub.
            token: Access token for the Hub.

        Raises:
            FileNotFoundError: If there is no such file, or none in the folder or repository.
            OSError: What huggingface_hub raises if the repository or revision cannot be had.
            ValueError: If the file is damaged.
        """
        path = find_file(path_or_repo_id, cls.file, revision=revision, token=token)
        shapes, metadata = read_metadata(path)
        try:
            about = json.loads(metadata["covariance"])
            layers = {int(name.removeprefix("layer.")): shape for name, shape in shapes.items()}
            fields = (int(about["num_tokens"]), int(about["num_texts"]), str(about["source"]))
            fingerprint = dict(about["base_fingerprint"])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"`{path}` is not a saved covariance ({error!r}).") from error
        if any(len(shape) != 2 or shape[0] != shape[1] for shape in layers.values()):
            raise ValueError(f"`{path}` holds matrices that are not square: it is not a saved covariance.")
        tensors = read_tensors(path, {name: torch.Size(shape) for name, shape in shapes.items()})
        return cls({layer: tensors[f"layer.{layer}"] for layer in sorted(layers)}, *fields, fingerprint)

    def _card(self) -> str:
        layers = ", ".join(map(str, sorted(self.matrices)))
        return file_card(
            title="Covariance of MLP keys",
            tag="covariance",
            text="The mean of k kᵀ over a model's keys at the MLP output projections of some blocks, for MEMIT edits.",
            snippet=SNIPPET,
            about={"blocks": layers, "tokens": f"{self.num_tokens:,}", "texts": self.num_texts, "source": self.source},
            base_fingerprint=self.base_fingerprint,
        )

    def __repr__(self) -> str:
        return f"Covariance(layers={sorted(self.matrices)}, {self.num_tokens:,} tokens of {self.source})"


def oracle_shrinkage(matrix: Tensor, num_tokens: int) -> float:
    """ρ in [0, 1] that minimises the expected squared error of the shrunk matrix, were the keys Gaussian."""
    d = len(matrix)
    trace, squared = float(matrix.trace()), float(matrix.square().sum())
    denominator = (num_tokens + 1 - 2 / d) * (squared - trace**2 / d)
    return min(1.0, ((1 - 2 / d) * squared + trace**2) / denominator) if denominator > 0 else 1.0


class CovarianceFitter:
    """Accumulates Σ k kᵀ over texts, in any number of calls and processes.

    Args:
        model: A Hugging Face causal LM. What is active on it takes part.
        tokenizer: Its tokenizer.
        layers: Block indices, or a range of depth, as in `MemitConfig`.
        layers_path: Dotted name of the model's list of decoder blocks, where it is not recognised.

    Attributes:
        num_tokens: Keys so far, over all processes.
        num_texts: Texts so far: a stream is resumed after so many.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, layers: Sequence[int | float], *, layers_path: str | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.decoder = find_decoder(model, layers_path)
        self.layers = resolve_layers(layers, self.decoder.num_layers)
        self.base_fingerprint = base_fingerprint(model, layers_path)
        projections = [mlp_projection(self.decoder, layer) for layer in self.layers]
        self.modules = [projection.module for projection in projections]
        self.device = execution_device(self.decoder.embeddings)
        self.sums = [torch.zeros(p.in_features, p.in_features, device=self.device) for p in projections]
        self.num_tokens = self.num_texts = 0
        self.sources: list[str] = []

    def fit(
        self,
        texts: Any,
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
            ValueError: If the texts give no token, or the checkpoint belongs to another model or other layers.
        """
        if checkpoint is not None and Path(checkpoint).is_file():
            self.resume(Covariance.load(checkpoint))
            num_tokens -= self.num_tokens
        context = getattr(self.model.config, "max_position_embeddings", None) or ROW_LENGTH
        found = portions(
            texts,
            self.tokenizer,
            column=column,
            skip=self.num_texts,
            num_tokens=num_tokens,
            row_length=min(ROW_LENGTH, context),
        )
        self.sources.append(source or (str(texts) if isinstance(texts, os.PathLike) else "given texts"))
        with tqdm(total=max(num_tokens, 0), unit="token", desc="covariance", disable=not progress) as bar:
            for portion in found:
                for batch in share_of(list(batches_of(portion.rows))):
                    self.update([portion.rows[i] for i in batch])
                self.num_tokens += portion.num_tokens
                self.num_texts += portion.num_texts
                bar.update(portion.num_tokens)
                if checkpoint is not None:
                    result = self.covariance()
                    if is_first():
                        result.save(checkpoint)
        if self.num_tokens == 0:
            raise ValueError("`texts` gave no tokens: give texts that are not empty.")
        return self

    def sample(self, num_tokens: int, *, seed: int = 0, progress: bool = True) -> CovarianceFitter:
        """Add the keys of text that the model samples from itself: needs no data. Nothing is read twice."""
        buffers: list[list[Tensor]] = [[] for _ in self.modules]

        def receive(index: int, keys: Tensor) -> None:
            buffers[index].append(keys.reshape(-1, keys.shape[-1]))
            if sum(map(len, buffers[index])) >= BUFFERED_KEYS:
                add_gram(self.sums[index], torch.cat(buffers[index]))
                buffers[index].clear()

        rows = min(SAMPLE_ROWS, -(-num_tokens // SAMPLE_LENGTH))
        rounds = range(seed, seed + -(-num_tokens // (rows * SAMPLE_LENGTH)))
        with (
            tqdm(total=num_tokens, unit="token", desc="covariance of sampled text", disable=not progress) as bar,
            inputs_of(self.modules, receive),
            evaluating(self.model),
        ):
            for part in share_of(rounds):
                sample_tokens(self.model, self.tokenizer, rows=rows, length=SAMPLE_LENGTH, seed=part)
                bar.update(rows * SAMPLE_LENGTH)
        for total, parts in zip(self.sums, buffers, strict=True):
            if parts:
                add_gram(total, torch.cat(parts))
        self.num_tokens += len(rounds) * rows * SAMPLE_LENGTH
        self.num_texts += len(rounds) * rows
        self.sources.append(f"text sampled from the model (seed {seed})")
        return self

    def update(self, rows: Sequence[Sequence[int]]) -> None:
        """Add the keys at all tokens of `rows` (token ids), without counting them. Padding is left out."""
        inputs = pad_rows(rows, self.device)
        mask = inputs["attention_mask"].bool()
        whole = bool(mask.all())
        with evaluating(self.model):
            captured = capture_inputs(self.model, self.modules, **inputs)
        for total, keys in zip(self.sums, captured, strict=True):
            flat = keys.reshape(-1, keys.shape[-1])  # OPT's are flat already
            add_gram(total, flat if whole else flat[mask.flatten().to(flat.device)])

    def resume(self, saved: Covariance) -> None:
        """Go on from a covariance fitted before.

        Raises:
            ValueError: If it belongs to another model or other layers.
        """
        check_fingerprint(saved.base_fingerprint, self.base_fingerprint)
        if sorted(saved.matrices) != self.layers:
            raise ValueError(f"The checkpoint has layers {sorted(saved.matrices)}, the fitter {self.layers}.")
        for total, layer in zip(self.sums, self.layers, strict=True):
            total.copy_(saved.matrices[layer] * saved.num_tokens if is_first() else torch.zeros_like(total))
        self.num_tokens, self.num_texts, self.sources = saved.num_tokens, saved.num_texts, [saved.source]

    def covariance(self) -> Covariance:
        """C₀ so far, over all processes (which all must call this)."""
        means = {}
        for layer, total in zip(self.layers, self.sums, strict=True):
            upper = summed(total).triu()
            means[layer] = ((upper + upper.triu(1).T) / self.num_tokens).cpu()
        sources = ", ".join(dict.fromkeys(self.sources))
        return Covariance(means, self.num_tokens, self.num_texts, sources, self.base_fingerprint)


def add_gram(total: Tensor, keys: Tensor) -> None:
    """total += keysᵀ keys in float32, on and above the diagonal alone (by blocks of columns)."""
    keys = keys.to(total.device, total.dtype)
    width = -(-keys.shape[1] // COLUMN_BLOCKS)
    for start in range(0, keys.shape[1], width):
        total[start : start + width, start:].addmm_(keys[:, start : start + width].T, keys[:, start:])
