"""The honest one: from random weights label noise ends flatter than label smoothing, and is no more accurate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.core.seeds import common_seeds, finals, interval, mean_trace, points
from decaycast.methods.label_noise.figures.arms import CLEAN, NOISE, SMOOTHING, train_arm
from decaycast.methods.label_noise.figures.escape import by_arm, way_panel
from decaycast.methods.label_noise.figures.runs import PLANS, Plan

FLATTER, BETTER = 0.6, 0.005
"""Ratio of traces that counts as flatter; accuracy that would count as better."""


@dataclass(frozen=True, kw_only=True)
class RandomStart:
    """Accuracy and trace from random weights: label noise, the same loss without sampling, and clean labels."""

    name: str = "label_noise/random-start"
    title: str = "From random weights: flatter, not more accurate"
    claim: str = (
        "From random weights, label noise ends with at most 0.6 times the trace of label smoothing (the same loss without "
        "sampling), and is not half a point more accurate."
    )
    source: str = "our own check; Damian, Ma & Lee 2021 start from minima"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Three arms at every seed."""
        return self.plans[size].random_start()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy and trace on the way, and the accuracy of every seed."""
        arms = by_arm(rows)
        if not {NOISE, SMOOTHING} <= set(arms):
            return []
        later = {name: {seed: _later(row) for seed, row in of_seed.items()} for name, of_seed in arms.items()}
        flat = {name: of_seed for name, of_seed in arms.items() if name != CLEAN}
        panels = [
            way_panel(later, "accuracy", "Test accuracy", "held-out accuracy", _ACCURACY_WORDS, log=False),
            way_panel(flat, "trace", "Flatness", "trace of the Gauss-Newton matrix", _TRACE_WORDS),
            _seeds_panel(arms),
        ]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both halves are true of the means over seeds, in pairs, with their 95 % intervals.

        The trace with label noise over that of smoothing is 0.6 at most, and its accuracy minus that of smoothing at most 0.005.
        """
        arms = by_arm(rows)
        seeds = common_seeds([arms.get(NOISE, {}), arms.get(SMOOTHING, {})])
        if len(seeds) < 2:
            return decide([])
        pairs = [(arms[NOISE][seed].final, arms[SMOOTHING][seed].final) for seed in seeds]
        gained = [noisy["accuracy"] - smooth["accuracy"] for noisy, smooth in pairs]
        bounds = [
            Bound(name="ratio of traces", values=[a["trace"] / b["trace"] for a, b in pairs], high=FLATTER),
            Bound(name="gain in accuracy", values=gained, high=BETTER),
        ]
        means = {name: float(np.mean(finals(of_seed, "accuracy"))) for name, of_seed in arms.items()}
        told = ", ".join(f"{name} {value:.2%}" for name, value in means.items())
        words = f"Label noise over smoothing in points: {points(interval(gained))}. Accuracy: {told}"
        return decide(bounds, words=words, numbers={f"accuracy, {name}": value for name, value in means.items()})


_ACCURACY_WORDS = "Mean over seeds, band: one standard error; arms of a seed share weights at the start and batches."
_TRACE_WORDS = "On the training images, mean over seeds, band: one standard error."


def _later(row: Row) -> Row:
    """The row without its start, whose accuracy of a tenth would hide the rest."""
    return Row(run=row.run, curve={name: values[1:] for name, values in row.curve.items()}, final=row.final)


def _seeds_panel(arms: Mapping[str, Mapping[int, Row]]) -> Panel:
    seeds = common_seeds(arms.values())
    traces = [
        mean_trace(name, seeds, [[of_seed[seed].final["accuracy"]] for seed in seeds]) for name, of_seed in arms.items()
    ]
    return Panel(
        title="Accuracy of every seed",
        x_label="seed",
        y_label="held-out accuracy at the end",
        traces=traces if seeds else [],
        caption="A seed sets weights, batches and flips. The differences between arms are those between lines.",
    )
