from __future__ import annotations

import numpy as np
import pytest
import torch

from decaycast.methods.self_distill import krylov, solve, theory
from decaycast.methods.self_distill.estimator import KernelSelfDistillation


@pytest.fixture(autouse=True)
def from_300_points_per_output(monkeypatch):
    monkeypatch.setattr(solve, "_KRYLOV_FROM", 300)


def problem(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 8))
    kernel = np.exp(-((points[:, None] - points) ** 2).sum(-1) / 8)
    return kernel, np.sin(points[:, 0]) + 0.5 * rng.normal(size=n)


KERNEL, LABELS = problem()
DECOMPOSED = solve.decompose(KERNEL)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.004, 0.02])
def test_a_tolerance_in_a_krylov_space_is_that_of_all_eigenvalues(weight: float, share: float):
    tolerance = share * float((LABELS**2).mean())
    found = krylov.constrained_rounds(torch.from_numpy(KERNEL), torch.from_numpy(LABELS), tolerance, 6, weight)
    assert found is not None
    z = DECOMPOSED.coefficients(LABELS)
    exact = theory.constrained_rounds(DECOMPOSED.eigenvalues, z, tolerance, 6, weight)
    np.testing.assert_allclose(found[0], exact.shifts, rtol=1e-9)
    fits = KERNEL @ found[1].numpy().T
    np.testing.assert_allclose(fits.T, DECOMPOSED.lift(exact.filters * z), atol=1e-9)


def test_rounds_after_a_collapse_are_zero():
    tolerance = 0.3 * float((LABELS**2).mean())
    found = krylov.constrained_rounds(torch.from_numpy(KERNEL), torch.from_numpy(LABELS), tolerance, 4, 0.0)
    exact = theory.constrained_rounds(DECOMPOSED.eigenvalues, DECOMPOSED.coefficients(LABELS), tolerance, 4)
    assert found is not None and exact.collapsed_at is not None
    assert np.isinf(found[0]).tolist() == np.isinf(exact.shifts).tolist()
    assert not found[1][exact.collapsed_at :].any() and found[1][: exact.collapsed_at].any()


def test_the_estimator_takes_it_and_falls_back_to_all_eigenvalues(monkeypatch):
    tolerance = 0.01 * float((LABELS**2).mean())
    model = KernelSelfDistillation(kernel="precomputed", tolerance=tolerance, rounds=4)
    quick = model.fit(KERNEL, LABELS)
    values, until = quick.predict(KERNEL), quick.rounds_until_collapse_
    multipliers = quick.multipliers_
    assert quick.route_ == "lanczos"
    monkeypatch.setattr(krylov, "constrained_rounds", lambda *args: None)
    slow = model.fit(KERNEL, LABELS)
    assert slow.route_ == "eigh" and slow.rounds_until_collapse_ == until > 4
    np.testing.assert_allclose(values, slow.predict(KERNEL), atol=1e-9)
    np.testing.assert_allclose(multipliers, slow.multipliers_, rtol=1e-9)


def test_what_is_wrong_is_not_passed_on(monkeypatch):
    good = krylov._Small.constrained

    def off(*args):
        shifts, duals = good(*args)
        return shifts, duals * (1 + 1e-8)

    args = torch.from_numpy(KERNEL), torch.from_numpy(LABELS), 0.02 * float((LABELS**2).mean()), 3, 0.0
    assert krylov.constrained_rounds(*args) is not None
    monkeypatch.setattr(krylov._Small, "constrained", off)
    assert krylov.constrained_rounds(*args) is None


def test_out_of_reach_is_left_to_all_eigenvalues():
    flat = np.ones((600, 600))  # one direction, and labels that have little of it
    args = torch.from_numpy(flat), torch.from_numpy(LABELS), 0.01, 3, 0.0
    assert krylov.constrained_rounds(*args) is None
    with pytest.raises(ValueError, match="cannot be met"):
        KernelSelfDistillation(kernel="precomputed", tolerance=0.01, rounds=3).fit(flat, LABELS)
    within = krylov.constrained_rounds(torch.from_numpy(KERNEL), torch.from_numpy(LABELS), 99.0, 3, 0.0)
    assert within is None  # nothing to guess a pole from


def test_an_indefinite_kernel_is_refused_whatever_the_route():
    bent = KERNEL.copy()
    bent[0, 0] -= 1.0
    with pytest.raises(ValueError, match="not positive semi-definite"):
        KernelSelfDistillation(kernel="precomputed", tolerance=0.05).fit(bent, LABELS)


def test_few_points_or_many_outputs_do_without():
    assert solve.constrained_duals(KERNEL[:100, :100].copy(), LABELS[:100, None], 0.1, 2, 0.0) is None
    assert solve.constrained_duals(KERNEL, np.stack([LABELS] * 3, 1), 0.1, 2, 0.0) is None
    found = solve.constrained_duals(KERNEL, np.stack([LABELS, 2 * LABELS], 1), 0.05, 2, 0.0)
    assert found is not None and found[0].shape == (2, 2) and found[1].shape == (2, 600, 2)
