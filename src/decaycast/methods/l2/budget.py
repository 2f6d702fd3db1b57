"""AutoL2 on the clock of e-folds: a budget of decay, spent along the learning rate, given back when training stalls.

Derivation and evidence: docs/autol2-schedules.md; e-folds: `decaycast.core.timescale`. With a_t the shrink per step and
unit of weight decay (lr/(1-momentum) for SGD, lr for AdamW), A = sum_t a_t over the run and s = sum_{u<t} a_u / A the share of
this learning-rate time that has gone, the weight decay is

    lambda_t = 2 * left_t / (A * (1 - s_t)),      left_{t+1} = left_t - a_t * lambda_t,      left_0 = E*,

twice what would just use up the budget E*. So E(s) = E* * (1 - (1 - s)**2): lambda falls in a straight line to zero on the clock
s, under any learning-rate schedule and in any unit. What the paper counts in steps is counted in e-folds: a
reading is a mean over refractory/2 e-folds, and a decay (two readings in a row no better than the best before, in loss or in
error) divides what is *left* by the factor, at the earliest `refractory` e-folds after the one before.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from decaycast.core.decay import check_keys
from decaycast.core.schedule import whole
from decaycast.methods.l2.rule import Number, checked, in_range

PACE = 2.0
"""Times the rate that would just use up what is left; 1 would be a constant weight decay."""
LEAST_MEASUREMENTS = 5
"""A reading is the mean of at least this many batches, however fast the e-folds go by."""
SAME_RATE = 0.1
"""Readings are compared while the learning rate stays within this share of what it was at the first of them."""


@dataclass(kw_only=True)
class _Memory:
    """All that the rule remembers; its size does not grow but for one entry per decay."""

    left: float
    last_step: int | None = None
    last_measured: int | None = None
    efolds: float = 0.0
    clock: float = 0.0
    decays: list[int] = field(default_factory=list)
    efolds_at_decay: float = 0.0
    # the reading under way: sums of loss and error, their number, and the e-folds at its begin
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    count: int = 0
    reading_began: float = 0.0
    # finished readings: rate at the first, best so far, and how many of the last in a row were no better
    compared_at: float | None = None
    best: list[float] | None = None
    stalled: list[int] = field(default_factory=lambda: [0, 0])


class BudgetRule:
    """AutoL2's state machine with e-folds for a clock, free of any framework: losses and errors in, the coefficient out.

    Args:
        budget_efolds: E*, e-folds of decay to spend over the run, in [1e-50, 1e50]; 1.3 is what the paper's own setting
            comes to, a forecast's `efolds` is better.
        horizon: A, the sum over the run's steps of the shrink per unit of weight decay (head of this file), same range.
        factor: what is left of the budget is divided by it when training stalls, > 1 (the paper's 10).
        refractory: e-folds to be spent before the first and between two such divisions, > 0. The paper's 0.1/lambda steps are
            0.4 e-folds in its own setting.
        measure_every: steps between measurements, >= 1; the first is at the first step seen.

    Raises:
        ValueError: an argument outside its range.

    Example (nothing stalls; half-way on the learning rate's clock three quarters of the budget are spent):

    >>> rule = BudgetRule(budget_efolds=1.0, horizon=1000 * 0.1)
    >>> for step in range(500):
    ...     coefficient = rule.update(step, loss=1.0 / (1 + step), error=0.5 / (1 + step), rate=0.1)
    >>> round(rule.efolds, 3), round(coefficient, 3)
    (0.75, 0.01)
    """

    def __init__(
        self,
        budget_efolds: float,
        horizon: float,
        factor: float = 10.0,
        refractory: float = 0.4,
        measure_every: int = 10,
    ) -> None:
        self.budget_efolds = in_range("budget_efolds", budget_efolds)
        self.horizon = in_range("horizon", horizon)
        self.factor = in_range("factor", factor)
        self.refractory = in_range("refractory", refractory)
        if not self.factor > 1:
            raise ValueError(f"factor must be > 1, got {factor}; what is left of the budget is divided by it")
        self.measure_every = whole("measure_every", measure_every, least=1)
        self._memory = _Memory(left=self.budget_efolds)

    @property
    def coefficient(self) -> float:
        """The weight decay that the next step would start from, before its own rate is known."""
        memory = self._memory
        ahead = self.horizon * (1.0 - memory.clock)
        return PACE * memory.left / ahead if ahead > 0 else 0.0

    @property
    def efolds(self) -> float:
        """E-folds spent so far, nominal (without heavy ball's cap)."""
        return self._memory.efolds

    @property
    def decays(self) -> list[int]:
        """The steps at which what was left of the budget was divided."""
        return list(self._memory.decays)

    def due(self, step: int) -> bool:
        """Whether `update` at `step` will look at loss and error; at other steps they may be None."""
        last = self._memory.last_measured
        return last is None or step - last >= self.measure_every

    def update(self, step: int, loss: Number, error: Number, rate: float) -> float:
        """Take in one optimiser step; return the coefficient in force for it. Call it at every step.

        Args:
            step: 0-based optimiser step, larger than the one before.
            loss: mean data loss of this step's training batch, without the L2 term.
            error: its share of wrong predictions, in [0, 1]; both are read only when `due`.
            rate: a_t, this step's shrink per unit of weight decay, finite and >= 0.

        Raises:
            ValueError: `step` does not rise, `rate` is out of range, or a number that is looked at is not finite or, for the
                error, outside [0, 1]. The state is then as before the call.
        """
        step, memory = operator.index(step), self._memory
        if step < 0 or (memory.last_step is not None and step <= memory.last_step):
            raise ValueError(f"step must be >= 0 and rise from call to call, got {step} after {memory.last_step}")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rate must be a finite number >= 0, got {rate} at step {step}")
        if self.due(step):
            self._measure(step, *checked(step, loss, error), rate)
        memory.last_step = step
        return self._spend(rate)

    def _spend(self, rate: float) -> float:
        """The coefficient of a step of this rate; never more than uses up the budget."""
        memory = self._memory
        coefficient = self.coefficient
        if coefficient * rate > memory.left:
            coefficient = memory.left / rate
        memory.efolds += coefficient * rate
        memory.left = max(0.0, memory.left - coefficient * rate)
        memory.clock += rate / self.horizon
        return coefficient

    def _measure(self, step: int, loss: float, error: float, rate: float) -> None:
        memory = self._memory
        memory.last_measured = step
        memory.sums = [memory.sums[0] + loss, memory.sums[1] + error]
        memory.count += 1
        if memory.efolds - memory.reading_began >= self.refractory / 2 and memory.count >= LEAST_MEASUREMENTS:
            reading = [total / memory.count for total in memory.sums]
            memory.sums, memory.count, memory.reading_began = [0.0, 0.0], 0, memory.efolds
            self._compare(step, reading, rate)

    def _compare(self, step: int, reading: list[float], rate: float) -> None:
        """Count readings that are no better than the best; after two in a row, and not too soon, divide what is left."""
        memory = self._memory
        reference = memory.compared_at
        if (
            memory.best is None
            or reference is None
            or not (1 - SAME_RATE) * reference <= rate <= reference / (1 - SAME_RATE)
        ):
            # a lower learning rate lowers the loss by itself: what came before it is no measure any more
            memory.compared_at, memory.best, memory.stalled = rate, reading, [0, 0]
            return
        memory.stalled = [
            count + 1 if now >= best else 0
            for count, now, best in zip(memory.stalled, reading, memory.best, strict=True)
        ]
        memory.best = [min(pair) for pair in zip(memory.best, reading, strict=True)]
        if max(memory.stalled) >= 2 and memory.efolds - memory.efolds_at_decay >= self.refractory:
            memory.decays.append(step)
            memory.left /= self.factor
            memory.efolds_at_decay, memory.stalled = memory.efolds, [0, 0]

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain numbers (JSON-able)."""
        return {name: getattr(self, name) for name in _SETTINGS} | copy.deepcopy(asdict(self._memory))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, settings included.

        Raises:
            ValueError: not a state of this class; the rule is then as before.
        """
        check_keys(state, self.state_dict(), type(self).__name__)
        restored = BudgetRule(**{name: state[name] for name in _SETTINGS})
        restored._memory = _Memory(**{item.name: copy.deepcopy(state[item.name]) for item in fields(_Memory)})
        self.__dict__.update(restored.__dict__)


_SETTINGS = ("budget_efolds", "horizon", "factor", "refractory", "measure_every")
