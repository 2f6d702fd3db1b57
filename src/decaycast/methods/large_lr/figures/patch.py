"""The paper's patch experiment: which rate memorises a planted patch first, what it costs, and whether noise helps.

Three claims with a judge each, from the same trainings, so that what is resolved does not hide behind what is not. Raw
accuracies of two rates prove nothing here: a large rate beats a small one on these images without any patch. So costs are
differences in differences, paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Verdict
from decaycast.core.seeds import interval, points
from decaycast.core.standing import Question, answer
from decaycast.methods.large_lr.figures.patch_panels import curve_panel, difference_panel, seeds_panel, word
from decaycast.methods.large_lr.figures.patch_runs import ARMS, LARGE, NOISE, PAPER, PLANS, SEEDS, SMALL, Plan
from decaycast.methods.large_lr.figures.patch_training import Found, by_arm, finals, late_accuracy, spared, train_patch

MEMORISED, NOT_YET = 0.9, 0.5
"""Patch-only accuracies before annealing that the claims speak of."""
_T_OF_TWO, _Z = 12.706, 1.96  # Student's t at 95 % with one degree of freedom and with many
_SOURCE = f"{PAPER}, section 5, patch experiment on CIFAR-10"


@dataclass(frozen=True, kw_only=True)
class PatchOrder:
    """Patch-only accuracy before annealing, at the small rate and at the large one."""

    name: str = "large_lr/patch-order"
    title: str = "Which rate memorises a patch first"
    claim: str = (
        "Before annealing, the small rate has memorised the patch (patch-only accuracy at least 0.9) and the large rate has not "
        "(at most 0.5)."
    )
    source: str = _SOURCE
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_patch

    def runs(self, size: Size) -> list[Run]:
        """Both rates, with the patch and without."""
        return self.plans[size].runs((LARGE, SMALL))

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Patch-only accuracy over the training, and each seed just before annealing."""
        found = by_arm(rows)
        wanted = f"small at {MEMORISED:g} or above, and that of large at {NOT_YET:g} or below"
        panels = [curve_panel(found, rows, "alone"), seeds_panel(found, f"The claim wants the mean of {wanted}.")]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the 95 % intervals of both means keep their bounds; five seeds at least."""
        found = by_arm(rows)
        small, large = (list(finals(found, arm, "alone_before").values()) for arm in (SMALL, LARGE))
        bounds = [
            Bound(name="patch-only accuracy before annealing at the small rate", values=small, low=MEMORISED),
            Bound(name="at the large rate", values=large, high=NOT_YET),
        ]
        return decide(bounds, least=SEEDS, words=_levels(found, (SMALL, LARGE)))


@dataclass(frozen=True, kw_only=True)
class PatchCost:
    """What the patch costs in clean accuracy at the end, at the small rate beyond the large one."""

    name: str = "large_lr/patch-cost"
    title: str = "What the patch costs"
    claim: str = (
        "The patch costs the small rate more clean accuracy than the large one, measured at the end against the same trainings "
        "without the patch."
    )
    source: str = _SOURCE
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_patch

    def runs(self, size: Size) -> list[Run]:
        """Both rates, with the patch and without."""
        return self.plans[size].runs((LARGE, SMALL))

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Clean accuracy over the training, and the difference in differences seed by seed."""
        found = by_arm(rows)
        panels = [curve_panel(found, rows, "clean"), difference_panel(found, LARGE)]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the 95 % interval of the difference in differences lies above 0; not held when below half a point."""
        return _judged(by_arm(rows), LARGE, [])


@dataclass(frozen=True, kw_only=True)
class PatchNoise:
    """The mitigation: the small rate with noise in front of its activations until the others anneal."""

    name: str = "large_lr/patch-noise"
    title: str = "Noise that anneals, in place of a large rate"
    claim: str = (
        "With noise in front of its activations the small rate has not memorised the patch before annealing (patch-only accuracy "
        "at most 0.5), and the patch costs it less clean accuracy than the small rate alone."
    )
    source: str = f"{PAPER}, section 5, mitigation"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_patch

    def runs(self, size: Size) -> list[Run]:
        """All three arms, with the patch and without."""
        return self.plans[size].runs(ARMS)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Patch-only and clean accuracy of the three arms, and the difference in differences seed by seed."""
        found = by_arm(rows)
        if not any(arm == NOISE for arm, _ in found):
            return []
        panels = [
            curve_panel(found, rows, "alone"),
            curve_panel(found, rows, "clean"),
            difference_panel(found, NOISE),
        ]
        return [panel for panel in panels if panel.traces]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when both parts are, with 95 % intervals; not held when one is ruled out; five seeds at least."""
        found = by_arm(rows)
        before = [NOT_YET - value for value in finals(found, NOISE, "alone_before").values()]
        order = Question(name=f"patch-only accuracy before annealing below {NOT_YET:g} by", values=before, worth=0.0)
        return _judged(found, NOISE, [order])


def _judged(found: Found, arm: str, before: list[Question]) -> Verdict:
    """The verdict on the patch's cost at `arm` against that at the small rate, and on what else is asked."""
    values = list(spared(found, arm, SMALL).values())
    if len(values) < 2 or any(len(question.values) < 2 for question in before):
        reason = f"needs {arm} and {SMALL}, each with the patch and without, with {SEEDS} seeds"
        return Verdict(outcome="not enough data", reason=reason)
    name = "costs the small rate more than the large" if arm == LARGE else "costs less with noise than without"
    questions = [*before, Question(name=name, values=values)]
    arms = [each for each in ARMS if finals(found, each, "accuracy")]
    words = ". ".join([_gaps(found, arm), _accuracies(found, arms), _scatter(values), *_others(found, arm)])
    numbers = {f"{each}, {word(patch)}": _mean(finals(found, each, "accuracy", patch=patch)) for each, patch in found}
    return answer(questions, least=SEEDS, words=f"{words}.", numbers=numbers)


def _gaps(found: Found, arm: str) -> str:
    """The raw gap with the patch and without, in points."""
    told = []
    for patch in (True, False):
        own, small = (finals(found, each, "accuracy", patch=patch) for each in (arm, SMALL))
        pairs = [own[seed] - small[seed] for seed in own if seed in small]
        told.append(f"{points(interval(pairs))} {word(patch)}" if len(pairs) > 1 else f"unknown {word(patch)}")
    return f"{arm.capitalize()} over small, raw: {told[0]}, {told[1]}"


def _scatter(values: Sequence[float]) -> str:
    """What two seeds can tell, and how many it takes to tell a point."""
    scatter = 100 * float(np.std(values, ddof=1))
    two = f"Two seeds with this scatter tell it to +-{_T_OF_TWO * scatter / math.sqrt(2):.0f} points"
    return f"{two}; to tell one point takes about {max(2, math.ceil((_Z * scatter) ** 2))}"


def _others(found: Found, arm: str) -> list[str]:
    """The same difference from other readings, and of the mitigation how it stands beside the large rate."""
    told = []
    late = list(spared(found, arm, SMALL, late_accuracy).values())
    if len(late) > 1:
        told.append(f"Mean of all readings after annealing, validation images: {points(interval(late))}")
    beside = list(spared(found, LARGE, NOISE).values()) if arm == NOISE else []
    if len(beside) > 1:
        told.append(f"The large rate is spared {points(interval(beside))} more than noise")
    return told


def _accuracies(found: Found, arms: Iterable[str]) -> str:
    told = []
    for arm in arms:
        with_, without = (_mean(finals(found, arm, "accuracy", patch=patch)) for patch in (True, False))
        told.append(f"{arm} {with_:.1%} with the patch and {without:.1%} without")
    return f"Clean accuracy at the end: {'; '.join(told)}"


def _levels(found: Found, arms: Iterable[str]) -> str:
    """Lowest and highest seed, the end, and the control's accuracy on the patch."""
    told = []
    for arm in arms:
        before, after = (finals(found, arm, name) for name in ("alone_before", "alone"))
        if before:
            control = _mean(finals(found, arm, "alone_before", patch=False))
            seeds = f"seeds {min(before.values()):.2f} to {max(before.values()):.2f} before annealing"
            told.append(f"{arm}: {seeds}, mean {_mean(after):.2f} at the end, control {control:.2f} before")
    return "; ".join(told).capitalize()


def _mean(values: Mapping[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan
