"""Gains in pairs of equal seed: intervals, tests, and a correction for many of them.

Conventions. Intervals are Student's t at 95 % over seeds, tests are two-sided. Accuracy is counted in whole samples, so that a
few seeds can have the same gain to the last digit, and such an accident would be certainty: no spread, p = 0. So where the unit
is known, a spread below it is taken as one unit (`least_spread`).

Source: Holm 1979, "A simple sequentially rejective multiple test procedure"; the finite sums for Student's t at whole degrees of
freedom are eq. 26.7.3 and 26.7.4 of Abramowitz & Stegun 1964.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from decaycast.core.seeds import Interval

LEVEL = 0.05
_UNKNOWN = Interval(mean=math.nan, low=-math.inf, high=math.inf, stderr=math.nan)


def t_beyond(t: float, freedom: int) -> float:
    """P(|T| >= |t|) for Student's t with `freedom` >= 1 degrees of freedom.

    >>> round(t_beyond(1.0, 1), 6), round(t_beyond(2.776445, 4), 6)
    (0.5, 0.05)
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    first = (
        2 if freedom % 2 else 1
    )  # the factors are 2/3, 4/5, ... for odd degrees of freedom and 1/2, 3/4, ... for even ones
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for factor in range(first, freedom, 2):
        total += term
        term *= cosine**2 * factor / (factor + 1)
    if freedom % 2:
        return max(0.0, 1.0 - 2.0 / math.pi * (angle + sine * total))
    return max(0.0, 1.0 - sine * total)


def t_quantile(tail: float, freedom: int) -> float:
    """The t with P(|T| >= t) = `tail`, for a tail in (0, 1).

    >>> round(t_quantile(0.05, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while t_beyond(high, freedom) > tail:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_beyond(middle, freedom) > tail else (low, middle)
    return high


def mean_gain(gains: Sequence[float], least_spread: float = 0.0) -> Interval:
    """Mean of `gains`, one per seed, with its 95 % interval; unbounded for a single one, and where there is no spread to go by.

    `least_spread` is the least standard deviation over seeds that is believed.

    >>> found = mean_gain([0.02, 0.02, 0.02], least_spread=0.01)
    >>> round(found.low, 4), round(found.stderr, 5)
    (-0.0048, 0.00577)
    """
    if len(gains) < 2:
        return replace(_UNKNOWN, mean=gains[0] if gains else math.nan)
    mean, root = statistics.fmean(gains), math.sqrt(len(gains))
    spread = 0.0 if _without_spread(gains) else statistics.stdev(gains)
    stderr = max(spread, least_spread) / root
    if stderr == 0:
        return replace(_UNKNOWN, mean=mean)
    reach = t_quantile(LEVEL, len(gains) - 1) * stderr
    return Interval(mean=mean, low=mean - reach, high=mean + reach, stderr=stderr)


def p_value(gains: Sequence[float], least_spread: float = 0.0) -> float:
    """Two-sided p of the hypothesis that the mean of `gains`, one per seed and at least two, is 0.

    Where all are equal and there is no `least_spread`, it is the sign test's, which is 1 for gains of 0.

    >>> round(p_value([0.01, 0.02, 0.03]), 4)
    0.0742
    >>> p_value([0.01] * 3), p_value([0.0] * 3)
    (0.25, 1.0)
    """
    found = mean_gain(gains, least_spread)
    if math.isnan(found.stderr):
        return 0.5 ** (len(gains) - 1) if gains[0] else 1.0
    return t_beyond(found.mean / found.stderr, len(gains) - 1)


def _without_spread(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-12 * max(map(abs, values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: reject those at most the level, whatever the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
