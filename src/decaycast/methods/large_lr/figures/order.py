"""The order of learning: which pattern each algorithm knows when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.methods.large_lr.figures.arms import (
    LARGE,
    PAPER,
    PLANS,
    SEEDS,
    SMALL,
    Plan,
    by_arm,
    time_trace,
    train_arm,
)
from decaycast.methods.large_lr.figures.two_layer import RELAXED

KNOWN = 0.1
"""Test loss, in nats, at which a pattern counts as learnt; at chance it is 0.69."""
UNLEARNT, LEARNT = 0.6, 0.4
"""P-only test losses: hardly moved from chance; learnt to a good part."""
_KINDS = {"p_only": "P alone", "q_only": "Q alone", "both": "both"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """Loss on each kind of example over gradient time."""

    name: str = "large_lr/order"
    title: str = "The order of learning"
    claim: str = (
        "When the test loss on Q alone is down to 0.1 for the first time, that on P alone is still above 0.6 at the small rate "
        "(chance: 0.69), and below 0.4 where a large rate came first."
    )
    source: str = f"{PAPER}, the order of learning in their theorems; the thresholds are not theirs"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Both algorithms at every seed: the runs of `TwoLayer`."""
        return self.plans[size].runs(LARGE, SMALL)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Test loss by kind over gradient time for each algorithm, and P-only error for both."""
        arms = {arm: found for arm, found in by_arm(rows).items() if arm in (LARGE, SMALL)}
        return [*(order_panel(arm, found) for arm, found in arms.items()), *([_error_panel(arms)] if arms else [])]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both means over the seeds keep their bounds with their 95 % intervals (`bounds`)."""
        arms = by_arm(rows)
        known = {arm: p_when_q_is_known(arms.get(arm, {})) for arm in (LARGE, SMALL)}
        if min(map(len, known.values())) < 2:
            return decide([], least=SEEDS)
        bounds = [
            Bound(name="P-only loss when Q is learnt, S", values=known[SMALL], low=UNLEARNT),
            Bound(name="P-only loss when Q is learnt, L-S", values=known[LARGE], high=LEARNT),
        ]
        times = [np.mean([_moment(row)["time"] for row in arms[arm].values()]) for arm in (LARGE, SMALL)]
        words = f"Q is learnt at gradient time {times[1]:,.0f} in S and {times[0]:,.0f} in L-S"
        return decide(bounds, least=SEEDS, words=words)


def p_when_q_is_known(rows: Mapping[int, Row]) -> list[float]:
    """P-only test loss at the first measurement with a Q-only test loss of 0.1 or less; seeds without one are left out."""
    return [found["p_only_test_loss"] for row in rows.values() for found in [_moment(row)] if found]


def _moment(row: Row) -> dict[str, float]:
    """The measurement at which Q is learnt; empty if it never is."""
    for index, loss in enumerate(row.curve["q_only_test_loss"]):
        if loss <= KNOWN:
            return {name: column[index] for name, column in row.curve.items()}
    return {}


def order_panel(arm: str, rows: Mapping[int, Row]) -> Panel:
    """Test loss on each kind of example over gradient time."""
    first = next(iter(rows.values())).run.config
    change = ""
    if "annealed_at" in first:
        time = first["annealed_at"] * first["large"]  # type: ignore[operator]
        change = f" The rate falls from {first['large']:g} to {first['small']:g} at time {time:,.0f}."
    return Panel(
        title=f"What {arm} learns when",
        x_label="gradient time (sum of the learning rates)",
        y_label="test loss",
        traces=[time_trace(words, rows, f"{kind}_test_loss") for kind, words in _KINDS.items()],
        x_log=True,
        caption=f"Mean over seeds, band: one standard error.{change} {RELAXED}",
    )


def _error_panel(arms: Mapping[str, Mapping[int, Row]]) -> Panel:
    return Panel(
        title="P-only error on the way",
        x_label="gradient time (sum of the learning rates)",
        y_label="P-only test error",
        traces=[time_trace(arm, rows, "p_only_test_error") for arm, rows in arms.items()],
        x_log=True,
        caption="Mean over seeds, band: one standard error. The first step finds the mean direction of P, which classifies most "
        "of it. From there S memorises its few P-only examples and gets worse.",
    )
