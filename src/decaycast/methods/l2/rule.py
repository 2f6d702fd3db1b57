"""AutoL2's rule as the paper has it: losses and errors in, the coefficient out, free of any framework.

Source: Lewkowycz & Gur-Ari, "On the training dynamics of deep networks with L2 regularization" (NeurIPS 2020,
arXiv 2006.08643), sec. 1 and 4; details as in the authors' code (google/autol2). The rule deals in bare numbers and has no
units of its own: a coefficient L, steps, and a refractory period of refractory/L steps.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, SupportsFloat

from decaycast.core.decay import check_keys
from decaycast.core.schedule import one_number, whole

Number = SupportsFloat | None


@dataclass(kw_only=True)
class _Memory:
    """All that the rule remembers; its size does not grow but for one entry per decay."""

    first_step: int | None = None
    last_step: int | None = None
    last_measured: int | None = None
    previous_loss: float | None = None
    previous_error: float | None = None
    best_loss: float | None = None
    best_error: float | None = None
    decays: list[int] = field(default_factory=list)


class AutoL2Rule:
    """The paper's state machine, free of any framework: losses and errors in, the coefficient out.

    Every `measure_every` steps it looks at the loss l and error e of the training batch in hand. If the last two
    losses are both no better than the best before them, or the last two errors are, and more than refractory/L steps
    have passed since the last decay (or the start), then L <- L/`factor`. Otherwise the best values take in the
    measurement *before* this one: a fresh record counts only from the next measurement on. L never rises.

    Args:
        start: first coefficient L_0; like the next two a number in [1e-50, 1e50].
        factor: what L is divided by, > 1.
        refractory: no decay until step > (step of the last decay) + refractory/L, with L the decayed value.
        measure_every: steps between measurements, >= 1; the first is at the first step seen.

    Raises:
        ValueError: an argument outside its range.

    Example (nothing ever improves, so the refractory period alone sets the pace):

    >>> rule = AutoL2Rule()
    >>> for step in range(0, 200, 10):
    ...     coefficient = rule.update(step, loss=1.0, error=0.5)
    >>> rule.decays, coefficient
    ([20, 40, 150], 0.0001)
    """

    def __init__(
        self, start: float = 0.1, factor: float = 10.0, measure_every: int = 10, refractory: float = 0.1
    ) -> None:
        self.start = in_range("start", start)
        self.factor = in_range("factor", factor)
        self.refractory = in_range("refractory", refractory)
        if not self.factor > 1:
            raise ValueError(f"factor must be > 1, got {factor}; the coefficient is divided by it")
        self.measure_every = whole("measure_every", measure_every, least=1)
        self._memory = _Memory()

    @property
    def coefficient(self) -> float:
        """The coefficient L in force."""
        return self.start / self.factor ** len(self._memory.decays)

    @property
    def decays(self) -> list[int]:
        """The steps at which L was divided so far."""
        return list(self._memory.decays)

    def due(self, step: int) -> bool:
        """Whether `update` at `step` will look at loss and error; at other steps they may be None."""
        last = self._memory.last_measured
        return last is None or step - last >= self.measure_every

    def update(self, step: int, loss: Number, error: Number) -> float:
        """Take in one optimiser step; return the coefficient in force for it.

        Args:
            step: 0-based optimiser step, never smaller than before. Calls at the measuring steps alone decide the
                same as calls at every step; a step given twice is measured once.
            loss: mean data loss of this step's training batch, *without* the L2 term.
            error: its share of wrong predictions (1 - accuracy), in [0, 1].
                Both may be zero-dimensional tensors; they are read (a device synchronisation) only when `due`. In
                data-parallel training pass the mean over all ranks, so that every rank decides alike.

        Raises:
            ValueError: `step` is negative or goes backwards, or a number that is looked at is not finite or, for the
                error, outside [0, 1]. The state is then as before the call.
        """
        step = operator.index(step)
        seen = self._memory.last_step
        if step < (seen or 0):
            raise ValueError(f"step must be >= 0 and never go backwards, got {step} after {seen}")
        if self.due(step):
            self._measure(step, *checked(step, loss, error))
        self._memory.last_step = step
        return self.coefficient

    def _measure(self, step: int, loss: float, error: float) -> None:
        memory = self._memory
        if memory.first_step is None:
            memory.first_step = step
        if self._stalled(loss, error) and step > self._bound():
            memory.decays.append(step)  # the best values stay as they are, untouched by this measurement
        elif memory.previous_loss is not None and memory.previous_error is not None:
            memory.best_loss = _least(memory.best_loss, memory.previous_loss)
            memory.best_error = _least(memory.best_error, memory.previous_error)
        memory.previous_loss, memory.previous_error, memory.last_measured = loss, error, step

    def _stalled(self, loss: float, error: float) -> bool:
        return _both_no_better(self._memory.best_loss, self._memory.previous_loss, loss) or _both_no_better(
            self._memory.best_error, self._memory.previous_error, error
        )

    def _bound(self) -> float:
        """The step that must be passed, s_0 + refractory/L."""
        memory = self._memory
        since = memory.decays[-1] if memory.decays else memory.first_step
        # refractory/L with the division by start first: whole powers of the factor stay exact, so that the strict >
        # holds at equality (0.1/(0.1/10**5) is 100000.00000000001, 2/(2/10**5) is 99999.99999999999)
        return (since or 0) + self.refractory / self.start * self.factor ** len(memory.decays)

    def state_dict(self) -> dict[str, Any]:
        """Settings and memory as plain numbers (JSON-able); the size grows only with the number of decays."""
        return {name: getattr(self, name) for name in _SETTINGS} | asdict(self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, settings included.

        Raises:
            ValueError: not a state of this class; the rule is then as before.
        """
        check_keys(state, self.state_dict(), type(self).__name__)
        restored = AutoL2Rule(**{name: state[name] for name in _SETTINGS})
        restored._memory = _Memory(**{item.name: copy.copy(state[item.name]) for item in fields(_Memory)})
        self.__dict__.update(restored.__dict__)


_SETTINGS = ("start", "factor", "measure_every", "refractory")


def in_range(name: str, value: float) -> float:
    """`value` as a float, inside limits that keep every power of the factor that a run can reach in float64."""
    number = one_number(value)
    if not 1e-50 <= number <= 1e50:
        raise ValueError(f"{name} must be a positive number between 1e-50 and 1e50, got {value}")
    return number


def checked(step: int, loss: Number, error: Number) -> tuple[float, float]:
    """Loss and error of a measurement as floats, refused where they can be no such thing."""
    loss_value, error_value = _number("loss", step, loss), _number("error", step, error)
    if not math.isfinite(loss_value):
        raise ValueError(f"loss must be finite, got {loss_value} at step {step}; the training has diverged")
    if not 0 <= error_value <= 1:
        raise ValueError(f"error must be a share of wrong predictions in [0, 1], got {error_value} at step {step}")
    return loss_value, error_value


def _number(name: str, step: int, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        raise ValueError(
            f"{name} must be one number at step {step}, where AutoL2 measures, got {type(value).__name__}"
        ) from cause


def _least(best: float | None, value: float) -> float:
    return value if best is None else min(best, value)


def _both_no_better(best: float | None, previous: float | None, value: float) -> bool:
    # the best value exists from the second measurement on, so no decay before the third
    return best is not None and previous is not None and previous >= best and value >= best
