"""Which arms of a sweep are worth training to the end: the budget-aware mode.

In a grid over weight decays most arms are far from the best. For each config without its weight decay, one forecast
(`decaycast.methods.l2.forecast`: short prefixes, compared by the e-folds they have spent) gives a 90 % interval for the best
weight decay of the full length; arms outside it are stopped at their prefix, all seeds of the others are trained. A forecast
that says "refuse" stops nothing.

Each forecast is a run of its own, with a row: it is trained by any executor, stored, and not made twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.core.names import choose
from decaycast.lab.forecasting import effective_rates
from decaycast.lab.probe import TrialProbe
from decaycast.lab.provenance import provenance
from decaycast.methods.l2.forecast import forecast

LEAST_ARMS = 4  # with fewer weight decays, choosing costs about what it saves
METRICS = ("validation_loss", "validation_accuracy")
_SETTINGS = ("task", "candidates", "max_cost", "metric")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a budget-aware sweep trains, and what that costs in full-run equivalents."""

    kept: tuple[Run, ...]
    stopped: tuple[Run, ...]
    spent: float
    reasons: tuple[str, ...]


def forecasts_for(runs: Iterable[Run], *, max_cost: float = 0.3, metric: str = "validation_loss") -> list[Run]:
    """One run per group of `runs` that differ only in weight decay and seed: the forecast of its best weight decay.

    Groups with fewer than `LEAST_ARMS` positive weight decays, or another rule than a constant weight decay, have none.

    Args:
        runs: of a sweep.
        max_cost: full-run equivalents that a forecast may spend, in (0, 1].
        metric: what should be best, "validation_loss" or "validation_accuracy".

    Raises:
        ValueError: `max_cost` or `metric` out of range.
    """
    if not 0 < max_cost <= 1:
        raise ValueError(f"max_cost must be in (0, 1] full-run equivalents, got {max_cost}")
    choose(metric, METRICS, "metric")
    found = []
    for group in _groups(runs):
        decays = sorted({float(run.config["weight_decay"]) for run in group if run.config.get("weight_decay")})  # type: ignore[arg-type]
        config = _without_decay(group[0])
        if len(decays) < LEAST_ARMS or config.get("rule", "constant") != "constant":
            continue
        asked: dict[str, Scalar] = {"task": "forecast", "max_cost": max_cost, "metric": metric}
        asked["candidates"] = ",".join(f"{decay!r}" for decay in decays)
        found.append(Run(config={**config, **asked}, seed=min(run.seed for run in group)))
    return found


def train_forecast(run: Run, *, data_dir: str | None = None) -> Row:
    """Make the forecast that `run` describes; the row's `final` has weight_decay, low, high and cost, its reason the verdict."""
    began = time.perf_counter()
    asked = dict(run.config)
    _, candidates, max_cost, metric = (asked.pop(name) for name in _SETTINGS)
    found = forecast(
        TrialProbe(asked, seed=run.seed, metric=str(metric), data_dir=data_dir),
        int(asked["steps"]),  # type: ignore[arg-type]
        lr=effective_rates(asked, data_dir),
        candidates=[float(value) for value in str(candidates).split(",")],
        higher_is_better=metric == "validation_accuracy",
        max_cost=float(max_cost),  # type: ignore[arg-type]
        metric=str(metric),
    )
    low, high = found.interval
    return Row(
        run=run,
        reason=f"{found.verdict}: {found.reason}",
        final={"weight_decay": found.weight_decay, "low": low, "high": high, "cost": found.cost},
        seconds=time.perf_counter() - began,
        provenance=provenance(),
    )


def choose_runs(runs: Sequence[Run], forecasts: Iterable[Row]) -> Choice:
    """The `runs` whose weight decay lies in the interval of their group's forecast, or is the one nearest to it.

    Kept as a whole are groups without a forecast, with a failed one or one that refuses; runs without weight decay always.
    """
    rows = {_group_of(row.run): row for row in forecasts}
    kept, stopped, reasons, spent = [], [], [], 0.0
    for group in _groups(runs):
        row = rows.get(_group_of(group[0]))
        wanted = None
        if row is not None:
            wanted = _wanted(row)
            spent += row.final.get("cost", 0.0)
            reasons.append(row.reason)
        for run in group:
            decay = run.config.get("weight_decay")
            (kept if wanted is None or not decay or decay in wanted else stopped).append(run)
    order = {run.key: place for place, run in enumerate(runs)}
    kept.sort(key=lambda run: order[run.key])
    return Choice(kept=tuple(kept), stopped=tuple(stopped), spent=spent, reasons=tuple(reasons))


def _wanted(row: Row) -> set[float] | None:
    """The candidates to train, or None for all."""
    if row.status == "failed" or row.reason.startswith("refuse"):
        return None
    candidates = np.array([float(value) for value in str(row.run.config["candidates"]).split(",")])
    inside = (candidates >= row.final["low"] * (1 - 1e-9)) & (candidates <= row.final["high"] * (1 + 1e-9))
    nearest = np.argmin(np.abs(np.log(candidates / row.final["weight_decay"])))
    return {*candidates[inside].tolist(), float(candidates[nearest])}


def _groups(runs: Iterable[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_group_of(run), []).append(run)
    return list(groups.values())


def _group_of(run: Run) -> str:
    return Run(config=_without_decay(run)).key


def _without_decay(run: Run) -> Mapping[str, Scalar]:
    return {name: value for name, value in run.config.items() if name not in ("weight_decay", *_SETTINGS)}
