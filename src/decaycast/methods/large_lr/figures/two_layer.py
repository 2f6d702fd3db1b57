"""A large rate and then a small one (L-S) against the small one throughout (S), at equal training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.methods.large_lr.figures.arms import (
    LARGE,
    PAPER,
    PLANS,
    SEEDS,
    SMALL,
    Plan,
    at,
    by_arm,
    level_traces,
    levels_of,
    ratios,
    train_arm,
)
from decaycast.methods.large_lr.two_layer import RELAXATIONS

HALF, LOSS_GAP, FITTED = 0.5, 0.15, 0.005
"""Ratio of P-only errors, difference of P-only losses in nats, and test error of the kinds with Q."""
RELAXED = f"Where this leaves the paper's assumptions: {'; '.join(RELAXATIONS)}."


@dataclass(frozen=True, kw_only=True)
class TwoLayer:
    """P-only error and loss of both algorithms at matched training losses."""

    name: str = "large_lr/two-layer"
    title: str = "Large, then small, against small throughout"
    claim: str = (
        "At an equal training loss of 0.03, the large rate and then the small one (L-S) has a lower P-only test error than the "
        "small one throughout (S) in every seed and at most half of it on average, and a P-only test loss at least 0.15 lower; "
        "both fit the kinds with Q."
    )
    source: str = f"{PAPER}, theorems on L-S and S; the setting is not theirs"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Both algorithms at every seed."""
        return self.plans[size].runs(LARGE, SMALL)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """P-only error and loss at each training loss, and the errors of both algorithms seed by seed."""
        arms = {arm: found for arm, found in by_arm(rows).items() if arm in (LARGE, SMALL)}
        if not arms:
            return []
        panels = [level_panel(arms, "p_only_test_error"), level_panel(arms, "p_only_test_loss")]
        return [*panels, _pairs_panel(arms)] if len(arms) == 2 else panels

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when L-S has the lower P-only error in every seed and the means over seeds keep their bounds (`bounds`).

        At training loss 0.03: error of L-S over that of S at most 0.5, loss of S minus that of L-S at least 0.15, the larger of
        the test errors on Q-only and on both at most 0.5 %, for either algorithm.
        """
        arms = by_arm(rows)
        first, second = arms.get(LARGE, {}), arms.get(SMALL, {})
        ratio = ratios(at(first, "p_only_test_error"), at(second, "p_only_test_error"))
        if len(ratio) < 2:
            return decide([], least=SEEDS)
        losses = at(first, "p_only_test_loss"), at(second, "p_only_test_loss")
        bounds = [
            Bound(name="P-only error, L-S over S", values=list(ratio.values()), high=HALF),
            Bound(name="P-only loss, S minus L-S", values=[losses[1][s] - losses[0][s] for s in ratio], low=LOSS_GAP),
            Bound(name="error with Q, L-S", values=[_with_q(row) for row in first.values()], high=FITTED),
            Bound(name="error with Q, S", values=[_with_q(row) for row in second.values()], high=FITTED),
        ]
        above = [str(seed) for seed, value in ratio.items() if value >= 1.0]
        broken = f"L-S is not below S in seed {', '.join(above)}" if above else ""
        return decide(bounds, least=SEEDS, broken=broken, words=_words(arms), numbers=_numbers(arms))


def level_panel(arms: Mapping[str, Mapping[int, Row]], name: str) -> Panel:
    """P-only error or loss over the training loss at which it was measured."""
    error = name == "p_only_test_error"
    return Panel(
        title=f"P-only {'error' if error else 'loss'} at equal training loss",
        x_label="training loss",
        y_label="P-only test error" if error else "P-only test loss",
        traces=level_traces(arms, name),
        x_log=True,
        caption=f"Mean over seeds, band: one standard error. Training goes from right to left. {_LEVEL_WORDS}",
    )


_LEVEL_WORDS = (
    "Measured where the training loss first is at or below a level and no noise disturbs it; L-S comes from its large rate with "
    f"a loss that can lie below the first level already. {RELAXED}"
)


def _pairs_panel(arms: Mapping[str, Mapping[int, Row]]) -> Panel:
    level = levels_of(arms)[SMALL][-1]
    first, second = (at(arms[arm], "p_only_test_error", level) for arm in (LARGE, SMALL))
    seeds = [seed for seed in first if seed in second]
    x = [second[seed] for seed in seeds]
    ends = [0.0, max([*x, *(first[seed] for seed in seeds)], default=1.0)]
    return Panel(
        title="Seed by seed",
        x_label="P-only test error of S",
        y_label="P-only test error of L-S",
        traces=[
            Trace(name="a seed", x=x, y=[first[seed] for seed in seeds], mode="markers"),
            Trace(name="equal", x=ends, y=ends),
            Trace(name="half", x=ends, y=[HALF * end for end in ends]),
        ],
        caption=f"At training loss {level:g}. Examples and start of a seed are the same for both.",
    )


def _with_q(row: Row) -> float:
    return max(row.final["q_only_test_error"], row.final["both_test_error"])


def _words(arms: Mapping[str, Mapping[int, Row]]) -> str:
    told = []
    for level in sorted({each for found in levels_of(arms).values() for each in found}, reverse=True):
        found = [np.mean(list(at(arms[arm], "p_only_test_error", level).values())) for arm in (LARGE, SMALL)]
        told.append(f"{found[0]:.2%} and {found[1]:.2%} at {level:g}")
    steps, mixture, start = (
        [np.mean([row.final[name] for row in arms[arm].values()]) for arm in (LARGE, SMALL)]
        for name in ("step", "mixture_test_error", "first_error")
    )
    return (
        f"P-only error of L-S and S by training loss: {', '.join(told)}; before, at the first measurement, {start[0]:.2%} and "
        f"{start[1]:.2%}. Error on the whole mixture {mixture[0]:.3%} and {mixture[1]:.3%}; steps {steps[0]:,.0f} and "
        f"{steps[1]:,.0f}"
    )


def _numbers(arms: Mapping[str, Mapping[int, Row]]) -> dict[str, float]:
    numbers = {}
    for arm in (LARGE, SMALL):
        for name in ("p_only_test_error", "p_only_test_loss"):
            numbers[f"{name}, {arm}"] = float(np.mean(list(at(arms[arm], name).values())))
    return numbers
