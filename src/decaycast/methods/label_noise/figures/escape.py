"""Out of a bad minimum: label noise against the same loss without sampling, clean labels and SAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import by_seed, finals, mean_trace, number
from decaycast.methods.label_noise.figures.arms import CLEAN, NOISE, SAM, SMOOTHING, train_arm
from decaycast.methods.label_noise.figures.runs import PLANS, Plan

ESCAPED, STAYED, CORRELATED = 0.88, 0.05, -0.9
"""Accuracy reached, gain that still counts as staying, and correlation of accuracy with the log of the trace."""


@dataclass(frozen=True, kw_only=True)
class Escape:
    """Test accuracy and trace along training from a minimum that fits all labels and tests badly."""

    name: str = "label_noise/escape"
    title: str = "Out of a bad minimum"
    claim: str = (
        "From a minimum that fits every label and tests badly, label noise reaches 88 % test accuracy, the same loss without "
        "sampling gains at most 5 points, and along the way accuracy goes with the log of the trace (correlation below -0.9)."
    )
    source: str = "Damian, Ma & Lee 2021, its CIFAR-10 experiment from an adversarial start, here on digits"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Every arm at every seed."""
        return self.plans[size].escape()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy and trace on the way, one against the other, and the training loss."""
        arms = by_arm(rows)
        if NOISE not in arms:
            return []
        flat = {name: of_seed for name, of_seed in arms.items() if name != CLEAN}
        return [
            way_panel(arms, "accuracy", "Test accuracy", "held-out accuracy", _caption(rows), log=False),
            way_panel(flat, "trace", "Flatness", "trace of the Gauss-Newton matrix", _TRACE_WORDS),
            _against_panel(flat),
            way_panel(flat, "loss", "Training loss", "smoothed loss on all training images", _LOSS_WORDS),
        ]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when three means over the seeds keep their bounds with their 95 % intervals.

        Label noise ends at an accuracy of 88 % or more; the same loss without sampling gains 5 points at most; along the runs
        with label noise the correlation of accuracy with the log of the trace is -0.9 or below.
        """
        arms = by_arm(rows)
        noisy, smooth = arms.get(NOISE, {}), arms.get(SMOOTHING, {})
        if min(len(noisy), len(smooth)) < 2:
            return decide([])
        gains = [row.final["accuracy"] - row.final["start_accuracy"] for row in smooth.values()]
        bounds = [
            Bound(name="accuracy with label noise", values=finals(noisy, "accuracy"), low=ESCAPED),
            Bound(name="gain without sampling", values=gains, high=STAYED),
            Bound(name="correlation", values=[correlation(row) for row in noisy.values()], high=CORRELATED),
        ]
        return decide(bounds, words=_words(arms), numbers=_numbers(arms))


def by_arm(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Finished rows by the name of their arm (SAM's with its radius) and by seed."""
    radii = sorted({number(row, "rho") for row in rows if row.run.config["arm"] == SAM})
    found = {arm: by_seed(rows, arm=arm) for arm in (NOISE, SMOOTHING, CLEAN)}
    found |= {f"SAM, radius {rho:g}": by_seed(rows, arm=SAM, rho=rho) for rho in radii}
    return {name: of_seed for name, of_seed in found.items() if of_seed}


def correlation(row: Row) -> float:
    """Of accuracy with the log of the trace along a run; 0 where one of them does not vary."""
    accuracy, trace = np.array(row.curve["accuracy"]), np.log(row.curve["trace"])
    if min(np.ptp(accuracy), np.ptp(trace)) == 0.0:
        return 0.0
    return float(np.corrcoef(accuracy, trace)[0, 1])


def way_panel(
    arms: Mapping[str, Mapping[int, Row]], column: str, title: str, label: str, caption: str, *, log: bool = True
) -> Panel:
    """One column of every arm over the optimiser steps, mean over seeds."""
    traces = []
    for name, of_seed in arms.items():
        rows = list(of_seed.values())
        columns = zip(*(row.curve[column] for row in rows), strict=True)
        traces.append(mean_trace(name, list(rows[0].curve["step"]), [list(each) for each in columns]))
    return Panel(title=title, x_label="optimiser steps", y_label=label, traces=traces, y_log=log, caption=caption)


_TRACE_WORDS = (
    "On the training images, mean over seeds. Clean labels send the outputs to certainty, where this trace vanishes whatever "
    "the weights; that arm is left out."
)
_LOSS_WORDS = (
    "Above its least value. Label noise and SAM hold the weights a little off the minimum, smoothing alone does not."
)


def _caption(rows: Sequence[Row]) -> str:
    config = rows[0].run.config
    images, rate, batch, flip = (number(rows[0], name) for name in ("train_size", "lr", "batch_size", "flip"))
    return (
        f"{config['network']} on {images:,.0f} {config['data']} images, learning rate {rate:g}, batch {batch:.0f}, flip "
        f"probability {flip:g}. Mean over seeds, band: one standard error; arms of a seed share start and batches. A step of SAM "
        "costs two."
    )


def _against_panel(arms: Mapping[str, Mapping[int, Row]]) -> Panel:
    traces = []
    for name, of_seed in arms.items():
        x = [value for row in of_seed.values() for value in row.curve["trace"]]
        y = [value for row in of_seed.values() for value in row.curve["accuracy"]]
        traces.append(Trace(name=name, x=x, y=y, mode="markers"))
    return Panel(
        title="Accuracy against flatness",
        x_label="trace of the Gauss-Newton matrix",
        y_label="held-out accuracy",
        traces=traces,
        x_log=True,
        caption="Every measurement of every seed. At one trace the arms differ: the trace is not all that counts.",
    )


def _words(arms: Mapping[str, Mapping[int, Row]]) -> str:
    start = np.mean([value for of_seed in arms.values() for value in finals(of_seed, "start_accuracy")])
    told = ", ".join(
        f"{name} {np.mean(finals(of_seed, 'accuracy')):.1%} (trace {np.mean(finals(of_seed, 'trace')):.3g})"
        for name, of_seed in arms.items()
    )
    trace = np.mean(finals(arms[NOISE], "start_trace"))
    return f"Start {start:.1%} (trace {trace:.3g}); at the end {told}. A step of SAM costs two gradients"


def _numbers(arms: Mapping[str, Mapping[int, Row]]) -> dict[str, float]:
    numbers = {"accuracy at the start": float(np.mean(finals(arms[NOISE], "start_accuracy")))}
    for name, of_seed in arms.items():
        numbers |= {f"{what}, {name}": float(np.mean(finals(of_seed, what))) for what in ("accuracy", "trace")}
    return numbers
