"""The linear algebra of an edit: which change of a matrix makes it say R at the keys K, and nothing elsewhere.

All solvers minimise ‖ΔW K − R‖² + tr(ΔW M ΔWᵀ), each with its own M: what a change costs on what the matrix has
learned already. A solver gives M for λ = d_in; the ledger, which knows how many subjects there are, scales it. With
W = M⁻¹ K and G = Kᵀ W,

    ΔW = R A,    A = Kᵀ (M + K Kᵀ)⁻¹ = (I + G)⁻¹ Wᵀ,

the right side on n × n matrices for n facts. Earlier facts are rows of K like new ones, so that a later write is
sequential MEMIT with the residual of the model as it then is: recursive least squares, whose result is the joint
solution in any order of writes. Everything is in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["SOLVERS", "Cost", "Solver", "cost_of", "readout"]


class Cost(ABC):
    """Store M of one layer."""

    @abstractmethod
    def whiten(self, keys: Tensor) -> Tensor:
        """Return W = M⁻¹ K (d_in, n), for keys K (d_in, n)."""


class DenseCost(Cost):
    """Store M as a positive definite matrix (d_in, d_in), by its Cholesky factor L.

    L_ii² / M_ii is the share of component i that those before it do not determine, however components are scaled.
    Below d_in · ε, rounding hides it.

    Raises:
        ValueError: If it is singular in float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        shares = self.factor.diagonal().square() / matrix.diagonal()
        least = len(matrix) * torch.finfo(matrix.dtype).eps
        if failed or not torch.isfinite(self.factor).all() or not (shares > least).all():
            raise ValueError(
                "The covariance is singular: fit it on more tokens (about 10 · d_in), or raise `shrinkage`."
            )

    def whiten(self, keys: Tensor) -> Tensor:
        return torch.cholesky_solve(keys, self.factor)


class NullSpaceCost(Cost):
    """Store an M that is λ on some directions and infinite on all others: M⁻¹ = P / λ.

    Args:
        basis: Orthonormal columns (d_in, m) that span what may be changed.
        weight: λ.
    """

    def __init__(self, basis: Tensor, weight: float) -> None:
        self.basis, self.weight = basis, weight

    def whiten(self, keys: Tensor) -> Tensor:
        return self.basis @ (self.basis.T @ keys) / self.weight


class Solver(ABC):
    """Choose M.

    Attributes:
        exact: Whether ΔW K = R holds exactly.
    """

    exact: bool = False

    @abstractmethod
    def cost(self, covariance: Tensor, null_space: float) -> Cost:
        """Return M at λ = d_in for C₀ (d_in, d_in) in float64; see `cost_of`."""


class Memit(Solver):
    """Choose M = λ C₀ (MEMIT, eq. 14)."""

    def cost(self, covariance: Tensor, null_space: float) -> Cost:
        return DenseCost(len(covariance) * covariance)


class AlphaEdit(Solver):
    """Choose M⁻¹ = P / λ, with P the projection on directions that ordinary keys hardly have (Fang et al. 2024).

    λ is relative to the mean of ‖P k‖² over ordinary text.
    """

    def cost(self, covariance: Tensor, null_space: float) -> Cost:
        values, vectors = torch.linalg.eigh(covariance)  # in rising order
        free = max(1, round(null_space * len(values)))
        kept = float(values[:free].sum())
        if not kept > len(values) * torch.finfo(values.dtype).eps * float(values.abs().max()):
            raise ValueError(
                f"The covariance is singular: ordinary keys are not at all in the {free} directions that may change. "
                "Fit it on more tokens (about 10 · d_in), or raise `shrinkage` or `null_space`."
            )
        return NullSpaceCost(vectors[:, :free], kept)


class Emmet(Solver):
    """Choose M = ε C₀ with ε next to 0, whatever λ is: ΔW K = R holds exactly (Gupta et al. 2024)."""

    exact = True

    def cost(self, covariance: Tensor, null_space: float) -> Cost:
        return DenseCost(1e-6 * len(covariance) * covariance)


SOLVERS: dict[str, Solver] = {"memit": Memit(), "alphaedit": AlphaEdit(), "emmet": Emmet()}


def cost_of(solver: str, layer: int, covariance: Tensor, *, null_space: float) -> Cost:
    """Return M of a block at λ = d_in, for C₀ (d_in, d_in) in float64.

    Args:
        solver: One of `SOLVERS`.
        layer: The block's index, for errors.
        covariance: C₀.
        null_space: Share of C₀'s directions that may change; see `MemitConfig`.

    Raises:
        ValueError: If C₀ is singular; names the block.
    """
    try:
        return SOLVERS[solver].cost(covariance, null_space)
    except ValueError as error:
        raise ValueError(f"`covariance` of block {layer}: {error}") from error


def readout(keys: Tensor, whitened: Tensor) -> Tensor:
    """Return A = (I + Kᵀ W)⁻¹ Wᵀ (n, d_in), for K and W (d_in, n): it turns a key into the facts that it opens."""
    gram = keys.T @ whitened
    gram = (gram + gram.T) / 2 + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or not torch.isfinite(factor).all():
        raise ValueError("The ledger's keys do not belong together: load the memory as it was saved, or write anew.")
    return torch.cholesky_solve(whitened.T, factor)


def dense_readout(keys: Tensor, inverse: Tensor) -> Tensor:
    """Return the same A from M⁻¹, on matrices (d_in, d_in): for more facts than keys have components."""
    gram = inverse @ (keys @ keys.T)
    gram += torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return keys.T @ torch.linalg.solve(gram, inverse)
