"""Optuna: a forecast as the prior of a search, that is, a narrower range and a first trial at the weight decay forecast.

    optuna.create_study()                                          # as ever, then:
    enqueue(study, found)                                          # one trial at the forecast
    weight_decay = suggest_weight_decay(trial, found)              # in the objective

What becomes of a forecast, by its verdict. The interval is that of 5 to 95 % (`decaycast.forecast`):

==========  ================================================================  ==========
verdict     range (logarithmic)                                               enqueued
==========  ================================================================  ==========
"trust"     the interval, `TRUSTED` times wider at each end                   yes
"weak"      the interval, `WEAK` times wider at each end                      yes
"refuse"    the full range, with a warning: there is no forecast              no
==========  ================================================================  ==========

A forecast holds for the learning rate it was made with. Where that is searched, too, it is the product of both that counts:
use ``suggest_weight_decay(trial, found) * found_lr / lr``.

Whether it pays: bench/results/optuna_prior.md.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from decaycast.adapters import require
from decaycast.core.schedule import one_number
from decaycast.methods.l2.arms import FREE_RANGE, SPACING
from decaycast.methods.l2.forecast import Forecast

require("optuna", optuna=">=4.0,<6")

import optuna  # noqa: E402  # pyright: ignore[reportMissingImports]

TRUSTED = 2.0  # one standard deviation of the forecast's own prior
WEAK = SPACING  # the distance between two arms: what a weak forecast may have overlooked
FULL_EFOLDS = (1e-3, 1e2)  # the full range where the learning rate is known, in e-folds over the run


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What a search starts from: the range, the first trial (None where there is none), and why."""

    low: float
    high: float
    enqueued: float | None
    reason: str


def prior_from_forecast(forecast: Any, full_range: tuple[float, float] | None = None) -> Prior:
    """Range and first trial that a forecast gives a search for the weight decay.

    Args:
        forecast: a `Forecast`, or what one of the finders here returns.
        full_range: smallest and largest weight decay that may be searched, which also bounds the narrower ranges; None for
            0.001 to 100 e-folds over the run where the forecast knew the learning rate, else 1e-6 to 1, without bounding them.

    Returns:
        The prior, in the optimiser's own convention of weight decay.

    Raises:
        TypeError: not a forecast.
        ValueError: a range that is not 0 < low < high, or that leaves out the weight decay forecast.

    >>> found = Forecast(
    ...     weight_decay=0.02, interval=(0.01, 0.04), verdict="trust", reason="", efolds=None, cost=0.3, budget_steps=1000,
    ...     metric="loss", higher_is_better=False, arms=(), rate_per_decay=None)
    >>> prior = prior_from_forecast(found)
    >>> prior.low, prior.high, prior.enqueued
    (0.005, 0.08, 0.02)
    """
    found = getattr(forecast, "forecast", forecast)
    if not isinstance(found, Forecast):
        raise TypeError(
            f"expected a Forecast (decaycast.find and decaycast.forecast return one), got {type(found).__name__}"
        )
    low, high = _checked(full_range) if full_range is not None else _full(found)
    if found.verdict == "refuse":
        return Prior(low=low, high=high, enqueued=None, reason=f"the full range, and no first trial: {found.reason}")
    if full_range is None:
        low, high = 0.0, math.inf
    if not low <= found.weight_decay <= high:
        raise ValueError(
            f"full_range {low:g} to {high:g} leaves out the weight decay forecast, {found.weight_decay:.3g}; widen it, or search "
            "without the forecast"
        )
    wider = TRUSTED if found.verdict == "trust" else WEAK
    return Prior(
        low=max(low, found.interval[0] / wider),
        high=min(high, found.interval[1] * wider),
        enqueued=found.weight_decay,
        reason=f"{found.verdict}: the forecast's interval, {wider:g} times wider at each end; {found.reason}",
    )


def suggest_weight_decay(
    trial: optuna.trial.BaseTrial,
    forecast: Any,
    *,
    name: str = "weight_decay",
    full_range: tuple[float, float] | None = None,
) -> float:
    """``trial.suggest_float`` on the forecast's range, in logarithm.

    Args:
        trial: of the objective.
        forecast: the same in all trials of a study.
        name: of the parameter in the study.
        full_range: as in `prior_from_forecast`.

    Raises:
        TypeError: not a trial, or as `prior_from_forecast`.
        ValueError: as `prior_from_forecast`.
    """
    if not isinstance(trial, optuna.trial.BaseTrial):
        raise TypeError(f"expected the trial that Optuna gives the objective, got {type(trial).__name__}")
    prior = prior_from_forecast(forecast, full_range)
    return trial.suggest_float(name, prior.low, prior.high, log=True)


def enqueue(
    study: optuna.Study,
    forecast: Any,
    *,
    name: str = "weight_decay",
    full_range: tuple[float, float] | None = None,
) -> Prior:
    """Let the study begin with a trial at the forecast's weight decay; parameters besides it are sampled as ever.

    Called again, as in a script that is started again, it adds no second trial.

    Args:
        study: before ``optimize``.
        forecast: as in `prior_from_forecast`.
        name: as in `suggest_weight_decay`.
        full_range: as in `suggest_weight_decay`.

    Returns:
        The prior; its `enqueued` is None where nothing was enqueued.

    Warns:
        UserWarning: the forecast is refused: nothing is enqueued, and the range is the full one.

    Raises:
        TypeError: not a study, or as `prior_from_forecast`.
        ValueError: as `prior_from_forecast`.
    """
    if not isinstance(study, optuna.Study):
        raise TypeError(f"expected an Optuna study, got {type(study).__name__}")
    prior = prior_from_forecast(forecast, full_range)
    if prior.enqueued is None:
        warnings.warn(f"nothing was enqueued, and the search goes over {prior.reason}", stacklevel=2)
    else:
        study.enqueue_trial({name: prior.enqueued}, skip_if_exists=True)
    return prior


def _checked(full_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = map(one_number, full_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (0 < low < high < math.inf):
        raise ValueError(f"full_range must be two weight decays, 0 < low < high, got {full_range!r}")
    return low, high


def _full(found: Forecast) -> tuple[float, float]:
    """The range to search without a forecast, around its fallback where that lies outside."""
    low, high = FREE_RANGE
    if found.rate_per_decay:
        low, high = (efolds / found.rate_per_decay for efolds in FULL_EFOLDS)
    return min(low, found.interval[0]), max(high, found.interval[1])
