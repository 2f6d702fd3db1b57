"""AutoL2: an L2 coefficient that lowers itself whenever training stops improving.

Source: Lewkowycz & Gur-Ari, "On the training dynamics of deep networks with L2 regularization" (NeurIPS 2020,
arXiv 2006.08643), sec. 1 and 4; details as in the authors' code (google/autol2).

Conventions. `AutoL2Rule` deals in bare numbers and has no units of its own: a coefficient L, steps, and a refractory
period of refractory/L steps. `AutoL2` writes L as torch's ``weight_decay``, the lambda of lambda*w added to the
gradient, that is, of the penalty (lambda/2)*||w||^2. The authors penalise with L2*||w||^2 (no 1/2) and average the
cross-entropy over the k classes as well, so their L2 is 2k times smaller than the same torch weight decay, and their
learning rate k times larger (`reference_units`). The defaults are the paper's numbers, taken as torch weight decay.
The paper's schedule, step by step, in torch's units is ``AutoL2(optimizer, start=2*k*0.1, refractory=2*k*0.1)`` with
``lr = eta/k``.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, SupportsFloat

import torch

from decaycast.core.hook import Hook, StepContext
from decaycast.core.schedule import WeightDecayController, check_keys, whole
from decaycast.core.timescale import effective_rate

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
        self.start = _in_range("start", start)
        self.factor = _in_range("factor", factor)
        self.refractory = _in_range("refractory", refractory)
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
            self._measure(step, *_checked(step, loss, error))
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


class AutoL2(WeightDecayController):
    """`AutoL2Rule` driving an optimiser's weight decay.

    The group with the largest initial weight decay gets the rule's coefficient L; the others keep their ratio to it,
    and groups at 0 stay 0. So the sizes given to the optimiser matter only against each other. The constructor writes
    `start` at once, as torch's schedulers do. The learning rate and the momentum buffers are never touched.

    Call `step` once per *optimiser* step (with gradient accumulation: once per update, with the mean loss and error
    of its micro-batches), between ``backward()`` and ``optimizer.step()``, with loss and error of that very batch:
    this is the paper's order, measured before the update. Called after ``optimizer.step()`` it does the same, each
    decay one step later.

    In data-parallel training every rank must pass the same numbers, the means over all ranks (reduce them when `due`):
    ranks that decide on their own batches would decay at different steps, and their copies of the model drift apart.

    Known limit: the refractory period counts steps, not e-folds, and under a falling learning rate the rule does not
    match a tuned constant (stated in the paper). The defaults are the paper's numbers; see the head of this file for
    its units.

    Args:
        optimizer: torch optimiser in which weight decay has a fixed shrink rate (SGD, AdamW, ...), with at least one
            group that decays.
        start, factor, measure_every, refractory: as in `AutoL2Rule`; `start` in the units of torch's weight decay.

    Raises:
        TypeError: not a torch optimiser.
        ValueError: a setting out of range; no group decays; weight decay coupled into an adaptive step (Adam).

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    >>> scheduler = AutoL2(optimizer)
    >>> for _ in range(21):  # forward and backward would come first
    ...     scheduler.step(loss=1.0, error=0.5)
    ...     optimizer.step()
    >>> scheduler.get_last_wd()
    [0.01]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start: float = 0.1,
        factor: float = 10.0,
        measure_every: int = 10,
        refractory: float = 0.1,
    ) -> None:
        self.rule = AutoL2Rule(start, factor, measure_every, refractory)
        super().__init__(optimizer)
        effective_rate(optimizer)  # refuses an optimiser in which weight decay has no rate
        self._largest = max(self._initial, default=0.0)
        if self._largest == 0:
            raise ValueError(
                "every parameter group has weight_decay 0, so AutoL2 has nothing to set; give the groups that shall "
                "decay a positive weight_decay (only its ratio between groups matters)"
            )
        self.steps = 0
        self._write()

    @property
    def due(self) -> bool:
        """Whether the next `step` will look at loss and error; otherwise they need not be computed."""
        return self.rule.due(self.steps)

    def step(self, loss: Number = None, error: Number = None) -> None:
        """Take in the batch of this optimiser step and set the weight decay in force for it.

        Args:
            loss: mean data loss of the batch, without any L2 term; a number or a zero-dimensional tensor.
            error: its share of wrong predictions, in [0, 1]. Both are read only when `due`.

        Raises:
            ValueError: as `AutoL2Rule.update`; the step then does not count.
        """
        before = self.rule.coefficient
        after = self.rule.update(self.steps, loss, error)
        self.steps += 1
        if after != before or self._stale():
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers (JSON-able), without the optimiser."""
        return {
            "steps": self.steps,
            "largest": self._largest,
            "initial_weight_decay": list(self._initial),
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` and write the restored weight decay; before or after the optimiser's own state.

        Raises:
            ValueError: the state does not belong here (keys, number of groups, numbers); nothing is changed then.
        """
        initial = self._restored_initial(state, self.state_dict())
        largest, steps = _in_range("saved largest", state["largest"]), whole("saved steps", state["steps"], least=0)
        self.rule.load_state_dict(state["rule"])
        self._initial, self._largest, self.steps = initial, largest, steps
        self._write()

    def _scaled(self, initial: float) -> float:
        return self.rule.coefficient * (initial / self._largest)


class AutoL2Hook(Hook):
    """`AutoL2` as a training hook, with its settings; it takes the optimiser from the first step it sees.

    Raises:
        ValueError: a setting out of range (at once); an optimiser that `AutoL2` refuses (at the first step).
    """

    def __init__(
        self, start: float = 0.1, factor: float = 10.0, measure_every: int = 10, refractory: float = 0.1
    ) -> None:
        self._settings = (start, factor, measure_every, refractory)
        AutoL2Rule(*self._settings)
        self.scheduler: AutoL2 | None = None
        self._saved: dict[str, Any] = {}

    def on_step(self, step: int, context: StepContext) -> None:
        """Measure the batch just used, when due, and set the weight decay of the update about to be made."""
        if self.scheduler is None:
            self.scheduler = AutoL2(context.optimizer, *self._settings)
            if self._saved:
                self.scheduler.load_state_dict(self._saved)
        due = self.scheduler.due
        self.scheduler.step(loss=context.loss if due else None, error=context.error() if due else None)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state; empty before the first step."""
        return self.scheduler.state_dict() if self.scheduler else copy.deepcopy(self._saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, at once or, where the optimiser is not known yet, at the first step."""
        if self.scheduler and state:
            self.scheduler.load_state_dict(state)
        else:
            self.scheduler, self._saved = None, copy.deepcopy(state)


def reference_units(eta: float, l2: float, classes: int) -> tuple[float, float]:
    """The paper's learning rate and L2 coefficient as torch SGD's: (lr, weight_decay) = (eta/k, 2*k*l2).

    The authors minimise (cross-entropy)/k + l2*||w||^2 with rate eta; torch minimises the cross-entropy with rate lr
    and adds weight_decay*w to its gradient. One step is the same, momentum included, and lr*weight_decay = 2*eta*l2.

    Args:
        eta: learning rate in the authors' code, > 0.
        l2: their coefficient, >= 0, on *all* parameters, biases and normalisation included.
        classes: k >= 1.

    Raises:
        ValueError: an argument outside its range.

    >>> lr, weight_decay = reference_units(eta=0.2, l2=1e-4, classes=10)
    >>> round(lr, 9), round(weight_decay, 9)
    (0.02, 0.002)
    """
    classes = whole("classes", classes, least=1)
    if not (math.isfinite(eta) and eta > 0 and math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"eta must be finite and > 0 and l2 finite and >= 0, got eta={eta}, l2={l2}")
    return eta / classes, 2 * classes * l2


def _in_range(name: str, value: float) -> float:
    # the limits keep every power of the factor that a run can reach inside float64
    if not 1e-50 <= value <= 1e50:
        raise ValueError(f"{name} must be a positive number between 1e-50 and 1e50, got {value}")
    return float(value)


def _checked(step: int, loss: Number, error: Number) -> tuple[float, float]:
    loss_value, error_value = _number("loss", step, loss), _number("error", step, error)
    if not math.isfinite(loss_value):
        raise ValueError(f"loss must be finite, got {loss_value} at step {step}; the training has diverged")
    if not 0 <= error_value <= 1:
        raise ValueError(f"error must be a share of wrong predictions in [0, 1], got {error_value} at step {step}")
    return loss_value, error_value


def _number(name: str, step: int, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise ValueError(
            f"{name} must be one number at step {step}, where AutoL2 measures, got {type(value).__name__}"
        ) from cause


def _least(best: float | None, value: float) -> float:
    return value if best is None else min(best, value)


def _both_no_better(best: float | None, previous: float | None, value: float) -> bool:
    # the best value exists from the second measurement on, so no decay before the third
    return best is not None and previous is not None and previous >= best and value >= best
