"""How the figures of this room decide: numbers over seeds against bounds that were fixed before, with 95 % intervals.

*Yes* when the whole interval of the mean keeps the bound, *no* when all of it lies beyond. Otherwise the data do not decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from decaycast.core.experiment import Row, Verdict
from decaycast.core.seeds import Interval, interval, number
from decaycast.core.standing import Standing

SEEDS = 5  # fewer decide nothing
PAPER = "Damian, Ma & Lee 2021"


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

        >>> Bound(name="error", values=[0.01, 0.02, 0.03], high=0.1).standing
        'yes'
        >>> Bound(name="error", values=[0.01, 0.02, 0.03], high=0.02).standing
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
    bounds: Sequence[Bound], *, least: int = SEEDS, words: str = "", numbers: Mapping[str, float] | None = None
) -> Verdict:
    """Held when all bounds are kept, not held when one is broken; nothing from fewer than `least` seeds.

    `words` and `numbers` tell more, and are added to the bounds' own.
    """
    if not bounds or min(len(bound.values) for bound in bounds) < max(least, 2):
        return Verdict(outcome="not enough data", reason=f"needs {least} seeds of every arm that is judged")
    own: dict[str, float] = {}
    for bound in bounds:
        own |= bound.found.numbers(bound.name)
    standings = {bound.standing for bound in bounds}
    outcome = "not held" if "no" in standings else "held" if standings == {"yes"} else "not enough data"
    reason = f"{'; '.join(map(str, bounds))}. {words}".strip()
    return Verdict(outcome=outcome, reason=reason, numbers={**own, **(numbers or {})})


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
