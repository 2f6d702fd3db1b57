"""Figs. 1a, 2b, 2e, 3: with a run length proportional to 1/lambda the best accuracy hardly depends on lambda, but lambda = 0
stays below (claims C2 and C4).

The lower half of a ladder, in the logarithm of lambda, is its *plateau*: above it, runs have too few steps to learn at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import Interval, common_seeds, group, interval, mean_trace, points
from decaycast.methods.l2.figures.fc_runs import train_fc_figure
from decaycast.methods.l2.figures.shared import PAPER, Ladder, Outcome, accuracies, best_accuracy, setup

FLAT = 0.01  # of accuracy: what counts as hardly any change from end to end of the plateau
SEEDS = 5
Groups = dict[float, dict[int, Row]]  # by weight decay, then by seed


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Best accuracy against the weight decay, at one number of e-folds, of one network."""

    name: str
    title: str
    ladders: Mapping[Size, Ladder]
    figure: str  # of the paper
    claim: str = (
        "With the run length proportional to 1/lambda, the best accuracy hardly depends on lambda below a largest one: from "
        "end to end of the lower half of the ladder it changes by at most one point."
    )

    @property
    def source(self) -> str:
        """Where the paper shows it."""
        return f"{PAPER}, sec. 2, {self.figure}"

    def runs(self, size: Size) -> list[Run]:
        """The ladder of decays at every learning rate, and no decay at the first for as long as the longest."""
        ladder = self.ladders[size]
        return [*ladder.without_decay(ladder.lrs[0]), *ladder.runs()]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Best accuracy against the decay, and the curves on two clocks."""
        by_lr = _by_lr(rows)
        if not by_lr:
            return []
        lr = _main_lr(by_lr)
        panels = [ladder_panel(by_lr), _curve_panel(by_lr[lr], "efolds", lr), _curve_panel(by_lr[lr], "step", lr)]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the 95 % interval of the change along the plateau lies within one point; five seeds at least.

        The change is, in each seed, the slope of the best accuracy on log lambda times the length of the plateau; the
        interval is Student's over seeds. It is not held when the interval excludes 0 and the change exceeds the point,
        and otherwise the data are too few.
        """
        ladder = _main_ladder(rows)
        plateau, seeds = lower_half(ladder), common_seeds(ladder.values())
        if len(plateau) < 3 or len(seeds) < 2:
            return Verdict(outcome="not enough data", reason="needs five weight decays, with five seeds each")
        decades = math.log10(max(plateau) / min(plateau))
        change = interval([decades * slope(plateau, seed) for seed in seeds])
        means = [float(np.mean([best_accuracy(row) for row in of_seed.values()])) for of_seed in plateau.values()]
        spread = max(means) - min(means)
        numbers = {**change.numbers("change"), "spread": spread, "decades": decades, "best": max(means)}
        reason = (
            f"over {decades:.1f} decades up to λ = {max(plateau):.2g} the best accuracy changes by {points(change)} points with "
            f"rising λ, its means differ by {100 * spread:.2f} points ({len(seeds)} seeds, standard error "
            f"{100 * change.stderr:.2f}); flat is within {100 * FLAT:.0f} point"
        )
        return Verdict(outcome=_flatness(change, len(seeds)), reason=reason, numbers=numbers)


@dataclass(frozen=True, kw_only=True)
class FcPlateau(Plateau):
    """The same for the fully connected network, which trains by itself."""

    train = train_fc_figure


@dataclass(frozen=True, kw_only=True)
class ZeroDecay(Plateau):
    """The same rows: does lambda = 0, trained as long, come up to the plateau?"""

    claim: str = (
        "The limit of small weight decay is not zero weight decay: networks without decay, trained at least as long, stay "
        "below the plateau."
    )

    def runs(self, size: Size) -> list[Run]:
        """The ladder and no decay, both at the first learning rate."""
        ladder = self.ladders[size]
        return [*ladder.without_decay(ladder.lrs[0]), *ladder.runs(ladder.lrs[:1])]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Best accuracy so far against the step, without decay and along the plateau."""
        by_lr = _by_lr(rows)
        return [_record_panel(by_lr[_main_lr(by_lr)])] if by_lr else []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the gap, plateau minus no decay, lies above 0 with its 95 % interval; five seeds at least.

        In each seed it is the mean of the best accuracy over the plateau, minus that without decay; the interval is
        Student's over seeds.
        """
        ladder, zero = _main_ladder(rows), _main_ladder(rows, zero=True).get(0.0, {})
        plateau = lower_half(ladder)
        seeds = common_seeds([*plateau.values(), zero])
        if len(plateau) < 2 or len(seeds) < 2:
            return Verdict(outcome="not enough data", reason="needs two weight decays and none, with five seeds each")
        gaps = [
            float(np.mean([best_accuracy(of_seed[s]) for of_seed in plateau.values()])) - best_accuracy(zero[s])
            for s in seeds
        ]
        gap = interval(gaps)
        enough = len(seeds) >= SEEDS
        outcome = "not enough data" if not enough else "held" if gap.low > 0 else "not held"
        reason = (
            f"the plateau is {points(gap)} points above no weight decay (standard error {100 * gap.stderr:.2f}, {len(seeds)} "
            f"seeds in pairs{'' if enough else f'; {SEEDS} are needed'})"
        )
        return Verdict(outcome=outcome, reason=reason, numbers=gap.numbers("gap"))


@dataclass(frozen=True, kw_only=True)
class FcZeroDecay(ZeroDecay):
    """The same for the fully connected network, which trains by itself."""

    train = train_fc_figure


def lower_half(ladder: Groups) -> Groups:
    """The decays up to the middle of the ladder on a logarithmic axis, with what is there of them."""
    if not ladder:
        return {}
    middle = math.sqrt(min(ladder) * max(ladder)) * (1 + 1e-4)  # decays are rounded to six digits
    return {decay: of_seed for decay, of_seed in ladder.items() if decay <= middle}


def slope(plateau: Groups, seed: int) -> float:
    """Least-squares slope of best accuracy per decade of weight decay in one seed."""
    best = [best_accuracy(of_seed[seed]) for of_seed in plateau.values()]
    return float(np.polyfit(np.log10(list(plateau)), best, 1)[0])


def _flatness(change: Interval, seeds: int) -> Outcome:
    if seeds < SEEDS:
        return "not enough data"
    if change.inside(-FLAT, FLAT):
        return "held"
    return "not held" if abs(change.mean) > FLAT and not change.low <= 0 <= change.high else "not enough data"


def _by_lr(rows: Sequence[Row]) -> dict[float, Groups]:
    found: dict[float, Groups] = {}
    for (lr, decay), of_seed in group(rows, "lr", "weight_decay").items():
        found.setdefault(lr, {})[decay] = of_seed
    return found


def _main_lr(by_lr: Mapping[float, Groups]) -> float:
    """The learning rate that also has runs without decay, else the largest."""
    return max(by_lr, key=lambda lr: (0.0 in by_lr[lr], lr))


def _main_ladder(rows: Sequence[Row], *, zero: bool = False) -> Groups:
    by_lr = _by_lr(rows)
    groups = by_lr[_main_lr(by_lr)] if by_lr else {}
    return {decay: of_seed for decay, of_seed in groups.items() if zero or decay > 0}


def ladder_panel(by_lr: Mapping[float, Mapping[float, Mapping[int, Row]]]) -> Panel:
    """Best accuracy against the weight decay: a line per learning rate, level lines without decay."""
    traces, zeros = [], []
    rows = [row for groups in by_lr.values() for of_seed in groups.values() for row in of_seed.values()]
    for lr, groups in by_lr.items():
        decays = [decay for decay in groups if decay > 0]
        values = [[best_accuracy(row) for row in groups[decay].values()] for decay in decays]
        if decays:
            traces.append(mean_trace(f"lr = {lr:g}", decays, values))
        if 0.0 in groups:
            none = [best_accuracy(row) for row in groups[0.0].values()]
            every = [decay for groups in by_lr.values() for decay in groups if decay > 0]
            zeros.append(mean_trace(f"λ = 0, lr = {lr:g}", [min(every), max(every)], [none, none]) if every else None)
    return Panel(
        title="Best accuracy at a fixed number of e-folds",
        x_label="weight decay λ",
        y_label="best validation accuracy",
        traces=traces + [trace for trace in zeros if trace],
        x_log=True,
        caption="Mean over seeds, band: one standard error. Without decay (level line) the runs are as long as the longest "
        f"here. {setup(rows)}",
    )


def _curve_panel(groups: Groups, clock: str, lr: float) -> Panel:
    names = {"efolds": "e-folds of decay spent", "step": "optimiser steps"}
    traces = []
    for decay, of_seed in groups.items():
        row = next(iter(of_seed.values()))
        if clock == "step" or decay > 0:
            traces.append(Trace(name=f"λ = {decay:.3g}", x=list(row.curve[clock]), y=accuracies(row).tolist()))
    return Panel(
        title=f"Accuracy against {'the decay' if clock == 'efolds' else 'steps'}, lr = {lr:g}",
        x_label=names[clock],
        y_label="validation accuracy",
        traces=traces,
        x_log=True,
        caption="One run per weight decay, first seed.",
    )


def _record_panel(groups: Groups) -> Panel:
    shown = {decay: of_seed for decay, of_seed in groups.items() if decay == 0.0}
    shown |= lower_half({decay: of_seed for decay, of_seed in groups.items() if decay > 0})
    traces = []
    for decay, of_seed in shown.items():
        length = min(len(row.curve["step"]) for row in of_seed.values())
        records = np.array([np.maximum.accumulate(accuracies(row)[:length]) for row in of_seed.values()])
        x = list(next(iter(of_seed.values())).curve["step"])[:length]
        traces.append(
            Trace(
                name=f"λ = {decay:.3g}",
                x=x,
                y=records.mean(0).tolist(),
                low=records.min(0).tolist(),
                high=records.max(0).tolist(),
            )
        )
    return Panel(
        title="Best accuracy so far",
        x_label="optimiser steps",
        y_label="best validation accuracy up to here",
        traces=traces,
        x_log=True,
        caption="Mean and range over seeds. Runs with decay end after a fixed number of e-folds. "
        f"{setup([row for of_seed in groups.values() for row in of_seed.values()])}",
    )
