"""Was the forecast right? Full trainings around it, on seeds the forecast has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.lab.execute import Execute, Train, in_process
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep

FACTORS = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)
FRESH_SEEDS = (1001, 1002, 1003)
SEEDS = 2  # of these, those the forecast was not made on


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Final validation metric of full runs over a grid of weight decays around the forecast.

    `regret` is how much worse the forecast's weight decay was than the best of the grid, in the metric's unit (>= 0), and
    `regret_stderr` its standard error over seeds. A decay whose runs failed has mean NaN.
    """

    weight_decays: tuple[float, ...]
    means: tuple[float, ...]
    stderrs: tuple[float, ...]
    seeds: int
    regret: float
    regret_stderr: float
    metric: str
    cost: float


def verification_runs(
    config: Mapping[str, Scalar], weight_decay: float, *, default: float, forecast_seed: int = 0
) -> list[Run]:
    """Full runs at the forecast times `FACTORS`, and at the default people use."""
    seeds = [seed for seed in FRESH_SEEDS if seed != forecast_seed][:SEEDS]
    grid = sorted({float(f"{weight_decay * factor:.6g}") for factor in FACTORS} | {default})
    return [Run(config={**config, "weight_decay": value}, seed=seed) for seed in seeds for value in grid]


def verify(
    config: Mapping[str, Scalar],
    weight_decay: float,
    store: Store,
    *,
    default: float,
    forecast_seed: int = 0,
    metric: str = "validation_loss",
    train: Train | None = None,
    execute: Execute = in_process,
    on_row: Callable[[Row], None] | None = None,
) -> Verification:
    """Train the grid (what the store lacks) and compare."""
    runs = verification_runs(config, weight_decay, default=default, forecast_seed=forecast_seed)
    # a run that failed for want of memory, say, deserves another try; one that diverges fails again soon
    rows = sweep(runs, store, train=train, execute=execute, retry_failed=True, on_row=on_row)
    return compare(rows, float(f"{weight_decay:.6g}"), metric)


def compare(rows: Sequence[Row], weight_decay: float, metric: str) -> Verification:
    """Read the verification off finished rows; seeds are paired, since they share data order and initial weights."""
    decays = sorted({float(row.run.config["weight_decay"]) for row in rows})  # type: ignore[arg-type]
    seeds = sorted({row.run.seed for row in rows})
    table = np.full((len(decays), len(seeds)), math.nan)
    for row in rows:
        if row.status == "done":
            place = decays.index(float(row.run.config["weight_decay"])), seeds.index(row.run.seed)  # type: ignore[arg-type]
            table[place] = row.curve[metric][-1]
    worse = table if metric.endswith("loss") else -table
    means = worse.mean(1)
    if not np.isfinite(means).any():
        raise ValueError("every verification run failed; see the failed rows' reasons in the store")
    best, picked = int(np.nanargmin(means)), decays.index(weight_decay)
    paired = worse[picked] - worse[best]
    root = math.sqrt(len(seeds))
    ddof = 1 if len(seeds) > 1 else 0
    return Verification(
        weight_decays=tuple(decays),
        means=tuple(table.mean(1).tolist()),
        stderrs=tuple((table.std(1, ddof=ddof) / root).tolist()),
        seeds=len(seeds),
        regret=float(paired.mean()),
        regret_stderr=float(paired.std(ddof=ddof) / root),
        metric=metric,
        cost=float(len(rows)),
    )
