"""Schedules: pure functions of the optimiser step, for weight decay and for the learning rate.

A schedule is a pure function of the 0-based optimiser step that returns a *multiplier* of some base value (a group's
initial weight decay, a learning rate): 1 leaves the base as it is. Outside its horizon it stays at its end value.
`decaycast.core.decay.WeightDecayScheduler` runs any of them on an optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from decaycast.core.names import choose

Schedule = Callable[[int], float]
COOLDOWN = 0.2  # share of the run that "wsd" and "off_in_cooldown" use for the cooldown
RISE = 10.0  # how much the rising schedules gain by name: DINO's 0.04 -> 0.4 (Caron et al. 2021)


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
    total, end = _horizon(total_steps), check_multiplier("end", end)

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
    total, end = _horizon(total_steps), check_multiplier("end", end)

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
    total, factor = _horizon(total_steps), check_multiplier("factor", factor)
    if list(milestones) != sorted(set(milestones)) or not all(0 <= m <= 1 for m in milestones):
        raise ValueError(f"milestones must be rising fractions of the run in [0, 1], got {tuple(milestones)}")
    drops = [_first_step(m, total) for m in milestones]
    return lambda step: factor ** sum(step >= drop for drop in drops)


def exponential(total_steps: int, end: float = 0.01) -> Schedule:
    """A geometric fall (or rise) from 1 to `end` at `total_steps`: end**t, t = step/total.

    Args:
        total_steps: horizon in optimiser steps, >= 1.
        end: multiplier reached at the horizon, finite and > 0.

    Raises:
        ValueError: an argument outside its range; a geometric fall never reaches 0.

    >>> round(exponential(10, end=0.01)(5), 12)
    0.1
    """
    total, end = _horizon(total_steps), check_multiplier("end", end)
    if end == 0:
        raise ValueError("end must be > 0 for an exponential schedule, got 0; use linear or cosine to reach 0")
    return lambda step: end ** _progress(step, total)


def inverse_time(total_steps: int, timescale_steps: float | None = None) -> Schedule:
    """A fall like one over the time: t0 / (t0 + step), which is 1 at step 0 and 1/2 at step t0.

    ADana's lambda = omega/t in a form that is finite at step 0 and has no corner (min(1, t0/step) has one). The
    authors write the shrink per step as gamma(t)*omega/(t0 + t), gamma being the learning rate over its peak; in torch's
    AdamW that is an initial weight decay of omega/(lr*t0), with lr the peak. omega has no unit: the e-folds per
    e-fold of time. At a constant learning rate E = omega*log(1 + T/t0), 2.4*omega for the default t0 = T/10.

    Args:
        total_steps: horizon in optimiser steps, >= 1; the value stays as it is from there on.
        timescale_steps: t0 > 0 in optimiser steps; None is a tenth of the horizon, as in the authors' runs.

    Raises:
        ValueError: an argument outside its range.

    Source: Ferbach et al. 2026, arXiv 2602.05298 (omega ~ 4); the form with t0 is that of their code, which counts
    the first step as 1.

    >>> inverse_time(1000)(300)
    0.25
    """
    total = _horizon(total_steps)
    timescale = check_multiplier("timescale_steps", total / 10 if timescale_steps is None else timescale_steps)
    if timescale == 0:
        raise ValueError("timescale_steps must be > 0, got 0; leave it out for a tenth of the horizon")
    return lambda step: timescale / (timescale + min(max(step, 0), total))


def wsd(total_steps: int, warmup_share: float = 0.01, cooldown_share: float = COOLDOWN, end: float = 0.0) -> Schedule:
    """Warm-up, stable, decay: a short ramp to 1, then 1, then a straight line to `end` at `total_steps`.

    Args:
        total_steps: horizon in optimiser steps, >= 1.
        warmup_share: share of the run for the ramp, in [0, 1]; 0 starts at 1.
        cooldown_share: share of the run for the last line, in [0, 1]; together at most 1.
        end: multiplier reached at the horizon, finite and >= 0.

    Raises:
        ValueError: an argument outside its range.

    Source: Hu et al. 2024 (MiniCPM), arXiv 2404.06395; a cooldown over a fifth of the run as in Haegele et al. 2024,
    arXiv 2405.18392. The straight line and the length of the ramp are this library's choice.

    >>> [round(wsd(100, warmup_share=0.02)(step), 2) for step in (0, 1, 80, 90, 100)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    total, end = _horizon(total_steps), check_multiplier("end", end)
    if not (warmup_share >= 0 and cooldown_share >= 0 and warmup_share + cooldown_share <= 1):
        raise ValueError(
            "warmup_share and cooldown_share must be >= 0 and together at most 1, "
            f"got {warmup_share} and {cooldown_share}"
        )
    start = _first_step(1 - cooldown_share, total)
    fall = linear(total - start, end) if start < total else lambda step: end if step >= 0 else 1.0
    return warmup(lambda step: fall(step - start), round(warmup_share * total))


def off_in_cooldown(total_steps: int, cooldown_share: float = COOLDOWN) -> Schedule:
    """1, and 0 during the last `cooldown_share` of the run: the weight decay that goes with a `wsd` learning rate.

    Args:
        total_steps: horizon in optimiser steps, >= 1.
        cooldown_share: share of the run, in [0, 1].

    Raises:
        ValueError: an argument outside its range.

    Source: arXiv 2601.09000 (weight decay off in the cooldown of WSD).

    >>> [off_in_cooldown(100)(step) for step in (79, 80)]
    [1.0, 0.0]
    """
    if not 0 <= cooldown_share <= 1:
        raise ValueError(f"cooldown_share must be in [0, 1], got {cooldown_share}")
    return step_decay(total_steps, milestones=(1 - cooldown_share,), factor=0.0)


def lr_proportional(total_steps: int, lr_schedule: Schedule) -> Schedule:
    """The learning rate over its peak, so that the shrink per step is lambda*lr**2/lr_max.

    Args:
        total_steps: horizon in optimiser steps, >= 1; the peak is looked for in it, the value stays at its end.
        lr_schedule: the schedule of the learning rate, step -> multiplier.

    Raises:
        TypeError: `lr_schedule` cannot be called.
        ValueError: an argument outside its range; a learning rate that is zero at every step.

    Source: AdamC, Defazio 2025, arXiv 2506.02285: for layers followed by a normalisation, on which this decay keeps
    the steady-state ratio of gradient to weight constant. (`decaycast.efolds` calls the convention "corrected".)

    >>> lr_proportional(10, linear(10))(5)
    0.5
    """
    total = _horizon(total_steps)
    if not callable(lr_schedule):
        raise TypeError(f"lr_schedule must be a function step -> multiplier, got {type(lr_schedule).__name__}")
    peak = max(check_multiplier(f"lr_schedule({step})", lr_schedule(step)) for step in range(total))
    if peak == 0:
        raise ValueError("the learning rate is zero at every step, so it has no peak; give a positive lr_schedule")
    return lambda step: lr_schedule(min(max(step, 0), total)) / peak


def warmup(fn: Schedule, warmup_steps: int) -> Schedule:
    """`fn` times a linear ramp 1/w, 2/w, ..., 1 over the first w = `warmup_steps` steps; `fn` keeps its own horizon.

    Raises:
        ValueError: `warmup_steps` is negative or not a whole number.

    >>> [warmup(constant(), 4)(step) for step in (0, 1, 3, 9)]
    [0.25, 0.5, 1.0, 1.0]
    """
    ramp = whole("warmup_steps", warmup_steps, least=0)
    return lambda step: fn(step) * (min(1.0, (max(step, 0) + 1) / ramp) if ramp else 1.0)


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


_FOR_BOTH: Mapping[str, Callable[[int], Schedule]] = {
    "constant": lambda total_steps: constant(),
    "linear": linear,
    "cosine": cosine,
    "step_decay": step_decay,
    "exponential": exponential,
    "wsd": wsd,
}
_FOR_WEIGHT_DECAY: Mapping[str, Callable[[int], Schedule]] = {
    **_FOR_BOTH,
    "off_in_cooldown": off_in_cooldown,
    "linear_up": lambda total_steps: linear(total_steps, end=RISE),
    "cosine_up": lambda total_steps: cosine(total_steps, end=RISE),
    "inverse_time": inverse_time,
}
_FROM_LR: Mapping[str, Callable[[int, Schedule], Schedule]] = {"lr_proportional": lr_proportional}
LR_NAMES: tuple[str, ...] = tuple(_FOR_BOTH)
WEIGHT_DECAY_NAMES: tuple[str, ...] = (*_FOR_WEIGHT_DECAY, *_FROM_LR)


def by_name(name: str, total_steps: int, lr_schedule: Schedule | None = None) -> Schedule:
    """The weight-decay schedule called `name` over `total_steps` optimiser steps, with its default shape.

    Args:
        name: one of `WEIGHT_DECAY_NAMES`.
        total_steps: horizon in optimiser steps, >= 1.
        lr_schedule: the learning rate's schedule; needed by "lr_proportional", not looked at by the others.

    Raises:
        ValueError: unknown name (the nearest one is offered), fewer than one step, or `lr_schedule` is missing.

    >>> by_name("cosine_up", 100)(100)
    10.0
    """
    known = choose(name, WEIGHT_DECAY_NAMES, "schedule")
    if known not in _FROM_LR:
        return _FOR_WEIGHT_DECAY[known](_horizon(total_steps))
    if lr_schedule is None:
        raise ValueError(f"schedule {name!r} follows the learning rate; give its schedule as lr_schedule")
    return _FROM_LR[known](_horizon(total_steps), lr_schedule)


def lr_by_name(name: str, total_steps: int) -> Schedule:
    """The learning-rate schedule called `name` (one of `LR_NAMES`) over `total_steps`, with its default shape.

    Raises:
        ValueError: unknown name (the nearest one is offered), a name that only weight decay has, or fewer than one step.
    """
    if name in WEIGHT_DECAY_NAMES and name not in LR_NAMES:
        raise ValueError(
            f"{name!r} is a schedule of the weight decay, not of the learning rate; use one of {', '.join(LR_NAMES)}"
        )
    return _FOR_BOTH[choose(name, LR_NAMES, "schedule")](_horizon(total_steps))


def _first_step(share: float, total: int) -> int:
    """The first step at or after `share` of the run."""
    # share*total may exceed a whole number by one rounding error, which must not delay a drop by a step
    return math.ceil(share * total - 1e-9 * total)


def _progress(step: int, total: int) -> float:
    return min(max(step / total, 0.0), 1.0)


def _horizon(total_steps: int) -> int:
    return whole("total_steps", total_steps, least=1)


def whole(name: str, value: Any, *, least: int) -> int:
    """`value` as an int if it is a whole number >= `least` (5.0 passes, True does not), else a ValueError naming it."""
    number = _unwrapped(value)
    known = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not known or number % 1 != 0 or number < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(number)


def check_multiplier(name: str, value: Any) -> float:
    """`value` as a float if it is a finite number >= 0 (tensors and numpy numbers pass), else a ValueError naming it."""
    number = one_number(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def one_number(value: Any) -> float:
    """`value` as a float if it is one number (tensors and numpy arrays of one element are), NaN if it is not."""
    number = _unwrapped(value)
    try:
        return float(number) if isinstance(number, (int, float)) else math.nan
    except OverflowError:  # an int beyond float's range
        return math.inf if number > 0 else -math.inf


def _unwrapped(value: Any) -> Any:
    """The Python number in a numpy scalar, or in a tensor or array of one element; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    try:
        return value.item() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    except (RuntimeError, ValueError):  # more or fewer than one element
        return value
