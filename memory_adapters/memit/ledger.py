"""The ledger of an edit: its facts, and all that is needed to solve for the edit again without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from memory_adapters.items import Fact, by_subject
from memory_adapters.memit.solvers import Cost, dense_readout, readout

__all__ = ["Factors", "Ledger"]

LEAST_REGULARIZATION = 0.2


@dataclass(frozen=True)
class Factors:
    """Store ΔW = B A of one layer.

    Attributes:
        A: (rank, d_in), float32.
        B: (hidden_size, rank), float32.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Ledger:
    """Store what was written, subject by subject. A value: changes make a new one.

    Attributes:
        facts: The facts, which have n subjects; see `subjects`.
        keys: Layer to keys (n · c, d_in), float32: c for each subject in turn (the mean of its bare prompts', that
            behind prefixes, that in the chat template), each divided by √c.
        shares: Layer to the change of the projection's output asked of it (n, hidden_size), float32.
        whitened: Layer to rows M⁻¹ k (n · c, d_in), float64, at λ = d_in; empty where `inverses` is not.
        inverses: Layer to M⁻¹ (d_in, d_in), float64, at λ = d_in: smaller than `whitened` once n · c ≥ d_in; otherwise
            empty.
        half: Whether `plus` and `subset` round what they keep to what a file holds: rows to float16 times a number a
            row, and M⁻¹ to float32, which changes ΔW by 3e-4 of its norm. A solver that is exact needs more.
        regularization: λ as a share of d_in, with which `solve` scales M; None for 0.2 + n ÷ d_in.
    """

    facts: tuple[Fact, ...]
    keys: dict[int, Tensor]
    shares: dict[int, Tensor]
    whitened: dict[int, Tensor] = field(default_factory=dict)
    inverses: dict[int, Tensor] = field(default_factory=dict)
    half: bool = False
    regularization: float | None = 1.0

    @classmethod
    def empty(
        cls, layers: Mapping[int, int], hidden_size: int, *, half: bool = False, regularization: float | None = 1.0
    ) -> Ledger:
        """Return the ledger of no facts, for layers and their d_in."""
        none = {layer: torch.zeros(0, width, dtype=torch.float32) for layer, width in layers.items()}
        shares = {layer: torch.zeros(0, hidden_size, dtype=torch.float32) for layer in layers}
        whitened = {layer: torch.zeros(0, width, dtype=torch.float64) for layer, width in layers.items()}
        return cls((), none, shares, whitened, half=half, regularization=regularization)

    @property
    def layers(self) -> list[int]:
        return sorted(self.keys)

    @cached_property
    def subjects(self) -> list[list[Fact]]:
        """The facts about each subject, in the order of the tensors' rows."""
        return by_subject(self.facts)

    @property
    def num_subjects(self) -> int:
        """Number of subjects n."""
        return len(next(iter(self.shares.values())))

    @property
    def keys_per_subject(self) -> int:
        """Number of keys c that each subject has."""
        return max((len(keys) // self.num_subjects for keys in self.keys.values() if self.facts), default=1)

    def plus(self, other: Ledger, costs: Mapping[int, Cost]) -> Ledger:
        """Return a ledger with the subjects of `other` too, none of which it has, and every key measured by `costs`."""
        keys = {layer: torch.cat([self.keys[layer], self._kept(other.keys[layer])]) for layer in self.layers}
        shares = {layer: torch.cat([self.shares[layer], self._kept(other.shares[layer])]) for layer in self.layers}
        joined = replace(self, facts=(*self.facts, *other.facts), keys=keys, shares=shares)
        many = [layer for layer in self.layers if len(keys[layer]) >= keys[layer].shape[1]]
        few = [layer for layer in self.layers if layer not in many]
        return replace(
            joined,
            whitened={layer: self._kept(costs[layer].whiten(keys[layer].T.double()).T) for layer in few},
            inverses={layer: self._symmetric(costs[layer].whiten(_identity(keys[layer]))) for layer in many},
        )

    def _kept(self, rows: Tensor) -> Tensor:
        """Return rows as this ledger keeps them."""
        return _rounded(rows) if self.half else rows

    def _symmetric(self, inverse: Tensor) -> Tensor:
        """Return M⁻¹ with its lower triangle in the upper one too, as a file holds it."""
        lower = (inverse.float().double() if self.half else inverse).tril()
        return lower + lower.tril(-1).T

    def subset(self, indices: Sequence[int]) -> Ledger:
        """Return a ledger of the subjects with these indices alone, in their order."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        each = self.keys_per_subject
        own = (rows[:, None] * each + torch.arange(each)).flatten()
        whitened = {layer: rows_of[own] for layer, rows_of in self.whitened.items()}
        keys = {layer: rows_of[own] for layer, rows_of in self.keys.items()}
        inverses = {}
        for layer, inverse in self.inverses.items():
            if len(own) >= len(inverse):
                inverses[layer] = inverse
            else:
                whitened[layer] = self._kept(keys[layer].double() @ inverse)
        shares = {layer: rows_of[rows] for layer, rows_of in self.shares.items()}
        facts = tuple(fact for i in indices for fact in self.subjects[i])
        return replace(self, facts=facts, keys=keys, shares=shares, whitened=whitened, inverses=inverses)

    def entries_of(self, subjects: Sequence[Sequence[Fact]], keys_per_subject: int) -> Ledger:
        """Return those of some subjects of which the same facts are held, as they were before any solve.

        Args:
            subjects: The facts about each.
            keys_per_subject: As many as they have here, or 1 for the mean.
        """
        places = {frozenset(own): i for i, own in enumerate(self.subjects)}
        found = self.subset([places[frozenset(own)] for own in subjects if frozenset(own) in places])
        each, keys = found.keys_per_subject, found.keys
        if keys_per_subject < each:
            keys = {layer: rows.unflatten(0, (-1, each)).sum(1) / each**0.5 for layer, rows in keys.items()}
        return Ledger(found.facts, keys, found.shares)

    def solve(self) -> dict[int, Factors]:
        """Return ΔW of every layer. What a layer fails to realise is shared out among those above it."""
        solved: dict[int, Factors] = {}
        each = self.keys_per_subject
        carried = torch.zeros_like(self.shares[self.layers[0]], dtype=torch.float64)
        for i, layer in enumerate(self.layers):
            left = len(self.layers) - i
            keys = self.keys[layer].double()
            scale = self._lambda_share(keys.shape[1])
            if layer in self.inverses:
                A = dense_readout(keys.T, self.inverses[layer] / scale)
            else:
                A = readout(keys.T, self.whitened[layer].T / scale)
            A, keys = (rows.unflatten(0, (self.num_subjects, each)).sum(1) / each**0.5 for rows in (A, keys))
            R = self.shares[layer].double() + carried / left
            carried = carried * (1 - 1 / left) + R - (A @ keys.T).T @ R
            solved[layer] = _thin(R.T, A)
        return solved

    def _lambda_share(self, d_in: int) -> float:
        """Return λ ÷ d_in. By default it grows with the subjects, as what they all say to an ordinary token does."""
        return LEAST_REGULARIZATION + self.num_subjects / d_in if self.regularization is None else self.regularization

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a file."""
        found: dict[str, Tensor] = {}
        for kind in ("keys", "shares", "whitened"):
            for layer, rows in getattr(self, kind).items():
                name = f"{kind}.{layer}"
                found |= {name: _halves(rows), f"{name}.scale": _scale(rows)} if self.half else {name: rows}
        for layer, inverse in self.inverses.items():
            triangle = inverse[tuple(torch.tril_indices(*inverse.shape))]
            found[f"inverses.{layer}"] = triangle.float() if self.half else triangle
        return found

    @staticmethod
    def tensor_shapes(
        num_subjects: int,
        layers: Mapping[int, int],
        hidden_size: int,
        keys_per_subject: int = 1,
        *,
        half: bool = False,
    ) -> dict[str, torch.Size]:
        """Return names and shapes of `tensors` for so many subjects."""
        rows = num_subjects * keys_per_subject
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, width in layers.items():
            shapes[f"keys.{layer}"] = (rows, width)
            shapes[f"shares.{layer}"] = (num_subjects, hidden_size)
            if rows < width:
                shapes[f"whitened.{layer}"] = (rows, width)
        if half:
            shapes |= {f"{name}.scale": (shape[0], 1) for name, shape in shapes.items()}
        for layer, width in layers.items():
            if rows >= width:
                shapes[f"inverses.{layer}"] = (width * (width + 1) // 2,)
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    @classmethod
    def from_tensors(
        cls,
        facts: Sequence[Fact],
        tensors: Mapping[str, Tensor],
        *,
        half: bool = False,
        regularization: float | None = 1.0,
    ) -> Ledger:
        """Undo `tensors`."""
        kinds: dict[str, dict[int, Tensor]] = {"keys": {}, "shares": {}, "whitened": {}, "inverses": {}}
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            if layer.endswith(".scale"):
                continue
            if kind == "inverses":
                width = int((2 * len(tensor)) ** 0.5)
                inverse = torch.zeros(width, width, dtype=torch.float64)
                inverse[tuple(torch.tril_indices(width, width))] = tensor.double()
                tensor = inverse + inverse.tril(-1).T
            elif half:
                tensor = tensor.float() * tensors[f"{name}.scale"]
            if kind == "whitened":
                tensor = tensor.double()
            kinds[kind][int(layer)] = tensor
        return cls(tuple(facts), **kinds, half=half, regularization=regularization)


def _scale(rows: Tensor) -> Tensor:
    """Return the largest size in each row (rows, 1), float32; 1 for a row of zeros."""
    if not rows.numel():
        return rows.new_ones(len(rows), 1, dtype=torch.float32)
    largest = rows.abs().amax(1, keepdim=True).float()
    return torch.where(largest > 0, largest, 1.0)


def _halves(rows: Tensor) -> Tensor:
    """Return rows ÷ their scale in float16."""
    return (rows.float() / _scale(rows)).half()


def _rounded(rows: Tensor) -> Tensor:
    """Return rows as a file holds them, in their own dtype. Rounding twice is rounding once."""
    return (_halves(rows).float() * _scale(rows)).to(rows.dtype)


def _thin(R: Tensor, A: Tensor) -> Factors:
    """Return R A with the smallest rank that loses nothing: for more subjects than the stream is wide, by R = Q T."""
    if R.shape[1] > R.shape[0]:
        Q, T = torch.linalg.qr(R)
        R, A = Q, T @ A
    return Factors(A.float().contiguous(), R.float().contiguous())


def _identity(keys: Tensor) -> Tensor:
    return torch.eye(keys.shape[1], dtype=torch.float64)
