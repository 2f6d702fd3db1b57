"""Before a run with label noise: will it be long enough to see an effect, and is the learning rate within bounds?

Conventions are those of `theory`. The drift along the weights of zero loss goes with s = sum of lr/(1-beta)*lambda, and
lambda with lr, so s goes with lr^2/(B(1-beta)^2): four times the steps are worth twice the learning rate or a quarter of the
batch. Measured: the quadratic model of HaoChen et al. recovers its sparse weights from s = 3 on (test error 0.005 at 3, 0.6 at
1.5, 4 at 0.75). Networks can take longer: an MLP on digits, from an adversarial start of 53 % test accuracy, had 82 %
after s = 6 and 92 % after s = 17. Minibatches add noise of their own, that of sampling: a linear model at batch size 1 diverged
at a quarter of the stability limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from decaycast.core.names import choose
from decaycast.core.schedule import check_multiplier
from decaycast.core.timescale import LearningRate
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.flips import LOSSES, flip_loss

ENOUGH = 3.0  # drift time
_SHORT = ENOUGH * (
    1.0 - 1e-9
)  # below this it is too little: rounding must not make too few of the steps that are advised
NEAR = 0.9  # share of the stability limit from which on the top eigenvector jitters ten times as much as at small lr


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What a planned run with label noise will reach; printed, it reads as words."""

    strength: float
    """lambda at the largest learning rate of the run."""
    drift_time: float
    """s over the run."""
    steps_needed: float
    """Steps for s = 3 with the same schedule stretched; infinite without noise."""
    share_of_limit: float
    """Largest lr*l1/(2(1+momentum)), below 1 if stable; NaN where the eigenvalue is not known."""
    verdict: str
    """"unstable", "near the limit", "too little" or "enough"; the first that applies."""
    words: str
    """What to expect and what to change."""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.words}"


def advice(
    *,
    lr: LearningRate,
    steps: int,
    batch_size: float,
    flip: float | None = None,
    sigma: float | None = None,
    loss: str = "softmax",
    momentum: float = 0.0,
    top_eigenvalue: float | None = None,
) -> Advice:
    """Strength, drift time and stability of a planned run, and what to change.

    Args:
        lr: learning rate of torch's SGD; a number, one value per step, or a function of the 0-based step.
        steps: optimiser steps, >= 1.
        batch_size: samples per optimiser step, over all ranks and micro-batches, > 0.
        flip: probability of another class or sign, for classification; as in `LabelNoise`.
        sigma: standard deviation of the noise on the targets, for regression with the loss (f - y)^2/2.
        loss: with `flip`, one of `flips.LOSSES`. Under softmax only flip = 0 or not makes a difference to the drift time.
        momentum: beta in [0, 1).
        top_eigenvalue: l1 of the Hessian at the start (`core.lanczos.top_eigenvalue`, or any estimate), if known; >= 0.

    Returns:
        `Advice`.

    Raises:
        ValueError: both or neither of flip and sigma, or an argument outside its range.

    Source: the rule s >= 3 and the numbers at the head of this file are measurements; stability from Damian et al. 2021.

    Example:
        >>> plan = advice(lr=0.01, steps=25_000, batch_size=1, sigma=0.5**0.5, top_eigenvalue=13.0)
        >>> plan.verdict, round(plan.drift_time, 3), plan.steps_needed, round(plan.share_of_limit, 3)
        ('too little', 1.25, 60000.0, 0.065)
    """
    peak, _ = theory.peak_and_squares(lr, steps)
    noise = {"noise_variance": _noise_ratio(flip, sigma, loss), "batch_size": batch_size, "momentum": momentum}
    weight = theory.strength(lr=1.0, **noise) * peak
    drift = theory.drift_time(lr=lr, steps=steps, **noise)
    share = math.nan
    if top_eigenvalue is not None:
        share = peak * check_multiplier("top_eigenvalue", top_eigenvalue) / theory.stability_limit(momentum)
    verdict = _verdict(drift, share)
    needed = float(math.ceil(int(steps) * ENOUGH / drift * (1.0 - 1e-12))) if drift else math.inf
    return Advice(
        strength=weight,
        drift_time=drift,
        steps_needed=needed,
        share_of_limit=share,
        verdict=verdict,
        words=" ".join(_words(verdict, drift, share, peak, needed)),
    )


def _noise_ratio(flip: float | None, sigma: float | None, loss: str) -> float:
    """sigma^2/alpha of the noise that is planned."""
    if (flip is None) == (sigma is None):
        raise ValueError("give flip= for classification or sigma= for regression, one of the two")
    if sigma is not None:
        return check_multiplier("sigma", sigma) ** 2
    choose(loss, LOSSES, "loss")
    if loss != "softmax":
        return float(flip_loss(loss, flip).noise_ratio)
    if check_multiplier("flip", flip) >= 1.0:
        raise ValueError(f"flip is a probability and has to be in [0, (C-1)/C), got {flip!r}")
    return 1.0 if flip else 0.0


def _verdict(drift: float, share: float) -> str:
    if share >= 1.0:
        return "unstable"
    if share >= NEAR:
        return "near the limit"
    return "too little" if drift < _SHORT else "enough"


def _words(verdict: str, drift: float, share: float, rate: float, needed: float) -> list[str]:
    """Sentences: stability first, then drift."""
    words = []
    if verdict == "unstable":
        return [
            f"lr times the largest eigenvalue is {share:.3g} times its limit 2(1+momentum), so gradient descent itself leaves "
            f"the minimum; use lr < {rate / share:.3g}, better {NEAR * rate / share:.3g} at most."
        ]
    if verdict == "near the limit":
        words.append(
            f"lr times the largest eigenvalue is {share:.0%} of its limit 2(1+momentum): the weights jitter "
            f"{1 / (1 - share):.0f} times as strongly along the top eigenvector as at small lr, and noise of small batches can "
            f"carry them over; use lr < {NEAR * rate / share:.3g} unless that is meant."
        )
    return [*words, _drift_words(drift, share, rate, needed)]


def _drift_words(drift: float, share: float, rate: float, needed: float) -> str:
    if not drift:
        return "There is no noise, so nothing drifts; give a learning rate and noise above 0."
    if drift >= _SHORT:
        return f"The drift time is {drift:.3g}, of which an effect needs about {ENOUGH:g} or more."
    factor = ENOUGH / drift
    raised = math.sqrt(factor)
    ways = [f"{needed:.0f} steps"]
    if math.isnan(share):
        ways.append(f"lr {rate * raised:.3g} if that is stable")
    elif share * raised < NEAR:
        ways.append(f"lr {rate * raised:.3g}")
    ways.append(f"a batch {factor:.3g} times smaller")
    return (
        f"The drift time is {drift:.3g}, and an effect needs about {ENOUGH:g}: the noise will hardly move the weights. Enough "
        f"would be {', or '.join(ways)}."
    )
