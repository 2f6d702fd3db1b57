"""When to anneal, and the schedule that does it: a large learning rate, then the small one (Li, Wei & Ma 2019, algorithm L-S).

Conventions. A trigger is asked once per step with the training loss before that step, until it says yes; its state can be
saved. `step` counts calls of the scheduler from 0, be they optimiser steps or epochs. A single batch's loss is noisy, most of
all at a large rate, so the triggers that look at it smooth it first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from decaycast.core.decay import check_keys
from decaycast.core.schedule import one_number, whole


class Trigger(ABC):
    """Says when to anneal. In data-parallel training give it the loss averaged over all ranks, so that they decide alike."""

    @abstractmethod
    def update(self, step: int, loss: float | None) -> bool:
        """Whether to anneal before `step`; `loss` is the training loss last seen.

        Args:
            step: 0-based, rising by one.
            loss: finite number, or one-element tensor; triggers that do not need it take None.

        Raises:
            ValueError: a loss is needed and missing or not finite.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, enough to go on as if never interrupted; the arguments are the resumed run's to give."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the state is not that of such a trigger.
        """
        check_keys(state, self.state_dict(), type(self).__name__)
        for name, value in state.items():
            setattr(self, name, value)


class AtStep(Trigger):
    """Anneal at a step known beforehand; an epoch is `epoch*steps_per_epoch`.

    Args:
        step: >= 1: how many steps have the large rate.

    Raises:
        ValueError: no whole number >= 1.

    Source: the patch experiments of Li, Wei & Ma 2019 anneal at epoch 30 of 60.

    >>> [AtStep(30).update(epoch, None) for epoch in (29, 30)]
    [False, True]
    """

    def __init__(self, step: int) -> None:
        self.at = whole("step", step, least=1)

    def update(self, step: int, loss: float | None = None) -> bool:
        """Whether `step` is reached; the loss is not looked at."""
        return step >= self.at


class _Smoothed(Trigger):
    """Keeps an exponential mean of the loss, corrected for its start, in steps of `window`."""

    def __init__(self, window: int) -> None:
        self.window = whole("window", window, least=1)
        self.total, self.weight, self.seen = 0.0, 0.0, 0

    def smoothed(self) -> float:
        """Mean of the last losses; NaN before the first."""
        return self.total / self.weight if self.weight else math.nan

    def add(self, step: int, loss: float | None) -> bool:
        """Take in a loss; returns whether a whole window was seen."""
        value = math.nan if loss is None else one_number(loss)
        if not math.isfinite(value):
            raise ValueError(
                f"{type(self).__name__} needs the training loss at every step, got {loss!r} at step {step}"
            )
        kept = 1.0 - 1.0 / self.window
        self.total, self.weight = kept * self.total + value, kept * self.weight + 1.0
        self.seen += 1
        return self.seen >= self.window

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"total": self.total, "weight": self.weight, "seen": self.seen}


class BelowLoss(_Smoothed):
    """Anneal when the smoothed training loss is at or below a threshold, such as `theory.anneal_loss`: eps1 + q*log(classes).

    Args:
        threshold: in nats, finite and > 0.
        window: steps of the exponential mean, >= 1; nothing happens before that many were seen.

    Raises:
        ValueError: an argument outside its range.

    Source: Li, Wei & Ma 2019, algorithm L-S; there without smoothing, on the whole training set.

    >>> trigger = BelowLoss(0.5, window=2)
    >>> [trigger.update(step, loss) for step, loss in enumerate([0.9, 0.3, 0.3])]  # means 0.9, 0.5, 0.39 (corrected)
    [False, True, True]
    """

    def __init__(self, threshold: float, window: int = 100) -> None:
        self.threshold = one_number(threshold)
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"threshold must be a finite loss > 0, got {threshold!r}")
        super().__init__(window)

    def update(self, step: int, loss: float | None) -> bool:
        """Whether the smoothed loss is low enough."""
        return self.add(step, loss) and self.smoothed() <= self.threshold


class OnPlateau(_Smoothed):
    """Anneal when the smoothed training loss has not improved for `patience` steps.

    Args:
        patience: steps, >= 1.
        improvement: fraction in [0, 1) by which a loss has to be lower than the best one to count as better.
        window: steps of the exponential mean, >= 1; nothing happens before that many were seen.

    Raises:
        ValueError: an argument outside its range.

    >>> trigger = OnPlateau(patience=2, window=1)
    >>> [trigger.update(step, loss) for step, loss in enumerate([1.0, 0.5, 0.6, 0.5])]
    [False, False, False, True]
    """

    def __init__(self, patience: int, improvement: float = 0.01, window: int = 100) -> None:
        self.patience, self.improvement = whole("patience", patience, least=1), one_number(improvement)
        if not 0 <= self.improvement < 1:
            raise ValueError(f"improvement must be a fraction in [0, 1), got {improvement!r}")
        super().__init__(window)
        self.best: float | None = None
        self.waited = 0

    def update(self, step: int, loss: float | None) -> bool:
        """Whether the loss has stalled long enough."""
        if not self.add(step, loss):
            return False
        mean = self.smoothed()
        if self.best is None or mean < self.best - self.improvement * abs(self.best):
            self.best, self.waited = mean, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """The running mean, the best one and how long ago it was."""
        return {**super().state_dict(), "best": self.best, "waited": self.waited}


class LargeThenSmallLR(LRScheduler):
    """The learning rate the optimiser was built with, until a trigger; then the small one, to the end.

    Two runs that are to be compared end in the same small rate: rank large rates by what they give after annealing, never by
    their loss before. Call `step(loss)` once after each `optimizer.step()`, or once per epoch: the unit is the caller's.

    Args:
        optimizer: its groups hold the large rate.
        small: the rate after annealing, finite and >= 0, for all groups or one per group; not above the large one.
        trigger: when to anneal.
        total_steps: length of the run in calls of `step`, >= 2.
        latest: step at which to anneal if the trigger has not said so, in [1, total_steps); None is 4/5 of the run. For
            `AtStep` it is not needed.

    Attributes:
        annealed_at: step whose rate was the first small one; None before.
        reason: "trigger" or "latest"; "" before.

    Raises:
        TypeError: `trigger` is none.
        ValueError: the run would end before it anneals; an argument outside its range.

    Source: Li, Wei & Ma 2019, algorithm L-S.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    >>> scheduler = LargeThenSmallLR(optimizer, 0.004, AtStep(30), total_steps=60)
    >>> rates = []
    >>> for epoch in range(60):
    ...     rates.append(optimizer.param_groups[0]["lr"])
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates.count(0.1), rates[30:] == [0.004] * 30
    (30, True)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        small: float | Sequence[float],
        trigger: Trigger,
        total_steps: int,
        latest: int | None = None,
    ) -> None:
        if not isinstance(trigger, Trigger):
            raise TypeError(
                f"trigger must be an AtStep, BelowLoss, OnPlateau or other Trigger, got {type(trigger).__name__}"
            )
        self.total_steps = whole("total_steps", total_steps, least=2)
        self.trigger, self.latest = trigger, self._latest(trigger, latest)
        self.small = _small_rates(optimizer, small)
        self.annealed_at: int | None = None
        self.reason = ""
        self._started = False  # torch's constructor makes a step of its own, before there is a loss
        super().__init__(optimizer)
        self._started = True

    def _latest(self, trigger: Trigger, latest: int | None) -> int:
        """The last step to anneal at, which has to lie inside the run."""
        if latest is None and isinstance(trigger, AtStep):
            latest = trigger.at
        latest = max(1, 4 * self.total_steps // 5) if latest is None else whole("latest", latest, least=1)
        first = min(latest, trigger.at) if isinstance(trigger, AtStep) else latest
        if first >= self.total_steps:
            raise ValueError(
                f"the run ends at step {self.total_steps}, before it anneals at step {first}: it would never see the small "
                "rate; anneal earlier or train longer"
            )
        return latest

    def step(self, loss: float | None = None) -> None:  # type: ignore[override]
        """Go on to the next step's rate; `loss` is the training loss of the step just made."""
        if self._started and self.annealed_at is None:
            following = self.last_epoch + 1
            if self.trigger.update(following, loss):
                self.annealed_at, self.reason = following, "trigger"
            elif following >= self.latest:
                self.annealed_at, self.reason = following, "latest"
        super().step()

    def get_lr(self) -> list[float]:
        """The rates due: large ones as they are, or the small ones."""
        if self.annealed_at is None:
            return [group["lr"] for group in self.optimizer.param_groups]
        return list(self.small)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and the trigger's state; optimiser, trigger and rates are the resumed run's to give."""
        names = ("last_epoch", "_step_count", "base_lrs", "_last_lr", "annealed_at", "reason")
        return {**{name: getattr(self, name) for name in names}, "trigger": self.trigger.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict`; the optimiser's rates come with its own state, as with torch's schedulers.

        Raises:
            ValueError: the state is not that of such a schedule, or of another kind of trigger.
        """
        check_keys(state_dict, self.state_dict(), type(self).__name__)
        self.trigger.load_state_dict(state_dict["trigger"])
        self.__dict__.update({name: value for name, value in state_dict.items() if name != "trigger"})


def _small_rates(optimizer: torch.optim.Optimizer, small: float | Sequence[float]) -> list[float]:
    """One small rate per group, none above the large one."""
    groups = optimizer.param_groups
    rates = list(small) if isinstance(small, (list, tuple)) else [small] * len(groups)
    if len(rates) != len(groups):
        raise ValueError(
            f"small has {len(rates)} rates and the optimizer {len(groups)} groups; give one per group, or one"
        )
    large = [float(group.get("initial_lr", group["lr"])) for group in groups]
    found = [one_number(rate) for rate in rates]
    if not all(0 <= rate <= most for rate, most in zip(found, large, strict=True)):
        raise ValueError(f"small must be rates from 0 to the optimizer's own {large}, got {small!r}")
    return found
