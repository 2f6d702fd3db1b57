"""The closed forms against ODE integration, incomplete gamma functions and limits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import roots_jacobi

from decaycast.methods.l2 import theory

CASE = {"eigenvalue": 1.0, "target": 1.0, "weight_decay": 0.1, "homogeneity": 2}


def integrate(times, gamma, y, start, decay, k):
    """Theorem 1 for one mode, step by step."""

    def slope(t, f):
        return -gamma * np.exp(-2 * (k - 1) * decay * t) * (f - y) - k * decay * f

    found = solve_ivp(slope, (0.0, times[-1]), [start], method="DOP853", t_eval=times, rtol=1e-12, atol=1e-14)
    return found.y[0]


def radau(stages: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and integration matrix of the Radau IIA method: any stiffness, order 2*stages - 1."""
    nodes = np.append(roots_jacobi(stages - 1, 1, 0)[0], 1.0)
    legendre = np.polynomial.legendre
    integrals = [legendre.legval(nodes, legendre.legint(each, lbnd=-1)) / 2 for each in np.eye(stages)]
    return (nodes + 1) / 2, np.stack(integrals, axis=1) @ np.linalg.inv(legendre.legvander(nodes, stages - 1))


def integrate_stiff(times, ratios, y, start, k):
    """Theorem 1 at lambda = 1 for many gamma at once, in steps that grow with t: table of times x ratios."""
    nodes, weights = radau(10)
    mesh = np.unique(np.concatenate([[0.0], np.geomspace(1e-12, 0.25, 146), np.arange(0.3, 20.05, 0.05), times]))
    f, kept = np.full(ratios.shape, float(start)), []
    for now, then in zip(mesh[:-1], mesh[1:]):
        gamma = ratios[:, None] * np.exp(-2 * (k - 1) * (now + (then - now) * nodes))
        steps = (then - now) * weights
        system = np.eye(len(nodes)) + steps * (gamma + k)[:, None, :]
        f = np.linalg.solve(system, (f[:, None] + y * gamma @ steps.T)[..., None])[:, -1, 0]
        if then in times:
            kept.append(f)
    return np.array(kept)


def exact(t, gamma, y, start, decay, k):
    """Theorem 2 in 60 digits: the integral is a difference of incomplete gamma functions (k >= 2, lambda > 0)."""
    with mpmath.workdps(60):
        t, gamma, y, start, decay, k = (mpmath.mpf(value) for value in (t, gamma, y, start, decay, k))
        a, p = 2 * (k - 1) * decay, k / (2 * (k - 1))
        first, last = gamma / a, gamma * mpmath.exp(-a * t) / a
        memory = mpmath.exp(last) * last**p * (mpmath.gammainc(1 - p, last) - mpmath.gammainc(1 - p, first))
        return float(start * mpmath.exp(last - first - k * decay * t) + y * memory)


# the solution


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_a_mode_solves_the_equation(k: int, decay: float):
    times = np.linspace(0.0, 3.0 / decay if k else 0.7 / decay, 23)
    for gamma, y, start in [(1.0, 1.0, 0.3), (0.2, -1.7, 0.4), (5.0, 0.6, -2.0)]:
        found = theory.mode(times, eigenvalue=gamma, target=y, initial=start, weight_decay=decay, homogeneity=k)
        assert np.abs(found - integrate(times, gamma, y, start, decay, k)).max() < 1e-9


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_a_mode_solves_the_equation_at_every_stiffness_up_to_twenty_efolds(k: int):
    """Against the size of the parts of f from the start and from the target, each of which has one sign."""
    ratios, decay = np.geomspace(1e-3, 1e8, 12), 0.037
    times = np.array([1e-9, 1e-7, 1e-5, 1e-3, 0.02, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0])
    learnt, kept = integrate_stiff(times, ratios, 1.0, 0.0, k), integrate_stiff(times, ratios, 0.0, 1.0, k)
    for start, y in [(0.3, 1.0), (-2.0, 1.0), (0.8, -0.5), (0.0, 1.7), (-1.0, 1e-3)]:
        case = {"target": y, "initial": start, "weight_decay": decay, "homogeneity": k}
        found = theory.mode(times[:, None] / decay, eigenvalue=ratios * decay, **case)
        assert (np.abs(found - y * learnt - start * kept) <= 1e-11 * (abs(y) * learnt + abs(start) * kept)).all()
        table = theory.outputs(times / decay, ratios * decay, np.full(12, y), start, decay, k)
        assert (table == found).all()


@pytest.mark.parametrize("k", [2, 2.5, 3, 4])
@pytest.mark.parametrize("ratio", [1e-6, 0.03, 1.0, 40.0, 1400.0, 1e8])
def test_a_mode_to_thirteen_digits_through_all_its_phases(k: float, ratio: float):
    decay = 0.037
    for scaled in [1e-9, 1e-4, 0.02, 0.3, 1.0, 4.0, 20.0]:
        want = exact(scaled / decay, ratio * decay, 1.3, 0.2, decay, k)
        found = theory.mode(
            scaled / decay, eigenvalue=ratio * decay, target=1.3, initial=0.2, weight_decay=decay, homogeneity=k
        )
        assert found == pytest.approx(want, rel=2e-13), scaled


def test_the_highest_point_of_a_mode_is_that_of_the_fact_sheet():
    decay = np.array([0.01, 0.1])
    case = {**CASE, "initial": 0.3, "weight_decay": decay}
    peak = theory.time_of_peak(**case)
    assert decay * peak == pytest.approx([0.076, 0.276], abs=5e-4)
    assert theory.mode(peak, **case) == pytest.approx([0.977, 0.742], abs=5e-4)
    assert (theory.mode(peak, **case) > theory.mode(peak * [[0.99], [1.01]], **case)).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_large_eigenvalue_follows_the_quasi_static_value(k: int):
    decay, gamma, y = 1e-4, 1e4, -2.0
    times = np.array([0.01, 10.0, 1e3, 1e4])
    case = {"eigenvalue": gamma, "target": y, "weight_decay": decay, "homogeneity": k}
    found = theory.mode(times, initial=5.0, **case)
    now = gamma * np.exp(-2 * (k - 1) * decay * times)
    assert found == pytest.approx(y * now / (now + k * decay), rel=1e-8)
    assert theory.quasi_static(times, **case) == pytest.approx(y * now / (now + k * decay), rel=1e-14)


def test_nothing_is_lost_in_blocks():
    gamma = np.geomspace(1e-3, 1e3, 9001)
    case = {"target": 1.0, "weight_decay": 0.1, "homogeneity": 3}
    found = theory.mode(2.0, eigenvalue=gamma, **case)
    picked = [0, 4095, 4096, 9000]
    assert found[picked] == pytest.approx(
        [float(theory.mode(2.0, eigenvalue=gamma[i], **case)) for i in picked], rel=1e-13
    )


# limits


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_without_decay_it_is_plain_ntk_training(k: int):
    times, gamma = np.array([0.0, 1e-3, 0.5, 3.0, 200.0]), 0.7
    want = 2.0 + (-1.0 - 2.0) * np.exp(-gamma * times)
    for decay, accuracy in [(0.0, 1e-14), (1e-300, 1e-14), (1e-15, 1e-12), (1e-9, 1e-5)]:
        found = theory.mode(times, eigenvalue=gamma, target=2.0, initial=-1.0, weight_decay=decay, homogeneity=k)
        assert found == pytest.approx(want, rel=accuracy)


@pytest.mark.parametrize("scaled", [1e-10, 4.9e-10, 5.1e-10, 1e-8])
def test_the_first_order_in_a_tiny_decay(scaled: float):
    """k = 0: X = gamma*(t + lambda*t**2 + ...)."""
    found = theory.mode(2.0, eigenvalue=0.3, target=1.0, weight_decay=scaled / 2.0, homogeneity=0)
    assert found == pytest.approx(-np.expm1(-0.3 * (2.0 + 2.0 * scaled)), rel=2e-15)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_it_starts_at_the_start_and_ends_where_it_has_to(k: int):
    case = {"eigenvalue": 0.5, "target": 2.0, "initial": -0.25, "homogeneity": k}
    assert theory.mode(0.0, weight_decay=0.3, **case) == -0.25
    end = {0: 2.0, 1: 2.0 * 0.5 / 0.8}.get(k, 0.0)
    assert theory.mode([np.inf, 1e5], weight_decay=0.3, **case) == pytest.approx([end, end], rel=1e-15)
    assert theory.mode(np.inf, weight_decay=0.0, **case) == 2.0
    still = {**case, "eigenvalue": 0.0}
    assert theory.mode([2.0, np.inf], weight_decay=0.3, **still) == pytest.approx(
        [-0.25 * np.exp(-0.6 * k), 0.0 if k else -0.25], rel=1e-15
    )
    assert theory.mode(np.inf, weight_decay=0.0, **still) == -0.25


def test_ridge_is_ridge_regression():
    times = np.array([0.0, 0.4, 9.0])
    found = theory.mode(times, eigenvalue=3.0, target=2.0, initial=0.5, weight_decay=0.2, homogeneity=1)
    best = 3.0 * 2.0 / 3.2
    assert found == pytest.approx(best + (0.5 - best) * np.exp(-3.2 * times), rel=1e-14)


def test_scale_invariant_weights_train_at_the_effective_rate():
    """Gradient descent on the function, without L2, with lr*exp(2*lr*lambda*steps)."""
    lr, decay, gamma = 1e-3, 0.2, 0.5
    steps = np.arange(4000)
    rates = theory.effective_learning_rate(lr, decay, steps)
    assert rates[[0, 2500]] == pytest.approx([lr, lr * np.e], rel=1e-14)
    trained = 1.0 - 0.9 * np.prod(1.0 - gamma * rates)
    closed = theory.mode(4.0, eigenvalue=gamma, target=1.0, initial=0.1, weight_decay=decay, homogeneity=0)
    assert trained == pytest.approx(closed, rel=1e-3)
    assert abs(closed - (1.0 - 0.9 * np.exp(-gamma * 4.0))) > 0.05  # plain training is elsewhere


# times


def test_the_peak_is_where_the_slope_changes_sign():
    gamma, decay = np.geomspace(1e-2, 1e6, 9), 0.01
    for k, start in [(2, -4.0), (3, 0.0), (4, 0.001)]:
        case = {"eigenvalue": gamma, "target": -2.0, "initial": -2.0 * start, "weight_decay": decay, "homogeneity": k}
        peak = theory.time_of_peak(**case)
        assert ((peak > 0) & np.isfinite(peak)).all()
        below, above = (
            abs(integrate([0.0, x], gamma[2], 1.0, start, decay, k)[-1]) for x in (0.9 * peak[2], 1.1 * peak[2])
        )
        assert theory.mode(peak, **case)[2] / -2.0 > max(below, above)
    # gamma >> lambda: the start is forgotten when exp(-gamma*t) = 2(k-1)*k*(lambda/gamma)**2, far below rounding of f
    fast = theory.time_of_peak(eigenvalue=1e6, target=1.0, weight_decay=0.01, homogeneity=2)
    assert fast == pytest.approx(np.log(1e16 / 4.0) / 1e6, rel=1e-6)


def test_a_peak_with_hardly_any_decay():
    case = {"eigenvalue": 1.0, "target": 1.0, "homogeneity": 2}
    peak = theory.time_of_peak(**case, weight_decay=[1e-100, 1e-300, 5e-324])
    assert peak[0] == pytest.approx(np.log(1e200 / 4.0), rel=1e-6)
    assert (theory.mode(peak, **case, weight_decay=[1e-100, 1e-300, 5e-324]) == 1.0).all()


def test_modes_without_a_peak():
    case = {"eigenvalue": 1.0, "target": 1.0}
    assert theory.time_of_peak(**case, initial=0.9, weight_decay=0.1, homogeneity=2) == 0.0  # above 1/1.2
    assert theory.time_of_peak(**case, weight_decay=0.0, homogeneity=2) == np.inf
    assert theory.time_of_peak(**case, weight_decay=0.1, homogeneity=[0, 1]).tolist() == [np.inf, np.inf]
    # k > 2: from far enough on the other side, f creeps up to 0 and never gets there; k = 2 always does
    late = theory.time_of_peak(eigenvalue=0.1, target=-1.0, initial=4.0, weight_decay=0.1, homogeneity=[2, 3])
    assert late[0] < late[1] == np.inf
    flat = theory.time_of_peak(eigenvalue=[0.0, 1.0], target=[1.0, 0.0], weight_decay=0.1, homogeneity=2)
    assert flat.tolist() == [0.0, 0.0]


def test_a_mode_is_lost_when_it_is_down_to_a_half():
    lost = theory.time_of_loss(eigenvalue=[1.0, 7.0], weight_decay=0.01, homogeneity=[[2], [4]])
    assert lost[0, 0] == pytest.approx(np.log(50.0) / 0.02)
    half = theory.quasi_static(lost, eigenvalue=[1.0, 7.0], target=3.0, weight_decay=0.01, homogeneity=[[2], [4]])
    assert half == pytest.approx(np.full((2, 2), 1.5), rel=1e-13)
    never = theory.time_of_loss(eigenvalue=[0.0, 0.1, 9.0], weight_decay=[[0.2], [0.0]], homogeneity=2)
    assert never[0, :2].tolist() == [0.0, 0.0] and 0 < never[0, 2] < np.inf
    assert never[1].tolist() == [0.0, np.inf, np.inf]
    assert theory.time_of_loss(eigenvalue=1.0, weight_decay=0.1, homogeneity=[0, 1]).tolist() == [np.inf, np.inf]


def test_the_kernel_shrinks_stays_or_grows():
    assert theory.kernel_scale([0.0, 5.0], 0.1, [[0], [1], [2]]) == pytest.approx(
        np.array([[1, np.e], [1, 1], [1, 1 / np.e]])
    )
    assert theory.kernel_eigenvalue(3.0, 0.1, 5.0, 3) == pytest.approx(3.0 * np.exp(-2.0))
    assert theory.kernel_scale(np.inf, [0.0, 1.0], 2).tolist() == [1.0, 0.0]
    assert theory.kernel_scale(1e6, 1.0, 0) == np.inf
    assert theory.kernel_eigenvalue([0.0, 2.0], 1.0, 1e6, 0).tolist() == [0.0, np.inf]
    assert theory.effective_learning_rate(1.0, 1.0, 1e6) == np.inf


# shapes and bounds


def test_everything_broadcasts():
    shape = (5, 4, 3, 2)
    t, gamma, decay = np.ones((5, 1, 1, 1)), np.ones((4, 1, 1)), np.full((3, 1), 0.1)
    k = [0.0, 3.0]
    found = theory.mode(t, eigenvalue=gamma, target=1.0, initial=torch.zeros(1), weight_decay=decay, homogeneity=k)
    assert found.shape == shape and found.dtype == np.float64
    single = [float(theory.mode(1.0, eigenvalue=1.0, target=1.0, weight_decay=0.1, homogeneity=each)) for each in k]
    assert found[2, 1, 0] == pytest.approx(single, rel=1e-14)
    assert theory.kernel_eigenvalue(gamma, decay, t, k).shape == shape
    assert theory.quasi_static(t, eigenvalue=gamma, target=1, weight_decay=decay, homogeneity=k).shape == shape
    assert theory.time_of_peak(eigenvalue=gamma, target=1, weight_decay=decay, homogeneity=k).shape == shape[1:]
    assert theory.time_of_loss(eigenvalue=gamma, weight_decay=decay, homogeneity=k).shape == shape[1:]
    assert theory.effective_learning_rate([[0.1], [0.2]], 0.1, [1, 2, 3]).shape == (2, 3)


@settings(max_examples=80, deadline=None)
@given(
    t=st.floats(0, 1e6),
    gamma=st.floats(0, 1e9),
    y=st.floats(1e-3, 1e3),
    decay=st.floats(0, 10),
    k=st.sampled_from([0, 1, 2, 3, 7]),
)
def test_a_mode_stays_between_nothing_and_its_target(t: float, gamma: float, y: float, decay: float, k: int):
    case = {"eigenvalue": gamma, "target": y, "weight_decay": decay, "homogeneity": k}
    found = float(theory.mode(t, **case))
    assert 0.0 <= found <= y * (1 + 1e-13)
    assert float(theory.mode(t, initial=y / 2, **case)) >= found  # paths never cross


# a whole training set


def data(n: int = 7, m: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(n + m, 12))
    return features @ features.T, rng.normal(size=(n + m, 2)), rng.normal(size=(n + m, 2))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_outputs_of_a_network_on_all_points(k: int):
    """All points at once, train and other, against theorem 1 integrated."""
    n, decay = 7, 0.2
    kernel, start, y = data(n)
    times = np.array([0.0, 0.3, 1.0, 4.0])

    def slope(t, flat):
        f = flat.reshape(y.shape)
        pull = np.exp(-2 * (k - 1) * decay * t) * kernel[:, :n] @ (f[:n] - y[:n]) / n
        return (-pull - k * decay * f).ravel()

    solved = solve_ivp(slope, (0.0, 4.0), start.ravel(), method="DOP853", t_eval=times, rtol=1e-11, atol=1e-13)
    want = solved.y.T.reshape(len(times), *y.shape)
    common = {"weight_decay": decay, "homogeneity": k}
    train = theory.function_evolution(times, kernel[:n, :n], y[:n], initial=start[:n], **common)
    other = theory.prediction_evolution(
        times, kernel[:n, :n], y[:n], kernel[n:, :n], initial=start[:n], cross_initial=start[n:], **common
    )
    assert np.abs(train - want[:, :n]).max() < 1e-8
    assert np.abs(other - want[:, n:]).max() < 1e-8
    one = theory.function_evolution(times, kernel[:n, :n], y[:n, 1], initial=start[:n, 1], **common)
    assert one == pytest.approx(train[..., 1], rel=1e-12)


def test_a_kernel_without_full_rank_is_fine():
    kernel, _, y = data(9)
    features = np.linalg.cholesky(kernel + 1e-9 * np.eye(12))[:, :4]
    low = features @ features.T
    common = {"weight_decay": 0.1, "homogeneity": 2}
    train = theory.function_evolution([0.5, 2.0], low[:9, :9], y[:9], **common)
    again = theory.prediction_evolution([0.5, 2.0], low[:9, :9], y[:9], low[:9, :9], **common)
    assert again == pytest.approx(train, abs=1e-12)
    nothing = theory.prediction_evolution(
        [1.0], np.zeros((2, 2)), [1.0, 2.0], np.zeros((1, 2)), cross_initial=1.0, **common
    )
    assert nothing == pytest.approx(np.exp([[-0.2]]))


def test_a_table_of_outputs_is_a_table_of_modes():
    times, gamma, y = np.array([0.0, 1.0, 1.0, 30.0]), np.array([2.0, 0.5, -1e-16]), np.array([1.0, -2.0, 3.0])
    found = theory.outputs(times, gamma, y, 0.1, 0.05, 3)
    case = {"eigenvalue": [2.0, 0.5, 0.0], "target": y, "initial": 0.1, "weight_decay": 0.05, "homogeneity": 3}
    assert found == pytest.approx(theory.mode(times[:, None], **case), rel=1e-13)
    assert found.shape == (4, 3)
    single = theory.function_evolution(
        [1.0], torch.tensor([[2.0, 1.0], [1.0 + 1e-7, 2.0]]), [1.0, 0.0], weight_decay=0.1, homogeneity=2
    )
    assert np.isfinite(single).all()  # float32 rounding is no asymmetry
