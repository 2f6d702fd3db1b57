from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.methods.self_distill import theory
from decaycast.methods.self_distill.checked import clipped

# the eleven points of Kennethborup/self_distillation, said there to be the paper's own
X11 = np.linspace(0.0, 1.0, 11)
Y11_TEXT = """0.38476636 1.23339677 1.33232242 0.69201595 -0.29756146 -0.24189292
    -0.79644858 -0.96164802 -0.49672510 -0.34690660 0.55895127"""
Y11 = np.array(Y11_TEXT.split(), dtype=float)


def biharmonic(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Green's function of d^4/dx^4 on [0, 1] with f = f'' = 0 at the ends."""
    x, t = x[:, None], t[None]
    return np.maximum(x - t, 0.0) ** 3 / 6 - x * (1 - t) * (x**2 - 2 * t + t**2) / 6


def problem(seed: int, n: int = 12, outputs: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    d = np.exp(rng.normal(0.0, 2.0, n))
    return d, rng.normal(size=(n, outputs) if outputs else n)


# the paper's example


def test_eleven_points_with_the_papers_tolerance():
    kernel = biharmonic(X11, X11)
    d, v = np.linalg.eigh(kernel)
    found = theory.constrained_rounds(d, v.T @ Y11, 0.045, 6)
    assert found.collapsed_at == theory.collapse(d, v.T @ Y11, 0.045) == 4
    assert found.shifts[:4] / 11 == pytest.approx([2.7053e-6, 8.7628e-5, 2.7376e-4, 7.9002e-4], rel=2e-5)
    assert np.isinf(found.shifts[4:]).all() and not found.filters[4:].any()
    assert found.norms[0] == pytest.approx(3.5701, abs=5e-5)
    assert found.norms[:5] * math.sqrt(11 * 0.045) == pytest.approx([2.5118, 2.3637, 1.8809, 1.2475, 0.5857], abs=5e-5)
    assert np.sort(found.filters[3])[:-6:-1] == pytest.approx([0.8871, 0.2502, 0.0210, 0.0014, 1.2e-4], abs=5e-5)
    grid = np.linspace(0.0, 1.0, 101)
    fits = biharmonic(grid, X11) @ v @ (found.duals[:4] * (v.T @ Y11)).T
    errors = ((fits - np.sin(2 * np.pi * grid)[:, None]) ** 2).mean(0)
    assert errors == pytest.approx([0.15275, 0.06821, 0.12029, 0.30439], abs=5e-6)


TABLE = {
    0.0: ([0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
    0.25: ([0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
    0.35: ([0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
}


@pytest.mark.parametrize("weight", TABLE)
def test_eleven_points_with_one_shift_and_mixed_labels(weight: float):
    grid = np.linspace(0.0, 1.0, 101)
    d, v = np.linalg.eigh(np.exp(-80 * (X11[:, None] - X11) ** 2))
    lift = np.exp(-80 * (grid[:, None] - X11) ** 2) @ v / d

    def error(filters: np.ndarray) -> np.ndarray:
        return ((lift @ (filters * (v.T @ Y11)).T - np.sin(2 * np.pi * grid)[:, None]) ** 2).mean(0)

    errors, limit = TABLE[weight]
    assert error(theory.mixed_filters(d, 0.2, [weight] * 5)) == pytest.approx(errors, abs=5.1e-6)
    last = theory.ridge_filter(d, theory.limit_shift(0.2, weight))[None] if weight else np.zeros((1, 11))
    assert error(last) == pytest.approx([limit], abs=5.1e-6)


# the multiplier


@given(st.integers(0, 10**6), st.floats(1e-6, 0.999), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_the_constraint_is_met_and_the_root_lies_in_the_bracket(seed: int, share: float, n: int):
    d, z = problem(seed, n)
    tolerance = share * float((z**2).mean())
    shift = float(theory.multiplier(d, z, tolerance))
    low, high = theory.multiplier_bracket(d, z, tolerance)
    assert ((shift / (shift + d)) ** 2 * z**2).mean() == pytest.approx(tolerance, rel=1e-10)
    assert low * (1 - 1e-9) <= shift <= high * (1 + 1e-9)


def test_the_root_agrees_with_plain_bisection():
    d, z = problem(3)
    low, high = 1e-12, 1e12
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ((middle / (middle + d)) ** 2 * z**2).mean() < 0.1 else (low, middle)
    assert float(theory.multiplier(d, z, 0.1)) == pytest.approx(low, rel=1e-12)


def test_each_output_has_its_own_multiplier():
    d, z = problem(5, outputs=3)
    z[:, 1] *= 1e-3  # within the tolerance
    together = theory.constrained_rounds(d, z, 0.05, 4, 0.2)
    assert np.isinf(together.shifts[:, 1]).all()
    for k in range(3):
        alone = theory.constrained_rounds(d, z[:, k], 0.05, 4, 0.2)
        for field in ("shifts", "filters", "duals", "norms"):
            np.testing.assert_allclose(getattr(together, field)[..., k], getattr(alone, field), rtol=1e-12)
        assert together.collapsed_at[k] == alone.collapsed_at


def test_null_directions_are_lost_in_the_first_fit_and_tighten_the_bracket():
    d, z = np.array([0.0, 1.0, 2.0]), np.array([0.5, 2.0, 1.0])
    shift = float(theory.multiplier(d, z, 0.2))
    assert ((shift / (shift + d)) ** 2 * z**2).sum() == pytest.approx(0.6, rel=1e-12)
    low, high = theory.multiplier_bracket(d, z, 0.2)
    assert 0 < low < shift < high
    # equal eigenvalues above 0: the bracket is the root
    ends = [float(end) for end in theory.multiplier_bracket([0.0, 1.0, 1.0], z, 0.2)]
    assert ends == pytest.approx([float(theory.multiplier([0.0, 1.0, 1.0], z, 0.2))] * 2, rel=1e-12)
    found = theory.constrained_rounds(d, z, 0.2, 2)
    assert not found.filters[:, 0].any() and np.isfinite(found.duals).all()
    # none of their energy is left for the second round
    np.testing.assert_allclose(found.shifts[1], theory.multiplier(d, found.filters[0] * z, 0.2), rtol=1e-14)


def test_a_tolerance_below_the_null_energy_is_refused_with_that_energy():
    with pytest.raises(ValueError, match=r"0.1 cannot be met.*mean square of 0.125; raise the tolerance"):
        theory.multiplier([0.0, 1.0], [0.5, 3.0], 0.1)
    assert float(theory.multiplier([0.0, 1.0], [0.5, 3.0], 0.13)) > 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_labels_within_the_tolerance_give_zero_from_round_zero(scale: float):
    z = scale * np.array([1.0, 1.0])
    found = theory.constrained_rounds([1.0, 2.0], z, 1.0, 2)
    assert found.collapsed_at == 0 == theory.collapse([1.0, 2.0], z, 1.0)
    assert np.isinf(found.shifts).all() and not found.duals.any() and theory.is_collapsed(z, 1.0)
    assert [float(end) for end in theory.multiplier_bracket([1.0, 2.0], z, 1.0)] == [math.inf, math.inf]


def test_labels_just_outside_the_tolerance_keep_their_digits():
    d, z = np.array([1.0, 1.0]), np.array([1.0, 1.0 + 1e-12])
    shift = float(theory.multiplier(d, z, 1.0))
    assert shift == pytest.approx(1.0 / (math.sqrt((z**2).mean()) - 1.0), rel=1e-3)
    assert (shift / (shift + 1.0)) ** 2 * (z**2).mean() == pytest.approx(1.0, rel=1e-10)


def test_a_kernel_of_zeros_fits_nothing():
    assert np.isinf(theory.multiplier([0.0, 0.0], [1.0, 1.0], 2.0))
    with pytest.raises(ValueError, match="cannot be met"):
        theory.multiplier([0.0, 0.0], [1.0, 1.0], 0.5)


# rounds


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.4, -0.5])
def test_rounds_are_what_a_loop_of_fits_gives(weight: float):
    rng = np.random.default_rng(7)
    points = rng.normal(size=(15, 2))
    kernel = np.exp(-((points[:, None] - points) ** 2).sum(-1))
    y = rng.normal(size=15)
    d, v = np.linalg.eigh(kernel)
    found = theory.constrained_rounds(d, v.T @ y, 0.2, 4, weight)
    labels = y
    for t in range(4):
        if (labels**2).mean() <= 0.2:
            dual = np.zeros(15)
        else:
            dual = np.linalg.solve(kernel + found.shifts[t] * np.eye(15), labels)
            assert ((kernel @ dual - labels) ** 2).mean() == pytest.approx(0.2, rel=1e-9)
        np.testing.assert_allclose(v @ (found.duals[t] * (v.T @ y)), dual, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(v @ (found.filters[t] * (v.T @ y)), kernel @ dual, atol=1e-10)
        labels = weight * y + (1 - weight) * kernel @ dual


def test_original_labels_put_off_collapse():
    d, z = problem(8)
    pure = theory.constrained_rounds(d, z, 0.3 * float((z**2).mean()), 20)
    mixed = theory.constrained_rounds(d, z, 0.3 * float((z**2).mean()), 20, weight=0.9)
    assert pure.collapsed_at is not None and mixed.collapsed_at is None


def test_constant_rounds_are_powers_of_one_fit():
    d, _ = problem(1)
    h = d / (d + 0.3)
    np.testing.assert_allclose(theory.constant_rounds(d, 0.3, 4), [h, h**2, h**3, h**4], rtol=1e-13)
    assert theory.constant_rounds(d, [[0.1], [0.3]], 4).shape == (2, 1, 4, 12)


def test_mixed_filters_broadcast_shifts_against_weights():
    d, _ = problem(2)
    table = theory.mixed_filters(d, np.array([0.1, 3.0])[:, None], [[0.0, 0.5], [1.0, 1.0], [-1.0, 2.0]])
    assert table.shape == (2, 3, 3, 12)
    np.testing.assert_allclose(table[1, 2], theory.mixed_filters(d, 3.0, [-1.0, 2.0]), rtol=1e-15)
    np.testing.assert_allclose(table[0, 1, 2], theory.ridge_filter(d, 0.1), rtol=1e-15)  # w = 1 is plain ridge


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 1.9])
def test_many_mixed_rounds_come_to_one_fit_with_the_limit_shift(weight: float):
    d, _ = problem(4)
    last = theory.mixed_filters(d, 0.7, [weight] * 2000)[-1]
    np.testing.assert_allclose(last, theory.ridge_filter(d, theory.limit_shift(0.7, weight)), rtol=1e-10)


def test_equivalent_eigenvalues_make_all_rounds_one_fit():
    d, z = problem(6)
    d[0] = 0.0
    found = theory.constrained_rounds(d, z, 0.15 + z[0] ** 2 / 12, 3)
    other = theory.equivalent_eigenvalues(d, found.shifts[:2])
    np.testing.assert_allclose(theory.ridge_filter(other, found.shifts[0]), found.filters[1], rtol=1e-9, atol=1e-14)
    assert other[0] == 0.0
    ordered = np.argsort(d)[1:]
    assert (np.diff(np.log(other[ordered])) >= np.diff(np.log(d[ordered])) - 1e-12).all()  # falls faster


def test_rounding_in_the_eigenvalues_is_zero_and_more_is_refused():
    assert clipped([-1e-13, 1e-17, 1.0]).tolist() == [0.0, 0.0, 1.0]
    assert clipped([-1e-6, 1.0], eps=float(np.finfo(np.float32).eps)).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"an eigenvalue of -1e-06 beside a largest of 1.*not positive semi-definite"):
        clipped([-1e-6, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.multiplier([[1.0]], [1.0], 0.1), r"eigenvalues have to have shape \(n,\)"),
        (lambda: theory.multiplier([1.0], [1.0, 2.0], 0.1), r"coefficients have to have shape \(1,\)"),
        (lambda: theory.multiplier([1.0], [math.nan], 0.1), "coefficients has to be finite"),
        (lambda: theory.multiplier([1.0], [1.0], 0.0), "tolerance has to be finite and above 0, got 0"),
        (lambda: theory.collapse([1.0], [[1.0]], 0.1), "one output at a time"),
        (lambda: theory.constrained_rounds([1.0], [1.0], 0.1, 0), r"rounds is the number of fits.*got 0"),
        (lambda: theory.constant_rounds([1.0], 1.0, -1), r"rounds is the number of fits.*got -1"),
        (lambda: theory.ridge_filter([1.0], 0.0), "shift has to be above 0"),
        (lambda: theory.mixed_filters([1.0], 1.0, 0.5), "one entry per later fit"),
        (lambda: theory.limit_shift(1.0, 0.0), r"weight within \(0, 2\]"),
        (lambda: theory.equivalent_eigenvalues([1.0], []), "at least one number above 0"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
