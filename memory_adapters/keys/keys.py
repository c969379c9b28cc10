"""Keys of what was written, in closed form: where the memory opens.

With n(x) the normalised residual stream at one token, μ and Σ its mean and covariance over unrelated text, the
similarity of x to a key k is Fisher's linear discriminant scaled to the key,

    s_k(x) = (k − μ)ᵀ P_k (n(x) − μ) / (k − μ)ᵀ P_k (k − μ),    P_k = (Σ + α tr(Σ)/d · I + c (u_k − μ)(u_k − μ)ᵀ)⁻¹,

which is 1 at the key and about 0 on unrelated text. u_k is the state at the last word of the key's subject without
the rest of it ("Empire" for "Timurid Empire"): counting it among the unrelated keeps common last words from opening
the memory. The token gate is clip((max_k s_k(x) − θ_k) / ramp, 0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["StreamStatistics", "covering_keys", "gate_parameters", "normalized", "select_keys"]

SHRINKAGE = 0.05
LAST_WORD_SHARE = 0.003
MARGIN = 0.1
ROUNDING = 1e-4  # keys are stored in float32
_BLOCK = 1024


@dataclass(frozen=True)
class StreamStatistics:
    """Store mean and shrunk precision of the normalised stream on unrelated text, at one block.

    Attributes:
        mean: μ (hidden_size,), float64.
        precision: P (hidden_size, hidden_size), float64.
        unrelated: n(x) of the unrelated tokens (num_tokens, hidden_size), float64.
    """

    mean: Tensor
    precision: Tensor
    unrelated: Tensor

    @classmethod
    def fit(cls, states: Tensor) -> StreamStatistics:
        """Fit to residual-stream states (num_tokens, hidden_size) of unrelated text.

        Raises:
            ValueError: If they hold NaN or infinity, or are all the same.
        """
        n = normalized(states)
        if not torch.isfinite(n).all():
            raise ValueError("The states of unrelated text hold NaN or infinity: check the model's weights.")
        mean = n.mean(0)
        centered = n - mean
        covariance = centered.T @ centered / len(n)
        ridge = SHRINKAGE * covariance.diagonal().mean()
        if not ridge > torch.finfo(n.dtype).eps:
            raise ValueError("The states of unrelated text are all the same: give `unrelated` of several words each.")
        precision = torch.linalg.inv(covariance + ridge * torch.eye(len(mean), dtype=n.dtype))
        return cls(mean, precision, n)

    def directions(self, keys: Tensor, last_words: Tensor | None = None) -> Tensor:
        """Return P_k (k − μ) / (k − μ)ᵀ P_k (k − μ) (n, hidden_size): rows whose product with n(x) − μ is s_k(x).

        Args:
            keys: Normalised keys (n, hidden_size).
            last_words: Their u_k (n, hidden_size); μ for a key that has none. None if no key has one.
        """
        offset = keys - self.mean
        direction = offset @ self.precision
        if last_words is not None:  # Sherman–Morrison
            u = last_words - self.mean
            Pu = u @ self.precision
            weight = (Pu * offset).sum(-1, keepdim=True) / (1 / LAST_WORD_SHARE + (Pu * u).sum(-1, keepdim=True))
            direction = direction - weight * Pu
        return direction / (direction * offset).sum(-1, keepdim=True)

    def highest_unrelated(self, directions: Tensor) -> Tensor:
        """Return the highest similarity (n,) of each key to any unrelated token."""
        parts = [
            ((self.unrelated - self.mean) @ part.T).amax(0) if len(part) else part.new_zeros(0)
            for part in directions.split(_BLOCK)
        ]
        return torch.cat(parts)


def normalized(states: Tensor) -> Tensor:
    """Return n(x) = (x − mean(x)) / std(x) over the last dimension, in float64 on the CPU."""
    states = states.detach().to("cpu", torch.float64)
    return F.layer_norm(states, states.shape[-1:])


def select_keys(statistics: StreamStatistics, candidates: Tensor, *, threshold: float, ramp: float) -> Tensor:
    """Choose the candidates that are worth a key: unlike unrelated text, and not already opened by another.

    Args:
        statistics: Of the block.
        candidates: Normalised states (n, hidden_size) of tokens of documents or questions.
        threshold: θ, below which the gate is closed.
        ramp: How far above it the gate is fully open.

    Returns:
        Indices of the chosen candidates. The most distinctive (largest (k − μ)ᵀ P (k − μ)) come first.
    """
    directions = statistics.directions(candidates)
    separable = statistics.highest_unrelated(directions) < threshold - MARGIN
    offset = candidates - statistics.mean
    distinctiveness = ((offset @ statistics.precision) * offset).sum(-1)
    covered = torch.zeros(len(candidates), dtype=torch.bool)
    chosen: list[int] = []
    for index in distinctiveness.argsort(descending=True).tolist():
        if separable[index] and not covered[index]:
            chosen.append(index)
            covered |= offset @ directions[index] >= threshold + ramp
    return torch.tensor(chosen, dtype=torch.long)


def covering_keys(
    statistics: StreamStatistics, mean: Tensor, states: Tensor, last_word: Tensor, *, threshold: float, ramp: float
) -> tuple[Tensor, Tensor]:
    """Return keys (n, hidden_size) that open the gate at a subject's states, and at which they do not (states,).

    A subject that opens its prompt has another state than behind other text. The first key is the mean; a state at
    which the gate, as `gate_parameters` makes it, is not fully open gets a key of its own, the least open first, unless
    unrelated text would open that key too.

    Args:
        statistics: Of the block.
        mean: The subject's mean state (1, hidden_size), normalised.
        states: Its states (states, hidden_size), normalised.
        last_word: u_k of all of these keys (hidden_size,), as in `StreamStatistics.directions`.
        threshold: Least θ.
        ramp: Width of the gate's slope.
    """
    candidates = torch.cat([mean, states])
    weights, bias, leaky = gate_parameters(
        statistics, candidates, last_word.expand_as(candidates), threshold=threshold, ramp=ramp
    )
    openness = states @ weights.double().T + bias.double()  # (states, candidates)
    chosen, opened = [0], openness[:, 0]
    while True:
        lacking = (opened < 1 - ROUNDING) & ~leaky[1:]
        if not lacking.any():
            return candidates[chosen], opened < 1 - ROUNDING
        least = int(torch.where(lacking, opened, torch.inf).argmin())
        chosen.append(least + 1)
        opened = torch.maximum(opened, openness[:, least + 1])
        leaky[least + 1] = True  # it is taken


def gate_parameters(
    statistics: StreamStatistics, keys: Tensor, last_words: Tensor | None, *, threshold: float, ramp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and biases of `GatedMLP`: `keys · n(x) + bias = (s_k(x) − θ_k) / ramp`.

    θ_k is `threshold`, or higher where unrelated text comes nearer than that, but never so high that the gate would
    not open at the key itself.

    Args:
        statistics: Of the block.
        keys: Normalised (n, hidden_size).
        last_words: As in `StreamStatistics.directions`.
        threshold: Least θ.
        ramp: Width of the gate's slope.

    Returns:
        Keys (n, hidden_size) and biases (n,) in float32, and for each key whether unrelated text opens it too (n,).
    """
    directions = statistics.directions(keys, last_words)
    highest = statistics.highest_unrelated(directions)
    theta = (highest + MARGIN).clamp(min=threshold, max=max(threshold, 1 - ramp))
    bias = -(directions @ statistics.mean + theta) / ramp
    return (directions / ramp).float(), bias.float(), highest > theta
