"""Is it the rate or its noise? L-S without noise, and S with noise in its activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.methods.large_lr.figures.arms import (
    LARGE,
    LATE,
    MITIGATED,
    PAPER,
    PLANS,
    QUIET,
    SEEDS,
    SMALL,
    Plan,
    at,
    by_arm,
    ratios,
    train_arm,
)
from decaycast.methods.large_lr.figures.order import order_panel
from decaycast.methods.large_lr.figures.two_layer import HALF, level_panel

MEMORISED = 0.1
"""P-only error of a network that has memorised its few P-only examples."""
AS_GOOD = 1.1
"""Ratio of errors up to which one counts as as good as the other."""


@dataclass(frozen=True, kw_only=True)
class NoNoiseControl:
    """The rates of L-S without the injected noise."""

    name: str = "large_lr/no-noise"
    title: str = "The same rates without noise"
    claim: str = (
        "Without the injected noise the two rates of L-S give no gain: at training loss 0.03 L-S with noise has at most half of "
        "their P-only error, and trained on to 0.007 that error is 10 % or more."
    )
    source: str = f"{PAPER}: the noise makes the order of learning; this control is not theirs"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """L-S without noise, and the two runs to compare it with."""
        return self.plans[size].runs(LARGE, SMALL, QUIET)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """P-only error over training loss for the three, and the order of learning without noise."""
        return _panels(by_arm(rows), QUIET)

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both means over the seeds keep their bounds with their 95 % intervals (`bounds`)."""
        arms = by_arm(rows)
        large, small, quiet = (at(arms.get(arm, {}), "p_only_test_error") for arm in (LARGE, SMALL, QUIET))
        ratio, to_small = list(ratios(large, quiet).values()), list(ratios(quiet, small).values())
        late = list(at(arms.get(QUIET, {}), "p_only_test_error", LATE).values())
        if min(len(ratio), len(late), len(to_small)) < 2:
            return decide([], least=SEEDS)
        bounds = [
            Bound(name="P-only error, with noise over without", values=ratio, high=HALF),
            Bound(name=f"P-only error without noise at {LATE:g}", values=late, low=MEMORISED),
        ]
        words = f"At 0.03 the error without noise is {np.mean(list(quiet.values())):.2%}, {np.mean(to_small):.2f} times that of S"
        return decide(bounds, least=SEEDS, words=words, numbers={"without noise over S": float(np.mean(to_small))})


@dataclass(frozen=True, kw_only=True)
class ActivationNoiseControl:
    """The small rate with noise in front of Q's ReLUs, taken away later."""

    name: str = "large_lr/activation-noise"
    title: str = "A small rate with annealed activation noise"
    claim: str = (
        "Noise in front of Q's ReLUs, taken away later, gives the small rate what the large one has: at training loss 0.03 a "
        "P-only error of at most half that of S, and at most 1.1 times that of L-S."
    )
    source: str = f"{PAPER}, the mitigation in section 5, here in the two-layer model"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """S with activation noise, and the two runs to compare it with."""
        return self.plans[size].runs(LARGE, SMALL, MITIGATED)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """P-only error over training loss for the three, and the order of learning with activation noise."""
        return _panels(by_arm(rows), MITIGATED)

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both means over the seeds keep their bounds with their 95 % intervals (`bounds`)."""
        arms = by_arm(rows)
        large, small, noisy = (at(arms.get(arm, {}), "p_only_test_error") for arm in (LARGE, SMALL, MITIGATED))
        to_small, to_large = list(ratios(noisy, small).values()), list(ratios(noisy, large).values())
        if min(len(to_small), len(to_large)) < 2:
            return decide([], least=SEEDS)
        bounds = [
            Bound(name="P-only error, activation noise over S", values=to_small, high=HALF),
            Bound(name="over L-S", values=to_large, high=AS_GOOD),
        ]
        return decide(bounds, least=SEEDS, words=_price(arms))


def _price(arms: Mapping[str, Mapping[int, Row]]) -> str:
    steps = [np.mean([row.final["step"] for row in arms[arm].values()]) for arm in (MITIGATED, SMALL, LARGE)]
    error = np.mean(list(at(arms[MITIGATED], "p_only_test_error").values()))
    return f"Its P-only error is {error:.2%}. Steps: {steps[0]:,.0f}, S {steps[1]:,.0f}, L-S {steps[2]:,.0f}"


def _panels(arms: Mapping[str, Mapping[int, Row]], own: str) -> list[Panel]:
    shown = {arm: rows for arm, rows in arms.items() if arm in (LARGE, SMALL, own)}
    if own not in shown:
        return []
    return [level_panel(shown, "p_only_test_error"), order_panel(own, shown[own])]
