"""The weight-decay scheduler that torch lacks.

`WeightDecayScheduler` has the habits of torch's learning-rate schedulers: the constructor writes the value of step 0,
`step()` follows `optimizer.step()`, `state_dict()` leaves the optimiser out. What it guards against is what
hand-written ones get wrong: groups without decay stay at exactly 0, a resumed run never takes a step with the
constructor's value, and a tensor-valued weight decay is written in place, so that compiled and captured optimiser
steps see the new number. The schedules themselves are functions, in `decaycast.core.schedule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from decaycast.core.schedule import Schedule, check_multiplier, whole


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
        initial = [check_multiplier(f"saved initial_weight_decay[{index}]", value) for index, value in enumerate(saved)]
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

    >>> from decaycast.core.schedule import linear
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
        return check_multiplier(f"fn({step})", self.fn(step))

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
    return check_multiplier(f"weight_decay of parameter group {index}", value)


def _set(group: dict[str, Any], value: float) -> None:
    current = group["weight_decay"]
    if isinstance(current, torch.Tensor):
        current.fill_(value)  # compiled or captured steps hold this very tensor
    else:
        group["weight_decay"] = value
