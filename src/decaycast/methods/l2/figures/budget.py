"""Fig. 2c, f: at a fixed budget the best weight decay is neither zero nor the largest, and falls as the budget grows (C3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import Interval, common_seeds, group, interval, mean_trace, number, points
from decaycast.methods.l2.figures.fc_runs import LADDERS as FC
from decaycast.methods.l2.figures.fc_runs import train_fc_figure
from decaycast.methods.l2.figures.shared import PAPER, Ladder, best_accuracy, best_table, leader, rates, setup, tuned

SHARES = (1 / 16, 1 / 4, 1.0)  # of the longest budget; learning rates are constant, so one run shows all three
SEEDS = 3
Groups = Mapping[float, Mapping[int, Row]]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs of one length in steps over a range of weight decays, zero included."""

    ladder: Ladder
    steps: int

    def runs(self) -> list[Run]:
        """One run per decay and seed at the ladder's first learning rate."""
        lr = self.ladder.lrs[0]
        runs = [*self.ladder.without_decay(lr), *self.ladder.runs((lr,))]
        return [Run(config={**run.config, "steps": self.steps}, seed=run.seed) for run in runs]


GRIDS: dict[Size, Grid] = {
    "smoke": Grid(ladder=replace(FC["smoke"], rates=rates(0.1, 0.001, 3), seeds=2), steps=640),
    "small": Grid(ladder=replace(FC["small"], rates=rates(0.02, 2e-5, 10)), steps=8000),
    "paper": Grid(ladder=replace(FC["paper"], lrs=(0.015,), rates=rates(0.01, 1e-6, 13)), steps=320_000),
}


@dataclass(frozen=True, kw_only=True)
class FixedBudget:
    """Best accuracy and loss within a budget over a grid of weight decays, for three budgets a factor of 4 apart."""

    name: str = "l2/fixed-budget"
    title: str = "Fixed budget: best at an intermediate weight decay"
    claim: str = (
        "At a fixed budget of T steps the best accuracy is reached at an intermediate weight decay, neither zero nor the "
        "largest, and this weight decay is inverse to T."
    )
    source: str = f"{PAPER}, sec. 2, fig. 2c, f"
    grids: Mapping[Size, Grid] = field(default_factory=lambda: GRIDS)

    train = train_fc_figure

    def runs(self, size: Size) -> list[Run]:
        """A grid of decays at the longest budget; shorter ones are read from the same runs."""
        return self.grids[size].runs()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Best accuracy and lowest loss within each budget, and the optimum against the budget."""
        groups = group(rows, "weight_decay")
        if len([decay for decay in groups if decay > 0]) < 3:
            return []
        panels = [_panel(groups, "accuracy"), _panel(groups, "loss")]
        return [*panels, _optimum_panel(groups)] if _seeds(groups) else panels

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the best decay beats zero and the largest at every budget and -1 lies in the slope's interval.

        *Beats*: the difference of best accuracies, in each seed at the decay that leads on the other seeds, lies above 0 with
        its 95 % interval. *Slope*: of the logarithm of the best decay on that of the budget, fitted in each seed.
        """
        groups = group(rows, "weight_decay")
        seeds = _seeds(groups)
        if len(groups) < 4 or 0.0 not in groups or len(seeds) < SEEDS:
            reason = f"needs zero and three more weight decays, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        numbers, words, held = {}, [], True
        for budget in budgets(groups):
            best, zero, largest = margins(groups, seeds, budget)
            beats = min(zero.low, largest.low) > 0
            held = held and beats
            numbers |= {f"best at {budget:.0f}": best, f"over zero at {budget:.0f}": zero.mean}
            words.append(
                f"T = {budget:,.0f}: best at {best:.2g}, {points(zero)} points over zero and {points(largest)} over the largest"
            )
        exponent = interval([optimum_slope(groups, seed) for seed in seeds])
        of_loss = interval([optimum_slope(groups, seed, "validation_loss") for seed in seeds])
        numbers |= {**exponent.numbers("slope"), **of_loss.numbers("slope of the loss")}
        held = held and exponent.low <= -1 <= exponent.high
        words.append(
            f"best λ ~ T^{exponent.mean:.2f} ({exponent.low:.2f} to {exponent.high:.2f}); the claim says -1; by loss "
            f"{of_loss.mean:.2f} ({of_loss.low:.2f} to {of_loss.high:.2f}); {len(seeds)} seeds"
        )
        return Verdict(outcome="held" if held else "not held", reason="; ".join(words), numbers=numbers)


def budgets(groups: Groups) -> list[float]:
    """The three budgets, in steps, of runs as long as these."""
    steps = max(number(row, "steps") for of_seed in groups.values() for row in of_seed.values())
    return [share * steps for share in SHARES]


def margins(groups: Groups, seeds: Sequence[int], budget: float) -> tuple[float, Interval, Interval]:
    """The best positive decay within `budget`, and by how much it beats zero and the largest: intervals over seeds."""
    table = best_table(groups, seeds, budget)
    positive = {decay: values for decay, values in table.items() if decay > 0}
    tops = dict(zip(seeds, tuned(positive, seeds), strict=True))
    zero, largest = (interval([tops[s] - table[other][s] for s in seeds]) for other in (0.0, max(groups)))
    return leader(positive), zero, largest


def optimum(groups: Groups, seed: int, budget: float, column: str = "validation_accuracy") -> float:
    """The best positive decay of one seed: the vertex of a parabola in log lambda through the best point and its neighbours.

    At the end of the grid, or where the three points lie on a line, it is the best point itself.
    """
    decays = [decay for decay in groups if decay > 0]
    x, y = np.log(decays), [_best(groups[decay][seed], budget, column) for decay in decays]
    i = int(np.argmax(y))
    if 0 < i < len(x) - 1:
        left, right = y[i] - y[i - 1], y[i] - y[i + 1]
        if left + right > 0:
            return float(np.exp(x[i] + 0.5 * (x[i + 1] - x[i - 1]) / 2 * (left - right) / (left + right)))
    return decays[i]


def optimum_slope(groups: Groups, seed: int, column: str = "validation_accuracy") -> float:
    """Slope of the logarithm of the optimum on that of the budget, in one seed."""
    steps = budgets(groups)
    best = [optimum(groups, seed, budget, column) for budget in steps]
    return float(np.polyfit(np.log(steps), np.log(best), 1)[0])


def _best(row: Row, budget: float, column: str) -> float:
    """Best value within the budget, larger is better."""
    if column == "validation_accuracy":
        return best_accuracy(row, budget)
    values = np.array(row.curve[column])[np.array(row.curve["step"]) <= budget]
    return -float(values.min())


def _seeds(groups: Groups) -> list[int]:
    return common_seeds(groups.values())


def _panel(groups: Groups, what: str) -> Panel:
    column, sign = f"validation_{what}", 1 if what == "accuracy" else -1
    decays = [decay for decay in groups if decay > 0]
    traces = []
    for budget in budgets(groups):
        values = [[sign * _best(row, budget, column) for row in groups[decay].values()] for decay in decays]
        traces.append(mean_trace(f"T = {budget:,.0f}", decays, values))
        if 0.0 in groups:
            none = float(np.mean([sign * _best(row, budget, column) for row in groups[0.0].values()]))
            traces.append(Trace(name=f"λ = 0, T = {budget:,.0f}", x=[decays[0], decays[-1]], y=[none, none]))
    word = "Best" if what == "accuracy" else "Lowest"
    return Panel(
        title=f"{word} validation {what} within T steps",
        x_label="weight decay λ",
        y_label=f"{word.lower()} validation {what}",
        traces=traces,
        x_log=True,
        y_log=what == "loss",
        caption="Mean over seeds, band: one standard error. The learning rate is constant, so the budgets are read from the "
        f"same runs. Level lines: no weight decay. {setup([row for of_seed in groups.values() for row in of_seed.values()])}",
    )


def _optimum_panel(groups: Groups) -> Panel:
    steps, seeds, traces = budgets(groups), _seeds(groups), []
    for what in ("accuracy", "loss"):
        found = [[optimum(groups, seed, budget, f"validation_{what}") for seed in seeds] for budget in steps]
        middle = [math.exp(float(np.mean(np.log(each)))) for each in found]
        traces.append(
            Trace(
                name=f"best by {what}",
                x=steps,
                y=middle,
                low=[min(each) for each in found],
                high=[max(each) for each in found],
                mode="lines+markers",
            )
        )
    constant = math.exp(float(np.mean([math.log(t * y) for t, y in zip(steps, traces[0].y, strict=True)])))
    traces.append(Trace(name="c/T", x=steps, y=[constant / t for t in steps]))
    return Panel(
        title="Best weight decay against the budget",
        x_label="budget T, optimiser steps",
        y_label="best weight decay",
        traces=traces,
        x_log=True,
        y_log=True,
        caption="Geometric mean over seeds, band: their range. A parabola through the best point and its neighbours.",
    )
