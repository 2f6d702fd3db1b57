"""A number that was estimated at random, with what is known about its error."""

from __future__ import annotations

import math
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 to 5 degrees of freedom; above, the series below is good to 0.01
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571)
_NORMAL = 1.959964


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its error. Exact results have `stderr` 0 and an interval of no width.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        interval: (low, high), 95 %.
        probes: matrix-vector products (or gradients) spent on it.

    Example:
        >>> print(Estimate.of(8.0, 0.5, degrees=1000, probes=40))
        8 +- 0.5 (95 %: 7.019 to 8.981; 40 products)
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    probes: int

    @classmethod
    def of(cls, value: float, stderr: float, *, degrees: float, probes: int) -> Estimate:
        """With the interval of Student's t at `degrees` of freedom of the standard error."""
        half = student(degrees) * stderr if stderr else 0.0
        return cls(value=value, stderr=stderr, interval=(value - half, value + half), probes=probes)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4g} +- {self.stderr:.2g} (95 %: {low:.4g} to {high:.4g}; {self.probes} products)"


def student(degrees: float) -> float:
    """97.5 % quantile of Student's t, within 0.01, for `degrees` >= 1 of freedom.

    Beyond 5, the series of Abramowitz & Stegun 26.7.5 around the normal quantile.

    >>> round(student(1), 3), round(student(10), 3), round(student(1e9), 3)
    (12.706, 2.228, 1.96)
    """
    if degrees < 6:
        return _T975[max(1, int(degrees)) - 1]
    z, n = _NORMAL, degrees
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + _third(z) / n**3


def _third(z: float) -> float:
    return (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384


def mean_estimate(values: list[float], probes: int) -> Estimate:
    """Mean of independent values with the standard error that they show; two values at least.

    >>> print(mean_estimate([1.0, 2.0, 3.0], probes=3))
    2 +- 0.58 (95 %: -0.4843 to 4.484; 3 products)
    """
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate.of(mean, math.sqrt(variance / count), degrees=count - 1, probes=probes)
