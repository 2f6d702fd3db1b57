"""The paper's main claim: StochNorm beside plain fine-tuning, frozen batch norm and L2-SP, from few data to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import common_seeds, interval, mean_trace, points
from decaycast.core.standing import Question, answer
from decaycast.methods.stochnorm.figures.reading import (
    Arms,
    by_arm,
    finals,
    gains,
    in_points,
    interval_trace,
    mean,
    probabilities,
    setup,
)
from decaycast.methods.stochnorm.figures.recipe import train_arm
from decaycast.methods.stochnorm.figures.runs import (
    ANCHORED,
    FROZEN,
    JUDGED,
    PAPER,
    PLAIN,
    PLANS,
    SEEDS,
    Plan,
    stochnorm,
)

TOLERANCE = 0.01  # "neutral" with all data: not a point below plain fine-tuning


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Accuracy on new classes after fine-tuning on 15, 30, 50 and 100 % of a small set, arm by arm."""

    name: str = "stochnorm/fine-tuning"
    title: str = "Fine-tuning on few data"
    claim: str = (
        "StochNorm with p = 0.5 improves on plain fine-tuning most when data are few, and is neutral with all of them."
    )
    source: str = f"{PAPER}, section 4, table 1"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Every arm at every fraction and seed."""
        return self.plans[size].runs()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Accuracy over the fraction, gain by p and by arm, and the way there with the fewest data."""
        arms = by_arm(rows)
        if PLAIN not in arms:
            return []
        panels = [_accuracy_panel(arms, rows), _probability_panel(arms), _gain_panel(arms), _curve_panel(arms)]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when, in pairs of seed with 95 % intervals, three answers are yes; not held when one is no.

        The gain of p = 0.5 over plain with the fewest data is above 0; it is larger than the gain with all data; and the latter
        is above -1 point. `decaycast.core.standing` says what a yes and a no are. Five seeds at least.
        """
        arms = by_arm(rows)
        found = gains(arms, stochnorm(JUDGED))
        seeds = common_seeds(found.values())  # type: ignore[arg-type]
        if len(found) < 2 or len(seeds) < 2:
            reason = f"needs plain fine-tuning and p = {JUDGED:g} at two fractions, with {SEEDS} seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        few, full = min(found), max(found)
        least, most = ([found[fraction][s] for s in seeds] for fraction in (few, full))
        questions = [
            Question(name=f"gain at {few:.0%}", values=least),
            Question(name=f"more than at {full:.0%} by", values=[a - b for a, b in zip(least, most, strict=True)]),
            Question(name=f"gain at {full:.0%}", values=most, above=-TOLERANCE, worth=0.0),
        ]
        return answer(questions, least=SEEDS, words=_words(arms), numbers=_numbers(arms))


def _words(arms: Arms) -> str:
    """The gain at every fraction, which p has the largest mean, and the other methods with the fewest data."""
    gained = ", ".join(
        f"{points(interval(list(values.values())))} at {fraction:.0%} (largest mean: p = {_leader(arms, fraction):g})"
        for fraction, values in gains(arms, stochnorm(JUDGED)).items()
        if len(values) > 1
    )
    few = min(arms[PLAIN])
    found = {arm: gains(arms, arm).get(few, {}) for arm in (FROZEN, ANCHORED)}
    others = ", ".join(f"{arm} {points(interval(list(v.values())))}" for arm, v in found.items() if len(v) > 1)
    return f"p = {JUDGED:g} over plain: {gained}" + (f"; at {few:.0%} {others}" if others else "")


def _leader(arms: Arms, fraction: float) -> float:
    """The p with the largest mean gain over plain in pairs of seed; 1 where none gains."""
    found = {p: mean(list(gains(arms, stochnorm(p)).get(fraction, {}).values())) for p in probabilities(arms)}
    return max((p for p in found if np.isfinite(found[p])), key=lambda p: (found[p], p))


def _numbers(arms: Arms) -> dict[str, float]:
    numbers: dict[str, float] = {}
    numbers |= {f"{PLAIN} at {f:.0%}": mean(finals(of_seed, "accuracy")) for f, of_seed in arms[PLAIN].items()}
    for arm in arms:
        numbers |= {f"{arm} over plain at {f:.0%}": mean(list(v.values())) for f, v in gains(arms, arm).items()}
    for name in ("gap_mean", "gap_variance"):
        numbers[name] = mean([value for of_seed in arms[PLAIN].values() for value in finals(of_seed, name)])
    return {name: value for name, value in numbers.items() if np.isfinite(value) and "plain over plain" not in name}


def _accuracy_panel(arms: Arms, rows: Sequence[Row]) -> Panel:
    traces = [
        mean_trace(arm, list(fractions), [finals(of_seed, "accuracy") for of_seed in fractions.values()])
        for arm, fractions in arms.items()
    ]
    gap = [
        mean([v for of_seed in arms[PLAIN].values() for v in finals(of_seed, name)])
        for name in ("gap_mean", "gap_variance")
    ]
    return Panel(
        title="Accuracy",
        x_label="share of the data fine-tuned on",
        y_label="test accuracy after the last step",
        traces=traces,
        caption="Mean over seeds, band: one standard error. A seed's arms share images, head and order. "
        f"{setup(rows)} At the start a batch's mean lies {gap[0]:.2f} running deviations from the running mean, and its variance "
        f"is {gap[1]:.2f} of the running one (means over channels).",
    )


def _probability_panel(arms: Arms) -> Panel:
    tried = [p for p in probabilities(arms) if p > 0]
    traces = []
    for fraction in arms[PLAIN]:
        found = {p: gains(arms, stochnorm(p)).get(fraction, {}) for p in tried}
        shown = [p for p in tried if found[p]]
        traces.append(interval_trace(f"{fraction:.0%} of the data", shown, [in_points(found[p]) for p in shown]))
    return Panel(
        title="Gain over plain fine-tuning, by p",
        x_label="p, probability of batch statistics (1 is plain)",
        y_label="gain in points of accuracy",
        traces=[trace for trace in traces if len(trace.x) > 1],
        caption="Differences in pairs of seed; bands are 95 % intervals. p = 0 is in the first panel.",
    )


def _gain_panel(arms: Arms) -> Panel:
    traces = []
    for arm in (stochnorm(JUDGED), FROZEN, ANCHORED):
        found = gains(arms, arm)
        if found:
            traces.append(interval_trace(arm, list(found), [in_points(values) for values in found.values()]))
    fractions = list(arms[PLAIN])
    level = Trace(name="plain", x=[fractions[0], fractions[-1]], y=[0.0, 0.0])
    return Panel(
        title="Gain over plain fine-tuning, by method",
        x_label="share of the data fine-tuned on",
        y_label="gain in points of accuracy",
        traces=[*traces, level] if traces else [],
        caption="Differences in pairs of seed; bands are 95 % intervals. The claim wants p = 0.5 above 0 at the left, and not "
        f"{100 * TOLERANCE:.0f} point below it at the right.",
    )


def _curve_panel(arms: Arms) -> Panel:
    few = min(arms[PLAIN])
    traces = []
    for arm, fractions in arms.items():
        if few in fractions:
            own = list(fractions[few].values())
            steps = [float(step) for step in own[0].curve["step"]]
            columns = zip(*(row.curve["validation_loss"] for row in own), strict=True)
            traces.append(mean_trace(arm, steps, [list(values) for values in columns]))
    return Panel(
        title=f"Validation loss with {few:.0%} of the data",
        x_label="optimiser steps",
        y_label="validation loss",
        traces=traces,
        caption="Mean over seeds, band: one standard error. A loss that rises while the accuracy stands is overconfidence.",
    )
