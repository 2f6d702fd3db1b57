"""What a wide network needs to know of its activation: expectations of phi(u)*phi(v) over Gaussian preactivations.

Conventions of this file. u, v are jointly Gaussian with variances q, q' and covariance K. With a cosine c = nu*nu'*K,

    ReLU  nu = 1/sqrt(q):           E[phi phi'] = alpha*alpha'*e(c),  alpha = sqrt(q/2),   e = (sqrt(1-c^2) + c*(pi - acos c))/pi
    erf   nu = sqrt(2/(1+2q)):      E[phi phi'] = alpha*alpha'*e(c),  alpha = sqrt(2/pi),  e = asin c

and E[phidot phidot'] is the derivative of E[phi phi'] by K, alpha*alpha'*nu*nu'*e'(c).

Source: Cho & Saul 2009 (arc-cosine kernels of order 1 and 0), Williams 1997 (erf).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Dual:
    """An activation through the expectations it needs; q is the variance of a preactivation."""

    normaliser: Callable[[Tensor], Tensor]  # nu: c = nu*nu'*K
    amplitude: Callable[[Tensor], Tensor]  # alpha: E[phi phi'] = alpha*alpha'*e(c)
    moments: Callable[[Tensor], tuple[Tensor, Tensor]]  # E[phi^2] and E[phidot^2]
    # (minus_c, scratch, slope, tolerance), in place: minus_c from -c to -e(c), slope to e'(c)/unit
    step: Callable[[Tensor, Tensor, Tensor, float], None]
    unit: float


def _relu_step(minus_c: Tensor, scratch: Tensor, slope: Tensor, tolerance: float) -> None:
    """-c -> -e(c) and slope <- pi*e'(c) = pi - acos(c), in place; exact at c = 1."""
    torch.threshold_(minus_c, tolerance - 1.0, -1.0)
    torch.acos(minus_c, out=slope)
    torch.add(minus_c, 1.0, out=scratch)
    scratch.addcmul_(scratch, minus_c, value=-1.0).sqrt_()
    torch.addcmul(scratch, minus_c, slope, value=-1.0, out=minus_c)
    minus_c.div_(-math.pi)


def _erf_step(minus_c: Tensor, scratch: Tensor, slope: Tensor, tolerance: float) -> None:
    """-c -> -asin(c) and slope <- 1/sqrt(1 - c^2), in place; |c| < 1 by definition, so rounding up to 1 is undone."""
    del tolerance
    largest = 1.0 - torch.finfo(minus_c.dtype).eps
    minus_c.clamp_(-largest, largest)
    torch.add(minus_c, 1.0, out=scratch)
    scratch.addcmul_(scratch, minus_c, value=-1.0)
    torch.rsqrt(scratch, out=slope)
    minus_c.asin_()


DUALS = {
    "relu": Dual(
        # a variance of 0 is an input of zeros without bias: any number will do, `_fill_zero_inputs` has the last word
        normaliser=lambda q: torch.where(q > 0, q, 1.0).rsqrt(),
        amplitude=lambda q: (q / 2.0).sqrt(),
        moments=lambda q: (q / 2.0, torch.full_like(q, 0.5)),
        step=_relu_step,
        unit=1.0 / math.pi,
    ),
    "erf": Dual(
        normaliser=lambda q: math.sqrt(2.0) * (1.0 + 2.0 * q).rsqrt(),
        amplitude=lambda q: torch.full_like(q, math.sqrt(2.0 / math.pi)),
        moments=lambda q: (
            2.0 / math.pi * torch.asin(2.0 * q / (1.0 + 2.0 * q)),
            4.0 / math.pi * (1.0 + 4.0 * q).rsqrt(),
        ),
        step=_erf_step,
        unit=1.0,
    ),
}
