"""Self-distillation with kernels in closed form: every round is a filter on the kernel's eigenvalues (Mobahi et al. 2020).

Conventions of this file. K is the kernel matrix of the n training points as scikit-learn has it, *not* divided by n:
K = V diag(d) V^T, z = V^T y. A shift lambda is added to K, as scikit-learn's `alpha`; the paper's G = K/n and
c = lambda/n. `rounds` counts fits: one round is plain kernel ridge (the paper's f_0). Labels of round t are

    l_t = w_t*y + (1 - w_t)*f_{t-1},   l_0 = y         w_t: weight of the *original* labels (`mix`), 1 - xi elsewhere
    f_t = A_t l_t,   A_t = d/(d + lambda_t)            all in the eigenbasis, so diagonal
    f_t = B_t z,     B_t = A_t (w_t + (1 - w_t) B_{t-1})

and w = 0 is pure distillation, B_t = A_t ... A_0. Two ways to choose lambda_t, not to be mixed: a constant one (decay without
end), or the paper's tolerance eps, (1/n)*||f_t - l_t||^2 = eps (finite collapse). With s = sqrt(n*eps), r_t = ||y_t||/s for the
labels y_t of round t; a round with r_t <= 1 is answered by f = 0. Everything is numpy, float64. Eigenvalues have shape (n,) and
need no order; coefficients (n,), or (n, outputs): then *each output has its own* lambda_t. All n eigenvalues are wanted.

Bounds on the rounds stand in `bounds`, criteria (GCV, leave-one-out) and the best mix in `selection`, matrices in `solve`.

Source: Mobahi, Farajtabar, Bartlett 2020 (arXiv 2002.05715); mixed labels: Borup & Andersen 2021 (arXiv 2102.13088). What is
marked as derived was derived for this library and is tested on random problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.methods.self_distill.bounds import initial_ratio, rounds_at_most
from decaycast.methods.self_distill.checked import (
    EPS,
    Values,
    check_rounds,
    clipped,
    finite,
    positive,
    problem,
    ratio_of,
    smallest,
)

_LOG_RESIDUAL = 1e-14  # of the constraint; Newton ends well below the 1e-10 that is promised


# the multiplier


def multiplier(eigenvalues: Values, coefficients: Values, tolerance: float) -> np.ndarray:
    """Shift lambda whose ridge fit misses its labels by exactly the tolerance: sum (lambda/(lambda+d))^2 z^2 = n*eps.

    Newton on log ||residual|| over log lambda, both scale-free, inside the bracket of Prop. 2.

    Args:
        eigenvalues: d of K, shape (n,), >= 0 up to rounding.
        coefficients: z = V^T y, shape (n,) or (n, outputs).
        tolerance: eps > 0, the mean squared distance to the labels that is allowed; in units of y^2.

    Returns:
        lambda, shape () or (outputs,); the paper's c is lambda/n. Infinite where the labels lie within the tolerance
        (f = 0). Relative residual of the equation below 1e-10.

    Raises:
        ValueError: the tolerance cannot be met (the labels' part outside the kernel's range is too large), or an argument
            is of the wrong shape or range.

    Source: Mobahi et al. 2020, the active constraint and Prop. 2.

    Example:
        >>> float(multiplier([1.0, 1.0], [2.0, 0.0], 0.5))  # (lambda/(1+lambda))^2 * 4 = 1
        1.0
    """
    low, high = multiplier_bracket(eigenvalues, coefficients, tolerance)
    d, z, _ = problem(eigenvalues, coefficients, tolerance)
    active = np.isfinite(high)
    shift = np.full(high.shape, np.inf)
    if active.any():
        table = z.reshape(d.size, -1)[:, active.reshape(-1)]
        shift[active] = _root(d, table, tolerance, low[active], high[active])
    return shift


def multiplier_bracket(eigenvalues: Values, coefficients: Values, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the root of `multiplier` lies: d_min/(r-1) <= lambda <= d_max/(r-1).

    Directions with d = 0 are never fitted. Their energy N is taken off both sides of the equation, and the bracket is that of
    the others: r = ||z'||/sqrt(n*eps - N), d_min the smallest eigenvalue above 0 (derived).

    Args:
        eigenvalues: as in `multiplier`.
        coefficients: as in `multiplier`.
        tolerance: as in `multiplier`.

    Returns:
        Lower and upper end, each of shape () or (outputs,); infinite where the labels lie within the tolerance.

    Raises:
        ValueError: as `multiplier`.

    Source: Mobahi et al. 2020, Prop. 2, times n.

    Example:
        >>> low, high = multiplier_bracket([1.0, 3.0], [2.0, 2.0], 1.0)  # r = 2
        >>> float(low), float(high)
        (1.0, 3.0)
    """
    d, z, budget = problem(eigenvalues, coefficients, tolerance)
    energy, lost = (z * z).sum(0), (z[d == 0] ** 2).sum(0)
    within = energy <= budget
    if np.any(~within & (lost >= budget)):
        worst = float(np.max(np.where(within, 0.0, lost)))
        raise ValueError(
            f"a tolerance of {tolerance:g} cannot be met: the labels' part that the kernel cannot fit (eigenvalues that are 0 up "
            f"to rounding) has a mean square of {worst / d.size:g}; raise the tolerance above it, or take a rougher kernel"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        # r - 1 as (r^2 - 1)/(r + 1): keeps its digits where the labels are only just outside the tolerance
        square = np.where(within, 1.0, (energy - lost) / (budget - lost))
        excess = np.where(within, 0.0, (energy - budget) / (budget - lost)) / (np.sqrt(square) + 1.0)
        ends = [np.where(within, np.inf, end / excess) for end in (smallest(d), d.max())]
    return ends[0], ends[1]


def is_collapsed(coefficients: Values, tolerance: float) -> np.ndarray:
    """Whether labels lie within the tolerance, ||y||^2 <= n*eps, so that the fit is f = 0.

    Args:
        coefficients: labels or their components, shape (n,) or (n, outputs).
        tolerance: eps > 0.

    Returns:
        Booleans of shape () or (outputs,).

    Raises:
        ValueError: an argument is of the wrong shape or range.

    Source: Mobahi et al. 2020, the case before Prop. 1.

    Example:
        >>> is_collapsed([1.0, 1.0], 1.0), is_collapsed([1.0, 1.1], 1.0)
        (np.True_, np.False_)
    """
    z = finite(coefficients, "coefficients")
    return (z * z).sum(0) <= len(z) * positive(tolerance, "tolerance")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Rounds with the paper's tolerance. With several outputs every array has a last axis for them.

    Attributes:
        shifts: lambda_t of every fit, shape (rounds,); infinite where the fit is f = 0. The paper's c_t is shifts/n.
        filters: B_t, shape (rounds, n): round t's values at the training points are V (B_t z).
        duals: B_t/d without the division, shape (rounds, n): f_t(x) = k(x, .) V (dual_t z).
        norms: r_t = ||labels of round t||/sqrt(n*eps), shape (rounds + 1,): labels of rounds 0 to `rounds`, the last ones
            being those that a further round would get.
        collapsed_at: first t with r_t <= 1, that is, the number of fits before f = 0; None if that is not among `norms`.
            One entry per output if there are several.
    """

    shifts: np.ndarray
    filters: np.ndarray
    duals: np.ndarray
    norms: np.ndarray
    collapsed_at: int | tuple[int | None, ...] | None


def constrained_rounds(
    eigenvalues: Values, coefficients: Values, tolerance: float, rounds: int, weight: float = 0.0
) -> Rounds:
    """The paper's rounds: each fit misses its labels by exactly the tolerance, until the labels lie within it.

    Args:
        eigenvalues: d of K, shape (n,).
        coefficients: z = V^T y, shape (n,) or (n, outputs).
        tolerance: eps > 0.
        rounds: number of fits, >= 1.
        weight: of the original labels in every later fit; 0 is the paper. The bounds of this file hold for 0 only.

    Returns:
        Shifts, filters and norms of all rounds.

    Raises:
        ValueError: as `multiplier`; `rounds` below 1.

    Source: Mobahi et al. 2020, section 3.

    Example:
        >>> found = constrained_rounds([1.0, 1.0], [4.0, 0.0], 0.5, 4)  # the norm falls by sqrt(n*eps) = 1 per round
        >>> found.norms.round(6).tolist(), found.collapsed_at
        ([4.0, 3.0, 2.0, 1.0, 0.0], 3)
    """
    d, z, budget = problem(eigenvalues, coefficients, tolerance)
    check_rounds(rounds)
    column = d if z.ndim == 1 else d[:, None]
    kept = np.ones_like(z)  # labels of this round, as a filter of z
    shifts, filters, duals, norms = [], [], [], []
    for _ in range(rounds):
        norms.append(ratio_of(kept * z, budget))
        shifts.append(multiplier(d, kept * z, tolerance))
        with np.errstate(divide="ignore"):
            duals.append(kept / (column + shifts[-1]))
        filters.append(column * duals[-1])
        kept = weight + (1.0 - weight) * filters[-1]
    norms.append(ratio_of(kept * z, budget))
    ratios = np.array(norms)
    return Rounds(
        shifts=np.array(shifts),
        filters=np.array(filters),
        duals=np.array(duals),
        norms=ratios,
        collapsed_at=_first(ratios) if z.ndim == 1 else tuple(_first(ratio) for ratio in ratios.T),
    )


def collapse(eigenvalues: Values, coefficients: Values, tolerance: float) -> int:
    """Fits before pure distillation of one output is f = 0: the first t with ||y_t||^2 <= n*eps.

    Args:
        eigenvalues: d of K, shape (n,).
        coefficients: z = V^T y, shape (n,).
        tolerance: eps > 0.

    Returns:
        Number of fits that are not zero, between `rounds_at_least` and `rounds_at_most`; about 1.5 times the former in
        random problems, and each costs O(n). 0 if the labels themselves lie within the tolerance.

    Raises:
        ValueError: as `multiplier`; several outputs.

    Source: Mobahi et al. 2020, section 3.

    Example:
        >>> collapse([1.0, 1.0], [4.0, 0.0], 0.5)
        3
    """
    d, z, _ = problem(eigenvalues, coefficients, tolerance)
    if z.ndim != 1:
        raise ValueError(f"collapse is asked of one output at a time, got coefficients of shape {z.shape}")
    for fits in range(rounds_at_most(initial_ratio(z, tolerance)) + 2):
        shift = float(multiplier(d, z, tolerance))
        if math.isinf(shift):
            return fits
        z = d / (d + shift) * z
    raise AssertionError("the upper bound on the rounds is proven; please report this")  # pragma: no cover


# filters


def constant_rounds(eigenvalues: Values, shift: Values, rounds: int) -> np.ndarray:
    """B_t of pure rounds with one lambda: h^(t+1), h = d/(d + lambda).

    Args:
        eigenvalues: d, shape (n,).
        shift: lambda > 0, any shape (...).
        rounds: number of fits, >= 1.

    Returns:
        Shape (..., rounds, n).

    Raises:
        ValueError: an argument is out of range.

    Source: Mobahi et al. 2020 with constant c; the opposite of boosting's 1 - (1-h)^(t+1).

    Example:
        >>> constant_rounds([1.0, 3.0], 1.0, 2).tolist()
        [[0.5, 0.75], [0.25, 0.5625]]
    """
    check_rounds(rounds)
    return mixed_filters(eigenvalues, shift, np.zeros(rounds - 1))


def mixed_filters(eigenvalues: Values, shift: Values, weights: Values) -> np.ndarray:
    """B_t of rounds with one lambda and original labels mixed in: B_t = h*(w_t + (1 - w_t)*B_{t-1}), B_0 = h.

    Args:
        eigenvalues: d, shape (n,).
        shift: lambda > 0, any shape; broadcasts against the leading axes of `weights`.
        weights: w of the *original* labels in each later fit, shape (..., rounds - 1); 1 - xi of the literature. Any finite
            number: outside [0, 1] labels or fits are extrapolated.

    Returns:
        Shape (..., rounds, n), the plain ridge fit first.

    Raises:
        ValueError: an argument is out of range.

    Source: Borup & Andersen 2021; the recursion is derived.

    Example:
        >>> mixed_filters([1.0], 1.0, [0.5]).tolist()  # 1/2, then 1/2*(1/2 + 1/2*1/2)
        [[0.5], [0.375]]
    """
    h, w = ridge_filter(eigenvalues, shift), finite(weights, "weights")
    if w.ndim == 0:
        raise ValueError("weights has to have one entry per later fit, shape (..., rounds - 1); got one number")
    shape = np.broadcast_shapes(h.shape[:-1], w.shape[:-1])
    filters = np.empty((*shape, w.shape[-1] + 1, h.shape[-1]))
    filters[..., 0, :] = h
    for t in range(w.shape[-1]):
        mixed = w[..., t, None]
        filters[..., t + 1, :] = h * (mixed + (1.0 - mixed) * filters[..., t, :])
    return filters


def ridge_filter(eigenvalues: Values, shift: Values) -> np.ndarray:
    """One fit: h = d/(d + lambda).

    Args:
        eigenvalues: d, shape (n,).
        shift: lambda > 0, any shape (...); infinity gives 0.

    Returns:
        Shape (..., n).

    Raises:
        ValueError: an argument is out of range.

    Source: kernel ridge regression.

    Example:
        >>> ridge_filter([1.0, 3.0], 1.0).tolist()
        [0.5, 0.75]
    """
    d, shifts = clipped(eigenvalues), np.asarray(shift, dtype=float)
    if not np.all(shifts > 0):
        raise ValueError(f"shift has to be above 0, got {shift}; it is added to every eigenvalue of the kernel matrix")
    return d / (d + shifts[..., None])


def limit_shift(shift: Values, weight: Values) -> np.ndarray:
    """Rounds without end with label weight w are one ridge fit with lambda/w.

    Args:
        shift: lambda > 0.
        weight: w of the original labels in every later fit, 0 < w <= 2 (outside, rounds do not converge).

    Returns:
        lambda/w, of the broadcast shape.

    Raises:
        ValueError: an argument is out of range.

    Source: Borup & Andersen 2021.

    Example:
        >>> float(limit_shift(0.2, 0.25))
        0.8
    """
    shifts, w = finite(shift, "shift"), finite(weight, "weight")
    if not (np.all(shifts > 0) and np.all((w > 0) & (w <= 2))):
        raise ValueError(
            f"shift has to be above 0 and weight within (0, 2], got {shift} and {weight}; 0 has no limit but 0"
        )
    return shifts / w


def equivalent_eigenvalues(eigenvalues: Values, shifts: Sequence[float] | np.ndarray) -> np.ndarray:
    """Eigenvalues d' with which *one* fit of shift lambda_0 does what pure rounds do: d'/(d' + lambda_0) = B_t.

    d' = lambda_0/(prod_i (d + lambda_i)/d - 1): the same eigenvectors, and a kernel whose spectrum falls faster.

    Args:
        eigenvalues: d, shape (n,).
        shifts: lambda_0 .. lambda_t, each > 0, at least one.

    Returns:
        d', shape (n,); 0 where d = 0.

    Raises:
        ValueError: an argument is out of range.

    Source: derived from Mobahi et al. 2020, section 3.

    Example:
        >>> equivalent_eigenvalues([1.0, 3.0], [1.0, 1.0]).round(4).tolist()  # 1/(2^2 - 1), 1/((4/3)^2 - 1)
        [0.3333, 1.2857]
    """
    d, added = clipped(eigenvalues), finite(shifts, "shifts")
    if added.ndim != 1 or not added.size or np.any(added <= 0):
        raise ValueError(f"shifts has to be a list of at least one number above 0, got {shifts}")
    with np.errstate(divide="ignore", over="ignore"):
        return added[0] / np.expm1(np.log1p(added / d[:, None]).sum(1))


# root finding


def _root(d: np.ndarray, z: np.ndarray, tolerance: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Roots for the columns of `z`, each inside its bracket: Newton in log lambda, bisection where that leaves the bracket."""
    goal, d, squares = math.log(d.size * tolerance), d[:, None], z * z
    low, high = np.log(low), np.log(high)
    at = (low + high) / 2.0
    for _ in range(200):
        missed = np.exp(at) / (d + np.exp(at))
        parts = missed**2 * squares
        total = parts.sum(0)
        gap = np.log(total) - goal
        if np.all((np.abs(gap) <= _LOG_RESIDUAL) | (high - low <= 4 * EPS * (1.0 + np.abs(at)))):
            break
        low, high = np.where(gap < 0, at, low), np.where(gap > 0, at, high)
        slope = 2.0 * (parts * (1.0 - missed)).sum(0) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            step = at - gap / slope
        at = np.where((step >= low) & (step <= high), step, (low + high) / 2.0)
    return np.exp(at)


def _first(ratios: np.ndarray) -> int | None:
    return int(np.argmax(ratios <= 1.0)) if np.any(ratios <= 1.0) else None
