"""How figures decide: numbers over seeds against bounds that were fixed before, with 95 % intervals.

*Yes* when the whole interval of the mean keeps the bound, *no* when all of it lies beyond. Otherwise the data do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from decaycast.core.experiment import Verdict
from decaycast.core.seeds import Interval, interval
from decaycast.core.standing import Standing

SEEDS = 5  # fewer decide nothing


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Whether the mean of `values`, one per seed, lies within [`low`, `high`]."""

    name: str
    values: Sequence[float]
    low: float = -math.inf
    high: float = math.inf

    @property
    def found(self) -> Interval:
        """Mean and interval; two values at least."""
        return interval(self.values)

    @property
    def standing(self) -> Standing:
        """What the interval says.

        >>> Bound(name="ratio", values=[0.3, 0.4, 0.5], high=0.7).standing
        'yes'
        >>> Bound(name="ratio", values=[0.3, 0.4, 0.5], high=0.5).standing
        'open'
        """
        if self.found.inside(self.low, self.high):
            return "yes"
        return "no" if self.found.high < self.low or self.found.low > self.high else "open"

    def __str__(self) -> str:
        ends = f"{self.found.mean:.3g} ({self.found.low:.3g} to {self.found.high:.3g})"
        wanted = f"<= {self.high:g}" if math.isinf(self.low) else f">= {self.low:g}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            wanted = f"in {self.low:g} to {self.high:g}"
        return f"{self.name} {ends}, wanted {wanted}, {len(self.values)} seeds: {self.standing}"


def decide(
    bounds: Sequence[Bound],
    *,
    least: int = SEEDS,
    broken: str = "",
    words: str = "",
    numbers: Mapping[str, float] | None = None,
) -> Verdict:
    """Held when all bounds are kept, not held when one is broken; nothing from fewer than `least` seeds.

    `broken` says what else speaks against the claim, in words, and is empty where nothing does. `words` and `numbers` tell more.
    """
    if not bounds or min(len(bound.values) for bound in bounds) < max(least, 2):
        return Verdict(outcome="not enough data", reason=f"needs {least} seeds of every arm that is judged")
    own: dict[str, float] = {}
    for bound in bounds:
        own |= bound.found.numbers(bound.name)
    standings = {bound.standing for bound in bounds}
    refuted = bool(broken) or "no" in standings
    outcome = "not held" if refuted else "held" if standings == {"yes"} else "not enough data"
    told = "; ".join([*map(str, bounds), *([broken] if broken else [])])
    return Verdict(outcome=outcome, reason=f"{told}. {words}".strip(), numbers={**own, **(numbers or {})})
