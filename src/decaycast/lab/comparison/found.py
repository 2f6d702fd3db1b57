"""What a comparison found: arms against a baseline in pairs of equal seed, and one sentence that does not overclaim.

Conventions. A *gain* is an improvement on the baseline of the same seed: accuracy minus the baseline's, or the baseline's loss
minus the arm's, so that above 0 is better. Intervals are those of each arm by itself. Whether an arm is called better or worse
is decided by the t test with Holm's correction at 5 % over all arms compared (`decaycast.lab.comparison.paired`). Accuracy is
counted in whole samples, so a spread below one sample is taken as one. Both are about seeds on these test samples; other samples
would add their own variation.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from decaycast.core.experiment import Row, Scalar, jsonable
from decaycast.core.seeds import Interval
from decaycast.lab.comparison.arms import ARMS
from decaycast.lab.comparison.paired import LEVEL, holm, mean_gain, p_value, t_quantile

METRICS = ("accuracy", "loss")
Outcome = Literal["better", "no difference", "none better", "no verdict"]


@dataclass(frozen=True, kw_only=True)
class ArmFound:
    """All seeds of one arm.

    Attributes:
        name: of the arm.
        title: the arm with its settings, in words.
        finals: by seed the last numbers of each finished run (`decaycast.lab.comparison.train.train_arm`).
        failed: by seed why a run did not come to its end.
        gains: by seed, where arm and baseline have both finished; empty for the baseline.
        least_spread: the least standard deviation of gains that is believed.
        p: of no difference, corrected for all arms compared; NaN for the baseline and with fewer than two pairs.
        time: seconds of training relative to the baseline of the same seed, the median over seeds; NaN without a pair.
    """

    name: str
    title: str
    finals: Mapping[int, Mapping[str, float]]
    failed: Mapping[int, str] = field(default_factory=dict)
    gains: Mapping[int, float] = field(default_factory=dict)
    least_spread: float = 0.0
    p: float = math.nan
    time: float = math.nan

    @property
    def gain(self) -> Interval:
        """Mean gain with its 95 % interval (`mean_gain`)."""
        return mean_gain(list(self.gains.values()), self.least_spread)

    @property
    def better_share(self) -> float:
        """Share of the pairs in which the arm is better, ties not among them."""
        return sum(gain > 0 for gain in self.gains.values()) / len(self.gains) if self.gains else math.nan

    @property
    def standing(self) -> Literal["better", "worse", "no difference", "failed"]:
        """What the corrected test says.

        An arm that lost seeds is never called better, since the lost ones may have been bad; nor is one called worse than a
        baseline that lost seeds which the arm has finished.
        """
        if not self.p <= LEVEL:
            return "failed" if self.failed else "no difference"
        if self.gain.mean < 0:
            return "worse" if len(self.gains) == len(self.finals) else "no difference"
        return "failed" if self.failed else "better"

    def mean(self, name: str) -> float:
        """Mean over finished seeds of one of the last numbers; NaN without any."""
        values = [final[name] for final in self.finals.values()]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `decaycast.lab.compare.compare` found.

    Attributes:
        arms: the baseline first, then the others in the order they were asked for.
        metric: what decides, "accuracy" or "loss" on the test data.
        left_out: by name the arms that do not fit model or data, and why.
        seeds: how many every arm was given.
        settings: what all arms share.
        rows: of all runs, failed ones too.
    """

    HEAD: ClassVar = ("arm", "accuracy %", "gain (95 %)", "better", "p", "loss", "validation %", "gradients", "time")
    arms: Sequence[ArmFound]
    metric: str
    left_out: Mapping[str, str]
    seeds: int
    settings: Mapping[str, Scalar]
    rows: Sequence[Row] = field(repr=False)

    @property
    def baseline(self) -> ArmFound:
        """What the others are compared with."""
        return self.arms[0]

    @property
    def compared(self) -> list[ArmFound]:
        """The arms with a p, that is with two pairs at least."""
        return [arm for arm in self.arms[1:] if not math.isnan(arm.p)]

    @property
    def outcome(self) -> Outcome:
        """In one word what `verdict` says."""
        if not self.compared:
            return "no verdict"
        standings = {arm.standing for arm in self.compared}
        if "better" in standings:
            return "better"
        return "none better" if "worse" in standings else "no difference"

    @property
    def resolution(self) -> float:
        """The gain that an arm of usual spread needs to be told from 0, by the strictest step of the correction."""
        known = [arm for arm in self.compared if math.isfinite(arm.gain.stderr)]
        spreads = [arm.gain.stderr * t_quantile(LEVEL / len(self.compared), len(arm.gains) - 1) for arm in known]
        return statistics.median(spreads) if spreads else math.nan

    @property
    def blind_below(self) -> str:
        """The differences that these seeds cannot tell from none, in words."""
        if math.isnan(self.resolution) or (self.metric == "accuracy" and self.resolution >= 1):
            return "a difference of any size"
        amount = f"{100 * self.resolution:.2g} points" if self.metric == "accuracy" else f"{self.resolution:.2g}"
        return f"a difference below about {amount}"

    @property
    def verdict(self) -> str:
        """What can be said, corrected for the number of arms, and what could not have been seen."""
        if not self.compared:
            return f"No verdict: {self._why_none()}."
        better, worse = (self._named(standing) for standing in ("better", "worse"))
        rest = sum(arm.standing in ("no difference", "failed") for arm in self.compared)
        what, against = f"test {self.metric}", self.baseline.title
        said = [f"Better than {against!r} in {what}: {better}." if better else ""]
        if not better and not worse:
            said.append(f"No difference: none of {len(self.compared)} arms can be told from {against!r} in {what}.")
        elif not better:
            said.append(f"No arm is better than {against!r} in {what}.")
        said.append(f"Worse: {worse}." if worse else "")
        if better or worse:
            others = "the other arm" if rest == 1 else f"the other {rest}"
            said.append(f"No difference was found for {others}." if rest else "")
        if better.count(";"):
            said.append("The better ones were not compared with each other.")
        said.append(self._limits())
        said += [f"{len(arm.failed)} of {self.seeds} seeds of {arm.title!r} failed." for arm in self.arms if arm.failed]
        return " ".join(filter(None, said))

    def cells(self, arm: ArmFound) -> tuple[str, ...]:
        """The arm's line of the table, under `HEAD`: test accuracy, gain, in how many pairs it was better, p, test loss, ..."""
        if not arm.finals:
            return (arm.title, "failed", *[""] * 7)
        return (
            arm.title,
            f"{100 * arm.mean('test_accuracy'):.2f}",
            self._gain(arm),
            f"{sum(gain > 0 for gain in arm.gains.values())} of {len(arm.gains)}" if arm.gains else "",
            "" if math.isnan(arm.p) else f"{arm.p:.3f}" if arm.p >= 0.001 else "< 0.001",
            f"{arm.mean('test_loss'):.4f}" if arm.mean("test_loss") < 1000 else f"{arm.mean('test_loss'):.3g}",
            f"{100 * arm.mean('validation_accuracy'):.2f}",
            f"{arm.mean('gradients'):,.0f}",
            "" if math.isnan(arm.time) else f"{arm.time:.2f}x",
        )

    def lines(self) -> list[str]:
        """The table as text of about a hundred columns, arms by their names alone, and without the gradients spent."""
        rows = [self.HEAD, *((arm.name, *self.cells(arm)[1:]) for arm in self.arms)]
        kept = [[cell for name, cell in zip(self.HEAD, row, strict=True) if name != "gradients"] for row in rows]
        widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
        padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in kept]
        return ["  ".join(row).rstrip() for row in padded]

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.notes(), self.verdict])

    def notes(self) -> list[str]:
        """A line for each arm's settings, and the `troubles`."""
        return [*(f"{arm.name}: {arm.title}" for arm in self.arms), *self.troubles()]

    def troubles(self) -> list[str]:
        """A line for each arm left out, and for each reason why runs of an arm failed."""
        found = [f"{name}: left out, {reason}" for name, reason in self.left_out.items()]
        reasons = Counter((arm.name, reason) for arm in self.arms for reason in arm.failed.values())
        return found + [
            f"{name}: {count} of {self.seeds} failed, {reason}" for (name, reason), count in reasons.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        arms = [
            {
                "arm": arm.name,
                "title": arm.title,
                "yardstick": ARMS[arm.name].yardstick,
                **{name: arm.mean(name) for name in _TOLD},
                "gain": arm.gain.mean,
                "gain_low": arm.gain.low,
                "gain_high": arm.gain.high,
                "better_share": arm.better_share,
                "pairs": len(arm.gains),
                "p_corrected": arm.p,
                "standing": "baseline" if arm is self.baseline else arm.standing,
                "time": arm.time,
                "by_seed": {str(seed): dict(final) for seed, final in arm.finals.items()},
                "failed": {str(seed): reason for seed, reason in arm.failed.items()},
            }
            for arm in self.arms
        ]
        told = {"outcome": self.outcome, "verdict": self.verdict, "metric": self.metric, "resolution": self.resolution}
        left_out, settings = dict(self.left_out), dict(self.settings)
        return jsonable({**told, "seeds": self.seeds, "settings": settings, "arms": arms, "left_out": left_out})

    def _named(self, standing: str) -> str:
        return "; ".join(
            f"{arm.title} ({self._amount(arm.gain.mean)})" for arm in self.compared if arm.standing == standing
        )

    def _amount(self, gain: float) -> str:
        return f"{100 * gain:+.2f} points" if self.metric == "accuracy" else f"{-gain:+.4f}"

    def _gain(self, arm: ArmFound) -> str:
        """In points of accuracy; of a loss as it is, where a gain is a fall."""
        scale, digits = (100, 2) if self.metric == "accuracy" else (1, 4)
        found = arm.gain
        if math.isnan(found.mean):
            return ""
        ends = (
            f"{scale * found.low:+.{digits}f} to {scale * found.high:+.{digits}f}" if math.isfinite(found.low) else "?"
        )
        return f"{scale * found.mean:+.{digits}f} ({ends})"

    def _limits(self) -> str:
        return (
            f"Corrected for {len(self.compared)} comparisons (Holm, 5 %); with {self.seeds} seeds "
            f"{self.blind_below} is not seen."
        )

    def _why_none(self) -> str:
        finished = len(self.baseline.finals)
        if finished < 2:
            reason = next(iter(self.baseline.failed.values()), "not all of its runs are there")
            return f"only {finished} of {self.seeds} seeds of the baseline {self.baseline.title!r} finished ({reason})"
        return "no other arm has finished two of the baseline's seeds"


_TOLD = (
    "test_accuracy",
    "test_loss",
    "validation_accuracy",
    "validation_loss",
    "efolds",
    "gradients",
    "optimizer_steps",
    "train_seconds",
)


def assess(
    rows: Sequence[Row],
    *,
    baseline: str,
    metric: str = "accuracy",
    test_samples: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare the arms that `rows` are of; trains nothing.

    Args:
        rows: of `train_arm`, one per arm and seed; arms are shown in their order.
        baseline: the arm that the others are compared with.
        metric: "accuracy" or "loss", on the test data.
        test_samples: labels that accuracy was counted on, for its least spread; None where not known.
        left_out: by name the arms that were not trained, and why.

    Raises:
        ValueError: no row is of the baseline.
    """
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(str(row.run.config["arm"]), []).append(row)
    if baseline not in by_arm:
        raise ValueError(f"no row is of the baseline {baseline!r}; there are {', '.join(by_arm) or 'no rows at all'}")
    finals = {arm: {r.run.seed: dict(r.final) for r in own if r.status == "done"} for arm, own in by_arm.items()}
    least = 1 / test_samples if test_samples and metric == "accuracy" else 0.0
    found = [
        ArmFound(
            name=arm,
            title=ARMS[arm].title(own[0].run.config),
            finals=finals[arm],
            failed={row.run.seed: row.reason for row in own if row.status == "failed"},
            gains={} if arm == baseline else _gains(finals[arm], finals[baseline], metric),
            least_spread=least,
            time=_relative(finals[arm], finals[baseline]),
        )
        for arm, own in sorted(by_arm.items(), key=lambda item: item[0] != baseline)
    ]
    tested = [arm for arm in found[1:] if len(arm.gains) > 1]
    corrected = holm([p_value(list(arm.gains.values()), least) for arm in tested])
    p = {arm.name: value for arm, value in zip(tested, corrected, strict=True)}
    config = by_arm[baseline][0].run.config
    own = {name for arm in ARMS.values() for name in arm.settings} | {"experiment", "arm"}
    return Comparison(
        arms=[replace(arm, p=p.get(arm.name, math.nan)) for arm in found],
        metric=metric,
        left_out=dict(left_out or {}),
        seeds=max(len(own) for own in by_arm.values()),
        settings={name: value for name, value in config.items() if name not in own},
        rows=tuple(rows),
    )


def _gains(
    finals: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]], metric: str
) -> dict[int, float]:
    sign, name = (1.0 if metric == "accuracy" else -1.0), f"test_{metric}"
    return {seed: sign * (finals[seed][name] - base[seed][name]) for seed in sorted(finals) if seed in base}


def _relative(finals: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]]) -> float:
    ratios = [finals[seed]["train_seconds"] / base[seed]["train_seconds"] for seed in finals if seed in base]
    return statistics.median(ratios) if ratios else math.nan
