"""How many rounds before self-distillation with a tolerance collapses to f = 0, and how sparse it gets.

Conventions and symbols stand at the head of `theory`: r_t = ||y_t||/sqrt(n*eps), kappa = d_max/d_min over eigenvalues above 0,
rounds count fits. Everything here is for pure rounds (label weight 0) of one output.

Source: Mobahi, Farajtabar, Bartlett 2020 (arXiv 2002.05715); what is marked as derived is tested on random problems.
"""

from __future__ import annotations

import math

import numpy as np

from decaycast.methods.self_distill.checked import Values, finite, positive, ratio_of


def initial_ratio(coefficients: Values, tolerance: float) -> float:
    """r_0 = ||y||/sqrt(n*eps), all that the bounds need to know of the labels.

    Args:
        coefficients: labels or their components, shape (n,).
        tolerance: eps > 0.

    Returns:
        r_0; at most 1 means that f = 0 from the start.

    Raises:
        ValueError: an argument is out of range.

    Source: Mobahi et al. 2020, section 3.

    Example:
        >>> initial_ratio([3.0, 4.0], 0.5)
        5.0
    """
    z = finite(coefficients, "coefficients")
    return float(ratio_of(z, len(z) * positive(tolerance, "tolerance")))


def rounds_at_least(ratio: float) -> int:
    """Fits that are certainly not zero: ceil(r_0 - 1), whatever the kernel.

    Each round moves the labels by exactly sqrt(n*eps), so r_t >= r_0 - t (derived; equality if all d are equal).

    Args:
        ratio: r_0 >= 0.

    Returns:
        A whole number >= 0. It is never below the paper's (r_0 - 1)/kappa.

    Raises:
        ValueError: `ratio` is negative or not finite.

    Source: derived; compare `paper_rounds`.

    Example:
        >>> rounds_at_least(4.15)
        4
    """
    return max(0, math.ceil(_ratio_checked(ratio) - 1.0))


def rounds_at_most(ratio: float) -> int:
    """Fits after which the solution has certainly collapsed: ceil(r_0^2 - 1).

    A fit is closer to zero than its labels and on their side, so r_t^2 <= r_0^2 - t (derived).

    Args:
        ratio: r_0 >= 0.

    Returns:
        A whole number >= 0: no more fits than that are different from zero.

    Raises:
        ValueError: `ratio` is negative or not finite.

    Source: derived.

    Example:
        >>> rounds_at_most(4.0)
        15
    """
    return max(0, math.ceil(_ratio_checked(ratio) ** 2 - 1.0))


def paper_rounds(ratio: float, condition: float) -> float:
    """Rounds that the paper guarantees: (r_0 - 1)/kappa. Mostly far below one; compare `rounds_at_least`.

    Args:
        ratio: r_0 >= 1.
        condition: kappa = d_max/d_min >= 1.

    Returns:
        A number >= 0.

    Raises:
        ValueError: an argument is out of range.

    Source: Mobahi et al. 2020, Prop. 4.

    Example:
        >>> paper_rounds(3.0, 4.0)
        0.5
    """
    _check_bound(ratio, condition)
    return (ratio - 1.0) / condition


def paper_bound(ratio: float, condition: float, t: Values) -> np.ndarray:
    """The paper's lower bound on r_t, valid while nothing has collapsed: a^t r_0 - b (a^t - 1)/(a - 1).

    a = ((r_0-1)^2 + kappa(2 r_0 - 1))/(r_0 - 1 + kappa)^2,  b = kappa r_0^2/(r_0 - 1 + kappa)^2.

    Args:
        ratio: r_0 > 1.
        condition: kappa = d_max/d_min >= 1, over eigenvalues above 0.
        t: round, whole numbers >= 0.

    Returns:
        The bound, of the shape of `t`; never above r_0 - t (derived).

    Raises:
        ValueError: an argument is out of range.

    Source: Mobahi et al. 2020, Prop. 3.

    Example:
        >>> paper_bound(3.0, 1.0, [0, 1, 2]).tolist()  # kappa = 1: r_0 - t
        [3.0, 2.0, 1.0]
    """
    _check_bound(ratio, condition)
    t = finite(t, "t")
    below = (ratio - 1.0 + condition) ** 2
    # a - 1 = -kappa(kappa - 1)/below, written so that kappa = 1 costs no digits
    b, a_minus_1 = condition * ratio**2 / below, -condition * (condition - 1.0) / below
    if a_minus_1 == 0.0:
        return ratio - b * t
    power_minus_1 = np.expm1(t * math.log1p(a_minus_1))
    return ratio + power_minus_1 * (ratio - b / a_minus_1)


def sparsity_bound(larger: Values, smaller: Values, smallest: float, ratio: float, fits: Values) -> np.ndarray:
    """Least ratio B[k]/B[j] after a number of fits, d_k > d_j: ((r_0 - 1 + d_min/d_j)/(r_0 - 1 + d_min/d_k))^fits.

    Args:
        larger: d_k > 0.
        smaller: d_j, 0 < d_j <= d_k.
        smallest: d_min > 0, the smallest eigenvalue above 0.
        ratio: r_0 > 1.
        fits: number of fits, >= 0; holds for all that are not zero (derived; the paper states (r_0 - 1)/kappa of them).

    Returns:
        The bound, >= 1, of the broadcast shape.

    Raises:
        ValueError: an argument is out of range.

    Source: Mobahi et al. 2020, the sparsity theorem.

    Example:
        >>> float(sparsity_bound(2.0, 1.0, 1.0, 2.0, 2).round(6))  # (2/1.5)^2
        1.777778
    """
    d_k, d_j, t = finite(larger, "larger"), finite(smaller, "smaller"), finite(fits, "fits")
    if not (smallest > 0 and np.all(d_j >= smallest) and np.all(d_k >= d_j)):
        raise ValueError(f"eigenvalues have to be 0 < smallest <= smaller <= larger, got smallest = {smallest:g}")
    _check_bound(ratio, 1.0)
    return ((ratio - 1.0 + smallest / d_j) / (ratio - 1.0 + smallest / d_k)) ** t


def _ratio_checked(ratio: float) -> float:
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ValueError(f"ratio is ||y||/sqrt(n*eps), finite and >= 0, got {ratio}")
    return float(ratio)


def _check_bound(ratio: float, condition: float) -> None:
    if not (_ratio_checked(ratio) >= 1.0 and math.isfinite(condition) and condition >= 1.0):
        raise ValueError(f"the bound is for ratio >= 1 and condition = d_max/d_min >= 1, got {ratio} and {condition}")
