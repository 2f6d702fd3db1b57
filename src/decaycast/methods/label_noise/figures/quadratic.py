"""Sparse regression with f_v(x) = <v*v, x>: label noise, spherical noise and no noise around full-batch gradient descent.

Conventions of this file. The loss is the mean over the n samples of (f - y)^2/4, as in the experiment's source; with outputs
f/sqrt(2) it is the (f - y)^2/2 of `theory`, so that noise of standard deviation delta on the labels has sigma^2 = delta^2/2 and

    lambda = lr*delta^2/2        H = (2/n) sum over the samples of (v*x)(v*x)^T        tr H = 2*mean of sum_j v_j^2 x_j^2

at zero loss. Label noise adds to the full gradient that of one random sample's noise, delta*z*(v*x_i); spherical noise adds
`sigma`*z in every direction. The test error is ||v*v - w||^2.

Source: HaoChen, Wei, Lee & Ma, "Shape matters", COLT 2021, the quadratic model (d 100, n 40, five ones in w, v starts at 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("none", "label", "spherical", "spherical of equal variance")
_BLOCK = 4096  # steps whose random numbers are drawn at once


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Gaussian samples `inputs` (n, d), and the weights (d,) that made their labels, most of them 0."""

    inputs: np.ndarray
    weights: np.ndarray

    def trace(self, v: np.ndarray) -> float:
        """Of H, as if the loss were zero."""
        return float(2.0 * (np.square(self.inputs) @ np.square(v)).mean())

    def top_eigenvalue(self, v: np.ndarray) -> float:
        """Of H, as if the loss were zero."""
        return float(2.0 * np.linalg.norm(self.inputs * v, 2) ** 2 / len(self.inputs))

    def measured(self, v: np.ndarray) -> dict[str, float]:
        """Test error, training loss, trace and top eigenvalue at `v`."""
        residual = self.inputs @ (v * v - self.weights)
        return {
            "error": float(np.square(v * v - self.weights).sum()),
            "train_loss": float(np.square(residual).mean() / 4.0),
            "trace": self.trace(v),
            "top_eigenvalue": self.top_eigenvalue(v),
        }


def problem(samples: int, seed: int, *, dimension: int = 100, ones: int = 5) -> Problem:
    """Samples from N(0, 1) and weights whose first `ones` entries are 1, the others 0.

    >>> problem(40, 0).inputs.shape, problem(40, 0).weights.sum()
    ((40, 100), np.float64(5.0))
    """
    weights = np.zeros(dimension)
    weights[:ones] = 1.0
    return Problem(inputs=np.random.default_rng((seed, 0)).standard_normal((samples, dimension)), weights=weights)


def descend(
    task: Problem, rates: np.ndarray, *, kind: str, delta: float, seed: int, at: Sequence[int]
) -> dict[str, list[float]]:
    """Gradient descent from v = 1 with noise, and what `Problem.measured` says after the steps `at`.

    Args:
        task: data and truth.
        rates: learning rate of each step.
        kind: one of `KINDS`; that of equal variance has, at the start, the label noise's total variance.
        delta: standard deviation of the noise on a label, or of the spherical noise in each direction.
        seed: of the noise.
        at: steps made when measured, rising; 0 is the start.

    Returns:
        Columns "step" and those of `Problem.measured`; they end early where the numbers are no longer finite.
    """
    rng, x = np.random.default_rng((seed, 1)), task.inputs
    samples, dimension = x.shape
    if kind == KINDS[3]:
        delta = delta * float(np.sqrt(np.square(x).mean()))
    v, columns = np.ones(dimension), {"step": []}
    target, wanted = x @ task.weights / samples, set(at)
    x_mean = x / samples
    for step in range(len(rates) + 1):
        if step in wanted:
            columns["step"].append(float(step))
            for name, value in task.measured(v).items():
                columns.setdefault(name, []).append(value)
            if not np.isfinite(columns["train_loss"][-1]):
                break
        if step == len(rates):
            break
        if step % _BLOCK == 0:
            chosen = rng.integers(samples, size=_BLOCK)
            shape = _BLOCK if kind == "label" else (_BLOCK, dimension) if kind.startswith("spherical") else 0
            noise = delta * rng.standard_normal(shape)
        push = x_mean @ (v * v) - target
        if kind == "label":
            push[chosen[step % _BLOCK]] += noise[step % _BLOCK]
        gradient = v * (push @ x)
        if kind.startswith("spherical"):
            gradient += noise[step % _BLOCK]
        v = v - rates[step] * gradient
    return columns
