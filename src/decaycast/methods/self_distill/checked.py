"""Eigenvalues, coefficients and numbers of this room, checked. Conventions stand at the head of `theory`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Values = Any  # a number, a sequence or a numpy array

EPS = float(np.finfo(float).eps)


def clipped(eigenvalues: Values, eps: float = EPS) -> np.ndarray:
    """Eigenvalues of a kernel matrix with those that are rounding set to 0.

    Args:
        eigenvalues: as an eigensolver gave them, shape (n,).
        eps: machine epsilon of the arithmetic that gave them.

    Returns:
        float64, shape (n,), all >= 0. What lies below n*eps*d_max is 0: such directions cannot be told from empty ones.

    Raises:
        ValueError: an eigenvalue is further below 0 than rounding explains, or an argument is of the wrong shape.

    Source: backward error of symmetric eigensolvers.

    Example:
        >>> clipped([-1e-17, 1.0]).tolist()
        [0.0, 1.0]
    """
    d = finite(eigenvalues, "eigenvalues")
    if d.ndim != 1 or not d.size:
        raise ValueError(f"eigenvalues have to have shape (n,) with n >= 1, got {d.shape}")
    top, least = float(np.abs(d).max()), float(d.min())
    if least < -max(math.sqrt(eps) / 100.0, 10.0 * d.size * eps) * top:
        raise ValueError(
            f"the kernel matrix has an eigenvalue of {least:g} beside a largest of {float(d.max()):g}, more than rounding: it is "
            "not positive semi-definite; take another kernel, or add the missing amount to its diagonal"
        )
    return np.where(d > d.size * eps * top, d, 0.0)


def problem(eigenvalues: Values, coefficients: Values, tolerance: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Checked d and z, and the squared distance n*eps that is allowed."""
    d, z = clipped(eigenvalues), finite(coefficients, "coefficients")
    if z.ndim not in (1, 2) or len(z) != d.size:
        raise ValueError(f"coefficients have to have shape ({d.size},) or ({d.size}, outputs), got {z.shape}")
    return d, z, d.size * positive(tolerance, "tolerance")


def smallest(d: np.ndarray) -> float:
    """Smallest eigenvalue above 0, or 0 if there is none (then nothing is ever fitted)."""
    return float(d[d > 0].min(initial=np.inf)) if np.any(d > 0) else 0.0


def ratio_of(z: np.ndarray, budget: float) -> np.ndarray:
    """||z||/sqrt(budget) of every column."""
    return np.sqrt((z * z).sum(0) / budget)


def finite(values: Values, name: str) -> np.ndarray:
    """Values as float64; refuses NaN and infinity."""
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has to be finite, but holds NaN or infinity; look for it in the data")
    return array


def positive(value: float, name: str) -> float:
    """A finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} has to be finite and above 0, got {value}")
    return float(value)


def check_rounds(rounds: int) -> None:
    """Rounds count fits: at least one."""
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 1:
        raise ValueError(f"rounds is the number of fits, a whole number >= 1 (1 is plain kernel ridge), got {rounds!r}")
