"""What a probe for shortcuts found: accuracies by rate and seed, what they say, and with how much certainty.

Conventions. All accuracies are fractions in [0, 1], one per seed, in the order of the seeds; "alone" is the planted shortcut by
itself, "clean" held-out samples as they are, "control" the training without a shortcut. *Before* is the last measurement at the
candidate rate, *after* the end of the training, at the small rate that all share. Skill is accuracy rescaled so that chance is 0
and all right is 1. Intervals are Student's t at 95 % over seeds (`decaycast.core.seeds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from decaycast.core.experiment import jsonable
from decaycast.core.seeds import Interval, interval, points

Standing = Literal["memorises shortcuts first", "does not", "cannot tell"]
MEMORISED = 0.5  # skill on the shortcut alone above which it counts as memorised
LEARNT = 0.05  # skill on clean samples below which a network counts as having learnt nothing
RESOLVING = 3  # seeds below which no difference is believed: two that agree by accident have an interval of no width
NO_INTERVAL = Interval(mean=math.nan, low=-math.inf, high=math.inf, stderr=math.nan)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """All seeds of one candidate rate, with the shortcut and without.

    Attributes:
        lr: the rate before annealing.
        alone_before: accuracy on the shortcut alone before annealing, by seed.
        alone_after: the same at the end.
        clean_before: accuracy on clean samples before annealing.
        clean_after: the same at the end.
        control_alone: accuracy of the control on the shortcut alone, at the end; near chance, since it has never seen one.
        control_clean: accuracy of the control on clean samples, at the end.
        curves: mean over seeds at each measurement, by name: step, alone, clean, control.
        failed: why a training did not come to its end; the numbers are then empty.
    """

    lr: float
    alone_before: Sequence[float] = ()
    alone_after: Sequence[float] = ()
    clean_before: Sequence[float] = ()
    clean_after: Sequence[float] = ()
    control_alone: Sequence[float] = ()
    control_clean: Sequence[float] = ()
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failed: str = ""

    @property
    def cost(self) -> list[float]:
        """Clean accuracy at the end that the shortcut takes away, by seed: control minus planted."""
        return [without - with_ for without, with_ in zip(self.control_clean, self.clean_after, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """What `probe_shortcuts` found.

    Attributes:
        what: the shortcut in words.
        difficulty: how it was made as hard as it is: its separation or its switches, and whether tuned.
        learnable: whether the small rate memorised it before annealing when it was tuned; None where nothing was tuned.
        small: rate after annealing, and of the arm that the others are compared with.
        steps: optimiser steps of each training.
        anneal_at: first step at the small rate.
        chance: accuracy of guessing the commonest held-out class.
        arms: one per rate, falling; that of the small rate is the last.
        seeds: how many seeds each arm has.
        trainings: networks trained in all, those of the tuning among them.
        seconds: wall-clock seconds in all.
    """

    HEAD: ClassVar = (
        "rate",
        "alone before",
        "after",
        "control",
        "clean with",
        "without",
        "costs",
        "less than at small",
    )
    what: str
    difficulty: str
    learnable: bool | None
    small: float
    steps: int
    anneal_at: int
    chance: float
    arms: Sequence[Arm]
    seeds: int
    trainings: int
    seconds: float

    def standing(self, lr: float) -> tuple[Standing, str]:
        """What can be said about a rate, and why.

        *Memorises shortcuts first*: before annealing the whole interval of the skill on the shortcut alone lies above 1/2. *Does
        not*: it lies below, though the network has learnt something and the shortcut can be memorised in this time (by the small
        rate, or by this one after annealing). Otherwise the probe cannot tell.
        """
        arm = self._arm(lr)
        if arm.failed:
            return "cannot tell", arm.failed
        before, after = self._skill(arm.alone_before), self._skill(arm.alone_after)
        told = f"{_percent(arm.alone_before)} right on the shortcut alone before annealing"
        if self.seeds < 2:
            return "cannot tell", f"{told}, and one seed has no interval; give at least 2, better 5"
        if before.low > MEMORISED:
            return "memorises shortcuts first", told
        if before.high >= MEMORISED:
            return "cannot tell", f"{told}, too uncertain with {self.seeds} seeds; give more of them"
        if not self._skill(arm.clean_after).low > LEARNT:
            return "cannot tell", f"{told}, but also on clean samples it has learnt next to nothing; train longer"
        others = [self._skill(other.alone_before).mean for other in self.arms if not other.failed]
        if not max(after.mean, *others) > MEMORISED:
            return (
                "cannot tell",
                f"{told}, but no rate has learnt the shortcut in this time; train longer or plant an easier one",
            )
        return "does not", f"{told}, and {_percent(arm.alone_after)} at the end"

    def spared(self, lr: float) -> Interval:
        """Difference in differences: how much less clean accuracy the shortcut costs at `lr` than at the small rate.

        Paired by seed: (clean with - clean without) at `lr`, minus the same at the small rate; a fraction. The whole line without
        end where there are fewer than two seeds.
        """
        own, small = self._arm(lr).cost, self._arm(self.small).cost
        differences = [theirs - mine for mine, theirs in zip(own, small, strict=False)]
        return interval(differences) if len(differences) > 1 else NO_INTERVAL

    def sentence(self, lr: float) -> str:
        """The verdict on one rate in a sentence or two."""
        standing, why = self.standing(lr)
        verdict = {
            "memorises shortcuts first": f"at {lr:g} your network memorises shortcuts first",
            "does not": f"at {lr:g} your network does not memorise shortcuts first",
            "cannot tell": f"at {lr:g} the probe cannot tell whether your network memorises shortcuts first",
        }[standing]
        text = f"{verdict}: {why}."
        found = self.spared(lr)
        if lr == self.small or self.seeds < 2 or self._arm(lr).failed or self._arm(self.small).failed:
            return text
        return f"{text} Difference in differences {points(found)} points: {self._told(lr, found)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite is None."""
        names = (
            "what",
            "difficulty",
            "learnable",
            "small",
            "steps",
            "anneal_at",
            "chance",
            "seeds",
            "trainings",
            "seconds",
        )
        arms = []
        for arm in self.arms:
            standing, why = self.standing(arm.lr)
            spared = vars(self.spared(arm.lr)) if arm.lr != self.small else None
            words = {"verdict": standing, "why": why, "sentence": self.sentence(arm.lr)}
            arms.append({**vars(arm), "curves": dict(arm.curves), **words, "difference_in_differences": spared})
        return jsonable({**{name: getattr(self, name) for name in names}, "arms": arms})

    def __str__(self) -> str:
        lines = [self.HEAD, *(self.cells(arm) for arm in self.arms)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.HEAD))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        title = (
            f"{self.what}, {self.difficulty}; {self.steps} steps, at {self.small:g} from step {self.anneal_at} on; "
            f"{self.seeds} seeds, chance {self.chance:.0%}"
        )
        return "\n".join([title, *table, *(self.sentence(arm.lr) for arm in self.arms)])

    def cells(self, arm: Arm) -> tuple[str, ...]:
        """The row of a table on one arm: percents, then points."""
        if arm.failed:
            return (f"{arm.lr:g}", "failed", *[""] * 6)
        shown = (arm.alone_before, arm.alone_after, arm.control_alone, arm.clean_after, arm.control_clean)
        spared = "" if arm.lr == self.small else _interval(self.spared(arm.lr))
        return (f"{arm.lr:g}", *map(_percent, shown), f"{100 * _mean(arm.cost):+.1f}", spared)

    def _told(self, lr: float, found: Interval) -> str:
        """What a difference in differences says, if anything."""
        if not all(self._skill(self._arm(each).control_clean).mean > LEARNT for each in (lr, self.small)):
            return "it says nothing, since a control has learnt next to nothing"
        if self.seeds < RESOLVING or found.low <= 0 <= found.high:
            reach = 100 * (found.high - found.mean)
            few = ", too few to believe," if self.seeds < RESOLVING else ""
            return f"not resolved, {self.seeds} seeds{few} tell {reach:.1f} points here"
        return f"the shortcut costs {'less' if found.low > 0 else 'more'} clean accuracy than at {self.small:g}"

    def _arm(self, lr: float) -> Arm:
        for arm in self.arms:
            if arm.lr == lr:
                return arm
        raise ValueError(f"{lr!r} is none of the rates probed: {', '.join(f'{arm.lr:g}' for arm in self.arms)}")

    def _skill(self, accuracies: Sequence[float]) -> Interval:
        values = [(accuracy - self.chance) / (1 - self.chance) for accuracy in accuracies]
        return interval(values) if len(values) > 1 else NO_INTERVAL


def _interval(found: Interval) -> str:
    return points(found) if math.isfinite(found.low) else "?"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * _mean(values):.0f} %" if values else "-"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
