"""A small tanh network on one input with derivatives in closed form: label noise, and descent on L + lambda*R beside it.

Conventions of this file. f(x) = sum over h of a_h tanh(w_h x + b_h), weights in an array (..., 3, width) of w, b and a; leading
axes are networks that move at once. L = (1/2) mean over n samples of (f - y)^2, float64 throughout. With J the Jacobian of the
outputs, K = J J^T/n and R = -(1/(2 lr)) log det(1 - (lr/2) K), the gradient of R is that of

    tr(M K)  with  M = (1/4)(1 - (lr/2) K)^(-1) held fixed,       and with M = 1/4 it is that of tr H/4 at zero loss.

Source: Damian, Ma & Lee 2021, R and the coupling of section 3; the network and the derivatives are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK = 1024  # steps whose random numbers are drawn at once


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs and targets, both of shape (n,)."""

    inputs: np.ndarray
    targets: np.ndarray


def sine(samples: int) -> Samples:
    """Targets sin(1.5 x) at even places on [-2, 2]."""
    x = np.linspace(-2.0, 2.0, samples)
    return Samples(inputs=x, targets=np.sin(1.5 * x))


def initial(width: int, seed: int) -> np.ndarray:
    """Weights (3, width), uniform in +-2 (w, b) and +-1/sqrt(width) (a).

    Torch's layers start with +-1 for w and b. Twice that spreads the bends over the inputs, so that there is more than one way
    to fit the samples and the two regularisers lead further apart.
    """
    rng = np.random.default_rng(seed)
    return rng.uniform(-1.0, 1.0, (3, width)) * np.array([[2.0], [2.0], [width**-0.5]])


def residual(theta: np.ndarray, data: Samples) -> np.ndarray:
    """Outputs minus targets, shape (..., n)."""
    return _activation(theta, data)[0] - data.targets


def jacobian(theta: np.ndarray, data: Samples) -> np.ndarray:
    """J of the outputs by w, b and a, shape (..., n, 3*width)."""
    _, t, s = _activation(theta, data)
    by_b = theta[..., None, 2, :] * s
    return np.concatenate([by_b * data.inputs[:, None], by_b, t], -1)


def spectrum(theta: np.ndarray, data: Samples) -> np.ndarray:
    """Eigenvalues of K, falling, shape (..., n)."""
    return np.linalg.svd(jacobian(theta, data), compute_uv=False) ** 2 / len(data.inputs)


def penalty_gradient(theta: np.ndarray, data: Samples, lr: np.ndarray) -> np.ndarray:
    """Gradient of R at learning rate `lr`, one per network (shape (...)); of tr K/4 where that is 0."""
    _, t, s = _activation(theta, data)
    x, a, n = data.inputs[:, None], theta[..., None, 2, :], len(data.inputs)
    by_b = a * s
    by_w = by_b * x
    gram = (by_w @ _turned(by_w) + by_b @ _turned(by_b) + t @ _turned(t)) / n
    weight = np.linalg.inv(np.eye(n) - (lr[..., None, None] / 2.0) * gram) / 4.0
    from_a, bent = weight @ t, weight @ by_b + x * (weight @ by_w)
    inner = s * (from_a - 2.0 * a * bent * t)
    return np.stack([(x * inner).sum(-2), inner.sum(-2), (bent * s).sum(-2)], -2) * (2.0 / n)


def loss_gradient(theta: np.ndarray, data: Samples, push: np.ndarray) -> np.ndarray:
    """Gradient of sum over the samples of push_i f(x_i), with `push` (..., n) held fixed."""
    _, t, s = _activation(theta, data)
    back = push[..., None, :]
    by_b = back @ s
    by_w = (back * data.inputs) @ s
    a = theta[..., None, 2, :]
    return np.concatenate([a * by_w, a * by_b, back @ t], -2)


def _activation(theta: np.ndarray, data: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    t = np.tanh(data.inputs[:, None] * theta[..., None, 0, :] + theta[..., None, 1, :])
    return (t @ theta[..., 2, :, None])[..., 0], t, 1.0 - t * t


def _turned(matrix: np.ndarray) -> np.ndarray:
    return np.swapaxes(matrix, -1, -2)


def interpolating(data: Samples, width: int, seed: int, *, steps: int, lr: float, momentum: float) -> np.ndarray:
    """Weights at zero loss: gradient descent with momentum, then Gauss-Newton steps of least length for what is left.

    Raises:
        FloatingPointError: these do not reach a loss of 1e-20.
    """
    theta, velocity, n = initial(width, seed), np.zeros((3, width)), len(data.inputs)
    for _ in range(steps):
        velocity = momentum * velocity - lr * loss_gradient(theta, data, residual(theta, data) / n)
        theta = theta + velocity
    loss = np.inf
    for _ in range(100):
        rest, rows = residual(theta, data), jacobian(theta, data)
        loss = float(rest @ rest) / (2 * n)
        if loss < 1e-20:
            return theta
        # damped in proportion to what is left, so that steps stay short at first and the end is quadratic
        damping = np.eye(n) * float(rest @ rest)
        theta = theta - (rows.T @ np.linalg.solve(rows @ rows.T + damping, rest)).reshape(3, width)
    raise FloatingPointError(f"the loss is {loss:.3g} after 100 Gauss-Newton steps; start from more gradient steps")


def noisy_chains(
    start: np.ndarray, data: Samples, *, chains: int, lr: float, sigma: float, at: Sequence[int], seed: int
) -> np.ndarray:
    """Gradient descent with the noise of one random sample's label (+-sigma) in every step.

    Returns:
        Weights after the steps `at` (rising), of shape (len(at), chains, 3, width).
    """
    rng, n = np.random.default_rng((seed, 2)), len(data.inputs)
    theta, rows, found = np.repeat(start[None], chains, 0), np.arange(chains), []
    for step in range(at[-1] + 1):
        if step in at:
            found.append(theta)
        if step % _BLOCK == 0:
            chosen = rng.integers(n, size=(_BLOCK, chains))
            noise = sigma * (2.0 * rng.integers(2, size=(_BLOCK, chains)) - 1.0)
        push = residual(theta, data) / n
        push[rows, chosen[step % _BLOCK]] += noise[step % _BLOCK]
        theta = theta - lr * loss_gradient(theta, data, push)
    return np.stack(found)


def regularised_paths(start: np.ndarray, data: Samples, *, lr: float, strength: float, at: Sequence[int]) -> np.ndarray:
    """Gradient descent on L + strength*R and on L + strength*tr H/4, side by side.

    Returns:
        Weights after the steps `at` (rising), of shape (len(at), 2, 3, width).
    """
    theta, n, found = np.repeat(start[None], 2, 0), len(data.inputs), []
    rates = np.array([lr, 0.0])
    for step in range(at[-1] + 1):
        if step in at:
            found.append(theta)
        slope = loss_gradient(theta, data, residual(theta, data) / n)
        theta = theta - lr * (slope + strength * penalty_gradient(theta, data, rates))
    return np.stack(found)
