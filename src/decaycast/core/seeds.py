"""Numbers over seeds: rows grouped by what differs in their config, means with 95 % intervals, and their traces.

Conventions: an interval is Student's t over one value per seed; comparisons are made in pairs of equal seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Trace

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond 15 the last is used, a little too wide
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t, one value per seed) and standard error."""

    mean: float
    low: float
    high: float
    stderr: float

    def inside(self, low: float, high: float) -> bool:
        """Whether the whole interval lies between `low` and `high`."""
        return low <= self.low and self.high <= high

    def numbers(self, name: str) -> dict[str, float]:
        """Entries of a verdict: the mean as `name`, with both ends and the standard error."""
        ends = {f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_stderr": self.stderr}
        return {name: self.mean, **ends}


def interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with its 95 % interval; two values at least.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    mean, stderr = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    quantile = _T975[min(len(values) - 1, len(_T975)) - 1]
    return Interval(mean=mean, low=mean - quantile * stderr, high=mean + quantile * stderr, stderr=stderr)


def points(found: Interval) -> str:
    """A difference of accuracies in points, with its interval: 0.0123 is +1.23."""
    return f"{100 * found.mean:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"


def number(row: Row, name: str) -> float:
    """A numeric entry of a row's config; 0 where there is none."""
    return float(row.run.config.get(name) or 0.0)  # type: ignore[arg-type]


def group(rows: Iterable[Row], *names: str) -> dict[Any, dict[int, Row]]:
    """Finished rows by one or several numeric entries of their config, rising, and in each by seed.

    One name gives numbers as keys, several give tuples.
    """
    found: dict[Any, dict[int, Row]] = {}
    for row in rows:
        if row.status == "done":
            values = tuple(number(row, name) for name in names)
            found.setdefault(values if len(names) > 1 else values[0], {})[row.run.seed] = row
    return {key: dict(sorted(found[key].items())) for key in sorted(found)}


def common_seeds(groups: Iterable[Mapping[int, Row]]) -> list[int]:
    """Seeds that every group has, rising."""
    sets = [set(each) for each in groups]
    return sorted(set.intersection(*sets)) if sets else []


def mean_trace(name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Trace:
    """Mean over seeds at each x, with a band of one standard error (none of a single seed)."""
    errors = [float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0 for each in values]
    means = [float(np.mean(each)) for each in values]
    return Trace(
        name=name,
        x=list(x),
        y=means,
        low=[mean - error for mean, error in zip(means, errors, strict=True)],
        high=[mean + error for mean, error in zip(means, errors, strict=True)],
        mode="lines+markers",
    )


def by_seed(rows: Iterable[Row], **wanted: str | float) -> dict[int, Row]:
    """Finished rows whose config has these entries (a missing number counts as 0), by seed, rising."""
    found = {}
    for row in rows:
        config = row.run.config
        fits = all(
            config.get(name) == value if isinstance(value, str) else number(row, name) == value
            for name, value in wanted.items()
        )
        if row.status == "done" and fits:
            found[row.run.seed] = row
    return dict(sorted(found.items()))


def finals(of_seed: Mapping[int, Row], name: str) -> list[float]:
    """One of the final numbers of every seed that has it."""
    return [row.final[name] for row in of_seed.values() if name in row.final]
