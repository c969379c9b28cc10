"""The covariance C₀ = E[k kᵀ] of the keys that a model has already: what an edit must leave alone.

All layers are accumulated in one pass that stops at the last of them. C₀ is a mean of outer products, not centred
(MEMIT, eq. 15).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from memory_adapters.base_model.fingerprint import Fingerprint
from memory_adapters.files.atomic import atomic_file
from memory_adapters.files.hub import OneFile
from memory_adapters.files.model_card import HERE, file_card
from memory_adapters.files.strict_json import parse_json
from memory_adapters.files.tensors import read_metadata, read_tensors, write_tensors
from memory_adapters.validation import check_fingerprint_fields, check_name, check_number

__all__ = ["Covariance"]

SNIPPET = f"""from memory_adapters import Covariance

covariance = Covariance.load("{HERE}")
memory.write(facts, covariance=covariance)  # a `MemitMemory`'s"""


@dataclass(frozen=True, repr=False)
class Covariance(OneFile):
    """Store C₀ of some layers, and what it was computed from.

    Attributes:
        matrices: Layer to the mean of k kᵀ, (d_in, d_in), float32, symmetric.
        num_tokens: How many keys were averaged.
        num_texts: How many texts they come from.
        source: The text, in words.
        base_fingerprint: Which base model it belongs to; see `memory_adapters.base_model.fingerprint.base_fingerprint`.
        texts_sha256: Hash of the texts, so that a fit can only be gone on with on the same; None if not known.
    """

    file: ClassVar[str] = "covariance.safetensors"

    matrices: dict[int, Tensor]
    num_tokens: int
    num_texts: int
    source: str
    base_fingerprint: Fingerprint
    texts_sha256: str | None = None

    def shrunk(self, layer: int, shrinkage: float | None = None) -> Tensor:
        """Return (1 − ρ) C₀ + ρ D (d_in, d_in) in float64: invertible also when tokens are few.

        D is C₀'s diagonal, and nowhere less than its median; where most components are always 0, than that of the
        others. Without `shrinkage`, ρ is the oracle-approximating one (Chen et al. 2010, eq. 23) of keys divided by D's
        root: in many models the first token of a text has a key of enormous norm, and ρ of the keys as they are is next
        to 0, however few the tokens.

        Raises:
            ValueError: If C₀ lacks the layer, is 0, or holds NaN or infinity.
        """
        if layer not in self.matrices:
            raise ValueError(
                f"`covariance` has layers {sorted(self.matrices)}, but block {layer} is to be edited: "
                "fit it on the layers of the memory."
            )
        matrix = self.matrices[layer].double()
        if not torch.isfinite(matrix).all():
            raise ValueError(f"`covariance` of block {layer} holds NaN or infinity: check the model's weights.")
        diagonal = matrix.diagonal()
        if not (diagonal > 0).any():
            raise ValueError(
                f"`covariance` of block {layer} is 0: no text moved the block's MLP; fit it on other texts."
            )
        m = diagonal.median() if diagonal.median() > 0 else diagonal[diagonal > 0].median()
        target = diagonal.clamp(min=m)
        if shrinkage is None:
            scale = target.rsqrt()
            shrinkage = oracle_shrinkage(scale[:, None] * matrix * scale, self.num_tokens)
        return (1 - shrinkage) * matrix + shrinkage * target.diag()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        about = {"num_tokens": self.num_tokens, "num_texts": self.num_texts, "source": self.source}
        about |= {} if self.texts_sha256 is None else {"texts_sha256": self.texts_sha256}
        metadata = {"covariance": json.dumps({**about, "base_fingerprint": self.base_fingerprint}, sort_keys=True)}
        with atomic_file(path) as staging:
            write_tensors(staging, {f"layer.{i}": matrix for i, matrix in self.matrices.items()}, metadata)

    @classmethod
    def _read(cls, path: Path) -> Covariance:
        shapes, metadata = read_metadata(path)
        try:
            about = parse_json(metadata["covariance"])
            layers = {int(name.removeprefix("layer.")): shape for name, shape in shapes.items()}
            if not layers or {f"layer.{layer}" for layer in layers} != set(shapes):
                raise ValueError("its tensors are not those of layers")
            counts = about["num_tokens"], about["num_texts"]
            check_number("num_tokens", counts[0], low=1, integer=True)
            check_number("num_texts", counts[1], low=0, integer=True)
            source, fingerprint = about["source"], about["base_fingerprint"]
            if not isinstance(source, str):
                raise ValueError("`source` is no text")
            check_name("texts_sha256", digest := about.get("texts_sha256"))
            check_fingerprint_fields("base_fingerprint", fingerprint)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"`{path}` is not a saved covariance ({error}).") from error
        if any(len(shape) != 2 or shape[0] != shape[1] or not shape[0] for shape in layers.values()):
            raise ValueError(f"`{path}` holds matrices that are not square: it is not a saved covariance.")
        tensors = read_tensors(path, {name: torch.Size(shape) for name, shape in shapes.items()})
        if any(not torch.equal(C, C.T) or (C.diagonal() < 0).any() for C in tensors.values()):
            raise ValueError(f"`{path}` holds matrices that are no covariances: they must be symmetric.")
        return cls({layer: tensors[f"layer.{layer}"] for layer in sorted(layers)}, *counts, source, fingerprint, digest)

    def check_widths(self, widths: Mapping[int, int]) -> None:
        """Raise a `ValueError` if C₀ of one of these blocks is not d_in wide."""
        for layer, width in widths.items():
            if layer in self.matrices and len(self.matrices[layer]) != width:
                raise ValueError(
                    f"`covariance` of block {layer} is {len(self.matrices[layer])} wide, the keys there {width}: fit "
                    "it on this model."
                )

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
    """Return the ρ in [0, 1] that minimises the expected squared error of the shrunk matrix, were the keys Gaussian."""
    d = len(matrix)
    trace, squared = float(matrix.trace()), float(matrix.square().sum())
    denominator = (num_tokens + 1 - 2 / d) * (squared - trace**2 / d)
    return min(1.0, ((1 - 2 / d) * squared + trace**2) / denominator) if denominator > 0 else 1.0
