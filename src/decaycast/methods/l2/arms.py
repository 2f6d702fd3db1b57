"""The arms of a forecast: what to train, for how long, and what was measured. The decision is in `forecast`.

Conventions: a weight decay is handled by its natural logarithm; metric values have the sign that makes larger better; time
is counted in optimiser steps, and the *clock* S(t) is the summed learning rate (summed steps where the rate is not known).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from decaycast.core.schedule import whole
from decaycast.core.timescale import LearningRate, learning_rates

Probe = Callable[[float, int], tuple[Sequence[float], Sequence[float]]]

PRIOR_EFOLDS = 1.3  # the paper's WRN setting: 32 steps at 0.04 per step
PRIOR_SD = math.log(2.0)
DRIFT_KNOWN_RATE = (0.5, 0.6)  # mean and standard deviation of p: midway between the two theories, and unsure
DRIFT_UNKNOWN_RATE = (0.75, 0.25)
FIRST_SHARE = (
    4.5  # each first arm gets this part of the money: three arms, one more where the best is outermost, a rest
)
SPACING = 4.0  # ratio between neighbouring arms when they can be chosen freely
FREE_RANGE = (1e-6, 1.0)  # weight decays considered when neither lr nor candidates are given


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One probed weight decay and what was measured of it."""

    weight_decay: float
    steps: tuple[float, ...]
    values: tuple[float, ...]
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fixed before anything is trained. Decays are handled by their natural logarithm."""

    budget_steps: int
    clock: np.ndarray  # summed learning rate after each step, shape (budget_steps,)
    known_rate: bool
    candidates: np.ndarray | None
    max_cost: float

    @classmethod
    def checked(
        cls, budget_steps: int, lr: LearningRate | None, candidates: Sequence[float] | None, max_cost: float
    ) -> Plan:
        """A plan from `forecast`'s arguments; raises ValueError for those out of range."""
        budget_steps = whole("budget_steps", budget_steps, least=10)
        if not 0 < max_cost <= 1:
            raise ValueError(f"max_cost must be in (0, 1] full-run equivalents, got {max_cost}")
        rates = learning_rates(1.0 if lr is None else lr, budget_steps)
        if rates.sum() == 0:
            raise ValueError("the learning rate is zero at every step: nothing would train")
        options = None
        if candidates is not None:
            options = np.unique(np.asarray(candidates, dtype=float))
            if len(options) < 2 or not np.isfinite(options).all() or options[0] <= 0:
                raise ValueError(f"candidates must be at least two different positive weight decays, got {candidates}")
        return cls(
            budget_steps=budget_steps,
            clock=rates.cumsum(),
            known_rate=lr is not None,
            candidates=options,
            max_cost=max_cost,
        )

    @property
    def rate_per_decay(self) -> float:
        """Summed learning rate of the full run: e-folds per unit of weight decay."""
        return float(self.clock[-1])

    def remaining(self, step: float) -> float:
        """ln(S(T)/S(t)): how far the clock still has to run after `step`, in natural logarithms."""
        index = min(max(int(step), 1), self.budget_steps) - 1
        begun = self.clock[self.clock > 0][0]  # a warm-up from zero: the clock stands still in the first steps
        return float(np.log(self.clock[-1] / max(self.clock[index], begun)))

    @property
    def prior(self) -> tuple[float, float]:
        """Mean and standard deviation of ln(best weight decay) before any training."""
        if self.known_rate:
            return math.log(PRIOR_EFOLDS / self.rate_per_decay), PRIOR_SD
        low, high = np.log(self.bounds)
        return (low + high) / 2, (high - low) / math.sqrt(12)  # as wide as the range is: no opinion within it

    @property
    def drift(self) -> tuple[float, float]:
        """Mean and standard deviation of the exponent p with which the best weight decay drifts as the clock runs."""
        return DRIFT_KNOWN_RATE if self.known_rate else DRIFT_UNKNOWN_RATE

    def expected_best(self, step: float) -> float:
        """Logarithm of the weight decay expected to be best at `step`, before any training."""
        return self.prior[0] + self.drift[0] * self.remaining(step)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest weight decay that may be answered."""
        if self.candidates is not None:
            return float(self.candidates[0]), float(self.candidates[-1])
        if self.known_rate:
            return 1e-4 / self.rate_per_decay, 1e3 / self.rate_per_decay
        return FREE_RANGE

    def ladder(self, horizon: float) -> np.ndarray:
        """Logarithms of the decays an arm may have, the geometric ones around what should be best at `horizon`."""
        if self.candidates is not None:
            return np.log(self.candidates)
        low, high = np.log(self.bounds)
        rungs = self.expected_best(horizon) + math.log(SPACING) * np.arange(-12, 13)
        return rungs[(rungs >= low - 1e-9) & (rungs <= high + 1e-9)]

    def decay_of(self, log_decay: float) -> float:
        """The weight decay of an arm; a candidate comes back as the very number given, so that it can be looked up."""
        return float(f"{math.exp(log_decay):.12g}") if self.candidates is None else self.snap(log_decay)

    def snap(self, log_decay: float) -> float:
        """The answerable weight decay nearest in logarithm."""
        low, high = self.bounds
        if self.candidates is None:
            return float(np.clip(math.exp(log_decay), low, high))
        return float(self.candidates[np.argmin(np.abs(np.log(self.candidates) - log_decay))])

    def answer(self, low: float, middle: float, high: float) -> float:
        """The weight decay to recommend for a posterior with these log-quantiles.

        The candidate nearest to the median, among those within the interval; where none is, the next one below, because
        decaying too much costs more than decaying too little.
        """
        if self.candidates is None:
            return self.snap(middle)
        logs = np.log(self.candidates)
        inside = self.candidates[(logs >= low - 1e-9) & (logs <= high + 1e-9)]
        if len(inside):
            return float(inside[np.argmin(np.abs(np.log(inside) - middle))])
        below = self.candidates[logs < low]
        return float(below[-1]) if len(below) else float(self.candidates[0])


class Arms:
    """The arms trained so far, larger always better; pays for every step asked for."""

    def __init__(self, probe: Probe, plan: Plan, sign: float) -> None:
        self.probe, self.plan, self.sign = probe, plan, sign
        self.curves: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self.failed: dict[float, str] = {}
        self.paid: dict[float, int] = {}

    @property
    def cost(self) -> float:
        """Full-run equivalents of everything that was run."""
        return sum(self.paid.values()) / self.plan.budget_steps

    def affordable(self, arms: int, steps: int) -> bool:
        """Whether `arms` fresh prefixes of `steps` still fit into the budget."""
        return (sum(self.paid.values()) + arms * steps) <= self.plan.max_cost * self.plan.budget_steps * (1 + 1e-9)

    def extend(self, log_decay: float, steps: int) -> None:
        """Train the arm up to `steps` in all (a failed arm stays as it is)."""
        if log_decay in self.failed or self.paid.get(log_decay, 0) >= steps:
            return
        try:
            raw_steps, raw_values = self.probe(self.plan.decay_of(log_decay), steps)
        except (FloatingPointError, OverflowError) as error:  # this arm diverged; the others may not
            self.failed[log_decay] = str(error) or "diverged"
            self.paid[log_decay] = steps
            self.curves.setdefault(log_decay, (np.empty(0), np.empty(0)))
            return
        self.paid[log_decay] = steps
        at, values = _plain(raw_steps), _plain(raw_values)
        if at.shape != values.shape or at.ndim != 1:
            raise ValueError(
                f"the probe must return two equally long arrays (steps, metric), got shapes {at.shape} and {values.shape}"
            )
        # a probe may hand out more than was asked for: what was not paid for is not looked at
        keep = at <= steps
        before = self.curves.get(log_decay)
        if before is not None and len(before[0]) and keep.any() and at[keep].min() > before[0].max():
            # it continued the arm and returned only what is new
            at, values = np.concatenate([before[0], at]), np.concatenate([self.sign * before[1], values])
            keep = at <= steps
        order = np.argsort(at[keep], kind="stable")
        at, values = at[keep][order], values[keep][order]
        if not np.isfinite(values).all():
            self.failed[log_decay] = f"the metric is not finite at step {at[~np.isfinite(values)][0]:g}"
        self.curves[log_decay] = (at, self.sign * values)

    def usable(self) -> list[float]:
        """Logarithms of the decays whose arms did not fail, ascending."""
        return sorted(x for x in self.curves if x not in self.failed and len(self.curves[x][0]))

    def level(self, log_decay: float, until: float) -> float:
        """Mean value of an arm over the last third of the prefix ending at `until`.

        Arms measured at different steps are compared over the same stretch of time, so the mean is that of the curve's
        straight-line interpolation.
        """
        return float(np.interp(np.linspace(until * 2 / 3, until, 13), *self.curves[log_decay]).mean())

    def noise(self, decays: Sequence[float], until: float) -> float:
        """Standard error of `level`, one for all arms; NaN with fewer than three measurements.

        Arms trained alike share their trend, and mostly its curvature, so the noise is read off each arm's distance from
        the arms' mean: second differences of it, which a smooth difference leaves near zero. It is not divided by the number
        of measurements averaged: those of one trajectory err together.
        """
        at = max((self.curves[x][0] for x in decays), key=len)
        at = at[at <= until]
        at = at[
            -max(3, int((at > until / 3).sum())) :
        ]  # the first evaluations of a training are noisy in their own way
        if len(at) < 3:
            return math.nan
        values = np.stack([np.interp(at, *self.curves[x]) for x in decays])
        values -= values.mean(0)
        wiggle = values[:, 1:-1] - (values[:, :-2] + values[:, 2:]) / 2
        # Var(e_i - (e_-1 + e_+1)/2) = 1.5 sigma^2, and leaving the mean of K arms keeps 1 - 1/K of it
        variance = float(np.mean(wiggle**2)) / 1.5 / (1 - 1 / len(decays))
        return math.sqrt(variance)

    def lead(self, log_decay: float, other: float, until: float) -> tuple[float, float]:
        """By how much one arm leads another: over the last third of the prefix, and over its first quarter.

        What decay does grows with the e-folds spent. A lead that was there in the first quarter already has another reason:
        trajectories of equal arms drift apart too, and stay apart for longer than evaluations take.
        """
        curves = self.curves[log_decay], self.curves[other]
        late, early = np.linspace(until * 2 / 3, until, 13), np.linspace(0, until / 4, 13)
        gaps = [np.interp(times, *curves[0]) - np.interp(times, *curves[1]) for times in (late, early)]
        return float(gaps[0].mean()), float(gaps[1].mean())

    def records(self) -> tuple[Arm, ...]:
        """The arms as they are reported, ascending in weight decay."""
        return tuple(
            Arm(
                weight_decay=self.plan.decay_of(x),
                steps=tuple(self.curves[x][0].tolist()),
                values=tuple((self.sign * self.curves[x][1]).tolist()),
                status="failed" if x in self.failed else "ok",
                reason=self.failed.get(x, ""),
            )
            for x in sorted(self.curves)
        )


def _plain(values: Any) -> np.ndarray:
    """A float array of numbers, a list of scalar tensors, or a tensor that may still require a gradient."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    if isinstance(values, (list, tuple)) and any(hasattr(value, "detach") for value in values):
        values = [float(value) for value in values]
    return np.asarray(values, dtype=float)


def probe_arms(arms: Arms, plan: Plan) -> None:
    """Three short arms; walk outwards while the best is outermost; spend the rest on the best three."""
    spend = plan.max_cost * plan.budget_steps
    horizon = max(1, int(spend / FIRST_SHARE))
    ladder = plan.ladder(horizon)
    middle = int(np.clip(np.argmin(np.abs(ladder - plan.expected_best(horizon))), 1, max(1, len(ladder) - 2)))
    chosen = set(range(max(0, middle - 1), min(len(ladder), middle + 2)))
    for index in sorted(chosen):
        if arms.affordable(1, horizon):
            arms.extend(float(ladder[index]), horizon)
    while (step := _outward(arms, ladder, chosen, horizon)) is not None and arms.affordable(1, horizon):
        chosen.add(step)
        arms.extend(float(ladder[step]), horizon)
    _spend_rest(arms, spend, horizon)


def _outward(arms: Arms, ladder: np.ndarray, chosen: set[int], horizon: int) -> int | None:
    """The next rung beyond the outermost arm, when that arm is the best so far."""
    usable = [index for index in chosen if float(ladder[index]) in arms.usable()]
    if not usable:
        lower = min(chosen) - 1  # everything failed: the decays were too large, if decay is to blame at all
        return lower if lower >= 0 else None
    best = max(usable, key=lambda index: arms.level(float(ladder[index]), horizon))
    if best == min(chosen):
        return best - 1 if best > 0 else None
    if best == max(chosen):
        return best + 1 if best + 1 < len(ladder) else None
    return None


def _spend_rest(arms: Arms, spend: float, horizon: int) -> None:
    """Train the best arm and its neighbours on with what is left."""
    usable = arms.usable()
    if len(usable) < 2:
        return
    best = max(range(len(usable)), key=lambda i: arms.level(usable[i], horizon))
    low = min(max(best - 1, 0), max(len(usable) - 3, 0))
    kept = usable[low : low + 3]
    more = int((spend - sum(arms.paid.values())) / len(kept))
    if more > 0:
        for log_decay in kept:
            arms.extend(log_decay, horizon + more)
