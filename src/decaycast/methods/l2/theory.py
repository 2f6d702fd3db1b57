"""Training with L2 in the limit of infinite width, in closed form (Lewkowycz & Gur-Ari 2020, arXiv 2006.08643).

Conventions of this file. Loss: mean over the n training points of (f - y)**2/2, plus (lambda/2)*||theta||^2. Time t is
that of gradient flow: t = lr*steps for plain gradient descent with a small lr. `homogeneity` k: f(c*theta) = c**k * f(theta)
(a bias-free ReLU network of k layers; 0 for weights in front of a normalisation). Kernel: Theta_0(x, x') = grad f(x) . grad f(x')
at the start; an `eigenvalue` gamma is one of Theta_0/n on the training set, and `target` y, `initial` f(0) are
components along its eigenvector. Everything is numpy, float64 and broadcasts; array-likes are accepted.

    df/dt     = -gamma(t)*(f - y) - k*lambda*f                                                    (theorem 1)
    gamma(t)  = gamma*exp(-2*(k-1)*lambda*t)
    f(t)      = f(0)*exp(-X - k*lambda*t) + y*M,     X = int_0^t gamma(s) ds                         (theorem 2)
    M         = int_0^t gamma(s)*exp(-int_s^t gamma(u) du - k*lambda*(t-s)) ds

Theorem 2 as printed multiplies exp(+gamma(t)/(2(k-1)*lambda)) with an integral of exp(-gamma(s)/(2(k-1)*lambda)), which
overflows once gamma/lambda passes about 1400. M above has the exponents combined; with x = int_s^t gamma(u) du it reads

    M = int_0^X exp(-x)*(1 + r*x)**(-p) dx,     r = 2(k-1)*lambda/gamma(t),     p = k/(2(k-1)) in (1/2, 1]

where nothing overflows, nothing cancels, and r = 0 is training without L2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Values = Any  # a number, a sequence, a numpy array or a CPU tensor

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_FAR = 50.0  # exp(-50) is below float64 rounding
_GONE = 800.0  # exp(-800) underflows
_BLOCK = 4096  # elements integrated at once: 4096 x 20 nodes stay in cache


def kernel_eigenvalue(gamma: Values, weight_decay: Values, t: Values, homogeneity: Values) -> np.ndarray:
    """Kernel eigenvalue at time t: gamma(t) = gamma*exp(-2(k-1)*lambda*t) (theorem 1).

    Args:
        gamma: eigenvalue at the start, finite and >= 0.
        weight_decay: lambda >= 0.
        t: flow time >= 0.
        homogeneity: k >= 0. The kernel shrinks for k > 1, stays for k = 1, grows for k < 1.

    Returns:
        gamma(t), of the broadcast shape.

    Raises:
        ValueError: an argument is outside its range.

    Source: Lewkowycz & Gur-Ari 2020, theorem 1; the finite-width identity behind it is exact up to O(1/width).

    Example:
        >>> float(kernel_eigenvalue(2.0, 0.1, 5.0, 2).round(6))  # 2/e
        0.735759
    """
    return _eigenvalues(gamma) * kernel_scale(t, weight_decay, homogeneity)


def kernel_scale(time: Values, weight_decay: Values, degree: Values) -> np.ndarray:
    """What the whole kernel is multiplied with: Theta_t = exp(-2(k-1)*lambda*t)*Theta_0 (theorem 1).

    Args:
        time: flow time >= 0.
        weight_decay: lambda >= 0.
        degree: homogeneity k >= 0.

    Returns:
        The factor, of the broadcast shape; infinite where exp(2*lambda*t) overflows (k = 0).

    Raises:
        ValueError: an argument is outside its range.

    Source: Lewkowycz & Gur-Ari 2020, theorem 1.

    Example:
        >>> float(kernel_scale(1.0, 0.1, 3).round(6))  # exp(-0.4)
        0.67032
    """
    t, decay, k = _at_least_zero(time, "time"), _weight_decay(weight_decay), _degree(degree)
    with np.errstate(over="ignore"):
        return np.exp(-_product(2.0 * (k - 1.0) * decay, t))


def mode(
    t: Values, *, eigenvalue: Values, target: Values, initial: Values = 0.0, weight_decay: Values, homogeneity: Values
) -> np.ndarray:
    """One mode of the network's function over time, f(t) (theorem 2, and its cases k = 1 and k = 0).

    k >= 2: f(t) = f(0)*exp(-X - k*lambda*t) + y*M, head of this file; f -> 0 in the end for every lambda > 0.
    k = 1: ridge regression, f* + (f(0) - f*)*exp(-(gamma+lambda)*t) with f* = y*gamma/(gamma+lambda).
    k = 0: y + (f(0) - y)*exp(-X), X = gamma*(exp(2*lambda*t) - 1)/(2*lambda): no L2, with a growing learning rate.
    lambda = 0: y + (f(0) - y)*exp(-gamma*t) for every k.

    Args:
        t: flow time >= 0; infinity gives the limit.
        eigenvalue: gamma of Theta_0/n, finite and >= 0 (negatives of the size of rounding are taken as 0).
        target: y, component of the targets along the eigenvector.
        initial: f(0), component of the outputs at the start.
        weight_decay: lambda >= 0.
        homogeneity: k = 0, 1 or k >= 2 (may be mixed in one array; need not be an integer).

    Returns:
        f(t), of the broadcast shape of all arguments; relative error about 1e-13 where f(0) and y agree in sign.

    Raises:
        ValueError: an argument is outside its range.

    Source: Lewkowycz & Gur-Ari 2020, theorem 2; k = 0 agrees with Li & Arora 2019 (arXiv 1910.07454) at small lr.

    Example:
        >>> float(mode(7.6, eigenvalue=1, target=1, initial=0.3, weight_decay=0.01, homogeneity=2).round(3))
        0.977
    """
    gamma = _eigenvalues(eigenvalue)
    args = _at_least_zero(t, "t"), gamma, _weight_decay(weight_decay), _solvable(homogeneity)
    y, start = _finite(target, "target"), _finite(initial, "initial")
    integrated, memory, decayed = _propagators(*args)
    return start * np.exp(-(integrated + decayed)) + y * memory


def quasi_static(
    t: Values, *, eigenvalue: Values, target: Values, weight_decay: Values, homogeneity: Values
) -> np.ndarray:
    """What a mode follows once its fast phase (t ~ 1/gamma) is over: y*gamma(t)/(gamma(t) + k*lambda).

    Args:
        t: flow time >= 0.
        eigenvalue: gamma, finite and >= 0.
        target: y.
        weight_decay: lambda >= 0.
        homogeneity: k >= 0.

    Returns:
        The value at which df/dt = 0, of the broadcast shape; 0 where gamma(t) = k*lambda = 0.

    Raises:
        ValueError: an argument is outside its range.

    Source: theorem 1 with df/dt = 0.

    Example:
        >>> float(quasi_static(0.0, eigenvalue=3, target=2, weight_decay=0.5, homogeneity=2))  # 2*3/4
        1.5
    """
    gamma, y = _eigenvalues(eigenvalue), _finite(target, "target")
    decay, k = _weight_decay(weight_decay), _degree(homogeneity)
    # divided by gamma(t)/gamma, which may overflow (k < 1): y*gamma/(gamma + k*lambda/scale)
    with np.errstate(over="ignore"):
        pull = _product(k * decay, np.exp(_product(2.0 * (k - 1.0) * decay, _at_least_zero(t, "t"))))
    total = gamma + pull
    return y * np.divide(gamma, total, out=np.zeros(total.shape), where=total > 0)


def time_of_peak(
    *, eigenvalue: Values, target: Values, initial: Values = 0.0, weight_decay: Values, homogeneity: Values
) -> np.ndarray:
    """When a mode comes closest to its target: the maximum over t of f(t)*sign(y).

    f rises while it is below y*gamma(t)/(gamma(t) + k*lambda), crosses that falling curve once, and falls ever after;
    the crossing is found by bisection on their difference d, itself a sum of terms of known sign:
    d(t) = d(0)*exp(-X - k*lambda*t) + y*int_0^t gamma(s)*w(s)*exp(-...) ds, w = 2(k-1)*k*lambda^2/(gamma(s) + k*lambda)^2.

    Args:
        eigenvalue: gamma, finite and >= 0.
        target: y.
        initial: f(0).
        weight_decay: lambda >= 0.
        homogeneity: k = 0, 1 or k >= 2.

    Returns:
        Flow time of the peak, of the broadcast shape: 0 if f only falls, infinity if it only rises (lambda = 0, k <= 1).

    Raises:
        ValueError: an argument is outside its range.

    Source: derived from theorem 2.

    Example:
        >>> float(time_of_peak(eigenvalue=1, target=1, initial=0.3, weight_decay=0.1, homogeneity=2).round(2))
        2.76
    """
    gamma, y, start, decay, k = np.broadcast_arrays(
        _eigenvalues(eigenvalue),
        _finite(target, "target"),
        _finite(initial, "initial"),
        _weight_decay(weight_decay),
        _solvable(homogeneity),
    )
    total = gamma + k * decay
    level = np.divide(gamma, total, out=np.zeros(total.shape), where=total > 0)
    # in units of y; a mode with nothing to learn never rises
    gap = np.divide(start, y, out=np.ones(y.shape), where=y != 0) - level
    rises = (gap < 0) & (gamma > 0) & (y != 0)
    peak = np.where(rises, np.inf, 0.0)
    turns = rises & (k >= 2) & (decay > 0)
    if turns.any():
        peak[turns] = _crossing(gap[turns], gamma[turns], decay[turns], k[turns])
    return peak


def time_of_loss(*, eigenvalue: Values, weight_decay: Values, homogeneity: Values) -> np.ndarray:
    """When a mode is lost again: t_a = log(gamma/(k*lambda))/(2(k-1)*lambda), where gamma(t_a) = k*lambda.

    There `quasi_static` has come down to y/2: from then on decay is stronger than the data.

    Args:
        eigenvalue: gamma, finite and >= 0.
        weight_decay: lambda >= 0.
        homogeneity: k >= 0.

    Returns:
        Flow time, of the broadcast shape: 0 where gamma <= k*lambda (never learnt beyond a half), infinity where the mode
        stays (lambda = 0, or k <= 1).

    Raises:
        ValueError: an argument is outside its range.

    Source: derived from theorem 1; the logarithm is the correction to t* ~ 1/lambda.

    Example:
        >>> float(time_of_loss(eigenvalue=1, weight_decay=0.01, homogeneity=2).round(2))  # log(50)/0.02
        195.6
    """
    gamma, decay, k = np.broadcast_arrays(_eigenvalues(eigenvalue), _weight_decay(weight_decay), _degree(homogeneity))
    learnt = gamma > k * decay
    shrinks = learnt & (k > 1) & (decay > 0)
    lost = np.where(learnt, np.inf, 0.0)
    ratio = np.log(gamma[shrinks]) - np.log(k[shrinks] * decay[shrinks])
    with np.errstate(over="ignore"):
        lost[shrinks] = ratio / (2.0 * (k[shrinks] - 1.0) * decay[shrinks])
    return lost


def effective_learning_rate(lr: Values, weight_decay: Values, steps: Values) -> np.ndarray:
    """Learning rate that does without L2 what `lr` does with it, for scale-invariant weights: lr*exp(2*lr*lambda*steps).

    For k = 0 only the norm of the weights decays, and the gradient grows as one over that norm.

    Args:
        lr: learning rate > 0 of plain SGD, per step.
        weight_decay: lambda >= 0.
        steps: optimiser steps done, >= 0.

    Returns:
        Effective learning rate after `steps`, of the broadcast shape. Small lr*lambda; it ends where noise balances decay.

    Raises:
        ValueError: an argument is outside its range.

    Source: Lewkowycz & Gur-Ari 2020, k = 0; Li & Arora 2019 (arXiv 1910.07454).

    Example:
        >>> float(effective_learning_rate(0.1, 5e-4, 10_000).round(6))  # 0.1*e
        0.271828
    """
    rate, decay = _finite(lr, "lr"), _weight_decay(weight_decay)
    if (rate <= 0).any():
        raise ValueError(f"lr has to be above 0, got {rate.min():g}")
    with np.errstate(over="ignore"):
        return rate * np.exp(2.0 * rate * _product(decay, _at_least_zero(steps, "steps")))


def outputs(
    time: Values, eigenvalues: Values, targets: Values, initial: Values, weight_decay: float, degree: float
) -> np.ndarray:
    """All modes over time: f_a(t) of theorem 2, as a table of times x modes.

    Args:
        time: flow times, shape (times,), >= 0, never decreasing.
        eigenvalues: those of Theta_0/n, shape (n,), finite and >= 0 up to rounding.
        targets: components of the targets along the eigenvectors, shape (n,), or (n, c) for c outputs.
        initial: the same for the outputs at the start; a number is used for all.
        weight_decay: lambda >= 0, one number.
        degree: homogeneity k = 0, 1 or k >= 2, one number.

    Returns:
        f_a(t), shape (times, n) or (times, n, c).

    Raises:
        ValueError: shapes do not fit, times decrease, or an argument is outside its range.

    Source: Lewkowycz & Gur-Ari 2020, theorem 2; see `mode`.

    Example:
        >>> outputs([0.0, 1.0], [1.0, 2.0], [1.0, 1.0], 0.0, 0.0, 2).round(4).tolist()  # 1 - exp(-gamma*t)
        [[0.0, 0.0], [0.6321, 0.8647]]
    """
    y, (integrated, memory, decayed) = _table(time, eigenvalues, targets, weight_decay, degree)
    start = np.broadcast_to(_like(initial, y, "initial"), y.shape)
    return start * np.exp(-(integrated + decayed)) + y * memory


def function_evolution(
    time: Values, kernel: Values, targets: Values, *, initial: Values = 0.0, weight_decay: float, homogeneity: float
) -> np.ndarray:
    """Outputs on the training points over time: f_t = V f_a(t), with Theta_0/n = V diag(gamma) V^T.

    Args:
        time: flow times, shape (times,), >= 0, never decreasing.
        kernel: Theta_0 on the training points, shape (n, n), symmetric, positive semi-definite; not divided by n.
        targets: shape (n,), or (n, c) for c outputs that share the kernel.
        initial: outputs at the start, of the shape of the targets, or one number.
        weight_decay: lambda >= 0.
        homogeneity: k = 0, 1 or k >= 2.

    Returns:
        f_t(x), shape (times, n) or (times, n, c).

    Raises:
        ValueError: shapes do not fit, the kernel is not symmetric or has eigenvalues well below 0, times decrease.

    Source: Lewkowycz & Gur-Ari 2020, theorem 2.

    Example:
        >>> function_evolution([1e9], [[2.0, 1.0], [1.0, 2.0]], [1.0, 0.0], weight_decay=1.0, homogeneity=1).round(4).tolist()
        [[0.4667, 0.1333]]
    """
    gamma, vectors = _eigenpairs(kernel)
    y = _per_sample(targets, gamma, "targets")
    start = np.broadcast_to(_like(initial, y, "initial"), y.shape)
    modes = outputs(time, gamma, vectors.T @ y, vectors.T @ start, weight_decay, homogeneity)
    return np.einsum("xa,ta...->tx...", vectors, modes)


def prediction_evolution(
    time: Values,
    kernel: Values,
    targets: Values,
    cross_kernel: Values,
    *,
    initial: Values = 0.0,
    cross_initial: Values = 0.0,
    weight_decay: float,
    homogeneity: float,
) -> np.ndarray:
    """Outputs on other points over time, driven by the training points (theorem 1, integrated).

    f_t(x) = exp(-k*lambda*t)*f_0(x) + sum_a (Theta_0(x, .) e_a/(n*gamma_a))*(f_a(t) - exp(-k*lambda*t)*f_a(0)).

    Args:
        time: flow times, shape (times,), >= 0, never decreasing.
        kernel: Theta_0 on the training points, shape (n, n).
        targets: shape (n,), or (n, c).
        cross_kernel: Theta_0 between other and training points, shape (m, n).
        initial: outputs at the start on the training points, of the shape of the targets, or one number.
        cross_initial: outputs at the start on the other points, shape (m,) or (m, c), or one number.
        weight_decay: lambda >= 0.
        homogeneity: k = 0, 1 or k >= 2.

    Returns:
        f_t(x), shape (times, m) or (times, m, c). Directions whose eigenvalue is rounding are left out: a kernel that is
        positive semi-definite on all points has no weight there.

    Raises:
        ValueError: as `function_evolution`; or `cross_kernel` has not n columns.

    Source: Lewkowycz & Gur-Ari 2020, theorem 1.

    Example:
        >>> args = ([1e9], [[2.0, 1.0], [1.0, 2.0]], [1.0, 0.0], [[1.0, 1.0]])
        >>> prediction_evolution(*args, weight_decay=1.0, homogeneity=1).round(4).tolist()  # k(x)(K + n*lambda)^-1 y
        [[0.2]]
    """
    gamma, vectors = _eigenpairs(kernel)
    y = _per_sample(targets, gamma, "targets")
    start = np.broadcast_to(_like(initial, y, "initial"), y.shape)
    cross = _finite(cross_kernel, "cross_kernel")
    if cross.ndim != 2 or cross.shape[1] != gamma.size:
        raise ValueError(f"cross_kernel has to have shape (points, {gamma.size}), got {cross.shape}")
    other = np.zeros((cross.shape[0], *y.shape[1:]))
    other = other + _like(cross_initial, other, "cross_initial")
    y_modes, (integrated, memory, decayed) = _table(time, gamma, vectors.T @ y, weight_decay, homogeneity)
    # f_a(t) - exp(-k*lambda*t)*f_a(0), without the cancellation
    response = y_modes * memory + (vectors.T @ start) * np.exp(-decayed) * np.expm1(-integrated)
    kept = gamma > gamma.size * np.finfo(float).eps * gamma.max()
    lift = np.divide(cross @ vectors, gamma.size * gamma, out=np.zeros(cross.shape), where=kept)
    first = np.exp(-decayed[:, :1]) * other  # decay is the same for all modes
    return first + np.einsum("xa,ta...->tx...", lift, response)


# the mathematics


def _propagators(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, ...]:
    """X, M and k*lambda*t of the head of this file, for every k, of the common shape."""
    t, gamma, decay, k = np.broadcast_arrays(t, gamma, decay, k)
    integrated, decayed = _integrated(t, gamma, decay, k), _product(k * decay, t)
    memory = np.array(-np.expm1(-integrated))  # k = 0
    ridge, deep = k == 1, k >= 2
    if ridge.any():
        total = gamma + decay
        share = np.divide(gamma, total, out=np.zeros(total.shape), where=total > 0)
        memory[ridge] = (share * -np.expm1(-(integrated + decayed)))[ridge]
    if deep.any():
        memory[deep] = _memory(t[deep], gamma[deep], decay[deep], k[deep])
    return integrated, memory, decayed


def _integrated(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> np.ndarray:
    """X = int_0^t gamma(s) ds = gamma*(1 - exp(-a*t))/a, a = 2(k-1)*lambda."""
    rate = 2.0 * (k - 1.0) * decay
    shrunk = _product(rate, t)
    slow = np.abs(shrunk) < 1e-9  # to second order the average of exp(-a*s) is 1 - a*t/2
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        lasted = np.where(slow, t * (1.0 - shrunk / 2.0), -np.expm1(-shrunk) / rate)
    return _product(gamma, lasted)


def _memory(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray, *, lag: bool = False) -> np.ndarray:
    """M for k >= 2 and flat arrays; with `lag`, its integrand times w of `time_of_peak`."""
    integrated = _integrated(t, gamma, decay, k)
    memory = np.zeros(t.shape)
    # M <= exp(-k*lambda*t)*(a polynomial): zero where that underflows
    (todo,) = np.nonzero((integrated > 0) & (_product(k * decay, t) < _GONE))
    for first in range(0, todo.size, _BLOCK):
        block = todo[first : first + _BLOCK]
        memory[block] = _quadrature(integrated[block], t[block], gamma[block], decay[block], k[block], lag)
    return memory


def _quadrature(
    integrated: np.ndarray, t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray, lag: bool
) -> np.ndarray:
    """Integrate exp(-x)*(1 + r*x)**(-p) over x in (0, X) by Gauss-Legendre panels in z = log(1 + R*x), R = max(r, 1).

    In z the two scales, 1 and 1/r, are both of order one and no singularity is nearer than pi: panels of width 1 do.
    Cutting at x = 50 costs a relative exp(-50), as the second factor only falls.
    """
    with np.errstate(divide="ignore"):  # lambda = 0: log r = -infinity, that is, r = 0
        log_r = np.log(2.0 * (k - 1.0) * decay) + _product(2.0 * (k - 1.0) * decay, t) - np.log(gamma)
    log_scale = np.maximum(log_r, 0.0)
    end = np.logaddexp(0.0, log_scale + np.log(np.minimum(integrated, _FAR)))
    panels = int(np.ceil(end.max()))
    half = (end / (2 * panels))[:, None]
    ratio, shift, power = np.exp(np.minimum(log_r, 0.0))[:, None], log_scale[:, None], (k / (2.0 * (k - 1.0)))[:, None]
    total = np.zeros(end.shape)
    for panel in range(panels):
        z = half * (2 * panel + 1 + _NODES)
        grown = np.exp(z - shift)  # (1 + R*x)/R, also dx/dz
        x = grown - np.exp(-shift)
        log_back = np.where(shift > 0, z, np.log1p(ratio * x))  # log(gamma(s)/gamma(t))
        values = grown * np.exp(-x - power * log_back)
        if lag:
            pull = (k * decay)[:, None]
            now = _product(gamma, np.exp(-2.0 * (k - 1.0) * decay * t))[:, None] * np.exp(log_back)
            values *= 2.0 * (k - 1.0)[:, None] * decay[:, None] * (pull / (now + pull)) / (now + pull)
        total += (half * values) @ _WEIGHTS
    return total


def _crossing(gap: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Time at which a mode that starts `gap` < 0 (in units of y) below its quasi-static value meets it; k >= 2."""

    def above(t: np.ndarray) -> np.ndarray:
        start = gap * np.exp(-(_integrated(t, gamma, decay, k) + k * decay * t))
        return start + _memory(t, gamma, decay, k, lag=True) >= 0

    low, high = np.zeros(gap.shape), 1.0 / (gamma + k * decay)
    while not (met := above(high)).all():
        low, high = np.where(met, low, high), np.where(met, high, 2.0 * high)
    for _ in range(60):
        middle = (low + high) / 2.0
        met = above(middle)
        low, high = np.where(met, low, middle), np.where(met, middle, high)
    return (low + high) / 2.0


def _table(
    time: Values, eigenvalues: Values, targets: Values, weight_decay: Values, degree: Values
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Checked targets, and the propagators of shape (times, n), with an axis for c outputs if there are."""
    t, gamma = _times_in_order(time), _eigenvalues(eigenvalues)
    if gamma.ndim != 1 or gamma.size == 0:
        raise ValueError(f"eigenvalues have to have shape (n,) with n >= 1, got {gamma.shape}")
    y = _per_sample(targets, gamma, "targets")
    decay, k = _weight_decay(weight_decay), _solvable(degree)
    if decay.ndim or k.ndim:
        raise ValueError(f"weight_decay and degree have to be single numbers here, got shapes {decay.shape}, {k.shape}")
    found = _propagators(t[:, None], gamma, decay, k)
    return y, tuple(part.reshape(*part.shape, *[1] * (y.ndim - 1)) for part in found)


def _eigenpairs(kernel: Values) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of Theta_0/n, clipped at 0, and eigenvectors as columns."""
    matrix = _finite(kernel, "kernel")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"kernel has to be a square matrix, got shape {matrix.shape}")
    rounding, skew = _rounding(kernel, len(matrix)) * np.abs(matrix).max(), np.abs(matrix - matrix.T).max()
    if skew > rounding:
        raise ValueError(
            f"kernel is not symmetric: entries differ by up to {skew:g}; pass (K + K.T)/2 if that is noise"
        )
    gamma, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0 / len(matrix))
    return _clipped(gamma, rounding / len(matrix)), vectors


# arguments


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a*b with 0*infinity = 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, np.multiply(a, b))


def _array(values: Values, name: str) -> np.ndarray:
    try:
        return np.asarray(values).astype(float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} has to be a number or an array of numbers, got {values!r:.80}") from error


def _finite(values: Values, name: str) -> np.ndarray:
    array = _array(values, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has to be finite, got {array[~np.isfinite(array)].flat[0]}")
    return array


def _at_least_zero(values: Values, name: str) -> np.ndarray:
    array = _array(values, name)
    if not (array >= 0).all():
        raise ValueError(f"{name} has to be at least 0, got {array[~(array >= 0)].flat[0]:g}")
    return array


def _weight_decay(values: Values) -> np.ndarray:
    return _at_least_zero(_finite(values, "weight_decay"), "weight_decay")


def _degree(values: Values) -> np.ndarray:
    return _at_least_zero(_finite(values, "homogeneity"), "homogeneity")


def _solvable(values: Values) -> np.ndarray:
    k = _degree(values)
    between = (k < 2) & (k != 0) & (k != 1)
    if between.any():
        raise ValueError(f"homogeneity has to be 0, 1 or at least 2, got {k[between].flat[0]:g}")
    return k


def _rounding(values: Values, size: int) -> float:
    """Relative size of what rounding in the caller's own precision may leave in a matrix of `size` rows."""
    dtype = np.asarray(values).dtype
    return 8 * size * float(np.finfo(dtype if dtype.kind == "f" else float).eps)


def _clipped(gamma: np.ndarray, rounding: float) -> np.ndarray:
    if gamma.size and gamma.min() < -rounding:
        raise ValueError(
            f"eigenvalues have to be at least 0, got {gamma.min():g}: more than rounding; is the kernel a kernel?"
        )
    return np.maximum(gamma, 0.0)


def _eigenvalues(values: Values) -> np.ndarray:
    gamma = _finite(values, "eigenvalue")
    largest = float(np.abs(gamma).max(initial=0.0)) if gamma.ndim else 0.0
    return _clipped(gamma, _rounding(values, gamma.size) * largest if largest else 0.0)


def _times_in_order(values: Values) -> np.ndarray:
    t = _at_least_zero(values, "time")
    if t.ndim != 1:
        raise ValueError(f"time has to have shape (times,), got {t.shape}")
    if (t[1:] < t[:-1]).any():
        raise ValueError("time has to be in order, and it decreases; sort it first")
    return t


def _per_sample(values: Values, gamma: np.ndarray, name: str) -> np.ndarray:
    array = _finite(values, name)
    if array.ndim not in (1, 2) or len(array) != gamma.size:
        raise ValueError(f"{name} have to have shape ({gamma.size},) or ({gamma.size}, outputs), got {array.shape}")
    return array


def _like(values: Values, like: np.ndarray, name: str) -> np.ndarray:
    array = _finite(values, name)
    if array.ndim and array.shape != like.shape:
        raise ValueError(f"{name} has to be one number or of shape {like.shape}, got {array.shape}")
    return array
