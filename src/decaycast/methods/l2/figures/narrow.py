"""Where the law ends (the supplement's failure): a network too narrow to fit its data has a best weight decay of its own.

However long it trains, t ~ 1/lambda, accuracy is best at a finite lambda and lower at smaller ones: what the narrow network
lacks is not time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import common_seeds, group, interval, mean_trace, points
from decaycast.methods.l2.figures.fc_runs import train_fc_figure
from decaycast.methods.l2.figures.plateau import ladder_panel
from decaycast.methods.l2.figures.shared import PAPER, Ladder, best_accuracy, best_table, leader, rates, tuned

FITS = 0.95  # training accuracy from which on a network is said to fit its data
SEEDS = 5

_NARROW: dict[str, Scalar] = {"model": "mlp-8x2", "init_gain": 1.0, "batch_size": 64}
LADDERS: dict[Size, Ladder] = {
    "smoke": Ladder(
        config={**_NARROW, "data": "digits", "train_size": 256, "validation_size": 400, "test_size": 200, "points": 30},
        lrs=(0.1,),
        rates=rates(0.02, 0.005, 3),
        efolds=2.0,
        seeds=2,
    ),
    "small": Ladder(
        config={
            **_NARROW,
            "data": "cifar10",
            "train_size": 2000,
            "validation_size": 4000,
            "test_size": 4000,
            "pool": 4,
            "points": 80,
        },
        lrs=(0.1,),
        rates=rates(0.01, 1e-4, 7),
        efolds=2.0,
        seeds=5,
    ),
    # the paper's lr 0.1 is 0.01 in torch's unit
    "paper": Ladder(
        config={
            "model": "mlp-64x3",
            "init_gain": 1.0,
            "batch_size": 512,
            "data": "cifar10",
            "validation_size": 5000,
            "test_size": 10_000,
            "points": 150,
        },
        lrs=(0.01,),
        rates=rates(1e-3, 1e-6, 10),
        efolds=4.0,
        seeds=5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Best accuracy against the weight decay of a network that cannot fit its training data."""

    name: str = "l2/narrow"
    title: str = "A network too narrow to fit: the plateau ends"
    claim: str = (
        "A network that cannot fit its data has a best weight decay that is not the smallest: with runs of one number of "
        "e-folds, the best accuracy falls again towards small lambda."
    )
    source: str = f"{PAPER}, supplement: fully connected, depth 3, width 64, CIFAR-10"
    ladders: Mapping[Size, Ladder] = field(default_factory=lambda: LADDERS)

    train = train_fc_figure

    def runs(self, size: Size) -> list[Run]:
        """The ladder of decays, and no decay for as long as the longest."""
        ladder = self.ladders[size]
        return [*ladder.without_decay(ladder.lrs[0]), *ladder.runs()]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Best accuracy against the decay, and how well the network fits."""
        groups = group(rows, "weight_decay")
        if not any(decay > 0 for decay in groups):
            return []
        lr = next(iter(next(iter(groups.values())).values())).run.config["lr"]
        return [ladder_panel({float(lr): groups}), _fit_panel(groups)]  # type: ignore[arg-type]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the network never fits and the smallest decay loses against the best, with a 95 % interval above 0.

        In each seed, the loss is the best accuracy at the decay that leads on the other seeds, minus that at the smallest.
        """
        groups = group(rows, "weight_decay")
        ladder = {decay: of_seed for decay, of_seed in groups.items() if decay > 0}
        seeds = common_seeds(ladder.values())
        if len(ladder) < 3 or len(seeds) < 2:
            return Verdict(outcome="not enough data", reason=f"needs three weight decays, with {SEEDS} seeds each")
        table = best_table(ladder, seeds)
        best, smallest = leader(table), min(ladder)
        fitted = max(final_fit(row) for of_seed in groups.values() for row in of_seed.values())
        numbers = {"best": best, "training accuracy": fitted}
        fit = f"training accuracy ends at {fitted:.2f} at most"
        if fitted >= FITS:
            return Verdict(outcome="not enough data", reason=f"{fit}: this network can fit its data", numbers=numbers)
        if best == smallest:
            reason = f"{fit}; the smallest weight decay {best:.2g} is the best of all"
            return Verdict(
                outcome="not held" if len(seeds) >= SEEDS else "not enough data", reason=reason, numbers=numbers
            )
        loss = interval([top - table[smallest][s] for top, s in zip(tuned(table, seeds), seeds, strict=True)])
        numbers |= loss.numbers("loss")
        reason = f"{fit}; best at λ = {best:.2g}, {points(loss)} points above the smallest, {smallest:.2g} ({len(seeds)} seeds)"
        zero = groups.get(0.0, {})
        if set(seeds) <= set(zero):
            gap = interval([top - best_accuracy(zero[s]) for top, s in zip(tuned(table, seeds), seeds, strict=True)])
            numbers |= gap.numbers("gap to zero")
            reason += f", {points(gap)} above none"
        enough = len(seeds) >= SEEDS
        outcome = "not enough data" if not enough else "held" if loss.low > 0 else "not held"
        return Verdict(outcome=outcome, reason=reason, numbers=numbers)


def final_fit(row: Row) -> float:
    """Training accuracy over the last tenth of the measurements, batch by batch."""
    seen = np.array(row.curve["train_accuracy"])
    return float(seen[-max(1, len(seen) // 10) :].mean())


def _fit_panel(groups: Mapping[float, Mapping[int, Row]]) -> Panel:
    decays = [decay for decay in groups if decay > 0]
    trained = [[final_fit(row) for row in groups[decay].values()] for decay in decays]
    ends = [[row.curve["validation_accuracy"][-1] for row in groups[decay].values()] for decay in decays]
    traces = [mean_trace("training, at the end", decays, trained), mean_trace("validation, at the end", decays, ends)]
    if 0.0 in groups:
        none = float(np.mean([final_fit(row) for row in groups[0.0].values()]))
        traces.append(Trace(name="training, λ = 0", x=[decays[0], decays[-1]], y=[none, none]))
    return Panel(
        title="How well the network fits",
        x_label="weight decay λ",
        y_label="accuracy at the end",
        traces=traces,
        x_log=True,
        caption="Mean over seeds, band: one standard error. Level line: without decay.",
    )
