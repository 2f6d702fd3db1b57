"""Flipped labels, for classes and for two signs: the loss they have on average, where it is least, and the noise there.

Conventions. `flip` is the probability p of *another* class, each of the C-1 others equally likely; torch's ``label_smoothing``
e mixes with the uniform distribution over all C, so p = e(C-1)/C. C = `num_classes`, p in [0, (C-1)/C). Two-class losses are
functions l(z) of the margin z = y*f with labels y in {-1, 1}; a flip turns the sign of z, and p in [0, 1/2).

The smoothed loss (1-p)*l(z) + p*l(-z) is what SGD with flips sees on average. It is least at z = c, where

    sigma^2 = p(1-p)(l'(c) + l'(-c))^2     variance of the derivative by f over the flips
    alpha   = (1-p)*l''(c) + p*l''(-c)     curvature

==============  ==============  ====================  ===========  ==================  ================
loss            l(z)            c                     sigma^2      alpha               least value
==============  ==============  ====================  ===========  ==================  ================
"logistic"      log(1+e^-z)     log((1-p)/p)          p(1-p)       p(1-p)              entropy of p
"exponential"   e^-z            (1/2) log((1-p)/p)    1            2 sqrt(p(1-p))      2 sqrt(p(1-p))
"square"        (1/2)(z-1)^2    1-2p                  4p(1-p)      1                   2p(1-p)
==============  ==============  ====================  ===========  ==================  ================

"softmax", the cross-entropy of C classes: the logits' gradient has covariance diag(q) - q q^T over the flips, which is also
the curvature, so that sigma^2/alpha = 1 in every direction.

Source: Damian, Ma & Lee 2021, section on classification (the smoothed loss, c and alpha); sigma^2 and softmax derived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from decaycast.core.names import choose
from decaycast.core.schedule import one_number, whole

Values = Any  # a number or an array of numbers

MARGIN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: functional.softplus(-z),
    "exponential": lambda z: torch.exp(-z),
    "square": lambda z: (z - 1.0).square() / 2.0,
}
LOSSES = ("softmax", *MARGIN_LOSSES)


@dataclass(frozen=True, kw_only=True)
class FlipLoss:
    """A two-class loss under flips (head of this file); floats, or arrays of the shape of the flip probabilities."""

    minimiser: Values
    """c, the margin at which the smoothed loss is least."""
    noise_variance: Values
    """sigma^2."""
    curvature: Values
    """alpha."""
    least: Values
    """The smoothed loss at c."""

    @property
    def noise_ratio(self) -> Values:
        """sigma^2/alpha: what lr/(B(1-momentum)) is multiplied with to give the strength."""
        return self.noise_variance / self.curvature


def flip_loss(loss: str, flip: Values) -> FlipLoss:
    """Minimiser, noise and curvature of a two-class loss whose labels are flipped with probability `flip`.

    Args:
        loss: "logistic", "exponential" or "square".
        flip: p in (0, 1/2), a number or an array; "square" also takes 0. The others have no finite minimum without flips.

    Returns:
        The row of the table at the head of this file.

    Raises:
        ValueError: an unknown loss, or p outside its range.

    Source: Damian et al. 2021; head of this file.

    Example:
        >>> flip_loss("square", 0.2)
        FlipLoss(minimiser=0.6, noise_variance=0.6400000000000001, curvature=1.0, least=0.32000000000000006)
    """
    choose(loss, MARGIN_LOSSES, "loss")
    p = np.asarray(flip)
    p = p.astype(float) if p.dtype.kind in "iuf" else np.full((), np.nan)
    bottom = "[0" if loss == "square" else "(0"
    if not ((p < 0.5) & ((p >= 0) if loss == "square" else (p > 0))).all():
        raise ValueError(f"flip has to be in {bottom}, 1/2) for the {loss} loss, got {flip!r}")
    both = p * (1.0 - p)
    if loss == "square":
        found = (1.0 - 2.0 * p, 4.0 * both, np.ones_like(p), 2.0 * both)
    else:
        odds = np.log1p(-p) - np.log(p)
        if loss == "logistic":
            found = (odds, both, both, -p * np.log(p) - (1.0 - p) * np.log1p(-p))
        else:
            found = (odds / 2.0, np.ones_like(p), 2.0 * np.sqrt(both), 2.0 * np.sqrt(both))
    minimiser, variance, curvature, least = (float(each) if each.ndim == 0 else each for each in found)
    return FlipLoss(minimiser=minimiser, noise_variance=variance, curvature=curvature, least=least)


def flip_from_smoothing(label_smoothing: float, num_classes: int) -> float:
    """Flip probability with the same average loss as torch's ``label_smoothing``: p = e(C-1)/C.

    A label replaced, with probability e, by a class drawn from all C (its own included) is flipped with this p, too.

    Args:
        label_smoothing: e in [0, 1).
        num_classes: C >= 2.

    Returns:
        p in [0, (C-1)/C).

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> round(flip_from_smoothing(0.1, 10), 6)
        0.09
    """
    classes, share = whole("num_classes", num_classes, least=2), one_number(label_smoothing)
    if not 0 <= share < 1:
        raise ValueError(f"label_smoothing has to be in [0, 1), got {label_smoothing!r}")
    return share * (classes - 1) / classes


def smoothing_from_flip(flip: float, num_classes: int) -> float:
    """Torch's ``label_smoothing`` with the same average loss as flips: e = pC/(C-1).

    Args:
        flip: p in [0, (C-1)/C).
        num_classes: C >= 2.

    Returns:
        e in [0, 1).

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> round(smoothing_from_flip(0.2, 10), 4)
        0.2222
    """
    return checked_flip(flip, num_classes) * num_classes / (num_classes - 1)


def flip_entropy(flip: float, num_classes: int) -> float:
    """Entropy of a flipped label, -(1-p) log(1-p) - p log(p/(C-1)): the least value of the smoothed cross-entropy.

    Args:
        flip: p in [0, (C-1)/C).
        num_classes: C >= 2.

    Returns:
        Nats, >= 0.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> round(flip_entropy(0.2, 10), 4)
        0.9398
    """
    p = checked_flip(flip, num_classes)
    shares = torch.tensor([1.0 - p, p / (num_classes - 1)], dtype=torch.float64)
    return float(torch.special.entr(shares) @ torch.tensor([1.0, num_classes - 1.0], dtype=torch.float64))


def smoothed_loss(
    output: Tensor, target: Tensor, flip: float, *, loss: str = "softmax", ignore_index: int = -100
) -> Tensor:
    """The loss that flipped labels have on average, less its least value: what SGD with label noise descends, without noise.

    The mean over all flips of the sampled loss is this plus a constant, so the gradients agree in expectation. As
    ``functools.partial(smoothed_loss, flip=0.2)`` it is the control experiment: the same loss, no drift.

    Args:
        output: "softmax": logits (n, C, ...); else f, of the shape of the targets.
        target: "softmax": classes (n, ...), integers, or class probabilities (n, C, ...); else -1 and 1.
        flip: p in [0, (C-1)/C); for "exponential" and "logistic" in (0, 1/2), for "square" in [0, 1/2).
        loss: one of `LOSSES`.
        ignore_index: "softmax": a class of this number does not count.

    Returns:
        The mean over the labels, a scalar >= 0; 0 where every sample has its least smoothed loss.

    Raises:
        ValueError: an unknown loss, an empty batch, p outside its range, outputs and targets that do not fit, labels other
            than -1 and 1.

    Source: Damian et al. 2021, section on classification.

    Example:
        >>> logits = torch.log(torch.tensor([[0.8, 0.1, 0.1]]))
        >>> bool(smoothed_loss(logits, torch.tensor([0]), flip=0.2).abs() < 1e-6)
        True
    """
    choose(loss, LOSSES, "loss")
    if not output.numel() or not target.numel():
        raise ValueError(
            f"no labels to take the mean of: outputs have shape {tuple(output.shape)}; is the batch empty?"
        )
    if loss != "softmax":
        return _smoothed_margin_loss(output, target, flip, loss)
    if output.ndim < 2:
        raise ValueError(
            f"logits have shape (n, classes, ...), got {tuple(output.shape)}; for one output per sample, loss="
        )
    classes = output.shape[1]
    share = smoothing_from_flip(flip, classes)
    found = functional.cross_entropy(output, target, ignore_index=ignore_index, label_smoothing=share)
    if not target.is_floating_point():
        return found - flip_entropy(flip, classes)
    return found - torch.special.entr(target * (1.0 - share) + share / classes).sum(1).mean()


def checked_flip(flip: float, num_classes: int) -> float:
    """`flip` as a float in [0, (C-1)/C) for C = `num_classes` >= 2 classes, else a ValueError."""
    top = 1.0 - 1.0 / whole("num_classes", num_classes, least=2)
    number = one_number(flip)
    if not 0 <= number < top:
        raise ValueError(
            f"flip is the probability of another class and has to be in [0, {top:.6g}) for {num_classes} classes, got {flip!r}; "
            "at its end labels say nothing any more"
        )
    return number


def _smoothed_margin_loss(output: Tensor, target: Tensor, flip: float, loss: str) -> Tensor:
    if output.shape != target.shape:
        raise ValueError(f"outputs have shape {tuple(output.shape)}, but labels {tuple(target.shape)}; make them agree")
    if not bool((target.abs() == 1).all()):
        raise ValueError(f"labels of the {loss} loss are -1 and 1, got others; from 0 and 1: 2*labels - 1")
    p, least = one_number(flip), flip_loss(loss, flip).least
    margin, of_margin = output * target, MARGIN_LOSSES[loss]
    return ((1.0 - p) * of_margin(margin) + p * of_margin(-margin)).mean() - least
