"""Fig. 1b: one short run at a large weight decay predicts the best constant for every budget, lambda = c/T."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import common_seeds, group, interval, mean_trace, number, points
from decaycast.methods.l2.figures.constants import CONSTANT, Grid
from decaycast.methods.l2.figures.shared import (
    PAPER,
    best_accuracy,
    best_table,
    leader,
    rate_of,
    setup,
    time_to_best,
    tuned,
)

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the longest budget
PROBE_EFOLDS = 3.0  # length of the short run; it is the beginning of the grid's run
PROBE = 1  # its place in the grid, counted from the largest weight decay: at the largest, networks barely learn
CLOSE = 0.01
SEEDS = 3
Groups = Mapping[float, Mapping[int, Row]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Accuracy at the predicted weight decay against that of the tuned constant, budget by budget."""

    name: str = "l2/forecast"
    title: str = "Predicted against tuned weight decay"
    claim: str = (
        "One short run at a large weight decay measures c = lambda*t*; at every budget T the constant lambda = c/T comes within "
        "one point of the tuned constant's best accuracy."
    )
    source: str = f"{PAPER}, sec. 2, fig. 1b"
    grids: Mapping[Size, Grid] = field(default_factory=lambda: CONSTANT)

    def runs(self, size: Size) -> list[Run]:
        """A grid of constants at the longest budget; the short run is the beginning of one of them."""
        return self.grids[size].runs()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy and weight decay against the budget, and the grid behind them."""
        groups = group(rows, "weight_decay")
        seeds = common_seeds(groups.values())
        if not seeds or _positive(groups) < 3:
            return []
        return [_accuracy_panel(groups, seeds), _decay_panel(groups, seeds), _grid_panel(groups, seeds)]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when at every budget the interval of the shortfall against the tuned constant ends below one point.

        It is not held when at some budget the whole interval lies above. The predicted accuracy is read between the grid's
        decays, linearly in log lambda; c is the mean over seeds; the tuned constant is, for each seed, chosen on the others.
        """
        groups = group(rows, "weight_decay")
        seeds = common_seeds(groups.values())
        if _positive(groups) < 3 or len(seeds) < SEEDS:
            return Verdict(outcome="not enough data", reason=f"needs three weight decays, with {SEEDS} seeds each")
        constant, numbers, words, shortfalls = measured_constant(groups, seeds), {}, [], []
        for budget in budgets(groups):
            predicted, table = constant / budget, best_table(groups, seeds, budget)
            best = leader(table)
            tops = zip(tuned(table, seeds), seeds, strict=True)
            lost = interval([top - between(groups, s, budget, predicted) for top, s in tops])
            shortfalls.append(lost)
            numbers |= {
                f"predicted at {budget:.0f}": predicted,
                f"tuned at {budget:.0f}": best,
                f"lost at {budget:.0f}": lost.mean,
            }
            words.append(f"T = {budget:,.0f}: predicted {predicted:.2g}, tuned {best:.2g}, {points(lost)} points lost")
        close, far = all(lost.high <= CLOSE for lost in shortfalls), any(lost.low > CLOSE for lost in shortfalls)
        outcome = "held" if close else "not held" if far else "not enough data"
        any_row = next(iter(groups[max(groups)].values()))
        numbers |= {"c": constant, "e-folds at t*": constant * rate_of(any_row) / number(any_row, "weight_decay")}
        words.append(f"t* of the short run is {numbers['e-folds at t*']:.2f} e-folds; {len(seeds)} seeds")
        return Verdict(outcome=outcome, reason="; ".join(words), numbers=numbers)


def measured_constant(groups: Groups, seeds: Sequence[int]) -> float:
    """The constant c = lambda*t* of the short run at a large weight decay, in steps; mean over seeds."""
    probe = sorted((decay for decay in groups if decay > 0), reverse=True)[PROBE]
    return float(np.mean([probe * time_to_best(beginning(groups[probe][s])) for s in seeds]))


def beginning(row: Row) -> Row:
    """The short run: the first `PROBE_EFOLDS` of a run."""
    until = PROBE_EFOLDS / rate_of(row)
    length = max(1, int(np.sum(np.array(row.curve["step"]) <= until)))
    return Row(run=row.run, curve={name: list(values)[:length] for name, values in row.curve.items()})


def budgets(groups: Groups) -> list[float]:
    """The budgets in steps, of runs as long as these."""
    steps = max(number(row, "steps") for of_seed in groups.values() for row in of_seed.values())
    return [share * steps for share in SHARES]


def between(groups: Groups, seed: int, budget: float, weight_decay: float) -> float:
    """Best accuracy within the budget at a decay between those of the grid: linear in its logarithm, level outside."""
    decays = [decay for decay in groups if decay > 0]
    best = [best_accuracy(groups[decay][seed], budget) for decay in decays]
    return float(np.interp(np.log(weight_decay), np.log(decays), best))


def _positive(groups: Groups) -> int:
    return sum(decay > 0 for decay in groups)


def _accuracy_panel(groups: Groups, seeds: Sequence[int]) -> Panel:
    steps, constant = budgets(groups), measured_constant(groups, seeds)
    predicted = [[between(groups, s, budget, constant / budget) for s in seeds] for budget in steps]
    tops = [tuned(best_table(groups, seeds, budget), seeds) for budget in steps]
    traces = [mean_trace("predicted λ = c/T", steps, predicted), mean_trace("tuned constant", steps, tops)]
    if 0.0 in groups:
        none = [[best_accuracy(groups[0.0][s], budget) for s in seeds] for budget in steps]
        traces.append(mean_trace("λ = 0", steps, none))
    return Panel(
        title="Best accuracy within the budget",
        x_label="budget T, optimiser steps",
        y_label="best validation accuracy",
        traces=traces,
        x_log=True,
        caption="Mean over seeds, band: one standard error. The predicted accuracy is read between the grid's weight decays, "
        "linearly in log λ; the tuned constant is, for each seed, the best of the grid on the other seeds.",
    )


def _decay_panel(groups: Groups, seeds: Sequence[int]) -> Panel:
    steps, constant = budgets(groups), measured_constant(groups, seeds)
    best = [leader(best_table(groups, seeds, budget)) for budget in steps]
    shown = [(budget, decay) for budget, decay in zip(steps, best, strict=True) if decay > 0]
    return Panel(
        title="Weight decay against the budget",
        x_label="budget T, optimiser steps",
        y_label="weight decay λ",
        traces=[
            Trace(name="predicted c/T", x=steps, y=[constant / budget for budget in steps], mode="lines+markers"),
            Trace(name="tuned constant", x=[b for b, _ in shown], y=[d for _, d in shown], mode="markers"),
        ],
        x_log=True,
        y_log=True,
        caption=f"c is measured in the first {PROBE_EFOLDS:g} e-folds of the run at the second largest weight decay. Where no "
        "weight decay is best, the tuned point is missing.",
    )


def _grid_panel(groups: Groups, seeds: Sequence[int]) -> Panel:
    decays, traces = [decay for decay in groups if decay > 0], []
    for budget in budgets(groups):
        values = [[best_accuracy(groups[decay][s], budget) for s in seeds] for decay in decays]
        traces.append(mean_trace(f"T = {budget:,.0f}", decays, values))
    return Panel(
        title="The grid of constants",
        x_label="weight decay λ",
        y_label="best validation accuracy within T steps",
        traces=traces,
        x_log=True,
        caption=f"Mean over seeds, band: one standard error. {setup([groups[decays[0]][seeds[0]]])}",
    )
