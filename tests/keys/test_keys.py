"""The closed-form token gate against a slow, plain version."""

from __future__ import annotations

import numpy as np
import torch

from memory_adapters import MemoryAdapterConfig
from memory_adapters.keys.keys import MARGIN, SHRINKAGE, StreamStatistics, gate_parameters, normalized, select_keys
from memory_adapters.residual_mlp.gated_mlp import GatedMLP


def plain_norm(v: np.ndarray) -> np.ndarray:
    return (v - v.mean()) / np.sqrt(v.var() + 1e-5)


def plain_statistics(unrelated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and regularised precision of unrelated states, straight from the formula, in float64."""
    n = np.array([plain_norm(v) for v in unrelated])
    mean = n.mean(0)
    covariance = sum(np.outer(v - mean, v - mean) for v in n) / len(n)
    return mean, np.linalg.inv(covariance + SHRINKAGE * np.trace(covariance) / len(mean) * np.eye(len(mean)))


def plain_similarity(mean: np.ndarray, precision: np.ndarray, key: np.ndarray, x: np.ndarray) -> float:
    """s_k(x) of one key and one token."""
    offset = plain_norm(key) - mean
    return float(offset @ precision @ (plain_norm(x) - mean) / (offset @ precision @ offset))


def test_gate_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.randn(200, 12, generator=generator) * torch.arange(1, 13)
    keys = torch.randn(3, 12, generator=generator) * 20
    x = torch.cat([keys + torch.randn(3, 12, generator=generator), unrelated[:5]])
    statistics = StreamStatistics.fit(unrelated)
    weights, bias, leaky = gate_parameters(statistics, normalized(keys), None, threshold=0.5, ramp=0.2)
    mlp = GatedMLP(12, MemoryAdapterConfig())
    mlp.add_keys(weights, bias)
    got = mlp.token_gate(x)
    assert got is not None
    plain = plain_statistics(unrelated.double().numpy())
    for row, token in enumerate(x.double().numpy()):
        expected = 0.0
        for k, key in enumerate(keys.double().numpy()):
            highest = max(plain_similarity(*plain, key, v) for v in unrelated.double().numpy())
            theta = min(max(0.5, highest + MARGIN), 0.8)
            assert bool(leaky[k]) == (highest > theta)
            expected = max(expected, (plain_similarity(*plain, key, token) - theta) / 0.2)
        np.testing.assert_allclose(got[row].item(), np.clip(expected, 0, 1), atol=1e-5)
    assert got[:3].min() > 0
    assert (got[3:] == 0).all()


def test_keys_open_at_themselves_and_stay_closed_elsewhere() -> None:
    generator = torch.Generator().manual_seed(1)
    unrelated = torch.randn(3000, 64, generator=generator)
    keys = torch.randn(40, 64, generator=generator)
    weights, bias, leaky = gate_parameters(
        StreamStatistics.fit(unrelated), normalized(keys), None, threshold=0.5, ramp=0.2
    )
    assert not leaky.any()
    mlp = GatedMLP(64, MemoryAdapterConfig())
    mlp.add_keys(weights, bias)
    assert (mlp.token_gate(keys) == 1).all()
    assert (mlp.token_gate(unrelated) == 0).all()
    assert (mlp.token_gate(torch.randn(3000, 64, generator=generator)) == 0).float().mean() > 0.99


def test_selection_drops_what_is_common_or_covered() -> None:
    generator = torch.Generator().manual_seed(2)
    unrelated = torch.randn(2000, 256, generator=generator)
    rare = torch.randn(5, 256, generator=generator) * 3
    twins = rare + 0.01 * torch.randn(5, 256, generator=generator)
    candidates = normalized(torch.cat([rare, twins, unrelated[:20]]))
    chosen = select_keys(StreamStatistics.fit(unrelated), candidates, threshold=0.5, ramp=0.2)
    assert len(chosen) == 5
    assert (chosen < 10).all()
    assert len({int(index) % 5 for index in chosen}) == 5


def test_without_keys_the_gate_is_closed() -> None:
    mlp = GatedMLP(8, MemoryAdapterConfig())
    gate = mlp.token_gate(torch.randn(2, 3, 8))
    assert gate is not None
    assert gate.shape == (2, 3, 1)
    assert not gate.any()
