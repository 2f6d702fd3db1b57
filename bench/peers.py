"""What the forecast is measured against: other ways to pick a weight decay on the same recorded runs.

Every peer sees the same table: full curves of one task over the grid. A weight decay it asks for is snapped to the nearest
grid point (in logarithm) and answered from one recorded seed, so a thousand searches cost no training. The cost of a
search is the optimiser steps it looked at, in full-run equivalents (FRE). Lambda is drawn from logU over the grid's range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Table:
    """A task's curves: ``losses[i, s, m]`` for grid point i, seed s, measurement m at fraction `at[m]` of the run."""

    decays: np.ndarray
    losses: np.ndarray
    at: np.ndarray

    def snap(self, decay: float) -> float:
        """The grid point nearest to `decay` in logarithm: what is trained when a search asks for it."""
        return float(self.decays[np.argmin(np.abs(np.log(self.decays) - math.log(decay)))])

    def read(self, decay: float, seed: int) -> np.ndarray:
        """One recorded curve of that grid point."""
        return self.losses[int(np.searchsorted(self.decays, self.snap(decay))), seed % self.losses.shape[1]]


Search = Callable[[Table, float, int], float]


def random_search(table: Table, budget: float, seed: int) -> float:
    """Best final loss of floor(budget) full runs at random weight decays."""
    rng = np.random.default_rng(seed)
    low, high = np.log(table.decays[[0, -1]])
    tried = np.exp(rng.uniform(low, high, max(1, int(budget))))
    return table.snap(min(tried, key=lambda value: table.read(value, int(rng.integers(99)))[-1]))


def tpe(table: Table, budget: float, seed: int) -> float:
    """Optuna's TPE with its defaults (10 random start-up trials), full runs."""
    optuna = _optuna()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))

    def objective(trial) -> float:
        value = trial.suggest_float("weight_decay", table.decays[0], table.decays[-1], log=True)
        return _finite(table.read(value, trial.number)[-1])

    study.optimize(objective, n_trials=max(1, int(budget)))
    return table.snap(study.best_params["weight_decay"])


def asha(table: Table, budget: float, seed: int) -> float:
    """Optuna's Hyperband pruner (asynchronous successive halving, factor 3) over TPE, until the steps are spent."""
    optuna = _optuna()
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=27, reduction_factor=3)
    # Hyperband puts a trial into a bracket by a hash of the study's name
    study = optuna.create_study(study_name=f"seed {seed}", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    spent, seen = 0.0, {}
    while spent < budget:
        trial = study.ask()
        value = trial.suggest_float("weight_decay", table.decays[0], table.decays[-1], log=True)
        curve = table.read(value, trial.number)
        used, pruned, loss = 0, False, math.inf
        for rung in range(1, 28):
            used = rung
            loss = _finite(float(np.interp(rung / 27, table.at, curve)))
            trial.report(loss, rung)
            if spent + rung / 27 >= budget or trial.should_prune():
                pruned = rung < 27
                break
        spent += used / 27
        seen[value] = (used, loss)
        state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if pruned else loss, state=state)
    # what was trained longest decides; among those the lowest loss
    longest = max(used for used, _ in seen.values())
    return table.snap(min((loss, value) for value, (used, loss) in seen.items() if used == longest)[1])


def rank_prefix(fraction: float) -> Search:
    """Rank five arms spread over the grid by their value at `fraction` of the run; costs 5 * fraction FRE."""

    def search(table: Table, budget: float, seed: int) -> float:
        arms = table.decays[np.linspace(0, len(table.decays) - 1, 7).round().astype(int)[1:-1]]
        return float(min(arms, key=lambda value: np.interp(fraction, table.at, table.read(value, seed))))

    return search


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 1e6


def _optuna():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
