"""Criteria for every filter without a refit (GCV, leave-one-out), and the best mix of a known problem.

Conventions and symbols stand at the head of `theory`; a filter s has shape (..., n) and predicts V (s z) at the training points.
After one eigendecomposition GCV costs O(n) per filter and leave-one-out O(n^2). The choice by them is in `tuning`.

Leaving point i out of *all* rounds is not the usual residual/(1 - leverage): later labels of the other points have seen y_i
through the first fit. It is exact all the same (derived). Let A = (K + lambda)^-1, h = d/(d + lambda), and for pure rounds

    g_k = [V (h^k/(d + lambda)) V^T]_ii,    b_k = [V (h^k/(d + lambda)) z]_i

A fit without point i is the fit of all points in which the label of i is moved by -delta to the value predicted there. Round
by round this leaves

    delta_t = (b_t - sum_{r<t} g_{t-r} delta_r)/g_0,    e_t = delta_0 + ... + delta_t

with e_t = y_i - (prediction at i after t+1 fits of the other n-1 points); e_0 is the usual formula. Mixed rounds are sums of
pure ones, B_t = sum_j a_tj h^(j+1) with sum_j a_tj = 1, with or without the point, and so are their residuals.

Source: GCV: Craven & Wahba 1979; leave-one-out of one fit: Allen 1974; best mix: Dang, Patil, Rinaldo 2026 (arXiv 2602.17565)
for the sign rule; the rest is derived and tested against refits.
"""

from __future__ import annotations

import numpy as np

from decaycast.core.names import choose
from decaycast.methods.self_distill.checked import Values, check_rounds, clipped, finite
from decaycast.methods.self_distill.theory import ridge_filter

ERRORS = ("prediction", "coefficients")


# criteria


def gcv(filters: Values, coefficients: Values) -> np.ndarray:
    """Generalised cross-validation: mean((1 - s)^2 z^2)/mean(1 - s)^2.

    Args:
        filters: s, shape (..., n), all n directions.
        coefficients: z = V^T y, shape (n,) or (n, outputs).

    Returns:
        Estimate of the mean squared error of prediction, shape (...) or (..., outputs); infinite where the filter has n
        degrees of freedom or more.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.

    Source: Craven & Wahba 1979.

    Example:
        >>> float(gcv([0.5, 0.0], [1.0, 1.0]).round(4))  # (0.25 + 1)/2 over (1.5/2)^2
        1.1111
    """
    s, z = _fitting(filters, coefficients)
    left = 1.0 - s
    free = left.mean(-1)
    missed = (left * left) @ (z * z) / s.shape[-1]
    free = free[..., None] if z.ndim == 2 else free
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(free > 0, missed / np.maximum(free, 0.0) ** 2, np.inf)


def leave_one_out(vectors: Values, filters: Values, coefficients: Values) -> np.ndarray:
    """Residuals over (1 - leverage), for any filter at O(n^2): y_i - f_{-i}(x_i), exact for one fit with a fixed shift.

    For more rounds it treats the filter as if it were one fit; `leave_one_out_rounds` is exact there.

    Args:
        vectors: V, shape (n, n).
        filters: s, shape (..., n).
        coefficients: z = V^T y, shape (n,) or (n, outputs).

    Returns:
        Shape (..., n) or (..., n, outputs); infinite or NaN where the leverage is 1.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.

    Source: Allen 1974.

    Example:
        >>> leave_one_out([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], [2.0, 4.0]).tolist()  # without it, a point is predicted 0
        [2.0, 4.0]
    """
    s, z = _fitting(filters, coefficients)
    v, left = _square(vectors, s.shape[-1]), 1.0 - s
    free = left @ (v * v).T
    missed = _images(v, left, z)
    free = free[..., None] if z.ndim == 2 else free
    with np.errstate(divide="ignore", invalid="ignore"):
        return missed / free


def leave_one_out_rounds(
    vectors: Values, eigenvalues: Values, coefficients: Values, shifts: Values, rounds: int
) -> np.ndarray:
    """Residuals at points that *every* pure round was without, exact for rounds with one shift (head of this file).

    Those of mixed rounds are `mix_powers(weights)` times these.

    Args:
        vectors: V, shape (n, n).
        eigenvalues: d, shape (n,).
        coefficients: z = V^T y, shape (n,) or (n, outputs).
        shifts: lambda > 0, one number or shape (shifts,).
        rounds: number of fits, >= 1.

    Returns:
        e_t = y_i - f_{-i}(x_i), shape (..., rounds, n) or (..., rounds, n, outputs), with an axis for a list of shifts.

    Raises:
        ValueError: an argument is out of range or its shape does not fit.

    Source: derived; tested against n refits.

    Example:
        >>> identity = [[1.0, 0.0], [0.0, 1.0]]
        >>> leave_one_out_rounds(identity, [1.0, 1.0], [2.0, 4.0], 1.0, 2).tolist()  # nothing to learn from the other
        [[2.0, 4.0], [2.0, 4.0]]
    """
    check_rounds(rounds)
    d, z = _fitting(clipped(eigenvalues), coefficients)
    v, h = _square(vectors, d.size), ridge_filter(d, shifts)
    powers = [1.0 / (d + np.asarray(shifts, dtype=float)[..., None])]
    for _ in range(rounds - 1):
        powers.append(powers[-1] * h)
    table = np.stack(powers, -2)  # h^k/(d + lambda), shape (..., rounds, n)
    g, b = table @ (v * v).T, _images(v, table, z)
    if z.ndim == 2:
        g = g[..., None]
    axis = b.ndim - z.ndim - 1
    g, b = np.moveaxis(g, axis, 0), np.moveaxis(b, axis, 0)
    moved = [b[0] / g[0]]
    for t in range(1, rounds):
        moved.append((b[t] - sum(g[t - r] * moved[r] for r in range(t))) / g[0])
    return np.moveaxis(np.cumsum(moved, axis=0), 0, axis)


def mix_powers(weights: Values) -> np.ndarray:
    """Mixed rounds as sums of pure ones: B_t = sum_j a_tj h^(j+1), where the a_tj of every t add to 1.

    Args:
        weights: w of the original labels in each later fit, shape (..., rounds - 1).

    Returns:
        a, shape (..., rounds, rounds), lower triangular; `mixed_filters` is a times `constant_rounds`, and whatever is linear
        in the labels, leave-one-out residuals among it, mixes in the same way.

    Raises:
        ValueError: a weight is not finite, or there is no axis of later fits.

    Source: derived.

    Example:
        >>> mix_powers([0.25, 0.5]).tolist()
        [[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.125, 0.375]]
    """
    w = finite(weights, "weights")
    if w.ndim == 0:
        raise ValueError("weights has to have one entry per later fit, shape (..., rounds - 1); got one number")
    rounds = w.shape[-1] + 1
    powers = np.zeros((*w.shape[:-1], rounds, rounds))
    powers[..., 0, 0] = 1.0
    for t in range(1, rounds):
        powers[..., t, 1:] = (1.0 - w[..., t - 1, None]) * powers[..., t - 1, :-1]
        powers[..., t, 0] = w[..., t - 1]
    return powers


# a known problem


def risk(
    filters: Values,
    eigenvalues: Values,
    signal: Values,
    noise_variance: float,
    error: str = "prediction",
) -> np.ndarray:
    """Expected squared error of a filter when truth and noise are known: mean of (1 - s)^2 m^2 + s^2 sigma^2.

    Args:
        filters: s, shape (..., n).
        eigenvalues: d, shape (n,).
        signal: m = V^T f of the true values f at the training points, shape (n,).
        noise_variance: sigma^2 >= 0 of the labels.
        error: ``"prediction"`` at the training points, or ``"coefficients"`` of the basis functions (terms divided by d;
            directions with d = 0 are left out).

    Returns:
        Shape (...).

    Raises:
        ValueError: an argument is out of range, or shapes do not fit.

    Source: bias and variance of a linear smoother with fixed inputs.

    Example:
        >>> float(risk([0.5, 0.5], [1.0, 1.0], [2.0, 0.0], 1.0))  # (1 + 1/4 + 1/4)/2
        0.75
    """
    scale, m, noise = _known(eigenvalues, signal, noise_variance, error)
    s, _ = _fitting(filters, m)
    return (((1.0 - s) * m) ** 2 + s * s * noise) @ scale / len(scale)


def best_mix(
    eigenvalues: Values, shift: float, signal: Values, noise_variance: float, error: str = "prediction"
) -> float:
    """Label weight w = 1 - xi of a second fit with the least expected error, in closed form.

    xi = sum q((h-1) m^2 + h sigma^2)/sum q^2 (m^2 + sigma^2),  q = h(1-h); the optimum over the whole line, not only [0, 1].

    Args:
        eigenvalues: d, shape (n,).
        shift: lambda > 0.
        signal: m = V^T f of the true values at the training points, shape (n,).
        noise_variance: sigma^2 >= 0 of the labels.
        error: as in `risk`.

    Returns:
        The weight of the *original* labels, as `mix`: below 0 when labels are very noisy (xi > 1), above 1 when the first fit
        is regularised too much (xi < 0), exactly 1 when it is tuned.

    Raises:
        ValueError: as `risk`; or nothing to choose (no signal and no noise).

    Source: derived; agrees with Das & Sanghavi 2023 (arXiv 2301.13304) on xi > 1 under high noise.

    Example:
        >>> best_mix([1.0], 1.0, [1.0], 3.0)  # one direction: S = h - xi*q is best at 1/(1 + 3)
        0.0
    """
    scale, m, noise = _known(eigenvalues, signal, noise_variance, error)
    h = ridge_filter(eigenvalues, shift)
    q = h * (1.0 - h)
    curvature = float(scale @ (q * q * (m * m + noise)))
    if curvature <= 0:
        raise ValueError("no mix is better than another: signal and noise are zero wherever the kernel fits")
    return 1.0 - float(scale @ (q * (h * noise - (1.0 - h) * m * m))) / curvature


def mix_sign(
    eigenvalues: Values, shift: float, signal: Values, noise_variance: float, error: str = "prediction"
) -> int:
    """Sign of the best xi = 1 - w of a second fit: minus the sign of d risk/d lambda at this shift.

    Args:
        eigenvalues: as in `best_mix`.
        shift: as in `best_mix`.
        signal: as in `best_mix`.
        noise_variance: as in `best_mix`.
        error: as in `best_mix`.

    Returns:
        1: too little regularised, the fit's own values help as labels. -1: too much, labels beyond the originals help
        (w > 1). 0: the shift is tuned, and one more fit changes nothing to first order.

    Raises:
        ValueError: as `risk`.

    Source: sign rule of Dang, Patil, Rinaldo 2026, here derived for fixed inputs.

    Example:
        >>> mix_sign([1.0], 0.1, [1.0], 3.0), mix_sign([1.0], 9.0, [1.0], 3.0)  # the best shift is 3
        (1, -1)
    """
    scale, m, noise = _known(eigenvalues, signal, noise_variance, error)
    h = ridge_filter(eigenvalues, shift)
    return int(np.sign(scale @ (h * (1.0 - h) * (h * noise - (1.0 - h) * m * m))))


# arguments


def _known(
    eigenvalues: Values, signal: Values, noise_variance: float, error: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights of the directions in the error, the signal, and the noise."""
    choose(error, ERRORS, "error")
    d, m = _fitting(clipped(eigenvalues), signal)
    if m.ndim != 1:
        raise ValueError(f"signal has to have shape ({d.size},), got {m.shape}; ask one output at a time")
    if not (np.isfinite(noise_variance) and noise_variance >= 0):
        raise ValueError(f"noise_variance has to be finite and >= 0, got {noise_variance}")
    if error == "prediction":
        return np.ones(d.size), m, float(noise_variance)
    return np.divide(1.0, d, out=np.zeros(d.size), where=d > 0), m, float(noise_variance)


def _images(vectors: np.ndarray, filters: np.ndarray, z: np.ndarray) -> np.ndarray:
    """V (s z), shape (..., n) or (..., n, outputs)."""
    if z.ndim == 1:
        return (filters * z) @ vectors.T
    return np.moveaxis((filters[..., None, :] * z.T) @ vectors.T, -2, -1)


def _square(vectors: Values, n: int) -> np.ndarray:
    v = finite(vectors, "vectors")
    if v.shape != (n, n):
        raise ValueError(f"vectors have to have shape ({n}, {n}), got {v.shape}; all of them are needed")
    return v


def _fitting(filters: Values, coefficients: Values) -> tuple[np.ndarray, np.ndarray]:
    s, z = finite(filters, "filters"), finite(coefficients, "coefficients")
    if z.ndim not in (1, 2) or s.ndim < 1 or s.shape[-1] != len(z):
        raise ValueError(
            f"filters of shape (..., n) and coefficients of shape (n,) or (n, outputs) are needed, got {s.shape} and {z.shape}"
        )
    return s, z
