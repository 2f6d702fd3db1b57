"""Strength, drift, R and jitter of label-noise SGD: closed forms against series, recursions, autograd and simulated chains."""

from __future__ import annotations

import doctest
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.methods.label_noise import theory

STRENGTH = 0.013


def test_the_examples_run():
    assert doctest.testmod(theory).failed == 0


def spectrum(size: int = 5, top: float = 1.9, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).uniform(0.05, 1.0, size)) * top


def psd(size: int, top: float, rank: int, seed: int = 0) -> np.ndarray:
    """A random positive semi-definite matrix of the given rank with `top` as its largest eigenvalue."""
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    matrix = factor @ factor.T
    return matrix * top / np.linalg.eigvalsh(matrix)[-1]


# R


def by_power_series(matrix: np.ndarray, lr: float, momentum: float, terms: int = 4000) -> float:
    """-log(1-x) = sum x^k/k, from traces of powers of H: no eigenvalue, no logarithm."""
    scaled, power, total = matrix * lr / (2 * (1 + momentum)), np.eye(len(matrix)), 0.0
    for k in range(1, terms):
        power = power @ scaled
        total += np.trace(power) / k
    return total * (1 + momentum) / (2 * lr)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_r_is_its_power_series(momentum: float, share: float):
    lr = 0.37
    matrix = psd(6, share * 2 * (1 + momentum) / lr, rank=4)
    found = theory.regularizer(np.linalg.eigvalsh(matrix), lr, momentum)
    assert found == pytest.approx(by_power_series(matrix, lr, momentum), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_r_for_small_lr_is_a_quarter_of_the_trace(momentum: float):
    eigenvalues = spectrum() + 3.0
    assert theory.small_lr_limit(eigenvalues) == pytest.approx(eigenvalues.sum() / 4, rel=1e-14)
    gaps = [theory.regularizer(eigenvalues, lr, momentum) - theory.small_lr_limit(eigenvalues) for lr in (1e-4, 1e-5)]
    assert gaps[0] / gaps[1] == pytest.approx(10.0, rel=1e-2)  # next order: lr*sum l^2/(16(1+beta))
    assert gaps[1] == pytest.approx(1e-5 * (eigenvalues**2).sum() / (16 * (1 + momentum)), rel=1e-3)
    assert theory.regularizer(eigenvalues, 1e-300, momentum) == pytest.approx(eigenvalues.sum() / 4, rel=1e-14)


def test_r_near_its_limit_counts_the_top_eigenvalues():
    # lr = (2-nu)/l1: R/log(2/nu) -> l1/4 times how often l1 occurs
    top, nu = 7.0, 1e-200
    share = 1.0 - nu  # rounds to 1, so take the largest float below
    assert share == 1.0
    nu = 2 * np.finfo(float).eps
    found = theory.regularizer([top, top, 0.1], (2 - nu) / top) / math.log(2 / nu)
    assert found == pytest.approx(2 * top / 4, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.floats(0.0, 0.95),
    st.randoms(use_true_random=False),
)
def test_r_is_at_least_a_quarter_of_the_trace_and_adds_up(eigenvalues: list, share: float, momentum: float, random):
    lr = share * 2 * (1 + momentum) / max(*eigenvalues, 1e-3)
    found = theory.regularizer(eigenvalues, lr, momentum)
    assert found >= sum(eigenvalues) / 4 * (1 - 1e-12)
    shuffled = random.sample(eigenvalues, len(eigenvalues))
    parts = [theory.regularizer(value, lr, momentum) for value in shuffled]
    assert found == pytest.approx(sum(parts), rel=1e-12, abs=1e-300)
    assert theory.regularizer([*eigenvalues, 0.0], lr, momentum) == pytest.approx(found, rel=1e-14)


def test_r_broadcasts():
    table = np.stack([spectrum(seed=seed) for seed in range(3)])
    lr, momentum = np.array([0.1, 0.3, 0.9]), np.array([0.0, 0.5, 0.9])
    rows = [theory.regularizer(*each) for each in zip(table, lr, momentum)]
    assert all(isinstance(row, float) for row in rows)
    np.testing.assert_allclose(theory.regularizer(table, lr, momentum), rows, rtol=1e-14)
    np.testing.assert_allclose(theory.regularizer(table, 0.3), [theory.regularizer(row, 0.3) for row in table])
    np.testing.assert_allclose(theory.regularizer(table[0], lr), [theory.regularizer(table[0], rate) for rate in lr])
    np.testing.assert_allclose(theory.small_lr_limit(table), table.sum(1) / 4)
    assert theory.regularizer([], 0.1) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_r_of_a_tensor_is_a_tensor_with_a_gradient(dtype: torch.dtype):
    eigenvalues = torch.tensor(spectrum(), dtype=dtype, requires_grad=True)
    found = theory.regularizer(eigenvalues, 0.8, 0.3)
    assert found.dtype == dtype and found.shape == ()
    assert found.item() == pytest.approx(theory.regularizer(spectrum(), 0.8, 0.3), rel=1e-6)
    (slope,) = torch.autograd.grad(found, eigenvalues)
    # the jitter is 2*lambda*dR/dH
    jitter = theory.stationary_variance(eigenvalues.detach(), lr=0.8, strength=STRENGTH, momentum=0.3)
    torch.testing.assert_close(2 * STRENGTH * slope, jitter)
    assert theory.regularizer(torch.tensor([1, 1]), 1.0).item() == pytest.approx(math.log(2), rel=1e-6)


def test_r_of_a_matrix_by_autograd():
    # dR/dH is a matrix function: through eigvalsh it has to be the jitter of the matrix form
    matrix = torch.tensor(psd(5, 2.5, rank=5), requires_grad=True)
    (slope,) = torch.autograd.grad(theory.regularizer(torch.linalg.eigvalsh(matrix), 0.7), matrix)
    jitter = theory.stationary_covariance(matrix.detach(), lr=0.7, strength=STRENGTH)
    torch.testing.assert_close(2 * STRENGTH * slope, jitter, rtol=1e-9, atol=1e-12)


# beyond stability


@pytest.mark.parametrize(("momentum", "limit"), [(0.0, 2.0), (0.9, 3.8)])
def test_beyond_stability_it_refuses_and_says_by_how_much(momentum: float, limit: float):
    assert theory.stability_limit(momentum) == pytest.approx(limit)
    lr = 0.25
    theory.regularizer([0.1, limit / lr * (1 - 1e-12)], lr, momentum)
    for call in (
        lambda top: theory.regularizer([0.1, top], lr, momentum),
        lambda top: theory.regularizer(torch.tensor([[0.1, top]], dtype=torch.float64), lr, momentum),
        lambda top: theory.stationary_variance([0.1, top], lr=lr, strength=0.1, momentum=momentum),
        lambda top: theory.stationary_covariance(np.diag([0.1, top]), lr=lr, strength=0.1, momentum=momentum),
    ):
        for top in (limit / lr, 3 * limit / lr):
            with pytest.raises(theory.UnstableError, match="lr times the largest eigenvalue is") as caught:
                call(top)
            assert caught.value.product == pytest.approx(lr * top)
            assert caught.value.limit == pytest.approx(limit)
            assert (caught.value.lr, caught.value.momentum) == (lr, momentum)
            assert caught.value.top_eigenvalue == pytest.approx(top)


def test_the_refusal_names_the_worst_of_many_and_survives_pickling():
    with pytest.raises(
        ValueError, match=r"0\.5 times 8\), not below 2\(1\+momentum\) = 2, .*use lr < 0\.25$"
    ) as caught:
        theory.regularizer([[1.0, 2.0], [8.0, 1.0]], [0.1, 0.5])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.product, copy.limit, str(copy)) == (4.0, 2.0, str(caught.value))


# jitter


def recursion(hessian: np.ndarray, lr: float, momentum: float, noise: np.ndarray) -> np.ndarray:
    """Covariance of the weights of heavy ball on a quadratic with gradient noise of covariance `noise`, by doubling.

    State (x, v): v' = beta*v - lr*(H x + e), x' = x + v'; S = sum over k of A^k Q A^k^T.
    """
    size = len(hessian)
    eye = np.eye(size)
    step = np.block([[eye - lr * hessian, momentum * eye], [-lr * hessian, momentum * eye]])
    kick = np.vstack([eye, eye]) * lr
    total = kick @ noise @ kick.T
    for _ in range(40):
        total, step = total + step @ total @ step.T, step @ step
    return total[:size, :size]


@pytest.mark.parametrize(("momentum", "product"), [(0.0, 0.1), (0.0, 1.0), (0.0, 1.8), (0.9, 1.0), (0.9, 3.0)])
def test_the_jitter_is_the_fixed_point_of_the_steps(momentum: float, product: float):
    lr, sigma, batch = 0.2, 0.3, 7
    hessian = psd(4, product / lr, rank=4)
    weight = theory.strength(lr=lr, batch_size=batch, noise_variance=sigma**2, momentum=momentum)
    found = theory.stationary_covariance(hessian, lr=lr, strength=weight, momentum=momentum)
    np.testing.assert_allclose(
        found, recursion(hessian, lr, momentum, sigma**2 / batch * hessian), rtol=1e-9, atol=1e-15
    )


def test_the_jitter_of_a_flip_loss_has_one_over_its_curvature():
    # noise sigma^2/B*G in the gradient, but H = alpha*G holds the weights
    lr, variance, alpha, batch = 0.2, 0.7, 2.5, 3
    gram = psd(4, 1.0, rank=4)
    weight = theory.strength(lr=lr, batch_size=batch, noise_variance=variance, curvature=alpha)
    found = theory.stationary_covariance(alpha * gram, lr=lr, strength=weight)
    np.testing.assert_allclose(found, recursion(alpha * gram, lr, 0.0, variance / batch * gram), rtol=1e-9)


def test_nothing_jitters_beside_the_range_of_the_hessian():
    hessian = psd(6, 3.0, rank=2)
    found = theory.stationary_covariance(hessian, lr=0.1, strength=STRENGTH)
    values, vectors = np.linalg.eigh(hessian)
    inside = vectors[:, -2:]
    np.testing.assert_allclose(found, inside @ inside.T @ found, atol=1e-12)
    expected = STRENGTH / (2 - 0.1 * values[-2:])
    np.testing.assert_allclose(np.linalg.eigvalsh(found)[-2:], expected, rtol=1e-9)
    variance = theory.stationary_variance(values, lr=0.1, strength=STRENGTH)
    np.testing.assert_allclose(variance, [0, 0, 0, 0, *expected], rtol=1e-9)
    assert theory.stationary_variance(values[-1], lr=0.1, strength=STRENGTH) == pytest.approx(expected[-1])
    tensor = theory.stationary_covariance(torch.tensor(hessian), lr=0.1, strength=STRENGTH)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_allclose(tensor.numpy(), found, atol=1e-15)
    assert theory.stationary_covariance(np.zeros((0, 0)), lr=0.1, strength=STRENGTH).shape == (0, 0)
    assert not theory.stationary_covariance(np.zeros((2, 2)), lr=0.1, strength=STRENGTH).any()


def simulated(lr: float, momentum: float, x: np.ndarray, sigma: float, chains: int, steps: int) -> np.ndarray:
    """Covariance around the minimum: gradient of the whole set, plus fresh label noise of one sample per step."""
    random = np.random.default_rng(7)
    count, size = x.shape
    weights, velocity, total = np.zeros((chains, size)), np.zeros((chains, size)), np.zeros((size, size))
    hessian = x.T @ x / count
    burn_in = steps // 5
    for step in range(steps):
        sample = random.integers(count, size=chains)
        label = sigma * (2.0 * random.integers(2, size=chains) - 1.0)
        velocity = momentum * velocity - lr * (weights @ hessian - label[:, None] * x[sample])
        weights = weights + velocity
        if step >= burn_in:
            total += weights.T @ weights
    return total / ((steps - burn_in) * chains)


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "product"), [(0.0, 0.1), (0.0, 1.0), (0.0, 1.8), (0.9, 1.0), (0.9, 3.0)])
def test_chains_of_sgd_have_the_stationary_covariance(momentum: float, product: float):
    # the linear model of the fact sheet: n 6, d 4, sigma 0.3; the acceptance threshold is 2 % in Frobenius norm, and 0.1 to
    # 0.5 % were found, where lambda/2 would be off by 3 to 90 %
    sigma, lr, random = 0.3, 0.15, np.random.default_rng(3)
    left, right = np.linalg.qr(random.normal(size=(6, 4)))[0], np.linalg.qr(random.normal(size=(4, 4)))[0]
    x = left * np.sqrt(6 * product / lr * np.array([1.0, 0.7, 0.4, 0.2])) @ right.T
    weight = theory.strength(lr=lr, batch_size=1, noise_variance=sigma**2, momentum=momentum)
    expected = theory.stationary_covariance(x.T @ x / 6, lr=lr, strength=weight, momentum=momentum)
    found = simulated(lr, momentum, x, sigma, chains=1024, steps=4000)
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


# strength and drift time


def test_strength_by_hand_and_broadcast():
    assert theory.strength(lr=0.2, batch_size=4, noise_variance=0.09) == pytest.approx(0.2 * 0.09 / 4, rel=1e-15)
    both = theory.strength(lr=0.2, batch_size=4, noise_variance=0.09, curvature=3.0, momentum=[0.0, 0.9])
    np.testing.assert_allclose(both, [0.0015, 0.015])
    # the fact sheet's groups of equal strength: (lr, B, beta)
    runs = np.array([(0.1, 8, 0.0), (0.4, 32, 0.0), (0.04, 32, 0.9)])
    found = theory.strength(lr=runs[:, 0], batch_size=runs[:, 1], noise_variance=1.0, momentum=runs[:, 2])
    np.testing.assert_allclose(found, 0.0125)
    assert theory.strength(lr=torch.tensor(0.5), batch_size=2, noise_variance=1) == 0.25


@pytest.mark.parametrize(
    ("lr", "noise", "steps", "momentum", "expected"),
    [
        # rows of the fact sheet: label noise on one example, lambda = lr*delta^2/2
        (0.01, 0.5, 30_000, 0.0, 1.5),
        (0.01, 0.5 * 0.3**2, 100_000, 0.0, 0.45),
        (0.01, 0.5, 100_000, 0.0, 5.0),
        (0.3 / 8.41, 0.01, 60_000, 0.0, 0.76),
    ],
)
def test_drift_times_of_the_fact_sheet(lr: float, noise: float, steps: int, momentum: float, expected: float):
    found = theory.drift_time(lr=lr, steps=steps, batch_size=1, noise_variance=noise, momentum=momentum)
    assert found == pytest.approx(expected, rel=0.01)
    weight = theory.strength(lr=lr, batch_size=1, noise_variance=noise, momentum=momentum)
    assert found == pytest.approx(lr / (1 - momentum) * weight * steps, rel=1e-12)


def test_drift_time_of_a_schedule_and_with_momentum():
    common = {"steps": 30_000, "batch_size": 2, "noise_variance": 0.5, "curvature": 1.25}

    def dropped(step: int) -> float:
        return 0.02 if step < 20_000 else 0.002 if step < 25_000 else 0.0002

    unit = 0.5 / 2 / 1.25
    expected = unit * (20_000 * 0.02**2 + 5_000 * 0.002**2 + 5_000 * 0.0002**2)
    assert theory.drift_time(lr=dropped, **common) == pytest.approx(expected, rel=1e-12)
    rates = [dropped(step) for step in range(30_000)]
    assert theory.drift_time(lr=rates, **common, momentum=0.9) == pytest.approx(100 * expected, rel=1e-12)


# bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: theory.regularizer([1.0], 0.0), r"lr has to be finite and > 0, got 0"),
        (lambda: theory.regularizer([1.0], math.nan), "lr has to be finite and > 0, got nan"),
        (lambda: theory.regularizer([1.0], 0.1, 1.0), r"momentum has to be finite and in \[0, 1\), got 1"),
        (lambda: theory.regularizer([1.0, math.inf], 0.1), "eigenvalues has to be finite, got inf"),
        (lambda: theory.regularizer(torch.tensor([math.nan]), 0.1), "eigenvalues has to be finite, but holds NaN"),
        (lambda: theory.regularizer("many", 0.1), "eigenvalues has to be a number or an array of numbers, got 'many'"),
        (lambda: theory.regularizer([[1.0], [1.0, 2.0]], 0.1), "eigenvalues has to be a number or an array"),
        (lambda: theory.small_lr_limit([math.nan]), "eigenvalues has to be finite, got nan"),
        (lambda: theory.stability_limit(-0.1), r"momentum has to be finite and in \[0, 1\), got -0.1"),
        (lambda: theory.stationary_variance([-1.0, 1.0], lr=0.1, strength=0.1), "eigenvalue below 0, got -1; H has to"),
        (
            lambda: theory.stationary_variance([1.0], lr=0.1, strength=-1.0),
            "strength has to be finite and >= 0, got -1",
        ),
        (lambda: theory.stationary_covariance([[1.0, 2.0]], lr=0.1, strength=0.1), r"shape \(p, p\), got \(1, 2\)"),
        (lambda: theory.stationary_covariance([[1.0, 0.1], [0.0, 1.0]], lr=0.1, strength=0.1), "has to be symmetric"),
        (lambda: theory.strength(lr=-1.0, batch_size=1, noise_variance=1.0), "lr has to be finite and > 0, got -1"),
        (
            lambda: theory.strength(lr=1.0, batch_size=0, noise_variance=1.0),
            "batch_size has to be finite and > 0, got 0",
        ),
        (
            lambda: theory.strength(lr=1.0, batch_size=1, noise_variance=-1.0),
            "noise_variance has to be finite and >= 0",
        ),
        (
            lambda: theory.strength(lr=1.0, batch_size=1, noise_variance=1.0, curvature=0.0),
            "curvature has to be finite",
        ),
        (lambda: theory.strength(lr=True, batch_size=1, noise_variance=1.0), "lr has to be a number"),
        (lambda: theory.drift_time(lr=[0.1], steps=2, batch_size=1, noise_variance=1.0), "lr has shape"),
    ],
)
def test_bad_input(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
