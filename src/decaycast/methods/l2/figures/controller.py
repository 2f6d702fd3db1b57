"""Fig. 1c, and the paper's stated failure: its AutoL2 against the tuned constant, without and with a learning-rate schedule.

In torch's unit the paper's L = 0.1 is a weight decay of 2k*0.1 = 2 for k = 10 classes, and its refractory period 2 steps times
weight decay. Beside it, for comparison and not judged: the bare numbers, 0.1 and 0.1, and AutoL2 on the clock of e-folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import common_seeds, group, interval, mean_trace, points
from decaycast.methods.l2.figures.constants import Grid
from decaycast.methods.l2.figures.shared import (
    PAPER,
    Outcome,
    accuracies,
    best_accuracy,
    best_table,
    leader,
    setup,
    tuned,
)

ARMS: Mapping[str, Mapping[str, Scalar]] = {  # the first is the paper's and is judged
    "AutoL2": {"weight_decay": 2.0, "rule": "autol2", "refractory": 2.0},
    "AutoL2 from 0.1": {"weight_decay": 0.1, "rule": "autol2"},
    "AutoL2 on e-folds": {"weight_decay": 1.0, "rule": "autol2-efolds"},
}
JUDGED = next(iter(ARMS))
SEEDS = 5
CAPTIONS = {
    "validation_accuracy": "Mean over seeds with their range; of the constants the one with the best mean accuracy.",
    "weight_decay": "Geometric mean over seeds with their range. AutoL2 lowers it tenfold when training stops improving; its "
    "start of 0.1 in the paper is a weight decay of 2 in torch's unit. On e-folds it spends a budget of 1.3.",
}
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
        """The arms of AutoL2, and the grid of constants."""
        grid = self.grids[size]
        auto = [Run(config={**grid.config, **arm}, seed=seed) for arm in ARMS.values() for seed in range(grid.seeds)]
        return [*auto, *grid.runs()]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy, the weight decay AutoL2 sets, and the grid."""
        auto, constants = _sides(rows)
        if not auto or not constants:
            return []
        shown = dict(auto)
        seeds = common_seeds(constants.values())
        if seeds:
            best = leader(best_table(constants, seeds))
            shown[f"constant λ = {best:.2g}"] = constants[best]
        return [_curves(shown, "validation_accuracy"), _curves(shown, "weight_decay"), _grid_panel(auto, constants)]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when AutoL2's lead in best accuracy lies on the claim's side of 0 with its 95 % interval; five seeds.

        The tuned constant is, for each seed, the one that leads on the other seeds. An interval around 0 decides nothing. *Steps
        to reach*: until AutoL2 comes to that constant's best of the same seed, over the seeds in which it does.
        """
        auto, constants = _sides(rows)
        seeds = common_seeds([*auto.values(), *constants.values()])
        positive = [decay for decay in constants if decay > 0]
        if JUDGED not in auto or len(positive) < 3 or len(seeds) < 2:
            reason = f"needs the paper's AutoL2 and three constants, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        table = best_table(constants, seeds)
        tops = dict(zip(seeds, tuned(table, seeds), strict=True))
        own = float(np.mean([steps_to(constants[leader(table, without=s)][s], tops[s]) for s in seeds]))
        numbers, words = {"tuned constant": leader(table)}, []
        outcome: Outcome = "not enough data"
        for name, of_seed in auto.items():
            lead = interval([best_accuracy(of_seed[s]) - tops[s] for s in seeds])
            there = [steps for s in seeds if np.isfinite(steps := steps_to(of_seed[s], tops[s]))]
            numbers |= {**lead.numbers(f"lead of {name}"), f"reached by {name}": len(there)}
            when = f"after {np.mean(there):,.0f} steps" if there else "never"
            words.append(
                f"{name}: {points(lead)} points above the tuned constant, reaches its best in {len(there)} of "
                f"{len(seeds)} seeds, {when} (the constant: {own:,.0f})"
            )
            if name == JUDGED and len(seeds) >= SEEDS:
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


def _sides(rows: Sequence[Row]) -> tuple[Mapping[str, BySeed], Mapping[float, BySeed]]:
    """The arms of AutoL2 by name (the paper's first), and constants by weight decay; each by seed."""
    auto: dict[str, dict[int, Row]] = {}
    for name, arm in ARMS.items():
        own = [row for row in rows if _arm(row) == dict(arm)]
        if found := group(own, "weight_decay"):
            auto[name] = dict(next(iter(found.values())))
    return auto, group([row for row in rows if "rule" not in row.run.config], "weight_decay")


def _arm(row: Row) -> dict[str, Scalar]:
    config = row.run.config
    return {name: config[name] for name in ("weight_decay", "rule", "refractory") if name in config}


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
        caption=CAPTIONS[column],
    )


def _grid_panel(auto: Mapping[str, BySeed], constants: Mapping[float, BySeed]) -> Panel:
    decays = [decay for decay in constants if decay > 0]
    best = [[best_accuracy(row) for row in constants[decay].values()] for decay in decays]
    traces = [mean_trace("constants", decays, best)] if decays else []
    levels = dict(auto)
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
