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

from decaycast.methods.l2 import modes

Values = Any  # a number, a sequence, a numpy array or a CPU tensor


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
    return modes.product(modes.checked_eigenvalues(gamma), kernel_scale(t, weight_decay, homogeneity))


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
    t, decay, k = modes.at_least_zero(time, "time"), modes.checked_decay(weight_decay), modes.checked_degree(degree)
    with np.errstate(over="ignore"):
        return np.exp(-modes.product(2.0 * (k - 1.0) * decay, t))


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
    gamma = modes.checked_eigenvalues(eigenvalue)
    args = modes.at_least_zero(t, "t"), gamma, modes.checked_decay(weight_decay), modes.solvable(homogeneity)
    y, start = modes.finite(target, "target"), modes.finite(initial, "initial")
    integrated, memory, decayed = modes.propagators(*args)
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
    gamma, y = modes.checked_eigenvalues(eigenvalue), modes.finite(target, "target")
    decay, k = modes.checked_decay(weight_decay), modes.checked_degree(homogeneity)
    # divided by gamma(t)/gamma, which may overflow (k < 1): y*gamma/(gamma + k*lambda/scale)
    with np.errstate(over="ignore"):
        pull = modes.product(k * decay, np.exp(modes.product(2.0 * (k - 1.0) * decay, modes.at_least_zero(t, "t"))))
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
        Flow time of the peak, of the broadcast shape: 0 if f only falls; infinity if it only rises: lambda = 0, k <= 1, or
        f(0) so far on the other side that f creeps up to 0 (judged at k*lambda*t = 300).

    Raises:
        ValueError: an argument is outside its range.

    Source: derived from theorem 2.

    Example:
        >>> float(time_of_peak(eigenvalue=1, target=1, initial=0.3, weight_decay=0.1, homogeneity=2).round(2))
        2.76
    """
    gamma, y, start, decay, k = np.broadcast_arrays(
        modes.checked_eigenvalues(eigenvalue),
        modes.finite(target, "target"),
        modes.finite(initial, "initial"),
        modes.checked_decay(weight_decay),
        modes.solvable(homogeneity),
    )
    total = gamma + k * decay
    level = np.divide(gamma, total, out=np.zeros(total.shape), where=total > 0)
    # in units of y; a mode with nothing to learn never rises
    gap = np.divide(start, y, out=np.ones(y.shape), where=y != 0) - level
    rises = (gap < 0) & (gamma > 0) & (y != 0)
    peak = np.where(rises, np.inf, 0.0)
    turns = rises & (k >= 2) & (decay > 0)
    if turns.any():
        peak[turns] = modes.crossing(gap[turns], gamma[turns], decay[turns], k[turns])
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
    gamma, decay, k = np.broadcast_arrays(
        modes.checked_eigenvalues(eigenvalue), modes.checked_decay(weight_decay), modes.checked_degree(homogeneity)
    )
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
    rate, decay = modes.finite(lr, "lr"), modes.checked_decay(weight_decay)
    if (rate <= 0).any():
        raise ValueError(f"lr has to be above 0, got {rate.min():g}")
    with np.errstate(over="ignore"):
        return rate * np.exp(2.0 * rate * modes.product(decay, modes.at_least_zero(steps, "steps")))


def outputs(
    time: Values, eigenvalues: Values, targets: Values, initial: Values, weight_decay: float, degree: float
) -> np.ndarray:
    """All components over time: f_a(t) of theorem 2, as a table of times x modes.

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
    y, (integrated, memory, decayed) = modes.evolve(time, eigenvalues, targets, weight_decay, degree)
    start = np.broadcast_to(modes.like(initial, y, "initial"), y.shape)
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
    gamma, vectors = modes.eigenpairs(kernel)
    y = modes.per_sample(targets, gamma, "targets")
    start = np.broadcast_to(modes.like(initial, y, "initial"), y.shape)
    components = outputs(time, gamma, vectors.T @ y, vectors.T @ start, weight_decay, homogeneity)
    return np.einsum("xa,ta...->tx...", vectors, components)


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
    gamma, vectors = modes.eigenpairs(kernel)
    y = modes.per_sample(targets, gamma, "targets")
    start = np.broadcast_to(modes.like(initial, y, "initial"), y.shape)
    cross = modes.finite(cross_kernel, "cross_kernel")
    if cross.ndim != 2 or cross.shape[1] != gamma.size:
        raise ValueError(f"cross_kernel has to have shape (points, {gamma.size}), got {cross.shape}")
    other = np.zeros((cross.shape[0], *y.shape[1:]))
    other = other + modes.like(cross_initial, other, "cross_initial")
    y_modes, (integrated, memory, decayed) = modes.evolve(time, gamma, vectors.T @ y, weight_decay, homogeneity)
    # f_a(t) - exp(-k*lambda*t)*f_a(0), without the cancellation
    response = y_modes * memory + (vectors.T @ start) * np.exp(-decayed) * np.expm1(-integrated)
    kept = gamma > gamma.size * np.finfo(float).eps * gamma.max()
    lift = np.divide(cross @ vectors, gamma.size * gamma, out=np.zeros(cross.shape), where=kept)
    first = np.exp(-decayed[:, :1]) * other  # decay is the same for all components
    return first + np.einsum("xa,ta...->tx...", lift, response)


# the mathematics
