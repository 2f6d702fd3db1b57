"""Schedules, and the weight-decay scheduler that torch lacks.

A schedule is a pure function of the 0-based optimiser step that returns a *multiplier* of some base value (a group's
initial weight decay, a learning rate): 1 leaves the base as it is. Outside its horizon it stays at its end value.

`WeightDecayScheduler` has the habits of torch's learning-rate schedulers: the constructor writes the value of step 0,
`step()` follows `optimizer.step()`, `state_dict()` leaves the optimiser out. What it guards against is what
hand-written ones get wrong: groups without decay stay at exactly 0, a resumed run never takes a step with the
constructor's value, and a tensor-valued weight decay is written in place, so that compiled and captured optimiser
steps see the new number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from decaycast.core.names import choose

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """1 at every step."""
    return lambda step: 1.0


def linear(total_steps: int, end: float = 0.0) -> Schedule:
    """A straight line from 1 at step 0 to `end` at step `total_steps`.

    Args:
        total_steps: horizon in optimiser steps, >= 1.
        end: multiplier reached at the horizon, finite and >= 0; above 1 the value rises.

    Raises:
        ValueError: an argument outside its range.

    >>> linear(10, end=0.5)(5)
    0.75
    """
    total, end = _horizon(total_steps), _multiplier("end", end)

    def value(step: int) -> float:
        t = _progress(step, total)
        return (1.0 - t) + t * end

    return value


def cosine(total_steps: int, end: float = 0.0) -> Schedule:
    """Half a cosine from 1 at step 0 to `end` at `total_steps`: end + (1 - end) * (1 + cos(pi*t)) / 2, t = step/total.

    Arguments and errors as `linear`. Source: Loshchilov & Hutter 2017, eq. 5, without restarts.

    >>> round(cosine(10, end=0.5)(5), 12)
    0.75
    """
    total, end = _horizon(total_steps), _multiplier("end", end)

    def value(step: int) -> float:
        fall = (1.0 + math.cos(math.pi * _progress(step, total))) / 2.0
        return fall + (1.0 - fall) * end

    return value


def step_decay(total_steps: int, milestones: Sequence[float] = (0.3, 0.6, 0.9), factor: float = 0.2) -> Schedule:
    """Multiply by `factor` at each milestone, given as a fraction of the run.

    The defaults are the learning-rate schedule of the L2 paper's WRN-28-10 runs (Lewkowycz & Gur-Ari 2020, fig. 1a).

    Args:
        total_steps: horizon in optimiser steps, >= 1.
        milestones: rising fractions in [0, 1]; a milestone m acts from the first step >= m*total_steps on.
        factor: finite and >= 0.

    Raises:
        ValueError: an argument outside its range.

    >>> [round(step_decay(10)(step), 3) for step in (2, 3, 6, 9)]
    [1.0, 0.2, 0.04, 0.008]
    """
    total, factor = _horizon(total_steps), _multiplier("factor", factor)
    if list(milestones) != sorted(set(milestones)) or not all(0 <= m <= 1 for m in milestones):
        raise ValueError(f"milestones must be rising fractions of the run in [0, 1], got {tuple(milestones)}")
    # m*total may exceed a whole number by one rounding error, which must not delay the drop by a step
    drops = [math.ceil(m * total - 1e-9 * total) for m in milestones]
    return lambda step: factor ** sum(step >= drop for drop in drops)


def warmup(fn: Schedule, warmup_steps: int) -> Schedule:
    """`fn` times a linear ramp 1/w, 2/w, ..., 1 over the first w = `warmup_steps` steps; `fn` keeps its own horizon.

    Raises:
        ValueError: `warmup_steps` is negative or not a whole number.

    >>> [warmup(constant(), 4)(step) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    ramp = whole("warmup_steps", warmup_steps, least=0)
    return lambda step: fn(step) * (min(1.0, (step + 1) / ramp) if ramp else 1.0)


def join(pieces: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each piece counts its steps from 0, beginning at its own boundary.

    Args:
        pieces: at least one schedule.
        boundaries: rising steps at which the second, third, ... piece takes over; one fewer than `pieces`.

    Raises:
        ValueError: numbers do not fit together, or boundaries do not rise.

    >>> late_fall = join([constant(), linear(10)], [100])
    >>> [late_fall(step) for step in (99, 100, 105, 110)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if len(pieces) != len(boundaries) + 1:
        raise ValueError(f"{len(pieces)} pieces need {len(pieces) - 1} boundaries between them, got {len(boundaries)}")
    starts = [0, *(whole("a boundary", boundary, least=1) for boundary in boundaries)]
    if starts != sorted(set(starts)):
        raise ValueError(f"boundaries must rise, got {list(boundaries)}")

    def value(step: int) -> float:
        index = max(sum(step >= start for start in starts) - 1, 0)
        return pieces[index](step - starts[index])

    return value


_BY_NAME: Mapping[str, Callable[[int], Schedule]] = {
    "constant": lambda total_steps: constant(),
    "linear": linear,
    "cosine": cosine,
    "step_decay": step_decay,
}
NAMES: tuple[str, ...] = tuple(_BY_NAME)


def by_name(name: str, total_steps: int) -> Schedule:
    """The schedule called `name` (one of `NAMES`) over `total_steps` optimiser steps, with its default shape.

    Raises:
        ValueError: unknown name (the nearest one is offered), or fewer than one step.
    """
    return _BY_NAME[choose(name, NAMES, "schedule")](_horizon(total_steps))


class WeightDecayController(ABC):
    """What every weight-decay scheduler here shares: it alone reads and writes ``group["weight_decay"]``.

    Each group's weight decay at construction is its *initial* one, kept here and under ``"initial_weight_decay"`` in
    the group (as torch keeps ``"initial_lr"``); where that key is present already, as after
    `optimizer.load_state_dict`, it is believed. A subclass says in `_scaled` what becomes of an initial value; groups
    at 0 are never asked and stay 0. Groups added later by `optimizer.add_param_group` join at the next `step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(self).__name__} needs a torch optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self._initial = [_initial_of(index, group) for index, group in enumerate(optimizer.param_groups)]
        self._last_wd: list[float] = []
        self._written_to: list[dict[str, Any]] | None = None

    def get_last_wd(self) -> list[float]:
        """The weight decay last written to each group."""
        return list(self._last_wd)

    @abstractmethod
    def _scaled(self, initial: float) -> float:
        """The weight decay now due for a group whose initial one is `initial` > 0."""

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        added = range(len(self._initial), len(groups))
        initial = self._initial + [_initial_of(index, groups[index]) for index in added]
        self._check_count(initial)
        self._initial = initial
        self._last_wd = [self._scaled(value) if value else 0.0 for value in initial]
        for group, first, value in zip(groups, initial, self._last_wd, strict=True):
            group["initial_weight_decay"] = first
            _set(group, value)
        self._written_to = groups

    def _stale(self) -> bool:
        """Whether the groups were replaced (`optimizer.load_state_dict` does) or added to since the last write."""
        groups = self.optimizer.param_groups
        return groups is not self._written_to or len(groups) != len(self._last_wd)

    def _restored_initial(self, state: Mapping[str, Any], expected: Iterable[str]) -> list[float]:
        """The initial values of a saved state, checked before anything is changed."""
        check_keys(state, expected, type(self).__name__)
        saved = state["initial_weight_decay"]
        initial = [_multiplier(f"saved initial_weight_decay[{index}]", value) for index, value in enumerate(saved)]
        self._check_count(initial)
        return initial

    def _check_count(self, initial: Sequence[float]) -> None:
        groups = self.optimizer.param_groups
        if len(initial) != len(groups):
            raise ValueError(
                f"{type(self).__name__} holds {len(initial)} parameter groups but the optimizer has {len(groups)}; "
                "build the optimizer with the same groups as when the state was saved"
            )


class WeightDecayScheduler(WeightDecayController):
    """Multiply each group's initial weight decay by fn(step): weight_decay_t = initial * fn(t).

    Call `step()` once after each `optimizer.step()`: steps are optimiser steps, so with gradient accumulation it is
    called once per update, not per micro-batch. The learning rate is never touched. Note what decay means in your
    optimiser: in SGD and AdamW the shrink per step is lr * weight_decay, so a falling learning rate already lowers it
    once.

    Args:
        optimizer: any torch optimiser whose groups have a ``"weight_decay"``, as a float or a tensor. A tensor is
            filled in place. (torch 2.13: changing a float recompiles a compiled `optimizer.step` once; a tensor never
            does.)
        fn: 0-based step -> multiplier, finite and >= 0, e.g. `cosine(total_steps)`.
        last_step: -1 starts afresh; n >= 0 goes on after step n and needs groups that hold ``"initial_weight_decay"``.

    Raises:
        TypeError: not a torch optimiser, or `fn` cannot be called.
        ValueError: a group without (valid) weight decay; a multiplier that is negative or not finite.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.01)
    >>> scheduler = WeightDecayScheduler(optimizer, linear(10))
    >>> for _ in range(5):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> scheduler.get_last_wd()
    [0.005]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fn: Schedule, last_step: int = -1) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a function step -> multiplier, got {type(fn).__name__}")
        super().__init__(optimizer)
        last_step = whole("last_step", last_step, least=-1)
        if last_step >= 0 and not all("initial_weight_decay" in group for group in optimizer.param_groups):
            raise ValueError(
                f"last_step={last_step} goes on with an earlier run, but a group has no 'initial_weight_decay'; "
                "load the optimizer's state first, or start with last_step=-1 and call load_state_dict"
            )
        self.fn = fn
        self._move_to(last_step + 1)

    def step(self) -> None:
        """Go on to the next step's weight decay; call it once after each `optimizer.step()`."""
        self._move_to(self.last_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers (JSON-able), without the optimiser and without `fn`, which the resumed run gives anew."""
        return {"last_step": self.last_step, "initial_weight_decay": list(self._initial)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` and write the restored step's weight decay; before or after the optimiser's own state.

        Raises:
            ValueError: the state does not belong here (keys, number of groups, numbers); nothing is changed then.
        """
        initial = self._restored_initial(state, self.state_dict())
        last_step = whole("last_step", state["last_step"], least=0)
        multiplier = self._multiplier_at(last_step)
        self._initial, self.last_step, self._multiplier = initial, last_step, multiplier
        self._write()

    def _move_to(self, step: int) -> None:
        self._multiplier, self.last_step = self._multiplier_at(step), step
        self._write()

    def _multiplier_at(self, step: int) -> float:
        return _multiplier(f"fn({step})", self.fn(step))

    def _scaled(self, initial: float) -> float:
        return initial * self._multiplier


def check_keys(state: Mapping[str, Any], expected: Iterable[str], owner: str) -> None:
    """Refuse a saved state that has not exactly the `expected` keys."""
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise ValueError(f"this is no state of {owner}: missing {missing}, unexpected {extra}")


def _initial_of(index: int, group: Mapping[str, Any]) -> float:
    if "weight_decay" not in group:
        raise ValueError(f"parameter group {index} has no 'weight_decay'; use an optimizer that decays weights")
    value = group.get("initial_weight_decay", group["weight_decay"])
    return _multiplier(f"weight_decay of parameter group {index}", value)


def _set(group: dict[str, Any], value: float) -> None:
    current = group["weight_decay"]
    if isinstance(current, torch.Tensor):
        current.fill_(value)  # compiled or captured steps hold this very tensor
    else:
        group["weight_decay"] = value


def _progress(step: int, total: int) -> float:
    return min(max(step / total, 0.0), 1.0)


def _horizon(total_steps: int) -> int:
    return whole("total_steps", total_steps, least=1)


def whole(name: str, value: Any, *, least: int) -> int:
    """`value` as an int if it is a whole number >= `least` (5.0 passes, True does not), else a ValueError naming it."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not known or value % 1 != 0 or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def _multiplier(name: str, value: Any) -> float:
    number = value.item() if isinstance(value, (torch.Tensor, np.number)) else value
    if not isinstance(number, (int, float)) or not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(number)
