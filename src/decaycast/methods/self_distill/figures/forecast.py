"""What the diagnostic says of a network, against what distilling it brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import interval, mean_trace
from decaycast.methods.self_distill.figures.deep import ANSWERS, PREDICTIONS, by_flips, column, train_rounds
from decaycast.methods.self_distill.figures.runs import PLANS, SEEDS, Plan

ALIKE, NEAR = 0.8, 0.03
"""Correlation that counts as agreement; distance in test accuracy that counts as near."""
MATCHED = PREDICTIONS[0]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted and observed change of test accuracy at several shares of flipped labels."""

    name: str = "self_distill/forecast"
    title: str = "The gain, predicted from the teacher's kernel"
    claim: str = (
        "From the tangent kernel at the teacher's start and the teacher's training error, the change of test accuracy in each "
        "of five rounds at 0 to 60 % flipped labels is predicted with a correlation above 0.8, and to 3 points on average."
    )
    source: str = "our own check of the link to kernels in Mobahi, Farajtabar & Bartlett 2020"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_rounds

    def runs(self, size: Size) -> list[Run]:
        """Every share of flips at every seed."""
        return self.plans[size].runs()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """All changes against each other, and round by round at each share of flips."""
        shares = by_flips(rows)
        return (
            [_scatter_panel(shares)] + [_round_panel(share, of_seed) for share, of_seed in shares.items()]
            if shares
            else []
        )

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both means over the seeds keep their bounds with their 95 % intervals.

        For each seed, over all shares of flips and all rounds after the teacher: the correlation of predicted and observed
        change is above 0.8, and their mean distance below 0.03. Predictions are those with the teacher's training error.
        """
        shares = by_flips(rows)
        seeds = sorted(set.intersection(*map(set, shares.values()))) if shares else []
        if len(shares) < 4 or len(seeds) < SEEDS:
            return Verdict(outcome="not enough data", reason=f"needs {SEEDS} seeds at four shares of flipped labels")
        found = {name: agreement(shares, name, seeds) for name in PREDICTIONS}
        alike, apart = (interval(values) for values in found[MATCHED])
        broken = alike.high < ALIKE or apart.low > NEAR
        kept = alike.low > ALIKE and apart.high < NEAR
        tuned = [float(np.mean(values)) for values in found["tuned"]]
        means = float(np.corrcoef(*_means(shares))[0, 1])
        reason = (
            f"Correlation {alike.mean:.2f} ({alike.low:.2f} to {alike.high:.2f}), mean distance {100 * apart.mean:.1f} "
            f"({100 * apart.low:.1f} to {100 * apart.high:.1f}) points, {len(seeds)} seeds; of the means over seeds {means:.2f}. "
            f"Before any training, with a tuned ridge: {tuned[0]:.2f} and {100 * tuned[1]:.1f}. {'; '.join(answers(shares))}"
        )
        numbers = {**alike.numbers("correlation"), **apart.numbers("distance")}
        numbers |= {"correlation of means": means, "correlation, tuned": tuned[0], "distance, tuned": tuned[1]}
        outcome = "not held" if broken else "held" if kept else "not enough data"
        return Verdict(outcome=outcome, reason=reason, numbers=numbers)


def changes(of_seed: Mapping[int, Row]) -> np.ndarray:
    """Observed change of test accuracy since the teacher, shape (seeds, rounds)."""
    test = column(of_seed, "test_accuracy")
    return test - test[:, :1]


def agreement(
    shares: Mapping[float, Mapping[int, Row]], name: str, seeds: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Of every seed, over shares and rounds: correlation of predicted and observed changes, and their mean distance."""
    alike, apart = [], []
    for seed in seeds:
        rows = [{seed: of_seed[seed]} for of_seed in shares.values()]
        predicted = np.concatenate([column(row, name)[0, 1:] for row in rows])
        observed = np.concatenate([changes(row)[0, 1:] for row in rows])
        flat = predicted.std() == 0 or observed.std() == 0
        alike.append(0.0 if flat else float(np.corrcoef(predicted, observed)[0, 1]))
        apart.append(float(np.abs(predicted - observed).mean()))
    return alike, apart


def _means(shares: Mapping[float, Mapping[int, Row]]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and observed changes, averaged over seeds, of all shares and rounds after the teacher."""
    predicted = np.concatenate([column(of_seed, MATCHED)[:, 1:].mean(0) for of_seed in shares.values()])
    return predicted, np.concatenate([changes(of_seed)[:, 1:].mean(0) for of_seed in shares.values()])


def answers(shares: Mapping[float, Mapping[int, Row]]) -> list[str]:
    """What the diagnostic answered at each share of flips, beside the observed change at the round it likes best."""
    words = {value: word for word, value in ANSWERS.items()}
    said = []
    for share, of_seed in shares.items():
        rows = list(of_seed.values())
        counts = [words[row.final[f"{MATCHED}_answer"]] for row in rows]
        told = ", ".join(f"{word} {counts.count(word)}" for word in ANSWERS if word in counts)
        best = 1 + column(of_seed, MATCHED)[:, 1:].argmax(1)
        gains = changes(of_seed)[np.arange(len(rows)), best]
        said.append(f"{share:.0%} flipped: {told}, observed at its best round {100 * gains.mean():+.1f} points")
    return said


def _scatter_panel(shares: Mapping[float, Mapping[int, Row]]) -> Panel:
    traces = []
    for share, of_seed in shares.items():
        predicted, observed = column(of_seed, MATCHED)[:, 1:], changes(of_seed)[:, 1:]
        traces.append(
            Trace(
                name=f"{share:.0%} flipped",
                x=predicted.ravel().tolist(),
                y=observed.ravel().tolist(),
                mode="markers",
            )
        )
    ends = [min(min(t.x) for t in traces), max(max(t.x) for t in traces)]
    return Panel(
        title="Predicted against observed",
        x_label="predicted change of test accuracy",
        y_label="observed change",
        traces=[*traces, Trace(name="equal", x=ends, y=ends)],
        caption="One mark per seed and round, all against the teacher of the same seed. Leave-one-out errors of the tangent "
        "kernel at the teacher's start, with the ridge that has the teacher's training error.",
    )


def _round_panel(share: float, of_seed: Mapping[int, Row]) -> Panel:
    rounds = list(next(iter(of_seed.values())).curve["round"])
    named = {"observed": changes(of_seed)}
    named |= {
        "predicted": column(of_seed, MATCHED),
        "predicted before training (tuned ridge)": column(of_seed, "tuned"),
    }
    return Panel(
        title=f"{share:.0%} of the labels flipped",
        x_label="round",
        y_label="test accuracy minus the teacher's",
        traces=[mean_trace(name, rounds, values.T.tolist()) for name, values in named.items()],
        caption=f"Mean over {len(of_seed)} seeds, band: one standard error.",
    )
