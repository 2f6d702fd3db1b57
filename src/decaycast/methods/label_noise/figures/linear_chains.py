"""Label noise on a linear model: many chains at once around zero loss, and the covariance that they settle to.

Conventions of this file. H = X^T X/n for n samples with rows x_i of X. A chain is the distance xi to the solution, one row of an
array (chains, d). "full": gradient H xi of all samples plus the noise of one, lambda = lr*sigma^2/(1-beta). "batch": the
gradient and the noise of B samples drawn with replacement, lambda = lr*sigma^2/(B(1-beta)). Float64.

Source: Damian, Ma & Lee 2021, section 3 (the Ornstein-Uhlenbeck process around the minimum) and algorithm 1 (batches).
"""

from __future__ import annotations

import math

import numpy as np

EIGENVALUES = (4.0, 2.0, 1.0, 0.4)
SAMPLES = 6


def inputs(seed: int) -> np.ndarray:
    """Samples (6, 4) in random directions whose H has the eigenvalues 4, 2, 1 and 0.4.

    >>> x = inputs(0)
    >>> np.linalg.eigvalsh(x.T @ x / 6).round(12).tolist()
    [0.4, 1.0, 2.0, 4.0]
    """
    rng = np.random.default_rng((seed, 3))
    left = np.linalg.qr(rng.standard_normal((SAMPLES, len(EIGENVALUES))))[0]
    right = np.linalg.qr(rng.standard_normal((len(EIGENVALUES),) * 2))[0]
    return left * np.sqrt(SAMPLES * np.array(EIGENVALUES)) @ right.T


def burn_in(lr: float, momentum: float, efolds: float = 8.0) -> int:
    """Steps in which the slowest direction forgets its start, by `efolds` of its amplitude.

    >>> burn_in(0.25, 0.0), burn_in(0.25, 0.9)  # a tenth per step; with this momentum a rotation that shrinks by 0.9^(1/2)
    (76, 152)
    """
    slowest = 0.0
    for value in EIGENVALUES:
        roots = np.roots([1.0, -(1.0 + momentum - lr * value), momentum])
        slowest = max(slowest, float(np.abs(roots).max()))
    return math.ceil(-efolds / math.log(slowest))


def measured_covariance(
    x: np.ndarray, *, lr: float, momentum: float, sigma: float, batch: int, chains: int, steps: int, seed: int
) -> np.ndarray:
    """Mean of xi xi^T over chains and `steps` steps after the burn-in, (d, d); `batch` 0 is the full gradient.

    It is infinite where the chains diverge.
    """
    rng = np.random.default_rng((seed, 4))
    now = np.zeros((chains, x.shape[1]))
    before, total = now, np.zeros((x.shape[1],) * 2)
    first = burn_in(lr, momentum)
    for step in range(first + steps):
        push = now @ x.T
        if batch:
            counts = rng.multinomial(batch, np.full(len(x), 1.0 / len(x)), size=chains)
            push = (counts * push + sigma * (2.0 * rng.binomial(counts, 0.5) - counts)) / batch
        else:
            push /= len(x)
            push[np.arange(chains), rng.integers(len(x), size=chains)] += sigma * (
                2.0 * rng.integers(2, size=chains) - 1
            )
        now, before = now - lr * (push @ x) + momentum * (now - before), now
        if step >= first:
            total += now.T @ now
        if step % 100 == 0 and not np.abs(now).max() < 1e6:
            return np.full_like(total, np.inf)
    return total / (chains * steps)
