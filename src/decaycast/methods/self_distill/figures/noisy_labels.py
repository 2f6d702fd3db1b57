"""Rounds of a small network on flipped labels: training accuracy falls, test accuracy rises and then falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.core.seeds import mean_trace
from decaycast.core.standing import Question, answer
from decaycast.methods.self_distill.figures.deep import by_flips, column, train_rounds
from decaycast.methods.self_distill.figures.runs import JUDGED, PLANS, SEEDS, Plan


@dataclass(frozen=True, kw_only=True)
class NoisyLabels:
    """Accuracies by round at 40 % flipped labels."""

    name: str = "self_distill/noisy-labels"
    title: str = "Flipped labels: less memory, then less knowledge"
    claim: str = (
        "With 40 % of its labels flipped, a small network's accuracy on its training labels falls over five rounds of "
        "self-distillation, while its test accuracy first rises and then falls."
    )
    source: str = (
        "Mobahi, Farajtabar & Bartlett 2020, figure 3 (CIFAR-10 with ResNet-50); flips and network are our own"
    )
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_rounds

    def runs(self, size: Size) -> list[Run]:
        """One share of flips, every seed; `Forecast` has these runs too."""
        return self.plans[size].runs((JUDGED,))

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracies by round."""
        of_seed = by_flips(rows).get(JUDGED, {})
        if not of_seed:
            return []
        rounds = list(next(iter(of_seed.values())).curve["round"])
        named = {
            "train_accuracy": "training images, labels as given",
            "clean_accuracy": "training images, true labels",
            "test_accuracy": "test images",
        }
        words = f"Mean over {len(of_seed)} seeds, band: one standard error. Round 0 is the teacher."
        return [
            Panel(
                title="Accuracy by round",
                x_label="round",
                y_label="accuracy",
                traces=[mean_trace(said, rounds, column(of_seed, name).T.tolist()) for name, said in named.items()],
                caption=words,
            ),
            Panel(
                title="Test accuracy of every seed",
                x_label="round",
                y_label="test accuracy minus the teacher's",
                traces=[
                    mean_trace(
                        f"seed {seed}", rounds, [[gain] for gain in column({seed: row}, "test_accuracy")[0] - first]
                    )
                    for seed, row in of_seed.items()
                    for first in [row.curve["test_accuracy"][0]]
                ],
                caption="A seed sets flips, weights and batches.",
            ),
        ]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when three means over the seeds are above 0 with their 95 % intervals.

        The fall of training accuracy from the teacher to the last round; the rise of test accuracy from the teacher to the best
        round, which for each seed is the one that is best on the others; and the fall from that to the last round.
        """
        of_seed = by_flips(rows).get(JUDGED, {})
        if len(of_seed) < 2:
            return Verdict(
                outcome="not enough data", reason=f"needs {SEEDS} seeds with {JUDGED:.0%} of the labels flipped"
            )
        train, test = column(of_seed, "train_accuracy"), column(of_seed, "test_accuracy")
        best = best_rounds(test)
        at_best = test[np.arange(len(test)), best]
        questions = [
            Question(name="fall of training accuracy", values=(train[:, 0] - train[:, -1]).tolist()),
            Question(name="rise of test accuracy", values=(at_best - test[:, 0]).tolist()),
            Question(name="its fall after the best round", values=(at_best - test[:, -1]).tolist()),
        ]
        told = ", ".join(f"{value:.1%}" for value in test.mean(0))
        always = int((np.diff(train, axis=1) < 0).all(1).sum())
        words = (
            f"Test accuracy by round: {told}. Training accuracy {train[:, 0].mean():.1%} to {train[:, -1].mean():.1%}, falling "
            f"in every round in {always} of {len(train)} seeds"
        )
        numbers = {f"test accuracy, round {t}": float(value) for t, value in enumerate(test.mean(0))}
        return answer(questions, least=SEEDS, words=words, numbers=numbers)


def best_rounds(test: np.ndarray) -> list[int]:
    """For each seed the round that is best on average over the other seeds, `test` of shape (seeds, rounds).

    >>> best_rounds(np.array([[0.5, 0.9], [0.6, 0.5], [0.6, 0.5]]))  # the first seed's own gain does not choose for it
    [0, 1, 1]
    """
    total = test.sum(0)
    return [int(np.argmax(total - own)) for own in test]
