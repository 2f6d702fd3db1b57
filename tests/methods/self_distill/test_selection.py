from __future__ import annotations

import numpy as np
import pytest

from decaycast.methods.self_distill import selection, theory


def problem(n: int = 20, outputs: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(n, 3))
    return np.exp(-0.3 * ((points[:, None] - points) ** 2).sum(-1)), rng.normal(size=(n, outputs)) + 1.0


def refits_without(kernel: np.ndarray, y: np.ndarray, i: int, shift: float, weights: list[float]) -> np.ndarray:
    """y_i minus predictions at i, after each round on the other points."""
    others = np.arange(len(y)) != i
    inner, cross = kernel[np.ix_(others, others)], kernel[i, others]
    labels, missed = y[others], []
    for weight in [*weights, 0.0]:
        dual = np.linalg.solve(inner + shift * np.eye(len(inner)), labels)
        missed.append(y[i] - cross @ dual)
        labels = weight * y[others] + (1 - weight) * inner @ dual
    return np.array(missed)


@pytest.mark.parametrize("weights", [[0.0] * 4, [0.4] * 4, [1.5, -1.0, 0.2, 3.0]])
def test_leaving_a_point_out_of_all_rounds_is_exact(weights: list[float]):
    kernel, y = problem()
    d, v = np.linalg.eigh(kernel)
    pure = selection.leave_one_out_rounds(v, d, v.T @ y, 0.3, 5)
    mixed = np.tensordot(selection.mix_powers(weights), pure, 1)
    for i in (0, 7, 19):
        np.testing.assert_allclose(mixed[:, i], refits_without(kernel, y, i, 0.3, weights), rtol=1e-8)


def test_many_shifts_and_one_output_are_slices_of_the_same_table():
    kernel, y = problem()
    d, v = np.linalg.eigh(kernel)
    table = selection.leave_one_out_rounds(v, d, v.T @ y, [0.3, 2.0], 3)
    assert table.shape == (2, 3, 20, 2)
    np.testing.assert_allclose(table[1], selection.leave_one_out_rounds(v, d, v.T @ y, 2.0, 3), rtol=1e-12)
    alone = selection.leave_one_out_rounds(v, d, v.T @ y[:, 1], [0.3, 2.0], 3)
    np.testing.assert_allclose(table[..., 1], alone, rtol=1e-10)


def test_the_shortcut_is_exact_for_one_fit_and_only_for_one():
    kernel, y = problem()
    d, v = np.linalg.eigh(kernel)
    filters = theory.constant_rounds(d, 0.3, 2)
    usual, exact = selection.leave_one_out(v, filters, v.T @ y), selection.leave_one_out_rounds(v, d, v.T @ y, 0.3, 2)
    np.testing.assert_allclose(usual[0], exact[0], rtol=1e-9)
    assert np.abs(usual[1] - exact[1]).max() > 1e-2
    np.testing.assert_allclose(selection.leave_one_out(v, filters[1], v.T @ y[:, 0]), usual[1, :, 0], rtol=1e-9)


def test_gcv_is_its_definition():
    kernel, y = problem()
    d, v = np.linalg.eigh(kernel)
    filters = theory.mixed_filters(d, 0.3, [[0.5], [-1.0]])
    found = selection.gcv(filters, v.T @ y)
    smoother = v @ np.diag(filters[1, 1]) @ v.T
    missed = y - smoother @ y
    expected = (missed**2).mean(0) / (1 - np.trace(smoother) / 20) ** 2
    np.testing.assert_allclose(found[1, 1], expected, rtol=1e-10)
    np.testing.assert_allclose(selection.gcv(filters, v.T @ y[:, 1]), found[..., 1], rtol=1e-12)
    assert selection.gcv([1.0, 1.0], [1.0, 2.0]) == np.inf and selection.gcv([3.0, 0.0], [1.0, 2.0]) == np.inf


def test_gcv_is_leave_one_out_where_all_points_are_alike():
    """On a circle every leverage is the same, and for one fit the two are one number."""
    angles = np.arange(9) * 2 * np.pi / 9
    d, v = np.linalg.eigh(np.exp(np.cos(angles[:, None] - angles)))
    y = np.random.default_rng(1).normal(size=9)
    h = theory.ridge_filter(d, 0.2)
    missed = selection.leave_one_out(v, h, v.T @ y)
    assert (missed**2).mean() == pytest.approx(float(selection.gcv(h, v.T @ y)), rel=1e-10)


def test_mix_powers_times_pure_rounds_are_mixed_rounds():
    d, weights = np.array([0.1, 1.0, 5.0]), np.array([[0.2, -1.0, 3.0], [0.0, 0.5, 1.0]])
    powers = selection.mix_powers(weights)
    np.testing.assert_allclose(powers.sum(-1), 1.0)
    np.testing.assert_allclose(
        powers @ theory.constant_rounds(d, 0.7, 4), theory.mixed_filters(d, 0.7, weights), rtol=1e-12
    )


# a known problem

KNOWN = [(0.1, 0.1), (0.1, 10.0), (4.0, 0.1), (4.0, 10.0)]  # noise variance, shift


@pytest.mark.parametrize(("noise", "shift"), KNOWN)
@pytest.mark.parametrize("error", selection.ERRORS)
def test_the_best_mix_beats_its_neighbours_and_its_sign_is_that_of_the_slope(noise: float, shift: float, error: str):
    rng = np.random.default_rng(2)
    d = np.exp(rng.normal(0.0, 1.5, 15))
    signal = np.sqrt(d) * rng.normal(size=15)

    def risk_of(weight: float) -> float:
        filters = theory.mixed_filters(d, shift, [weight])[-1]
        return float(selection.risk(filters, d, signal, noise, error))

    best = selection.best_mix(d, shift, signal, noise, error)
    assert risk_of(best) < min(risk_of(best - 1e-3), risk_of(best + 1e-3), risk_of(1.0))
    ridge = [
        float(selection.risk(theory.ridge_filter(d, shift * f), d, signal, noise, error)) for f in (1 - 1e-5, 1 + 1e-5)
    ]
    slope = np.sign(ridge[1] - ridge[0])
    assert selection.mix_sign(d, shift, signal, noise, error) == -slope == np.sign(1.0 - best)


def test_risk_is_what_draws_of_noise_give():
    rng = np.random.default_rng(3)
    d = np.array([0.2, 1.0, 4.0])
    v = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    truth = np.array([1.0, -1.0, 2.0])
    filters = theory.mixed_filters(d, 0.5, [0.3])[-1]
    labels = truth + 0.7 * rng.normal(size=(200_000, 3))
    errors = (((labels @ v * filters) @ v.T - truth) ** 2).mean(1)
    expected = float(selection.risk(filters, d, v.T @ truth, 0.49))
    assert abs(errors.mean() - expected) < 4 * errors.std() / np.sqrt(len(errors))


def test_the_best_mix_is_below_zero_when_labels_are_noise():
    assert (
        selection.best_mix([1.0, 2.0], 0.1, [0.1, 0.1], 4.0)
        < 0
        < 1
        < selection.best_mix([1.0, 2.0], 10.0, [3.0, 3.0], 0.1)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selection.gcv([1.0], [1.0, 2.0]), "filters of shape"),
        (lambda: selection.leave_one_out([[1.0]], [0.5, 0.5], [1.0, 2.0]), r"vectors have to have shape \(2, 2\)"),
        (lambda: selection.mix_powers(0.5), "one entry per later fit"),
        (lambda: selection.leave_one_out_rounds([[1.0]], [1.0], [1.0], 1.0, 0), "rounds is the number of fits"),
        (lambda: selection.risk([0.5], [1.0], [1.0], -1.0), "noise_variance has to be finite and >= 0"),
        (lambda: selection.risk([0.5], [1.0], [[1.0]], 1.0), "ask one output at a time"),
        (lambda: selection.risk([0.5], [1.0], [1.0], 1.0, "predictions"), "unknown error 'predictions'; did you mean"),
        (lambda: selection.best_mix([1.0], 1.0, [0.0], 0.0), "no mix is better than another"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
