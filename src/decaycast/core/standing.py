"""Yes-or-no questions about means over seeds, with 95 % intervals, and the verdict that several of them make.

A question asks whether a mean lies above a bound. *Yes*: the whole interval lies above it. *No*: the whole interval lies below
what would be worth having, which is half a point of accuracy above the bound if nothing else is said (the bound itself where
that is a tolerance). Anything else stays *open*: the data do not decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from decaycast.core.experiment import Verdict
from decaycast.core.seeds import Interval, interval, points

NEGLIGIBLE = 0.005  # of an accuracy: nobody changes a layer for less
Standing = Literal["yes", "no", "open"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Whether the mean of `values`, one per seed, lies above `above`; no when its interval ends below `above` + `worth`."""

    name: str
    values: Sequence[float]
    above: float = 0.0
    worth: float = NEGLIGIBLE

    @property
    def found(self) -> Interval:
        """Mean and interval; two values at least."""
        return interval(self.values)

    @property
    def standing(self) -> Standing:
        """What the interval says.

        >>> Question(name="gain", values=[0.01, 0.02, 0.03]).standing  # a mean of 2 points, known to 2.5
        'open'
        """
        if self.found.low > self.above:
            return "yes"
        return "no" if self.found.high < self.above + self.worth else "open"


def answer(questions: Sequence[Question], *, least: int, words: str, numbers: Mapping[str, float]) -> Verdict:
    """The verdict that the questions make: held when all answers are yes, not held when one is no, else not enough data.

    Args:
        questions: one at least, in accuracies as fractions; the reason tells them in points.
        least: seeds that each question needs; with fewer nothing is decided.
        words: added to the reason.
        numbers: added to the questions' own, which are `Interval.numbers` under the question's name.

    >>> gains = Question(name="gain", values=[0.021, 0.018, 0.020, 0.022, 0.019])
    >>> verdict = answer([gains], least=5, words="Over plain.", numbers={})
    >>> verdict.outcome, verdict.reason
    ('held', 'gain +2.00 (+1.80 to +2.20) points, 5 pairs: yes. Over plain.')
    """
    own: dict[str, float] = {}
    for question in questions:
        own |= question.found.numbers(question.name)
    told = "; ".join(f"{q.name} {points(q.found)} points, {len(q.values)} pairs: {q.standing}" for q in questions)
    seeds = min(len(question.values) for question in questions)
    reason = f"{told}. {words}".strip()
    standings = {question.standing for question in questions}
    outcome = "not enough data"
    if seeds >= least and "no" in standings:
        outcome = "not held"
    elif seeds >= least and standings == {"yes"}:
        outcome = "held"
    return Verdict(outcome=outcome, reason=reason, numbers={**own, **numbers})
