from __future__ import annotations

import math

import numpy as np
import pytest

from decaycast.methods.self_distill import bounds, theory


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Spectra from flat to steep, sizes 2 to 40, r_0 from just above 1 to 20."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 41))
    d = np.exp(rng.normal(0.0, rng.uniform(0.0, 5.0), n)) * 10 ** rng.uniform(-6, 6)
    z = rng.normal(size=n) * np.exp(rng.normal(0.0, 1.0, n))
    ratio = 1.0 + math.exp(rng.uniform(math.log(0.01), math.log(19.0)))
    return d, z, float((z**2).mean() / ratio**2)


def test_no_bound_is_violated_by_400_random_problems():
    for seed in range(400):
        d, z, tolerance = random_problem(seed)
        first = bounds.initial_ratio(z, tolerance)
        condition = float(d.max() / d.min())
        fits = theory.collapse(d, z, tolerance)
        found = theory.constrained_rounds(d, z, tolerance, fits + 1)
        assert found.collapsed_at == fits and np.isinf(found.shifts[fits])
        assert bounds.rounds_at_least(first) <= fits <= bounds.rounds_at_most(first)
        assert bounds.paper_rounds(first, condition) <= fits
        live = found.norms[: fits + 1]
        t = np.arange(fits + 1)
        assert (live >= first - t - 1e-8).all()
        assert (live**2 <= first**2 - t + 1e-8).all()
        assert (live >= bounds.paper_bound(first, condition, t) - 1e-8).all()
        low, high = (
            np.array([theory.multiplier_bracket(d, y, tolerance)[k] for y in labels(found, z)[:fits]]) for k in (0, 1)
        )
        assert (found.shifts[:fits] >= low * (1 - 1e-9)).all() and (found.shifts[:fits] <= high * (1 + 1e-9)).all()
        steps = np.diff(labels(found, z)[: fits + 1], axis=0)
        assert np.sqrt((steps**2).mean(1)) == pytest.approx([math.sqrt(tolerance)] * fits, rel=1e-6)
        missed = (found.shifts[:fits, None] / (found.shifts[:fits, None] + d)) * labels(found, z)[:fits]
        assert (np.abs((missed**2).mean(1) / tolerance - 1.0) <= 1e-10).all()
        check_sparsity(d, found, first, fits)


def labels(found: theory.Rounds, z: np.ndarray) -> np.ndarray:
    """Components of the labels of rounds 0, 1, ..."""
    return np.concatenate([z[None], found.filters * z])


def check_sparsity(d: np.ndarray, found: theory.Rounds, first: float, fits: int) -> None:
    order = np.argsort(d)
    ordered = d[order]
    for t in range(fits):
        kept = found.filters[t][order]
        bound = bounds.sparsity_bound(ordered[1:], ordered[:-1], float(ordered[0]), first, t + 1)
        assert (kept[1:] >= kept[:-1] * bound * (1 - 1e-9)).all()


def test_the_elementary_bound_is_sharp_for_equal_eigenvalues():
    z = np.array([3.0, 1.0, -2.0])
    found = theory.constrained_rounds([2.0, 2.0, 2.0], z, 0.05, 5)
    np.testing.assert_allclose(found.norms, bounds.initial_ratio(z, 0.05) - np.arange(6), rtol=1e-12)


def test_the_papers_bound_is_the_recursion_of_its_tangent():
    ratio, condition = 5.0, 30.0
    below = (ratio - 1 + condition) ** 2
    a, b = ((ratio - 1) ** 2 + condition * (2 * ratio - 1)) / below, condition * ratio**2 / below
    value, found = ratio, bounds.paper_bound(ratio, condition, np.arange(6))
    for t in range(6):
        assert found[t] == pytest.approx(value, rel=1e-12)
        value = a * value - b
    # kappa near 1 is no special case
    assert bounds.paper_bound(3.0, 1 + 1e-13, 2.0) == pytest.approx(1.0, abs=1e-10)


def test_rounds_of_a_label_within_the_tolerance():
    assert bounds.rounds_at_least(0.3) == bounds.rounds_at_most(0.3) == 0
    assert bounds.rounds_at_least(1.0) == bounds.rounds_at_most(1.0) == 0
    assert (bounds.rounds_at_least(1.001), bounds.rounds_at_most(1.001)) == (1, 1)


def test_near_interpolation_many_rounds_sparsify_more():
    """Fact of the paper's discussion: index at round (r_0 - 1)/kappa rises to exp(d_min/kappa*min(1/d_k - 1/d_{k+1}))."""
    d = np.array([0.2, 0.5, 1.0, 2.0])

    def index(ratio: float) -> float:
        fits = (ratio - 1) / (d[-1] / d[0])
        return float(bounds.sparsity_bound(d[1:], d[:-1], 0.2, ratio, fits).min())

    assert index(2.0) == pytest.approx(1.0087, abs=5e-5)
    assert index(1e6) == pytest.approx(math.exp(0.02 * 0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.initial_ratio([1.0], -1.0), "tolerance has to be finite and above 0"),
        (lambda: bounds.rounds_at_least(math.nan), r"ratio is \|\|y\|\|/sqrt\(n\*eps\)"),
        (lambda: bounds.rounds_at_most(-1.0), r"ratio is \|\|y\|\|/sqrt\(n\*eps\)"),
        (lambda: bounds.paper_rounds(0.5, 2.0), "the bound is for ratio >= 1"),
        (lambda: bounds.paper_bound(2.0, 0.5, 1), "the bound is for ratio >= 1"),
        (lambda: bounds.sparsity_bound(1.0, 2.0, 1.0, 2.0, 1), "smallest <= smaller <= larger"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
