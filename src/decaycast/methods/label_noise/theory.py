"""What label noise does to SGD, as formulas (Damian, Ma & Lee 2021, "Label noise SGD provably prefers flat global minimizers").

Conventions of this file. Loss L: the mean over the samples of a loss of the model's output f; for regression (f - y)^2/2. The
noise in a sample's gradient is its label's: variance `noise_variance` sigma^2 of the derivative by f, while `curvature`
alpha is the second derivative there (regression: the variance of the labels' noise, and 1; flips: `flips.flip_loss`; softmax:
their ratio is 1). Steps are those of torch's SGD: batch size B, learning rate lr, heavy-ball momentum beta without
dampening. H is the Hessian of L where the loss is zero (with flips: where the smoothed loss is least), l its eigenvalues.

    strength          lambda = lr*sigma^2/(alpha*B*(1-beta))
    regulariser       R      = -((1+beta)/(2 lr))*sum log(1 - lr*l/(2(1+beta)))      -> tr H/4 for small lr
    jitter            S      = lambda*(2 - lr*H/(1+beta))^(-1) on the range of H     = 2*lambda*dR/dH
    drift time        s      = sum over the steps of lr/(1-beta)*lambda

Around the weights that plain gradient descent on L + lambda*R would have, SGD with label noise jitters with covariance S.
Along the weights of zero loss it moves by R alone, and s is how long: the flow of R for the time s. All of it needs
lr*l < 2(1+beta); beyond, `UnstableError` carries the number.

The paper writes sigma^2 and alpha apart; here 1/alpha is part of lambda. With it, S of a flip loss comes out as above because
the gradient's noise has covariance sigma^2/(alpha*B)*H. Eigenvalues may be a number, a sequence, a numpy array or a tensor; of a
tensor dtype, device and gradient are kept, and all else is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decaycast.core.schedule import whole
from decaycast.core.timescale import LearningRate, learning_rates

Values = Any  # a number, a sequence, a numpy array or a tensor


class UnstableError(ValueError):
    """lr*l1 is not below 2(1+momentum): gradient descent itself leaves the minimum, and R is infinite.

    Attributes: `product` lr*l1, `limit` 2(1+momentum), and what they are made of: `lr`, `top_eigenvalue`, `momentum`.
    """

    def __init__(self, lr: float, top_eigenvalue: float, momentum: float) -> None:
        super().__init__(lr, top_eigenvalue, momentum)  # what pickle calls it with
        self.lr, self.top_eigenvalue, self.momentum = lr, top_eigenvalue, momentum
        self.product, self.limit = lr * top_eigenvalue, 2.0 * (1.0 + momentum)

    def __str__(self) -> str:
        return (
            f"lr times the largest eigenvalue is {self.product:.6g} ({self.lr:.6g} times {self.top_eigenvalue:.6g}), not below "
            f"2(1+momentum) = {self.limit:g}, so the regulariser is infinite; use lr < {self.limit / self.top_eigenvalue:.4g}"
        )


def strength(
    *, lr: Values, batch_size: Values, noise_variance: Values, curvature: Values = 1.0, momentum: Values = 0.0
) -> Values:
    """How strongly R is weighed against the loss: lambda = lr*sigma^2/(alpha*B*(1-beta)).

    Args:
        lr: learning rate > 0.
        batch_size: samples with a label of their own per optimiser step, over all ranks and micro-batches, > 0.
        noise_variance: sigma^2 >= 0 of the derivative by the output; it is not the flip probability.
        curvature: alpha > 0.
        momentum: beta in [0, 1).

    Returns:
        lambda, dimensionless; a float, or an array of the broadcast shape.

    Raises:
        ValueError: an argument outside its range.

    Source: Damian et al. 2021, sections 2 and 3 (alpha = 1 there); momentum and alpha derived.

    Example:
        >>> round(strength(lr=0.3, batch_size=32, noise_variance=1.0), 6)  # softmax: lr/B, whatever the flip probability
        0.009375
    """
    push = _number("lr", lr, "> 0") * _number("noise_variance", noise_variance, ">= 0")
    hold = _number("curvature", curvature, "> 0") * _number("batch_size", batch_size, "> 0")
    return _plain(push / (hold * (1.0 - _number("momentum", momentum, "in [0, 1)"))))


def drift_time(
    *,
    lr: LearningRate,
    steps: int,
    batch_size: float,
    noise_variance: float,
    curvature: float = 1.0,
    momentum: float = 0.0,
) -> float:
    """How long the weights follow R over a run: s = sum over the steps of lr/(1-beta)*lambda.

    s goes with the square of the learning rate: an lr divided by 10 drifts 100 times slower.

    Args:
        lr: learning rate; a number, one value per step, or a function of the 0-based step; >= 0.
        steps: optimiser steps, >= 1.
        batch_size: as in `strength`.
        noise_variance: as in `strength`.
        curvature: as in `strength`.
        momentum: as in `strength`.

    Returns:
        s, in units of one over the eigenvalues of H. About 3 or more is needed to see an effect (`advice`).

    Raises:
        ValueError: an argument outside its range, or `lr` of another length.

    Source: time scale of the flow of lambda*R, Damian et al. 2021; sum over a schedule derived.

    Example:
        >>> round(drift_time(lr=0.01, steps=100_000, batch_size=1, noise_variance=0.5), 6)
        5.0
    """
    squares = peak_and_squares(lr, steps)[1]
    unit = strength(
        lr=1.0, batch_size=batch_size, noise_variance=noise_variance, curvature=curvature, momentum=momentum
    )
    return float(squares * unit / (1.0 - _number("momentum", momentum, "in [0, 1)")))


def peak_and_squares(lr: LearningRate, steps: int) -> tuple[float, float]:
    """Largest learning rate of a run, and the sum of its squares over the steps.

    >>> peak_and_squares([0.5, 1.0], 2)
    (1.0, 1.25)
    """
    # a plain number may stand for more steps than an array could hold
    constant = not callable(lr) and np.ndim(lr) == 0
    count = whole("steps", steps, least=1)
    rates = learning_rates(lr, 1 if constant else count)
    return float(rates.max()), float(np.square(rates).sum()) * (count if constant else 1)


def regularizer(eigenvalues: Values, lr: Values, momentum: Values = 0.0) -> Values:
    """R = -((1+beta)/(2 lr))*sum over the eigenvalues of log(1 - lr*l/(2(1+beta))), a sum over the last axis.

    At least tr H/4 for l >= 0; grows like log(1/nu) of the top eigenvalue as lr*l1 = (2-nu)(1+beta) nears its limit.

    Args:
        eigenvalues: of H, shape (..., k); a single number is one eigenvalue. Zeros add nothing. Those below zero, which
            only a Hessian away from zero loss has, are taken as they are.
        lr: learning rate > 0; an array has the shape (...).
        momentum: beta in [0, 1); an array has the shape (...).

    Returns:
        R, shape (...): a tensor for tensors, with their gradient; else a float, or an array.

    Raises:
        UnstableError: lr*l reaches 2(1+beta).
        ValueError: an argument is not finite or outside its range.

    Source: Damian et al. 2021, equation of R; momentum: their appendix, derived again here.

    Example:
        >>> round(regularizer([1.0, 0.5, 0.0], lr=1.0), 6)  # -(log 0.5 + log 0.75)/2
        0.490415
    """
    spectrum, answer = _tensor("eigenvalues", eigenvalues)
    rate, beta = _beside("lr", lr, "> 0", spectrum), _beside("momentum", momentum, "in [0, 1)", spectrum)
    share = _share_of_limit(spectrum, rate, beta)
    return answer(((1.0 + beta) / (-2.0 * rate) * torch.log1p(-share)).sum(-1))


def small_lr_limit(eigenvalues: Values) -> Values:
    """R for lr to 0: tr H/4, whatever the momentum.

    Args:
        eigenvalues: of H, shape (..., k).

    Returns:
        Shape (...), as `regularizer`.

    Raises:
        ValueError: an eigenvalue is not finite.

    Source: Damian et al. 2021.

    Example:
        >>> small_lr_limit([1.0, 0.5, 0.0])
        0.375
    """
    spectrum, answer = _tensor("eigenvalues", eigenvalues)
    return answer(spectrum.sum(-1) / 4.0)


def stability_limit(momentum: Values = 0.0) -> Values:
    """What lr*l1 has to stay below: 2(1+beta).

    Args:
        momentum: beta in [0, 1).

    Returns:
        A float, or an array.

    Raises:
        ValueError: momentum outside its range.

    Source: heavy ball on a quadratic.

    Example:
        >>> stability_limit(0.9)
        3.8
    """
    return _plain(2.0 * (1.0 + _number("momentum", momentum, "in [0, 1)")))


def stationary_variance(eigenvalues: Values, *, lr: Values, strength: Values, momentum: Values = 0.0) -> Values:
    """Variance of the jitter along each eigenvector of H: lambda/(2 - lr*l/(1+beta)), and 0 where l is 0.

    Along directions of eigenvalue 0 there is no noise either, so nothing jitters there (it drifts, `regularizer`).

    Args:
        eigenvalues: of H, shape (..., k), >= 0; those of the size of rounding count as 0.
        lr: learning rate > 0; an array has the shape (...).
        strength: lambda >= 0, from `strength`; an array has the shape (...).
        momentum: beta in [0, 1); an array has the shape (...).

    Returns:
        Shape (..., k), as `regularizer`; a float for a single number.

    Raises:
        UnstableError: lr*l reaches 2(1+beta).
        ValueError: an eigenvalue is below 0, or an argument is outside its range.

    Source: the fixed point of S = (1 - lr*H) S (1 - lr*H) + lr*lambda*H, Damian et al. 2021; momentum derived.

    Example:
        >>> stationary_variance([1.0, 0.0], lr=1.0, strength=0.02).tolist()
        [0.02, 0.0]
    """
    spectrum, answer = _tensor("eigenvalues", eigenvalues)
    found = _jitter(spectrum, lr, strength, momentum)
    return answer(found.reshape(()) if np.ndim(eigenvalues) == 0 and found.numel() == 1 else found)


def stationary_covariance(hessian: Values, *, lr: float, strength: float, momentum: float = 0.0) -> Values:
    """Covariance of the jitter, S = lambda*(2 - lr*H/(1+beta))^(-1) on the range of H and 0 beside it.

    Args:
        hessian: H, symmetric, positive semi-definite, shape (p, p).
        lr: learning rate > 0.
        strength: lambda >= 0, from `strength`.
        momentum: beta in [0, 1).

    Returns:
        S, shape (p, p): a tensor for a tensor, else an array. Of a momentum run it is the covariance of the weights alone.

    Raises:
        UnstableError: lr*l1 reaches 2(1+beta).
        ValueError: not a symmetric matrix, an eigenvalue below 0, or an argument outside its range.

    Source: as `stationary_variance`.

    Example:
        >>> stationary_covariance([[0.5, 0.5], [0.5, 0.5]], lr=1.0, strength=0.02).round(6).tolist()
        [[0.01, 0.01], [0.01, 0.01]]
    """
    matrix, answer = _tensor("hessian", hessian)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"hessian has to have shape (p, p), got {tuple(matrix.shape)}")
    size = matrix.detach().abs().max() if matrix.numel() else 0.0
    if not bool(((matrix - matrix.T).abs() <= torch.finfo(matrix.dtype).eps ** 0.5 * size).all()):
        raise ValueError("hessian has to be symmetric; average it with its transpose if only rounding tells them apart")
    spectrum, vectors = torch.linalg.eigh(matrix)
    return answer((vectors * _jitter(spectrum, lr, strength, momentum)) @ vectors.T)


# numbers and tensors


def _jitter(spectrum: Tensor, lr: Values, strength: Values, momentum: Values) -> Tensor:
    rate, beta = _beside("lr", lr, "> 0", spectrum), _beside("momentum", momentum, "in [0, 1)", spectrum)
    weight = _beside("strength", strength, ">= 0", spectrum)
    share = _share_of_limit(spectrum, rate, beta)
    rounding = torch.zeros_like(spectrum[..., :1])
    if spectrum.numel():
        width = torch.finfo(spectrum.dtype).eps * spectrum.shape[-1]
        rounding = width * spectrum.detach().abs().amax(-1, keepdim=True)
    if bool((spectrum < -rounding).any()):
        raise ValueError(
            f"nothing is stationary along an eigenvalue below 0, got {float(spectrum.min()):.4g}; H has to be taken at zero loss "
            "(or at the minimum of the smoothed loss), where it is positive semi-definite"
        )
    return torch.where(spectrum > rounding, weight / (2.0 * (1.0 - share)), 0.0)


def _share_of_limit(spectrum: Tensor, rate: Tensor, beta: Tensor) -> Tensor:
    """lr*l/(2(1+beta)) per eigenvalue, refused from 1 on."""
    share = rate * spectrum / (2.0 * (1.0 + beta))
    if not bool((share < 1.0).all()):
        worst = int(share.detach().argmax())
        numbers = (each.detach().expand_as(share).reshape(-1)[worst].item() for each in (rate, spectrum, beta))
        raise UnstableError(*numbers)
    return share


def _tensor(name: str, values: Values) -> tuple[Tensor, Callable[[Tensor], Values]]:
    """`values` as a tensor of one axis at least, finite, and what turns the answer into the kind that was given."""
    if isinstance(values, Tensor):
        found = values if values.is_floating_point() else values.to(torch.get_default_dtype())
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{name} has to be finite, but holds NaN or infinity")
        answer: Callable[[Tensor], Values] = _unchanged
    else:
        found, answer = torch.tensor(_number(name, values, "")), _to_numpy
    return (found.reshape(1) if found.ndim == 0 else found), answer


def _unchanged(found: Tensor) -> Tensor:
    return found


def _to_numpy(found: Tensor) -> Values:
    return _plain(found.numpy())


def _beside(name: str, value: Values, rule: str, spectrum: Tensor) -> Tensor:
    """A number, or one per set of eigenvalues, so that it broadcasts against them."""
    return torch.tensor(_number(name, value, rule), dtype=spectrum.dtype, device=spectrum.device).unsqueeze(-1)


_RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": np.isfinite,
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "in [0, 1)": lambda x: (x >= 0) & (x < 1),
}


def _number(name: str, value: Values, rule: str) -> np.ndarray:
    """`value` as float64, finite and within `rule` throughout, else a ValueError naming it."""
    try:
        numbers = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):  # a ragged list
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"{name} has to be a number or an array of numbers, got {value!r}")
    wrong = numbers[~(np.isfinite(numbers) & _RULES[rule](numbers))]
    if wrong.size:
        raise ValueError(f"{name} has to be {' and '.join(filter(None, ('finite', rule)))}, got {wrong.flat[0]:g}")
    return numbers.astype(float)


def _plain(value: Any) -> Values:
    return float(value) if np.ndim(value) == 0 else value
