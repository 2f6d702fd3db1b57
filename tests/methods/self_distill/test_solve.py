from __future__ import annotations

import numpy as np
import pytest
import torch

from decaycast.methods.self_distill import krylov, solve


def problem(n: int = 40, outputs: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 4))
    kernel = np.exp(-0.2 * ((points[:, None] - points) ** 2).sum(-1))
    return kernel, rng.normal(size=(n, outputs) if outputs else n)


def loop(kernel: np.ndarray, y: np.ndarray, shift: float, rounds: int, weight: float) -> np.ndarray:
    """One full solve per round, labels from a product with the kernel."""
    labels, duals = y, []
    for _ in range(rounds):
        duals.append(np.linalg.solve(kernel + shift * np.eye(len(y)), labels))
        labels = weight * y + (1 - weight) * kernel @ duals[-1]
    return np.array(duals)


@pytest.mark.parametrize("route", solve.ROUTES)
@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("weight", [0.0, 0.3, -0.5, 1.5])
def test_every_route_is_the_loop_of_solves(route: str, outputs: int, weight: float):
    kernel, y = problem(outputs=outputs)
    duals, way = solve.constant_duals(kernel, y, 0.7, 5, weight, route=route)
    assert isinstance(duals, np.ndarray)
    # a space of n/8 = 5 steps, never below 32, is enough here; if it were not, the fallback would say "cholesky"
    assert way == route
    np.testing.assert_allclose(duals, loop(kernel, y, 0.7, 5, weight), rtol=1e-8, atol=1e-9)


def test_routes_agree_to_nine_digits_at_a_thousand_points():
    kernel, y = problem(1000)
    found = [solve.constant_duals(kernel, y, 1.0, 10, route=route) for route in solve.ROUTES]
    assert [way for _, way in found] == list(solve.ROUTES)
    for duals, _ in found[1:]:
        assert np.abs(duals - found[0][0]).max() < 1e-9 * np.abs(y).max()


def test_lanczos_that_does_not_converge_falls_back_to_cholesky():
    kernel, y = problem(400)
    kernel = kernel**20 + 1e-3 * np.eye(400)  # a flat spectrum with a tiny shift
    duals, way = solve.constant_duals(kernel, y, 1e-7, 3, route="lanczos")
    assert way == "cholesky"
    np.testing.assert_allclose(duals, loop(kernel, y, 1e-7, 3, 0.0), rtol=1e-7)


def test_the_residual_of_lanczos_is_checked_and_not_taken_on_trust(monkeypatch):
    kernel, y = problem()
    good = krylov._Space.lift
    monkeypatch.setattr(krylov._Space, "lift", lambda *args: good(*args) * (1 + 1e-8))
    duals, way = solve.constant_duals(kernel, y, 0.7, 3, route="lanczos")
    assert way == "cholesky"
    np.testing.assert_allclose(duals, loop(kernel, y, 0.7, 3, 0.0), rtol=1e-9)


def test_labels_of_zero_and_a_label_that_is_an_eigenvector():
    kernel, _ = problem()
    vector = np.linalg.eigh(kernel)[1][:, -1]
    y = np.stack([np.zeros(40), vector], 1)
    duals, way = solve.constant_duals(kernel, y, 1.0, 2, route="lanczos")
    assert way == "lanczos" and not duals[:, :, 0].any()
    np.testing.assert_allclose(duals, loop(kernel, y, 1.0, 2, 0.0), atol=1e-12)


@pytest.mark.parametrize("route", solve.ROUTES)
def test_tensors_in_tensors_out(route: str):
    kernel, y = problem(outputs=2)
    duals, _ = solve.constant_duals(torch.from_numpy(kernel), torch.from_numpy(y), 0.7, 3, route=route)
    assert isinstance(duals, torch.Tensor) and duals.shape == (3, 40, 2)
    np.testing.assert_allclose(duals.numpy(), loop(kernel, y, 0.7, 3, 0.0), rtol=1e-8, atol=1e-9)


def test_single_precision_stays_single_precision():
    kernel, y = problem()
    duals, way = solve.constant_duals(torch.from_numpy(kernel).float(), torch.from_numpy(y), 0.7, 3)
    assert duals.dtype == torch.float32 and way == "cholesky"
    np.testing.assert_allclose(duals.numpy(), loop(kernel, y, 0.7, 3, 0.0), atol=1e-4)
    found = solve.decompose(kernel.astype(np.float32))
    assert found.eigenvalues.dtype == np.float64 and (found.eigenvalues >= 0).all()


def test_arguments_are_left_as_they_were():
    kernel, y = problem()
    kernel.flags.writeable = y.flags.writeable = False
    before = kernel.copy(), y.copy()
    for route in solve.ROUTES:
        solve.constant_duals(kernel, y, 0.7, 3, 0.2, route=route)
    solve.checked_kernel(kernel, definite=True)
    assert (kernel == before[0]).all() and (y == before[1]).all()


def test_a_decomposition_goes_there_and_back():
    kernel, y = problem(outputs=2)
    found = solve.decompose(kernel)
    np.testing.assert_allclose(found.lift(found.coefficients(y)[None])[0], y, atol=1e-12)
    np.testing.assert_allclose(found.lift(found.coefficients(y).T), y.T, atol=1e-12)
    z = found.coefficients(y)
    np.testing.assert_allclose(found.lift((found.eigenvalues[:, None] * z)[None])[0], kernel @ y, atol=1e-11)
    tensor = solve.decompose(torch.from_numpy(kernel))
    assert isinstance(tensor.lift(z.T), torch.Tensor)


@pytest.mark.parametrize(
    ("args", "route"),
    [((500, 1), "cholesky"), ((5000, 1), "lanczos"), ((5000, 9), "cholesky"), ((5000, 10), "eigh"), ((50, 99), "eigh")],
)
def test_the_rule_of_cost(args: tuple[int, int], route: str):
    assert solve.choose_route(*args) == route


def test_the_rule_of_cost_knows_outputs_and_precision():
    assert solve.choose_route(5000, 1, outputs=10) == "cholesky"
    assert solve.choose_route(5000, 1, dtype=torch.float32) == "cholesky"


def asymmetric() -> np.ndarray:
    kernel, _ = problem(1100)
    kernel[3, 1050] += 1e-3
    return kernel


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve.checked_kernel(np.ones((2, 3))), r"shape \(n, n\), got \(2, 3\)"),
        (lambda: solve.checked_kernel(np.ones((0, 0))), r"shape \(n, n\), got \(0, 0\)"),
        (lambda: solve.checked_kernel(np.eye(2, dtype=int)), "float64 or float32, got torch.int64"),
        (lambda: solve.checked_kernel(np.full((2, 2), np.nan)), "the kernel matrix holds NaN or infinity"),
        (lambda: solve.checked_kernel(np.diag([1.0, np.inf])), "the kernel matrix holds NaN or infinity"),
        (lambda: solve.checked_kernel(asymmetric()), "not symmetric: .* up to 0.001"),
        (lambda: solve.checked_kernel(np.diag([1.0, -1e-6]), definite=True), "not positive semi-definite"),
        (lambda: solve.decompose(np.diag([1.0, -1e-6])), "an eigenvalue of -1e-06 beside a largest of 1"),
        (
            lambda: solve.constant_duals(np.diag([1.0, -2.0]), np.ones(2), 1.0, 1),
            "plus 1 on its diagonal is not positive",
        ),
        (lambda: solve.constant_duals(np.eye(2), np.ones(3), 1.0, 1), r"labels have to have shape \(2,\)"),
        (lambda: solve.constant_duals(np.eye(2), np.array([1.0, np.nan]), 1.0, 1), "labels has to be finite"),
        (lambda: solve.constant_duals(np.eye(2), torch.tensor([1.0, torch.nan]), 1.0, 1), "labels have to be finite"),
        (lambda: solve.constant_duals(np.eye(2), torch.ones(2, device="meta"), 1.0, 1), "labels are on meta"),
        (lambda: solve.constant_duals(np.eye(2), np.ones(2), 0.0, 1), "shift has to be finite and above 0"),
        (lambda: solve.constant_duals(np.eye(2), np.ones(2), 1.0, 0), "rounds is the number of fits"),
        (lambda: solve.constant_duals(np.eye(2), np.ones(2), 1.0, 1, np.inf), "weight has to be finite"),
        (lambda: solve.constant_duals(np.eye(2), np.ones(2), 1.0, 1, route="lu"), "unknown route 'lu'"),
        (lambda: solve.choose_route(0, 1), "at least 1, got 0, 1 and 1"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_of_a_kernel_is_let_pass():
    kernel, _ = problem()
    kernel[0, 1] += 1e-14
    solve.checked_kernel(kernel, definite=True)
    solve.checked_kernel(np.zeros((2, 2)), definite=True)
    solve.checked_kernel(np.diag([1.0, -1e-12]), definite=True)
