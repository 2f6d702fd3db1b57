"""Fig. 2a, d: the time to the best accuracy is inverse to the weight decay, over three decades and at two learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import common_seeds, group, interval, number
from decaycast.methods.l2.figures.fc_runs import LADDERS, train_fc_figure
from decaycast.methods.l2.figures.shared import PAPER, TOLERANCE, accuracies, setup, time_to_best

WIDEST = 0.15  # of the slope's interval: a wider one says too little
SEEDS = 3
Groups = Mapping[tuple[float, float], Mapping[int, Row]]  # by learning rate and weight decay, then by seed


@dataclass(frozen=True)
class TimeToBest:
    """t* against weight decay at each learning rate, each run 2 e-folds long."""

    name: str = "l2/time-to-best"
    title: str = "Time to best accuracy against weight decay"
    claim: str = "The time to the best accuracy is inverse to the weight decay: t* = c/(lr*lambda), a slope of -1."
    source: str = f"{PAPER}, sec. 2, fig. 2a, d"

    train = train_fc_figure

    def runs(self, size: Size) -> list[Run]:
        """One run per learning rate, decay and seed, of a fixed number of e-folds."""
        return LADDERS[size].runs()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """t* against the decay, t* in e-folds, and accuracy against e-folds."""
        groups = _decaying(rows)
        return [_law_panel(groups), _collapse_panel(groups), *_curve_panels(groups)] if groups else []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when -1 lies in the slope's 95 % interval and that is narrower than 0.15; if it is wider, data are too few.

        In each seed, log t* is fitted by one slope on log lambda with an intercept per learning rate; the interval is
        Student's over the seeds' slopes.
        """
        groups = _decaying(rows)
        seeds = common_seeds(groups.values())
        per_lr = {lr: sum(key[0] == lr for key in groups) for lr, _ in groups}
        if len(seeds) < SEEDS or min(per_lr.values(), default=0) < 3:
            reason = f"needs three weight decays at each learning rate, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        pooled = interval([common_slope(groups, seed) for seed in seeds])
        numbers = {**pooled.numbers("slope"), "width": pooled.high - pooled.low}
        words = []
        for lr in per_lr:
            of_lr = {key: group for key, group in groups.items() if key[0] == lr}
            own = interval([common_slope(of_lr, seed) for seed in seeds])
            efolds = float(
                np.exp(np.mean([math.log(_efolds(row)) for of_seed in of_lr.values() for row in of_seed.values()]))
            )
            numbers |= {f"slope at lr {lr:g}": own.mean, f"e-folds at t*, lr {lr:g}": efolds}
            words.append(
                f"{own.mean:.2f} ({own.low:.2f} to {own.high:.2f}) at lr {lr:g}, where t* is {efolds:.2f} e-folds"
            )
        inside, narrow = pooled.low <= -1 <= pooled.high, pooled.high - pooled.low < WIDEST
        reason = (
            f"log-log slope {pooled.mean:.3f}, 95 % interval {pooled.low:.3f} to {pooled.high:.3f} over {len(seeds)} seeds; "
            f"the claim says -1 in an interval narrower than {WIDEST:g}. Alone: {'; '.join(words)}"
        )
        outcome = "not held" if not inside else "held" if narrow else "not enough data"
        return Verdict(outcome=outcome, reason=reason, numbers=numbers)


def common_slope(groups: Groups, seed: int) -> float:
    """Least-squares slope of log t* on log lambda in one seed, common to all learning rates, each with its intercept."""
    above = below = 0.0
    for lr in {key[0] for key in groups}:
        points = [
            (math.log(decay), math.log(time_to_best(group[seed])))
            for (own, decay), group in groups.items()
            if own == lr
        ]
        x, y = np.array(points).T
        above += float(((x - x.mean()) * (y - y.mean())).sum())
        below += float(((x - x.mean()) ** 2).sum())
    return above / below


def _decaying(rows: Sequence[Row]) -> Groups:
    return {key: of_seed for key, of_seed in group(rows, "lr", "weight_decay").items() if key[1] > 0}


def _efolds(row: Row) -> float:
    return time_to_best(row) * number(row, "lr") * number(row, "weight_decay")


def _geometric(name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Trace:
    """Geometric mean with the range over seeds."""
    return Trace(
        name=name,
        x=x,
        y=[float(np.exp(np.mean(np.log(each)))) for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
        mode="lines+markers",
    )


def _law_panel(groups: Groups) -> Panel:
    traces, rows = [], [row for of_seed in groups.values() for row in of_seed.values()]
    for lr in sorted({key[0] for key in groups}, reverse=True):
        decays = [decay for own, decay in groups if own == lr]
        times = [[time_to_best(row) for row in groups[lr, decay].values()] for decay in decays]
        traces.append(_geometric(f"lr = {lr:g}", decays, times))
        products = [np.array(t) * decay for t, decay in zip(times, decays, strict=True)]
        constant = float(np.exp(np.mean([np.mean(np.log(product)) for product in products])))
        traces.append(Trace(name=f"c/λ, lr = {lr:g}", x=decays, y=[constant / decay for decay in decays]))
    return Panel(
        title="Time to best accuracy",
        x_label="weight decay λ",
        y_label="t*, optimiser steps",
        traces=traces,
        x_log=True,
        y_log=True,
        caption=f"Steps until validation accuracy comes within {TOLERANCE:.1%} of the run's best. Geometric mean over seeds, "
        f"band: their range. The lines without markers have slope -1. {setup(rows)}",
    )


def _collapse_panel(groups: Groups) -> Panel:
    traces = []
    for lr in sorted({key[0] for key in groups}, reverse=True):
        keys = [key for key in groups if key[0] == lr]
        values = [[_efolds(row) for row in groups[key].values()] for key in keys]
        traces.append(_geometric(f"lr = {lr:g}", [lr * decay for _, decay in keys], values))
    return Panel(
        title="The same in e-folds of decay",
        x_label="lr·λ, e-folds per step",
        y_label="t*·lr·λ, e-folds",
        traces=traces,
        x_log=True,
        y_log=True,
        caption="If t* = c/(lr·λ) these lines are level, and they meet where c does not depend on the learning rate.",
    )


def _curve_panels(groups: Groups) -> list[Panel]:
    panels = []
    for lr in sorted({key[0] for key in groups}, reverse=True):
        traces = []
        for own, decay in groups:
            if own == lr:
                row = next(iter(groups[own, decay].values()))
                traces.append(Trace(name=f"λ = {decay:.3g}", x=list(row.curve["efolds"]), y=accuracies(row).tolist()))
        panels.append(
            Panel(
                title=f"Accuracy on the decay's clock, lr = {lr:g}",
                x_label="e-folds of decay spent",
                y_label="validation accuracy",
                traces=traces,
                x_log=True,
                caption="One run per weight decay, first seed. Below the largest decays the curves rise and fall together.",
            )
        )
    return panels
