"""Fig. 1c, and the paper's stated failure: its AutoL2 against the tuned constant, without and with a learning-rate schedule.

AutoL2 starts at the paper's L = 0.1, which is a weight decay of 2k*0.1 = 2 in torch's unit for k = 10 classes, and for
comparison at a weight decay of 0.1, the bare number. Its refractory period is the rule's default of 0.1/weight decay steps in
both; the paper's, 0.1/L, is 20 times longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.methods.l2.figures.constants import Grid
from decaycast.methods.l2.figures.shared import (
    PAPER,
    Outcome,
    accuracies,
    best_accuracy,
    best_table,
    common_seeds,
    group,
    interval,
    leader,
    mean_trace,
    points,
    setup,
    tuned,
)

STARTS = (2.0, 0.1)  # torch's weight decay; the first is the paper's and is judged
RULE = "autol2"
SEEDS = 5
BySeed = Mapping[int, Row]


@dataclass(frozen=True, kw_only=True)
class AgainstConstant:
    """The paper's AutoL2 beside a grid of constants, at one learning-rate schedule."""

    name: str
    title: str
    claim: str
    better: bool  # what the claim says of AutoL2
    grids: Mapping[Size, Grid]
    source: str = f"{PAPER}, sec. 4, fig. 1c"

    def runs(self, size: Size) -> list[Run]:
        """AutoL2 from each start, and the grid of constants."""
        grid = self.grids[size]
        auto = [grid.run(start, seed, rule=RULE) for start in STARTS for seed in range(grid.seeds)]
        return [*auto, *grid.runs()]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy, the weight decay AutoL2 sets, and the grid."""
        auto, constants = _sides(rows)
        if not auto or not constants:
            return []
        shown = {f"AutoL2 from {start:g}": of_seed for start, of_seed in auto.items()}
        seeds = common_seeds(constants.values())
        if seeds:
            best = leader(best_table(constants, seeds))
            shown[f"best constant {best:.2g}"] = constants[best]
        return [_curves(shown, "validation_accuracy"), _curves(shown, "weight_decay"), _grid_panel(auto, constants)]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when AutoL2's lead in best accuracy lies on the claim's side of 0 with its 95 % interval; five seeds.

        The tuned constant is, for each seed, the one that leads on the other seeds. An interval around 0 decides nothing. *Steps
        to reach*: until AutoL2 comes to that constant's best of the same seed, over the seeds in which it does.
        """
        auto, constants = _sides(rows)
        seeds = common_seeds([*auto.values(), *constants.values()])
        positive = [decay for decay in constants if decay > 0]
        if STARTS[0] not in auto or len(positive) < 3 or len(seeds) < 2:
            reason = f"needs AutoL2 from its start and three constants, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        table = best_table(constants, seeds)
        tops = dict(zip(seeds, tuned(table, seeds), strict=True))
        own = float(np.mean([steps_to(constants[leader(table, without=s)][s], tops[s]) for s in seeds]))
        numbers, words = {"tuned constant": leader(table)}, []
        outcome: Outcome = "not enough data"
        for start, of_seed in auto.items():
            lead = interval([best_accuracy(of_seed[s]) - tops[s] for s in seeds])
            there = [steps for s in seeds if np.isfinite(steps := steps_to(of_seed[s], tops[s]))]
            numbers |= {**lead.numbers(f"lead from {start:g}"), f"reached from {start:g}": len(there)}
            when = f"after {np.mean(there):,.0f} steps" if there else "never"
            words.append(
                f"from {start:g}: {points(lead)} points above the tuned constant, reaches its best in {len(there)} of "
                f"{len(seeds)} seeds, {when} (the constant: {own:,.0f})"
            )
            if start == STARTS[0] and len(seeds) >= SEEDS:
                outcome = self._outcome(lead.low, lead.high)
        return Verdict(outcome=outcome, reason="; ".join(words), numbers=numbers)

    def _outcome(self, low: float, high: float) -> Outcome:
        if low <= 0 <= high:
            return "not enough data"
        return "held" if (low > 0) == self.better else "not held"


def steps_to(row: Row, accuracy: float) -> float:
    """First measured step at which a run is at least as good as `accuracy`; infinite if never."""
    reached = accuracies(row) >= accuracy
    return float(np.array(row.curve["step"])[reached.argmax()]) if reached.any() else np.inf


def _sides(rows: Sequence[Row]) -> tuple[Mapping[float, BySeed], Mapping[float, BySeed]]:
    """AutoL2 by its start (the paper's first), and constants by weight decay; each by seed."""
    auto = group([row for row in rows if row.run.config.get("rule") == RULE], "weight_decay")
    constants = group([row for row in rows if row.run.config.get("rule") != RULE], "weight_decay")
    return {start: auto[start] for start in STARTS if start in auto}, constants


def _curves(shown: Mapping[str, BySeed], column: str) -> Panel:
    traces = []
    for name, of_seed in shown.items():
        length = min(len(row.curve["step"]) for row in of_seed.values())
        values = np.array([list(row.curve[column])[:length] for row in of_seed.values()])
        low, high = (values.min(0).tolist(), values.max(0).tolist()) if len(values) > 1 else (None, None)
        x = list(next(iter(of_seed.values())).curve["step"])[:length]
        middle = np.exp(np.log(values).mean(0)) if column == "weight_decay" and (values > 0).all() else values.mean(0)
        traces.append(Trace(name=name, x=x, y=middle.tolist(), low=low, high=high))
    if column == "weight_decay":
        traces = [trace for trace in traces if min(trace.y) > 0]
    label = column.replace("_", " ")
    return Panel(
        title="Accuracy" if column == "validation_accuracy" else "The weight decay in force",
        x_label="optimiser steps",
        y_label=label,
        traces=traces,
        x_log=True,
        y_log=column == "weight_decay",
        caption="Mean over seeds with their range."
        if column == "validation_accuracy"
        else "Geometric mean over seeds with their range. AutoL2 lowers it tenfold when training stops improving.",
    )


def _grid_panel(auto: Mapping[float, BySeed], constants: Mapping[float, BySeed]) -> Panel:
    decays = [decay for decay in constants if decay > 0]
    best = [[best_accuracy(row) for row in constants[decay].values()] for decay in decays]
    traces = [mean_trace("constants", decays, best)] if decays else []
    levels = {f"AutoL2 from {start:g}": of_seed for start, of_seed in auto.items()}
    if 0.0 in constants:
        levels["λ = 0"] = constants[0.0]
    for name, of_seed in levels.items():
        own = [best_accuracy(row) for row in of_seed.values()]
        if decays:
            traces.append(mean_trace(name, [decays[0], decays[-1]], [own, own]))
    return Panel(
        title="Best accuracy",
        x_label="constant weight decay λ",
        y_label="best validation accuracy",
        traces=traces,
        x_log=True,
        caption="Mean over seeds, band: one standard error. Level lines do not depend on the constant. "
        f"{setup([row for of_seed in constants.values() for row in of_seed.values()])}",
    )
