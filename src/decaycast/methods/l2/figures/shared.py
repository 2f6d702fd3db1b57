"""What the figures of the L2 room share: ladders of weight decays, best accuracy within a budget, tuning that is fair over seeds.

Validation data stand in for the paper's test data throughout: nothing here is chosen on test data. The best accuracy is
the maximum over a run, as in the paper. A *rate* is the e-folds of decay per optimiser step, lr*lambda/(1 - momentum),
at the run's first learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.core.schedule import lr_by_name
from decaycast.core.seeds import number

Outcome = Literal["held", "not held", "not enough data"]
PAPER = "Lewkowycz & Gur-Ari 2020"
TOLERANCE = 0.005  # the paper's: time to come within half a percent of the best accuracy


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Runs of one length in e-folds over a range of weight decays: the shorter the decay's time, the shorter the run."""

    config: Mapping[str, Scalar]  # everything but lr, weight_decay and steps; momentum and schedule where there are any
    lrs: tuple[float, ...]
    rates: tuple[float, ...]
    efolds: float
    seeds: int

    def runs(self, lrs: Sequence[float] | None = None) -> list[Run]:
        """One run per learning rate, decay and seed; the longest first, since it decides how long a sweep takes."""
        return [
            self._run(lr, decay_of(self.config, lr, rate), self.steps(rate), seed)
            for rate in sorted(self.rates)
            for lr in lrs or self.lrs
            for seed in range(self.seeds)
        ]

    def without_decay(self, lr: float) -> list[Run]:
        """No decay, at one learning rate, as long as the longest run."""
        return [self._run(lr, 0.0, self.steps(min(self.rates)), seed) for seed in range(self.seeds)]

    def steps(self, rate: float) -> int:
        """Optimiser steps in which a decay of `rate` spends the e-folds."""
        return math.ceil(self.efolds / (rate * mean_multiplier(str(self.config.get("schedule", "constant")))) - 1e-9)

    def _run(self, lr: float, decay: float, steps: int, seed: int) -> Run:
        return Run(config={**self.config, "lr": lr, "weight_decay": decay, "steps": steps}, seed=seed)


def decay_of(config: Mapping[str, Scalar], lr: float, rate: float) -> float:
    """The weight decay that decays by `rate` e-folds per step: rate*(1 - momentum)/lr, to six digits."""
    return float(f"{rate * (1 - float(config.get('momentum') or 0)) / lr:.6g}")


@lru_cache
def mean_multiplier(schedule: str) -> float:
    """Mean of a learning-rate schedule over a long run."""
    shape = lr_by_name(schedule, 10_000)
    return float(np.mean([shape(step) for step in range(10_000)]))


def rates(largest: float, smallest: float, count: int) -> tuple[float, ...]:
    """`count` falling rates, evenly spaced in the logarithm; both ends included.

    >>> rates(0.1, 0.01, 3)
    (0.1, 0.0316228, 0.01)
    """
    return tuple(float(f"{rate:.6g}") for rate in np.geomspace(largest, smallest, count))


def rate_of(row: Row) -> float:
    """E-folds of decay per step of a run, at its first learning rate."""
    return number(row, "lr") * number(row, "weight_decay") / (1 - number(row, "momentum"))


def accuracies(row: Row) -> np.ndarray:
    """Validation accuracy at every measurement."""
    return np.array(row.curve["validation_accuracy"], dtype=float)


def best_accuracy(row: Row, budget_steps: float = math.inf) -> float:
    """Largest validation accuracy measured up to `budget_steps`; NaN where nothing was measured by then."""
    seen = accuracies(row)[np.array(row.curve["step"]) <= budget_steps]
    return float(seen.max()) if len(seen) else math.nan


def time_to_best(row: Row) -> float:
    """Optimiser steps until validation accuracy first comes within `TOLERANCE` of the run's best."""
    seen = accuracies(row)
    near = seen.max() - TOLERANCE - 1e-6  # an accuracy is a count over a count: rounding must not decide a tie
    return float(np.array(row.curve["step"])[np.argmax(seen >= near)])


Table = Mapping[float, Mapping[int, float]]  # a number by weight decay, then by seed


def best_table(
    groups: Mapping[float, Mapping[int, Row]], seeds: Iterable[int], budget_steps: float = math.inf
) -> Table:
    """Best accuracy of every run within a budget."""
    chosen = list(seeds)
    return {decay: {s: best_accuracy(groups[decay][s], budget_steps) for s in chosen} for decay in groups}


def leader(table: Table, without: int | None = None) -> float:
    """The weight decay with the largest mean; `without` a seed, so that what is shown on it was chosen on the others.

    Of a single seed nothing is left out.

    >>> table = {0.1: {0: 0.9, 1: 0.5}, 0.2: {0: 0.6, 1: 0.7}}
    >>> leader(table), leader(table, without=0)
    (0.1, 0.2)
    """

    def mean(decay: float) -> float:
        others = [value for seed, value in table[decay].items() if seed != without]
        return float(np.mean(others or list(table[decay].values())))

    return max(table, key=mean)


def tuned(table: Table, seeds: Iterable[int]) -> list[float]:
    """For each seed its best accuracy at the weight decay that leads on the other seeds: tuning that does not flatter itself."""
    return [table[leader(table, without=s)][s] for s in seeds]


def setup(rows: Sequence[Row]) -> str:
    """A caption's sentence on the network and its data, from the first row's config; nothing of no rows."""
    if not rows:
        return ""
    config = rows[0].run.config
    images = f"{config['train_size']:,} {config['data']} images" if config.get("train_size") else config.get("data", "")
    words = f"{config.get('model', 'a network')} on {images}".strip()
    pool, gain = number(rows[0], "pool"), number(rows[0], "init_gain")
    words += f", pooled by {pool:.0f}" if pool > 1 else ""
    words += f", momentum {config['momentum']}" if config.get("momentum") else ""
    words += f", {config['schedule']} learning rate".replace("_", " ") if config.get("schedule") else ""
    if gain > 1:
        words += (
            f". Its weights start at {gain:g} times the usual scale: a first fit from there generalises poorly, so that the "
            "decay has much to improve and t* is well defined"
        )
    return f"Network: {words}."
