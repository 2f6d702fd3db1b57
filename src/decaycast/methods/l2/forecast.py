"""Forecast the best weight decay of a long training from short prefixes of a few.

The L2 paper's predictor makes one short run at a large weight decay, notes when its metric peaks, and scales: the best
weight decay is inverse to the budget (Lewkowycz & Gur-Ari 2020, sec. 2). Here a handful of arms is trained to the same
early point instead, because a comparison of arms is steadier than the argmax of one flat curve:

1. At the probe's end, step h, the arms tell lambda*(h): the weight decay that is best *at that moment* (the vertex through
   the best arm and its neighbours), with the measurement noise propagated; where the best arm is the outermost, only a bound.
2. From there lambda*(t) drifts as S(t)**-p, S(t) being the summed learning rate. p = 1 is the paper's law, a fixed number
   of e-folds; p = 0 a network with a finite best weight decay however long it trains; p < 0 one that does not overfit yet,
   so that decay only hurts at first. p is uniform over `DRIFT_KNOWN_RATE` or `DRIFT_UNKNOWN_RATE`.
3. Where the learning rate is known, the number of e-folds that was best elsewhere, `PRIOR_EFOLDS` within a factor of two
   (one standard deviation), is a second opinion. Both are combined by weighting samples; the answer is the weighted median,
   with a 90 % interval. Without the learning rate there is no second opinion, and p stays near the paper's law.

Everything is a pure decision over a *probe*: a function that trains, or continues, one arm and returns its curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from decaycast.core.timescale import LearningRate, learning_rates

Probe = Callable[[float, int], tuple[Sequence[float], Sequence[float]]]

PRIOR_EFOLDS = 1.3  # the paper's WRN setting: 32 steps at 0.04 per step
PRIOR_SD = math.log(2.0)
DRIFT_KNOWN_RATE = (-0.5, 1.0)
DRIFT_UNKNOWN_RATE = (0.5, 1.0)
SPACING = 4.0  # ratio between neighbouring arms when they can be chosen freely
FREE_RANGE = (1e-6, 1.0)  # weight decays considered when neither lr nor candidates are given
SAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One probed weight decay and what was measured of it."""

    weight_decay: float
    steps: tuple[float, ...]
    values: tuple[float, ...]
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast weight decay, how sure it is, and what it cost.

    On "refuse", `weight_decay` is the fallback named in `reason`, not a forecast.
    """

    weight_decay: float
    interval: tuple[float, float]
    verdict: Literal["trust", "weak", "refuse"]
    reason: str
    efolds: float | None
    cost: float
    budget_steps: int
    metric: str
    higher_is_better: bool
    arms: tuple[Arm, ...]
    rate_per_decay: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite become None."""
        return _finite(asdict(self))

    def plot(self) -> Any:
        """Plotly figure of the arms' curves, coloured by weight decay; needs ``decaycast[lab]``."""
        try:
            import plotly.graph_objects as graph
        except ImportError as error:
            raise ImportError("Forecast.plot() draws with plotly: pip install 'decaycast[lab]'") from error
        figure = graph.Figure()
        for arm in self.arms:
            figure.add_scatter(x=arm.steps, y=arm.values, name=f"{arm.weight_decay:.3g}", mode="lines+markers")
        low, high = self.interval
        title = f"weight decay {self.weight_decay:.3g} [{low:.2g}, {high:.2g}]: {self.verdict}"
        return figure.update_layout(title=title, xaxis_title="optimiser steps", yaxis_title=self.metric)


def forecast(
    probe: Probe,
    budget_steps: int,
    *,
    lr: LearningRate | None = None,
    candidates: Sequence[float] | None = None,
    higher_is_better: bool = True,
    max_cost: float = 0.3,
    metric: str = "metric",
) -> Forecast:
    """Forecast the best weight decay for `budget_steps` from prefixes that cost at most `max_cost` full runs.

    Args:
        probe: ``probe(weight_decay, steps) -> (steps_array, metric_array)`` trains that arm up to `steps` optimiser steps
            in all, continuing where it was, and returns what was measured so far. It may raise FloatingPointError or
            return non-finite values for an arm that diverged; the arm then counts as worst and the forecast goes on.
        budget_steps: optimiser steps of the full training, >= 10.
        lr: the learning rate of the full training (number, one per step, or function of the step), such that the optimiser
            shrinks weights by lr*weight_decay per step: divide by 1 - momentum for coupled SGD. None when not known: then
            time is counted in steps and no prior on e-folds is used.
        candidates: weight decays to choose from, all positive; None for any (one outside 1e-6..1 needs `lr`).
        higher_is_better: True for accuracy, False for a loss.
        max_cost: most full-run equivalents to spend, in (0, 1].
        metric: what the values are called in reports.

    Returns:
        A `Forecast`; `verdict` is "trust", "weak" or "refuse", and `reason` says why.

    Raises:
        ValueError: arguments out of range; a probe whose arrays do not match.
    """
    plan = _Plan.checked(budget_steps, lr, candidates, max_cost)
    arms = _Arms(probe, plan, 1.0 if higher_is_better else -1.0)
    _probe_arms(arms, plan)
    decision = _decide(arms, plan)
    rate = None if lr is None else plan.rate_per_decay
    return Forecast(
        **decision,
        efolds=None if rate is None else rate * decision["weight_decay"],
        cost=arms.cost,
        budget_steps=plan.budget_steps,
        metric=metric,
        higher_is_better=higher_is_better,
        arms=arms.records(),
        rate_per_decay=rate,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is fixed before anything is trained. Decays are handled by their natural logarithm."""

    budget_steps: int
    clock: np.ndarray  # summed learning rate after each step, shape (budget_steps,)
    known_rate: bool
    candidates: np.ndarray | None
    max_cost: float

    @classmethod
    def checked(
        cls, budget_steps: int, lr: LearningRate | None, candidates: Sequence[float] | None, max_cost: float
    ) -> _Plan:
        if isinstance(budget_steps, bool) or int(budget_steps) != budget_steps or budget_steps < 10:
            raise ValueError(f"budget_steps must be a whole number >= 10, got {budget_steps!r}")
        if not 0 < max_cost <= 1:
            raise ValueError(f"max_cost must be in (0, 1] full-run equivalents, got {max_cost}")
        rates = learning_rates(1.0 if lr is None else lr, int(budget_steps))
        if rates.sum() == 0:
            raise ValueError("the learning rate is zero at every step: nothing would train")
        options = None
        if candidates is not None:
            options = np.unique(np.asarray(candidates, dtype=float))
            if len(options) < 2 or not np.isfinite(options).all() or options[0] <= 0:
                raise ValueError(f"candidates must be at least two different positive weight decays, got {candidates}")
        return cls(
            budget_steps=int(budget_steps),
            clock=rates.cumsum(),
            known_rate=lr is not None,
            candidates=options,
            max_cost=max_cost,
        )

    @property
    def rate_per_decay(self) -> float:
        return float(self.clock[-1])

    def remaining(self, step: float) -> float:
        """ln(S(T)/S(t)): how far the clock still has to run after `step`, in natural logarithms."""
        index = min(max(int(step), 1), self.budget_steps) - 1
        return float(np.log(self.clock[-1] / self.clock[index]))

    @property
    def prior(self) -> tuple[float, float]:
        """Mean and standard deviation of ln(best weight decay) before any training."""
        if self.known_rate:
            return math.log(PRIOR_EFOLDS / self.rate_per_decay), PRIOR_SD
        low, high = np.log(self.bounds)
        return (low + high) / 2, (high - low) / math.sqrt(12)  # as wide as the range is: no opinion within it

    @property
    def drift(self) -> tuple[float, float]:
        """Range of the exponent p with which the best weight decay drifts as the clock runs."""
        return DRIFT_KNOWN_RATE if self.known_rate else DRIFT_UNKNOWN_RATE

    def expected_best(self, step: float) -> float:
        """Logarithm of the weight decay expected to be best at `step`, before any training."""
        return self.prior[0] + sum(self.drift) / 2 * self.remaining(step)

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

    def snap(self, log_decay: float) -> float:
        """The answerable weight decay nearest in logarithm."""
        low, high = self.bounds
        if self.candidates is None:
            return float(np.clip(math.exp(log_decay), low, high))
        return float(self.candidates[np.argmin(np.abs(np.log(self.candidates) - log_decay))])


class _Arms:
    """The arms trained so far, larger always better; pays for every step asked for."""

    def __init__(self, probe: Probe, plan: _Plan, sign: float) -> None:
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
        weight_decay = float(f"{math.exp(log_decay):.12g}")
        try:
            raw_steps, raw_values = self.probe(weight_decay, steps)
        except FloatingPointError as error:
            self.failed[log_decay] = str(error) or "diverged"
            self.paid[log_decay] = steps
            self.curves.setdefault(log_decay, (np.empty(0), np.empty(0)))
            return
        self.paid[log_decay] = steps
        at, values = np.asarray(raw_steps, dtype=float), np.asarray(raw_values, dtype=float)
        if at.shape != values.shape or at.ndim != 1:
            raise ValueError(
                f"the probe must return two equally long arrays (steps, metric), got shapes {at.shape} and {values.shape}"
            )
        # a probe may hand out more than was asked for: what was not paid for is not looked at
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
        the arms' mean: second differences of it, which a smooth difference leaves near zero.
        """
        at = max((self.curves[x][0] for x in decays), key=len)
        at = at[at <= until]
        at = at[-max(3, int((at > until / 3).sum())) :]  # the first evaluations of a training are noisy in their own way
        if len(at) < 3:
            return math.nan
        values = np.stack([np.interp(at, *self.curves[x]) for x in decays])
        values -= values.mean(0)
        wiggle = values[:, 1:-1] - (values[:, :-2] + values[:, 2:]) / 2
        # Var(e_i - (e_-1 + e_+1)/2) = 1.5 sigma^2, and leaving the mean of K arms keeps 1 - 1/K of it
        variance = float(np.mean(wiggle**2)) / 1.5 / (1 - 1 / len(decays))
        return math.sqrt(variance / max(1, int((at > until * 2 / 3).sum())))

    def records(self) -> tuple[Arm, ...]:
        """The arms as they are reported, ascending in weight decay."""
        return tuple(
            Arm(
                weight_decay=float(f"{math.exp(x):.12g}"),
                steps=tuple(self.curves[x][0].tolist()),
                values=tuple((self.sign * self.curves[x][1]).tolist()),
                status="failed" if x in self.failed else "ok",
                reason=self.failed.get(x, ""),
            )
            for x in sorted(self.curves)
        )


def _probe_arms(arms: _Arms, plan: _Plan) -> None:
    """Three arms to a sixth of the money; walk outwards while the best is outermost; spend the rest on the best three."""
    spend = plan.max_cost * plan.budget_steps
    horizon = max(1, int(spend / 6))
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


def _outward(arms: _Arms, ladder: np.ndarray, chosen: set[int], horizon: int) -> int | None:
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


def _spend_rest(arms: _Arms, spend: float, horizon: int) -> None:
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


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """Arms side by side at one step: logarithms of the decays, values (larger is better), standard errors."""

    step: int
    decays: np.ndarray
    values: np.ndarray
    errors: np.ndarray


def _compare(arms: _Arms) -> _Comparison:
    """Compare at the longest prefix that at least three arms (or all) have reached; failed arms count as worst."""
    usable = arms.usable()
    reached = sorted((arms.paid[x] for x in usable), reverse=True)
    step = reached[min(2, len(reached) - 1)]
    shown = [x for x in usable if arms.paid[x] >= step]
    # an arm left behind was already beaten: it still bounds the best from its side
    behind = [x for x in arms.curves if x not in shown]
    levels = np.array([arms.level(x, step) for x in shown])
    spread = max(float(np.ptp(levels)), 1e-12)
    decays = np.array(shown + behind)
    values = np.concatenate([levels, np.full(len(behind), levels.min() - 3 * spread)])
    noise = arms.noise(shown, step)
    errors = np.concatenate([np.full(len(shown), noise if math.isfinite(noise) else spread), np.zeros(len(behind))])
    order = np.argsort(decays)
    return _Comparison(step=step, decays=decays[order], values=values[order], errors=errors[order])


def _best_now(comparison: _Comparison, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples of ln lambda*(h), and whether each lies beyond the arms.

    The vertex of the parabola through the best arm and its neighbours, kept within half the distance to them (the metric
    falls off steeply above the best and slowly below, so a free vertex strays). Beyond an outermost best arm nothing was
    measured: a half-normal step outwards, one arm's spacing wide.
    """
    x = comparison.decays
    y = comparison.values + comparison.errors * rng.standard_normal((SAMPLES, len(x)))
    best = y.argmax(1)
    outward = np.abs(rng.standard_normal(SAMPLES)) * math.log(SPACING)
    result = np.where(best == 0, x[0] - outward, x[-1] + outward)
    inner = np.flatnonzero((best > 0) & (best < len(x) - 1))
    b = best[inner]
    left, mid, right = x[b - 1], x[b], x[b + 1]
    rise, fall = y[inner, b] - y[inner, b - 1], y[inner, b] - y[inner, b + 1]
    down, up = mid - left, right - mid
    denominator = rise * up + fall * down
    shift = 0.5 * (rise * up**2 - fall * down**2) / np.where(denominator > 0, denominator, 1.0)
    result[inner] = mid + np.clip(shift, -down / 2, up / 2)
    beyond = np.ones(SAMPLES, dtype=bool)
    beyond[inner] = False
    return result, beyond


def _decide(arms: _Arms, plan: _Plan) -> dict[str, Any]:
    usable = arms.usable()
    if len(usable) < 2:
        reasons = "; ".join(dict.fromkeys(arms.failed.values())) or "no measurements"
        return _fallback(plan, f"{len(usable)} of {len(arms.curves)} arms could be used ({reasons})")
    comparison = _compare(arms)
    trouble = _nothing_to_see(arms, comparison)
    if trouble:
        return _fallback(plan, trouble)
    rng = np.random.default_rng(0)  # a fixed seed: the same curves give the same forecast
    now, beyond = _best_now(comparison, rng)
    drift = rng.uniform(*plan.drift, SAMPLES)
    then = now - drift * plan.remaining(comparison.step)
    low, high = np.log(plan.bounds)
    mean, deviation = plan.prior
    weights = np.exp(-0.5 * ((then - mean) / deviation) ** 2) if plan.known_rate else np.ones(SAMPLES)
    agreement = float(weights.mean())
    quantiles = _weighted_quantiles(np.clip(then, low, high), weights, (0.05, 0.5, 0.95))
    verdict, reason = _verdict(comparison, beyond, agreement, quantiles, arms, plan)
    return {
        "weight_decay": plan.snap(quantiles[1]),
        "interval": (math.exp(quantiles[0]), math.exp(quantiles[2])),
        "verdict": verdict,
        "reason": reason,
    }


def _nothing_to_see(arms: _Arms, comparison: _Comparison) -> str:
    """Why no forecast can be made from these arms, or nothing."""
    shown = comparison.errors > 0
    spread, noise = float(np.ptp(comparison.values[shown])), float(comparison.errors.max())
    low, high = (math.exp(comparison.decays[k]) for k in (0, -1))
    if spread <= 2 * noise or spread <= 1e-12:
        return (
            f"weight decay makes no measurable difference between {low:.2g} and {high:.2g} after {comparison.step} steps "
            f"(spread {spread:.2g}, noise {noise:.2g})"
        )
    best = comparison.decays[int(comparison.values.argmax())]
    at, values = arms.curves[float(best)]
    if len(at) >= 3 and values[at <= comparison.step].max() - values[0] <= 2 * noise:
        return f"the best arm's metric has not improved within {comparison.step} steps, so there is nothing to compare yet"
    return ""


def _verdict(
    comparison: _Comparison, beyond: np.ndarray, agreement: float, quantiles: np.ndarray, arms: _Arms, plan: _Plan
) -> tuple[Literal["trust", "weak"], str]:
    low, high = math.exp(comparison.decays[0]), math.exp(comparison.decays[-1])
    width = math.exp(quantiles[2] - quantiles[0])
    if beyond.mean() > 0.5:
        side = "smallest" if int(comparison.values.argmax()) == 0 else "largest"
        return "weak", f"the {side} of the arms ({low:.2g} to {high:.2g}) was best at step {comparison.step}: a bound only"
    if plan.known_rate and agreement < 0.1:
        return "weak", "the probe and the usual number of e-folds disagree; spend more (max_cost) or verify"
    if arms.failed:
        return "weak", f"{len(arms.failed)} of {len(arms.curves)} arms failed: {next(iter(arms.failed.values()))}"
    if width > 40:
        return "weak", f"the arms differ little against their noise: the interval spans a factor of {width:.0f}"
    return "trust", (
        f"the best of the arms at step {comparison.step} lies between {low:.2g} and {high:.2g}, and differs from its "
        "neighbours by more than the noise"
    )


def _fallback(plan: _Plan, reason: str) -> dict[str, Any]:
    mean, deviation = plan.prior
    low, high = np.log(plan.bounds)
    ends = np.clip([mean - 1.645 * deviation, mean + 1.645 * deviation], low, high)
    source = f"{PRIOR_EFOLDS} e-folds" if plan.known_rate else "the middle of the range"
    return {
        "weight_decay": plan.snap(mean),
        "interval": (math.exp(ends[0]), math.exp(ends[1])),
        "verdict": "refuse",
        "reason": f"{reason}; the weight decay given is only the fallback, {source}",
    }


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray, at: Sequence[float]) -> np.ndarray:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return values[order][np.searchsorted(cumulative, np.asarray(at) * cumulative[-1])]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
