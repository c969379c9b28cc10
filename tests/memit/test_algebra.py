"""Solvers and ledger against plain float64 formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_adapters import Fact
from memory_adapters.memit import ledger as ledger_module
from memory_adapters.memit.covariance import Covariance, oracle_shrinkage
from memory_adapters.memit.covariance_fitter import add_gram
from memory_adapters.memit.ledger import Ledger
from memory_adapters.memit.solvers import SOLVERS, dense_readout, readout

D_IN, D_OUT, LAYERS = 24, 10, (3, 5, 6)


def covariance(seed: int = 0, width: int = D_IN) -> Tensor:
    rows = torch.randn(200, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.linspace(0.1, 3, width, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def entries(count: int, seed: int = 0) -> Ledger:
    generator = torch.Generator().manual_seed(seed)

    def random(width: int) -> Tensor:
        return torch.randn(count, width, generator=generator)

    facts = tuple(Fact(f"Person {seed}-{i} lives in", f"Person {seed}-{i}", "Rome") for i in range(count))
    return Ledger(facts, {i: random(D_IN) for i in LAYERS}, {i: random(D_OUT) for i in LAYERS})


def written(
    *parts: Ledger,
    solver: str = "memit",
    half: bool = False,
    regularization: float | None = 0.4,
    null_space: float = 0.8,
) -> Ledger:
    costs = {layer: SOLVERS[solver].cost(covariance(layer), null_space) for layer in LAYERS}
    ledger = Ledger.empty(dict.fromkeys(LAYERS, D_IN), D_OUT, half=half, regularization=regularization)
    for part in parts:
        ledger = ledger.plus(part, costs)
    return ledger


def change(ledger: Ledger, layer: int) -> Tensor:
    factors = ledger.solve()[layer]
    return factors.B.double() @ factors.A.double()


@pytest.mark.parametrize("count", [1, 7, 24, 60])
@pytest.mark.parametrize("regularization", [0.4, None])
def test_memit_is_the_papers_formula(count: int, regularization: float | None) -> None:
    ledger = written(entries(count), regularization=regularization)
    weight = 0.2 * D_IN + count if regularization is None else 0.4 * D_IN
    carried = np.zeros((D_OUT, count))
    for i, layer in enumerate(LAYERS):
        left = len(LAYERS) - i
        K = ledger.keys[layer].double().numpy().T
        R = ledger.shares[layer].double().numpy().T + carried / left
        cost = weight * covariance(layer).numpy()
        expected = R @ K.T @ np.linalg.inv(cost + K @ K.T)
        np.testing.assert_allclose(change(ledger, layer).numpy(), expected, rtol=1e-4, atol=1e-6)
        carried = carried - carried / left + R - expected @ K


@pytest.mark.parametrize("count", [3, 20])
def test_facts_of_several_keys_have_them_all_in_the_normal_matrix(count: int) -> None:
    plain, more = entries(count), entries(count, seed=1)
    both = {i: torch.stack([plain.keys[i], more.keys[i]], 1).flatten(0, 1) / 2**0.5 for i in LAYERS}
    ledger = written(Ledger(plain.facts, both, plain.shares), regularization=0.4)
    assert ledger.keys_per_subject == 2
    bare, prefixed, R = (x[3].double().numpy().T for x in (plain.keys, more.keys, plain.shares))
    cost = 0.4 * D_IN * covariance(3).numpy()
    expected = R @ (bare + prefixed).T / 2 @ np.linalg.inv(cost + (bare @ bare.T + prefixed @ prefixed.T) / 2)
    np.testing.assert_allclose(change(ledger, 3).numpy(), expected, rtol=1e-4, atol=1e-6)
    shares = {i: found[:2] for i, found in plain.shares.items()}
    two = Ledger(plain.facts[:2], {i: found[:4] for i, found in both.items()}, shares)
    less = written(two, regularization=0.4)
    torch.testing.assert_close(change(ledger.subset([0, 1]), 3), change(less, 3), rtol=1e-5, atol=1e-6)


def test_ranks_lose_nothing() -> None:
    few, many = written(entries(4)), written(entries(60))
    assert few.solve()[3].A.shape == (4, D_IN)
    assert many.solve()[3].A.shape == (D_OUT, D_IN)
    assert many.solve()[3].B.shape == (D_OUT, D_OUT)


@pytest.mark.parametrize("count", [5, 40])
def test_alphaedit_is_the_papers_formula_and_leaves_the_directions_in_use(count: int) -> None:
    ledger = written(entries(count), solver="alphaedit", null_space=0.5)
    C = covariance(3).numpy()
    values, vectors = np.linalg.eigh(C)
    free = vectors[:, : D_IN // 2]
    P = free @ free.T
    K, R = ledger.keys[3].double().numpy().T, ledger.shares[3].double().numpy().T
    weight = 0.4 * values[: D_IN // 2].sum()
    expected = np.linalg.solve(P @ K @ K.T + weight * np.eye(D_IN), P @ K @ R.T).T
    np.testing.assert_allclose(change(ledger, 3).numpy(), expected, rtol=1e-4, atol=1e-6)
    used = torch.from_numpy(vectors[:, D_IN // 2 :].copy())
    assert (change(ledger, 3) @ used).norm() < 1e-5 * change(ledger, 3).norm()


def test_emmet_holds_exactly_at_the_keys() -> None:
    ledger = written(entries(6), solver="emmet")
    for layer in LAYERS:
        keys, shares = ledger.keys[layer].double(), ledger.shares[layer].double()
        torch.testing.assert_close(change(ledger, layer) @ keys.T, shares.T, rtol=1e-3, atol=1e-3)
    K, R, C = (x.double() for x in (ledger.keys[3].T, ledger.shares[3].T, covariance(3)))
    whitened = torch.linalg.solve(C, K)
    expected = R @ torch.linalg.inv(K.T @ whitened) @ whitened.T
    torch.testing.assert_close(change(ledger, 3), expected, rtol=1e-3, atol=1e-4)


def test_a_second_write_is_recursive_least_squares() -> None:
    """ΔW₂ = (R₂ − ΔW₁ K₂) K₂ᵀ (λC₀ + K₁K₁ᵀ + K₂K₂ᵀ)⁻¹ on top of ΔW₁: sequential MEMIT at the first layer."""
    first, second = entries(8, seed=1), entries(5, seed=2)
    before, after = written(first), written(first, second)
    W = change(before, 3)
    K1, K2 = first.keys[3].double().T, second.keys[3].double().T
    R2 = second.shares[3].double().T - W @ K2
    normal = 0.4 * D_IN * covariance(3) + K1 @ K1.T + K2 @ K2.T
    expected = W + R2 @ torch.linalg.solve(normal, K2).T
    torch.testing.assert_close(change(after, 3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("counts", [(9, 4), (30, 10), (20, 10)])
@pytest.mark.parametrize("regularization", [0.4, None])
def test_order_of_writes_does_not_matter_and_forgetting_is_never_having_written(
    solver: str, counts: tuple[int, int], regularization: float | None
) -> None:
    settings: dict[str, Any] = dict(solver=solver, regularization=regularization)
    first, second = entries(counts[0], seed=1), entries(counts[1], seed=2)
    together, swapped = written(first, second, **settings), written(second, first, **settings)
    forgotten = together.subset(range(counts[0], sum(counts)))
    only_second = written(second, **settings)
    assert forgotten.facts == only_second.facts
    for layer in LAYERS:
        torch.testing.assert_close(change(together, layer), change(swapped, layer), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(change(forgotten, layer), change(only_second, layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [6, 30])
def test_rows_stay_with_their_facts_in_any_order(count: int) -> None:
    given = entries(count)
    ledger, order = written(given), [4, 0, 3]
    chosen, held = ledger.subset(order), ledger.entries_of([[given.facts[i]] for i in order], 1)
    for part in (chosen, held):
        assert part.facts == tuple(given.facts[i] for i in order)
        for layer in LAYERS:
            assert torch.equal(part.keys[layer], given.keys[layer][order])
            assert torch.equal(part.shares[layer], given.shares[layer][order])
    less = written(given.subset([0, 3]))
    forgotten = chosen.subset([1, 2])
    assert forgotten.facts == less.facts
    for layer in LAYERS:
        torch.testing.assert_close(change(forgotten, layer), change(less, layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [6, 30])
@pytest.mark.parametrize("half", [False, True])
def test_tensors_round_trip(count: int, half: bool) -> None:
    ledger = written(entries(count), half=half)
    tensors = ledger.tensors()
    shapes = Ledger.tensor_shapes(count, dict.fromkeys(LAYERS, D_IN), D_OUT, half=half)
    assert {k: v.shape for k, v in tensors.items()} == shapes
    assert {tensors[f"keys.{i}"].dtype for i in LAYERS} == {torch.float16 if half else torch.float32}
    again = Ledger.from_tensors(ledger.facts, tensors, half=half, regularization=0.4)
    for layer in LAYERS:
        assert torch.equal(change(again, layer), change(ledger, layer))
        assert torch.equal(change(again.subset([0, 1]), layer), change(ledger.subset([0, 1]), layer))


def test_both_sides_agree() -> None:
    K = torch.randn(D_IN, 20, dtype=torch.float64)
    inverse = torch.linalg.inv(covariance())
    torch.testing.assert_close(readout(K, inverse @ K), dense_readout(K, inverse))


def test_gram_by_blocks() -> None:
    keys, total = torch.randn(50, 23), torch.zeros(23, 23)
    add_gram(total, keys[:20])
    add_gram(total, keys[20:])
    torch.testing.assert_close(total.triu(), (keys.T @ keys).triu(), rtol=1e-5, atol=1e-5)


def test_shrinkage_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.covariance")
    X = torch.randn(40, D_IN, dtype=torch.float64) @ torch.linalg.cholesky(covariance()).T
    _, expected = sklearn.oas(X.numpy(), assume_centered=True)
    assert oracle_shrinkage(X.T @ X / len(X), len(X)) == pytest.approx(expected, rel=0.05)


def test_a_first_token_of_enormous_norm_does_not_hide_that_tokens_are_few() -> None:
    keys = torch.randn(D_IN // 2, D_IN)
    ordinary = Covariance({0: keys.T @ keys / len(keys)}, len(keys), 1, "", {})
    keys[0, :3] = 1e6  # several components, always together
    enormous = Covariance({0: keys.T @ keys / len(keys)}, len(keys), 1, "", {})
    assert (torch.linalg.eigvalsh(enormous.shrunk(0)) > 0).all()
    SOLVERS["memit"].cost(enormous.shrunk(0), 0.8)  # not singular
    ratio = torch.linalg.eigvalsh(enormous.shrunk(0))[0] / torch.linalg.eigvalsh(ordinary.shrunk(0))[0]
    assert 0.3 < ratio < 3


def test_a_singular_covariance_is_refused() -> None:
    rows = torch.randn(5, D_IN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"singular.*more tokens.*shrinkage"):
        SOLVERS["memit"].cost(rows.T @ rows / 5, 0.8)


@pytest.mark.parametrize("count", [6, 30])
def test_rounding_to_half_precision_hardly_changes_the_edit(count: int) -> None:
    ledger, rounded = written(entries(count)), written(entries(count), half=True)
    for layer in LAYERS:
        wanted = change(ledger, layer)
        assert 0 < (change(rounded, layer) - wanted).norm() < 1e-3 * wanted.norm()
    tiny = torch.tensor([[0.0, 0.0], [1e-30, 3e-31], [7e8, -2e6]])
    kept = ledger_module._rounded(tiny)
    torch.testing.assert_close(kept, tiny, rtol=1e-3, atol=0)
    assert torch.equal(ledger_module._rounded(kept), kept)
