"""Forecast the best weight decay of a long training from short prefixes of a few.

The L2 paper's predictor makes one short run at a large weight decay, notes when its metric peaks, and scales: the best
weight decay is inverse to the budget (Lewkowycz & Gur-Ari 2020, sec. 2). Here a handful of arms is trained to the same
early point instead, because a comparison of arms is steadier than the argmax of one flat curve:

1. At the probe's end, step h, the arms tell lambda*(h): the weight decay that is best *at that moment* (the vertex through
   the best arm and its neighbours), with the measurement noise propagated; where the best arm is the outermost, only a bound.
2. From there lambda*(t) drifts as S(t)**-p, S(t) being the summed learning rate. p = 1 is the paper's law, a fixed number
   of e-folds; p = 0 a network with a finite best weight decay however long it trains; p < 0 one that does not overfit yet,
   so that decay only hurts at first. p is normal, `DRIFT_KNOWN_RATE` or `DRIFT_UNKNOWN_RATE` (mean, standard deviation).
3. Where the learning rate is known, the number of e-folds that was best elsewhere, `PRIOR_EFOLDS` within a factor of two
   (one standard deviation), is a second opinion. Both are combined by weighting samples; the answer is the weighted median,
   with a 90 % interval. Without the learning rate there is no second opinion, and p stays near the paper's law.

Everything is a pure decision over a *probe*: a function that trains, or continues, one arm and returns its curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from decaycast.core.experiment import jsonable
from decaycast.core.timescale import LearningRate
from decaycast.methods.l2.arms import PRIOR_EFOLDS, SPACING, Arm, Arms, Plan, Probe, probe_arms

SAMPLES = 4000
CLEAR = 20.0  # leads above this many times the noise between evaluations are no slow wandering either
GROWTH = 2.0  # an effect linear in the e-folds spent grows about sevenfold from the first quarter to the last third
MOST_OPEN = 0.2  # trusted only where the best decay so far lies within the arms with probability 1 - this


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast weight decay, how sure it is, and what it cost.

    On "refuse", `weight_decay` is the fallback named in `reason`, not a forecast. `efolds` is nominal, the summed rate times
    `weight_decay`: where heavy ball cannot shrink weights that fast (`efolds` of `decaycast.core.timescale` caps it), less.
    `cost` is in full runs and holds every step asked of the probe.
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
        return jsonable(asdict(self))

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
            return non-finite values for an arm that diverged; the arm then counts as worst and the forecast goes on. On several
            ranks it has to return the same numbers on each (means over the ranks); then the forecasts are the same.
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
    plan = Plan.checked(budget_steps, lr, candidates, max_cost)
    arms = Arms(probe, plan, 1.0 if higher_is_better else -1.0)
    probe_arms(arms, plan)
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
class _Comparison:
    """Arms side by side at one step: logarithms of the decays, values (larger is better), standard errors."""

    step: int
    decays: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    shown: np.ndarray  # which arms were measured up to `step`; the others are failed or were left behind
    noise: float  # NaN where there are too few measurements to tell


def _compare(arms: Arms) -> _Comparison:
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
    return _Comparison(
        step=step,
        decays=decays[order],
        values=values[order],
        errors=errors[order],
        shown=order < len(shown),
        noise=noise,
    )


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


def _decide(arms: Arms, plan: Plan) -> dict[str, Any]:
    usable = arms.usable()
    if not arms.curves:
        spend = f"max_cost {plan.max_cost:g} of {plan.budget_steps} steps"
        return _fallback(plan, f"{spend} pays for no measurements: not one step for each of three arms; raise max_cost")
    if len(usable) < 2:
        reasons = "; ".join(dict.fromkeys(arms.failed.values())) or "no measurements"
        return _fallback(plan, f"{len(usable)} of {len(arms.curves)} arms could be used ({reasons})")
    comparison = _compare(arms)
    trouble = _nothing_to_see(arms, comparison)
    if trouble:
        return _fallback(plan, trouble)
    posterior = _combine(comparison, plan)
    low, middle, high = posterior.quantiles
    answer = plan.answer(low, middle, high)
    verdict, reason = _verdict(comparison, posterior, arms, plan)
    if not low - 1e-9 <= math.log(answer) <= high + 1e-9:
        verdict = "weak"
        reason = f"no candidate lies within the interval, {math.exp(low):.2g} to {math.exp(high):.2g}; {reason}"
    return {
        "weight_decay": answer,
        "interval": (min(math.exp(low), answer), max(math.exp(high), answer)),
        "verdict": verdict,
        "reason": reason,
    }


@dataclass(frozen=True, kw_only=True)
class _Posterior:
    """What is believed of ln lambda*(T): 5, 50 and 95 % quantiles, and what the probe says without the second opinion."""

    quantiles: tuple[float, float, float]
    probe_alone: float
    agreement: float
    beyond: float


def _combine(comparison: _Comparison, plan: Plan) -> _Posterior:
    rng = np.random.default_rng(0)  # a fixed seed: the same curves give the same forecast
    now, beyond = _best_now(comparison, rng)
    drift = rng.normal(*plan.drift, SAMPLES)
    then = now - drift * plan.remaining(comparison.step)
    low, high = np.log(plan.bounds)
    mean, deviation = plan.prior
    surprise = 0.5 * ((then - mean) / deviation) ** 2 if plan.known_rate else np.zeros(SAMPLES)
    weights = np.exp(surprise.min() - surprise)  # the likeliest sample weighs 1, so that not all vanish
    five, middle, ninety_five = _weighted_quantiles(np.clip(then, low, high), weights, (0.05, 0.5, 0.95))
    return _Posterior(
        quantiles=(float(five), float(middle), float(ninety_five)),
        probe_alone=float(np.median(np.clip(then, low, high))),
        agreement=float(np.exp(-surprise).mean()),
        beyond=float(beyond.mean()),
    )


def _nothing_to_see(arms: Arms, comparison: _Comparison) -> str:
    """Why no forecast can be made from these arms, or nothing."""
    spread, noise = float(np.ptp(comparison.values[comparison.shown])), comparison.noise
    if math.isnan(noise):
        return (
            f"fewer than three measurements within {comparison.step} steps, too few to tell a difference from noise; "
            "measure more often, or spend more (max_cost)"
        )
    low, high = (math.exp(comparison.decays[k]) for k in (0, -1))
    if spread <= 2 * noise or spread <= 1e-12:
        return (
            f"weight decay makes no measurable difference between {low:.2g} and {high:.2g} after {comparison.step} steps "
            f"(spread {spread:.2g}, noise {noise:.2g})"
        )
    best = comparison.decays[int(comparison.values.argmax())]
    at, values = arms.curves[float(best)]
    if len(at) >= 3 and values[at <= comparison.step].max() - values[0] <= 2 * noise:
        return (
            f"the best arm's metric has not improved within {comparison.step} steps, so there is nothing to compare yet"
        )
    return ""


def _verdict(
    comparison: _Comparison, posterior: _Posterior, arms: Arms, plan: Plan
) -> tuple[Literal["trust", "weak"], str]:
    doubt = (
        _bound_only(comparison, posterior) or _noise_doubt(comparison, arms) or _second_opinion_doubt(posterior, plan)
    )
    if doubt:
        return "weak", doubt
    if arms.failed:
        return "weak", f"{len(arms.failed)} of {len(arms.curves)} arms failed: {next(iter(arms.failed.values()))}"
    low, high = math.exp(comparison.decays[0]), math.exp(comparison.decays[-1])
    return "trust", (
        f"the best of the arms at step {comparison.step} lies inside their range, {low:.2g} to {high:.2g}, and leads the "
        "outermost ones by more than the noise"
    )


def _bound_only(comparison: _Comparison, posterior: _Posterior) -> str:
    """Why the arms do not bracket the best weight decay, or nothing."""
    low, high = math.exp(comparison.decays[0]), math.exp(comparison.decays[-1])
    best, step = int(comparison.values.argmax()), comparison.step
    if best in (0, len(comparison.decays) - 1):
        side = "smallest" if best == 0 else "largest"
        return f"the {side} of the arms ({low:.2g} to {high:.2g}) was best at step {step}: a bound only"
    if posterior.beyond > MOST_OPEN:
        return (
            f"the best arm at step {step} leads an outermost one ({low:.2g}, {high:.2g}) by no more than noise: "
            f"a bound only, with probability {posterior.beyond:.0%}"
        )
    bracket = math.exp(comparison.decays[best + 1] - comparison.decays[best - 1])
    if bracket > SPACING**2 * 1.01:
        return f"the arms around the best one lie a factor of {bracket:.0f} apart; offer more candidates"
    return ""


def _noise_doubt(comparison: _Comparison, arms: Arms) -> str:
    """Whether the best arm's lead over an outermost one may be chance: it should be large, or have grown while decay acted."""
    measured = comparison.decays[comparison.shown]
    best = float(comparison.decays[int(comparison.values.argmax())])
    for outer in (float(measured[0]), float(measured[-1])):
        late, early = arms.lead(best, outer, comparison.step)
        if outer != best and late <= GROWTH * abs(early) and late <= CLEAR * comparison.noise:
            return (
                f"no measurable difference that grows with the decay spent: the best arm leads {math.exp(outer):.2g} by "
                f"{late:.2g} at step {comparison.step}, and they differed by {abs(early):.2g} from the start"
            )
    return ""


def _second_opinion_doubt(posterior: _Posterior, plan: Plan) -> str:
    """Whether probe and second opinion are too far apart to be averaged quietly, or the answer is too wide."""
    low, middle, high = posterior.quantiles
    pulled = math.exp(abs(middle - posterior.probe_alone))
    if plan.known_rate and (posterior.agreement < 0.1 or pulled > SPACING):
        return (
            f"the probe alone says {math.exp(posterior.probe_alone):.2g}, the usual number of e-folds moves that by a factor of "
            f"{pulled:.1f}: they disagree; spend more (max_cost) or verify"
        )
    if high - low > math.log(40):
        return f"the arms differ little against their noise: the interval spans a factor of {math.exp(high - low):.0f}"
    return ""


def _fallback(plan: Plan, reason: str) -> dict[str, Any]:
    mean, deviation = plan.prior
    low, high = np.log(plan.bounds)
    ends = np.clip([mean - 1.645 * deviation, mean + 1.645 * deviation], low, high)
    answer = plan.snap(mean)
    source = f"{PRIOR_EFOLDS} e-folds" if plan.known_rate else "the middle of the range"
    return {
        "weight_decay": answer,
        "interval": (min(math.exp(ends[0]), answer), max(math.exp(ends[1]), answer)),
        "verdict": "refuse",
        "reason": f"{reason}; the weight decay given is only the fallback, {source}",
    }


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray, at: Sequence[float]) -> np.ndarray:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return values[order][np.searchsorted(cumulative, np.asarray(at) * cumulative[-1])]
