"""The small models of the figures: losses, curvatures and one-step laws beside autograd, enumeration and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures import gauss_newton, linear_chains, quadratic, tanh_net
from decaycast.methods.label_noise.regularizer import implicit_regularizer

DATA = tanh_net.sine(7)


class Tanh(nn.Module):
    """The tanh network in torch, weights (3, width)."""

    def __init__(self, theta: np.ndarray) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, a = self.theta
        return torch.tanh(x[:, None] * w + b) @ a


def theta_of(seed: int, width: int = 5) -> np.ndarray:
    return tanh_net.initial(width, seed)


# sparse regression


def test_the_traced_hessian_is_that_of_the_loss_at_zero_residual():
    task = quadratic.problem(6, 3, dimension=4, ones=2)
    v = np.sqrt(task.weights) * np.array([1.0, -1.0, 1.0, 1.0])  # interpolates

    def loss(at: torch.Tensor) -> torch.Tensor:
        return (torch.tensor(task.inputs) @ (at * at - torch.tensor(task.weights))).square().mean() / 4

    dense: Any = torch.autograd.functional.hessian(loss, torch.tensor(v))
    assert task.trace(v) == pytest.approx(float(dense.trace()))
    assert task.top_eigenvalue(v) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]))
    assert task.measured(v) == pytest.approx(
        {"error": 0.0, "train_loss": 0.0, "trace": task.trace(v), "top_eigenvalue": task.top_eigenvalue(v)}
    )


def test_descent_without_noise_is_gradient_descent_on_the_loss():
    task, rates = quadratic.problem(6, 1, dimension=4, ones=1), np.array([0.02, 0.05, 0.01])
    at = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for rate in rates:
        residual = torch.tensor(task.inputs) @ (at * at - torch.tensor(task.weights))
        (slope,) = torch.autograd.grad(residual.square().mean() / 4, at)
        at = (at - rate * slope).detach().requires_grad_()
    found = quadratic.descend(task, rates, kind="none", delta=1.0, seed=0, at=[0, 3])
    assert found["step"] == [0.0, 3.0]
    wanted = task.measured(at.detach().numpy())
    assert {name: values[-1] for name, values in found.items() if name != "step"} == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["label", "spherical", "spherical of equal variance"])
def test_the_noise_of_a_step_has_the_covariance_that_it_is_said_to_have(kind: str):
    task, rate, delta = quadratic.problem(5, 2, dimension=3, ones=1), 1e-3, 0.7
    quiet = quadratic.descend(task, np.array([rate]), kind="none", delta=delta, seed=0, at=[1])["error"][0]
    # at the first step the error moves by 2(v*v - w)*2v*dv = 4(1 - w)*dv, up to dv^2
    lever = 4.0 * (1.0 - task.weights)
    moves = [
        quadratic.descend(task, np.array([rate]), kind=kind, delta=delta, seed=seed, at=[1])["error"][0] - quiet
        for seed in range(1500)
    ]
    samples = task.inputs  # gradients delta*z*x_i at v = 1
    covariance = delta**2 * samples.T @ samples / len(samples)
    if kind != "label":
        length = delta**2 * (np.square(samples).mean() if kind.endswith("variance") else 1.0)
        covariance = length * np.eye(3)
    wanted = rate**2 * lever @ covariance @ lever
    # a product of a normal number with a random sample has a kurtosis of up to 15 here
    assert np.mean(np.square(moves)) == pytest.approx(wanted, rel=0.25)
    if kind.endswith("variance"):
        assert np.trace(covariance) == pytest.approx(delta**2 * np.square(samples).sum(1).mean())


def test_each_step_takes_the_noise_of_a_sample_of_its_own():
    task = quadratic.Problem(inputs=np.diag([1.0, 100.0, 10_000.0]), weights=np.ones(3))
    found = quadratic.descend(task, np.full(300, 1e-16), kind="label", delta=1.0, seed=0, at=range(301))
    # one sample moves one v_j, and the trace by 1e-16*(4/3)*x_j^3 times a normal number; a small x_j^3 rounds to nothing
    moves = np.abs(np.diff(found["trace"]))
    assert 60 < (moves > 1e-6).sum() < 140


def test_a_descent_that_diverges_ends_early():
    with np.errstate(all="ignore"):
        found = quadratic.descend(
            quadratic.problem(4, 0), np.full(200, 5.0), kind="none", delta=0.0, seed=0, at=range(201)
        )
    assert 1 < len(found["step"]) < 201 and not np.isfinite(found["train_loss"][-1])


def test_numbers_drawn_in_blocks_do_not_repeat(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quadratic, "_BLOCK", 8)
    task = quadratic.problem(4, 0, dimension=3)
    found = quadratic.descend(task, np.full(64, 1e-9), kind="label", delta=1e6, seed=0, at=range(65))
    steps = np.diff(found["error"]).round(12)
    assert len(set(steps)) > 60


# linear chains


def test_the_inputs_have_the_eigenvalues_and_random_directions():
    first, second = linear_chains.inputs(0), linear_chains.inputs(1)
    for x in (first, second):
        np.testing.assert_allclose(np.linalg.eigvalsh(x.T @ x / 6), sorted(linear_chains.EIGENVALUES))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_burn_in_is_long_enough_for_the_slowest_direction(momentum: float):
    steps = linear_chains.burn_in(0.2, momentum)
    worst = 0.0
    for value in linear_chains.EIGENVALUES:
        turn = np.array([[1 + momentum - 0.2 * value, -momentum], [1.0, 0.0]])
        worst = max(worst, float(np.abs(np.linalg.eigvals(np.linalg.matrix_power(turn, steps))).max()))
    assert np.exp(-8.5) < worst <= np.exp(-8.0)


def batch_law(x: np.ndarray, lr: float, sigma: float, batch: int) -> np.ndarray:
    """Fixed point of the second moments for batches drawn with replacement: the operator, written out and solved."""
    n, d = x.shape
    hessian, one = x.T @ x / n, np.eye(d)
    step = np.kron(one - lr * hessian, one - lr * hessian)
    spread = sum(np.kron(np.outer(r, r), np.outer(r, r)) for r in x) / n - np.kron(hessian, hessian)
    found = np.linalg.solve(
        np.eye(d * d) - step - lr**2 / batch * spread, (lr**2 * sigma**2 / batch * hessian).reshape(-1)
    )
    return found.reshape(d, d)


@pytest.mark.parametrize(("batch", "tolerance"), [(0, 0.03), (16, 0.03), (4, 0.06)])
def test_chains_settle_to_the_second_moments_of_their_own_noise(batch: int, tolerance: float):
    x, lr, sigma = linear_chains.inputs(2), 0.1, 0.3
    sizes = {"chains": 400, "steps": 800}
    found = linear_chains.measured_covariance(x, lr=lr, momentum=0.0, sigma=sigma, batch=batch, seed=0, **sizes)
    full = theory.stationary_covariance(x.T @ x / 6, lr=lr, strength=lr * sigma**2)
    law = batch_law(x, lr, sigma, batch) if batch else full
    assert np.linalg.norm(found - law) < tolerance * np.linalg.norm(law)
    assert found.shape == (4, 4) and np.allclose(found, found.T)


def test_momentum_settles_to_the_closed_form():
    x, lr, sigma = linear_chains.inputs(1), 0.5, 0.3
    found = linear_chains.measured_covariance(
        x, lr=lr, momentum=0.9, sigma=sigma, batch=0, chains=400, steps=1500, seed=0
    )
    law = theory.stationary_covariance(x.T @ x / 6, lr=lr, strength=lr * sigma**2 / 0.1, momentum=0.9)
    assert np.linalg.norm(found - law) < 0.03 * np.linalg.norm(law)


def test_chains_that_diverge_have_an_infinite_covariance():
    settings: Any = {"momentum": 0.0, "sigma": 0.3, "batch": 0, "chains": 3, "steps": 300, "seed": 0}
    with np.errstate(all="ignore"):
        assert np.isinf(linear_chains.measured_covariance(linear_chains.inputs(0), lr=0.6, **settings)).all()


# the tanh network


def test_outputs_and_jacobian_are_those_of_torch():
    theta = np.stack([theta_of(0), theta_of(1)])
    jacobian, residual = tanh_net.jacobian(theta, DATA), tanh_net.residual(theta, DATA)
    assert jacobian.shape == (2, 7, 15) and residual.shape == (2, 7)
    x = torch.tensor(DATA.inputs)
    for i in range(2):
        wanted: Any = torch.func.jacrev(lambda at: torch.func.functional_call(Tanh(theta[0]), {"theta": at}, (x,)))(
            torch.tensor(theta[i])
        )
        np.testing.assert_allclose(jacobian[i], wanted.reshape(7, 15).numpy(), atol=1e-12)
        np.testing.assert_allclose(residual[i], Tanh(theta[i])(x).detach().numpy() - DATA.targets, atol=1e-12)
        np.testing.assert_allclose(
            tanh_net.spectrum(theta, DATA)[i], np.linalg.eigvalsh(jacobian[i] @ jacobian[i].T / 7)[::-1], atol=1e-12
        )


def test_the_gradient_of_the_regulariser_is_that_of_the_exact_one():
    theta = theta_of(2)
    for lr in (0.05, 1.5 / tanh_net.spectrum(theta, DATA)[0]):
        net = Tanh(theta)
        implicit_regularizer(net, torch.tensor(DATA.inputs), lr=float(lr)).backward()
        wanted: Any = net.theta.grad
        np.testing.assert_allclose(
            tanh_net.penalty_gradient(theta, DATA, np.array(lr)), wanted.numpy(), rtol=1e-9, atol=1e-12
        )


def test_without_a_learning_rate_it_is_the_gradient_of_a_quarter_of_the_trace():
    theta, step, away = theta_of(3), 1e-6, np.random.default_rng(0).standard_normal((3, 5))
    higher, lower = (tanh_net.spectrum(theta + sign * step * away, DATA).sum() / 4 for sign in (1, -1))
    slope = (tanh_net.penalty_gradient(theta, DATA, np.array(0.0)) * away).sum()
    assert slope == pytest.approx((higher - lower) / (2 * step), rel=1e-6)


def test_the_loss_gradient_pulls_back_a_push_on_the_outputs():
    theta, push = theta_of(4), np.random.default_rng(1).standard_normal((2, 7))
    many = tanh_net.loss_gradient(np.stack([theta, theta]), DATA, push)
    for i in range(2):
        net = Tanh(theta)
        (net(torch.tensor(DATA.inputs)) @ torch.tensor(push[i])).backward()
        wanted: Any = net.theta.grad
        np.testing.assert_allclose(many[i], wanted.numpy(), atol=1e-12)


def test_a_start_interpolates_or_says_that_it_does_not():
    start = tanh_net.interpolating(DATA, 8, 0, steps=4000, lr=0.1, momentum=0.9)
    assert np.square(tanh_net.residual(start, DATA)).sum() / 14 < 1e-20
    with pytest.raises(FloatingPointError, match="after 100 Gauss-Newton steps; start from more gradient steps"):
        tanh_net.interpolating(DATA, 1, 0, steps=10, lr=0.1, momentum=0.9)


def test_quiet_chains_are_gradient_descent_and_paths_are_descent_on_both_sums():
    theta, lr, weight = theta_of(5), 0.05, 0.03
    quiet = tanh_net.noisy_chains(theta, DATA, chains=2, lr=lr, sigma=0.0, at=[0, 3], seed=0)
    paths = tanh_net.regularised_paths(theta, DATA, lr=lr, strength=weight, at=[0, 3])
    assert quiet.shape == paths.shape == (2, 2, 3, 5)
    x, y = torch.tensor(DATA.inputs), torch.tensor(DATA.targets)
    for name, found in (("none", quiet[:, 0]), ("r", paths[:, 0]), ("trace", paths[:, 1])):
        net = Tanh(theta)
        np.testing.assert_array_equal(found[0], theta)
        for _ in range(3):
            loss = (net(x) - y).square().mean() / 2
            if name == "r":
                loss = loss + weight * implicit_regularizer(net, x, lr=lr)
            elif name == "trace":
                loss = loss + weight * implicit_regularizer(net, x, lr=1e-9)
            (slope,) = torch.autograd.grad(loss, net.theta)
            net.theta.data -= lr * slope
        np.testing.assert_allclose(found[1], net.theta.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_noise_on_one_label_moves_along_its_gradient():
    theta, lr, sigma = theta_of(6), 0.1, 0.4
    quiet = tanh_net.noisy_chains(theta, DATA, chains=1, lr=lr, sigma=0.0, at=[1], seed=0)[0]
    noisy = tanh_net.noisy_chains(theta, DATA, chains=3000, lr=lr, sigma=sigma, at=[1], seed=0)[0]
    kicks = ((noisy - quiet) / (lr * sigma)).reshape(3000, -1)
    rows = tanh_net.jacobian(theta, DATA)
    nearest = np.abs(kicks[:, None] - np.concatenate([rows, -rows])[None]).max(2)
    assert nearest.min(1).max() < 1e-9
    counts = np.bincount(nearest.argmin(1), minlength=14)
    assert np.abs(counts - 3000 / 14).max() < 5 * np.sqrt(3000 / 14)


def test_chains_draw_fresh_numbers_in_every_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tanh_net, "_BLOCK", 4)
    at = list(range(33))
    found = tanh_net.noisy_chains(theta_of(6), DATA, chains=1, lr=1e-9, sigma=1e9, at=at, seed=0)[:, 0]
    kicks = np.diff(found, axis=0).reshape(32, -1)
    blocks = kicks.reshape(8, 4, -1)[:, :, 0]
    assert len({tuple(np.sign(block)) for block in blocks}) > 2


# the trace of the Gauss-Newton matrix


def test_the_exact_trace_is_that_of_the_dense_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )
    net, x = net.double(), torch.randn(7, 2, 3, dtype=torch.float64)
    weights = {name: value.detach() for name, value in net.named_parameters()}
    rows: Any = torch.func.jacrev(lambda at: torch.func.functional_call(net, at, (x,)))(weights)
    jacobian = torch.cat([each.flatten(2) for each in rows.values()], 2)
    q = functional.softmax(net(x), 1).detach()
    curvature = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    wanted = torch.einsum("nip,nij,njp->", jacobian, curvature, jacobian) / len(x)
    assert gauss_newton.trace(net, x) == pytest.approx(float(wanted), rel=1e-10)
    assert all(weight.grad is None for weight in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="knows linear layers alone, not Conv2d; use hessian_trace"):
        gauss_newton.trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), torch.zeros(1, 1, 4, 4))
