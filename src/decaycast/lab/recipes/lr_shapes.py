"""Learning rates of a whole run, step by step, as Hugging Face's Trainer and timm's training script schedule them.

Each function returns the rate of every optimiser step as a float64 array. Only schedules that the recipe fixes in advance are
here: one that follows a metric has no rate before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Options = Mapping[str, Any]

# the parameters each schedule takes, with their defaults
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 1},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
    "polynomial": {"lr_end": 1e-7, "power": 1.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "warmup_stable_decay": {
        "num_decay_steps": None,
        "num_stable_steps": None,
        "warmup_type": "linear",
        "decay_type": "cosine",
        "min_lr_ratio": 0.0,
        "num_cycles": 0.5,
    },
}
TIMM = ("cosine", "step", "constant", "none")


def hugging_face(name: str, *, peak: float, steps: int, warmup_steps: int, options: Options) -> np.ndarray:
    """Rates of a Trainer run.

    Args:
        name: `lr_scheduler_type`, a key of `HUGGING_FACE`.
        peak: `learning_rate`.
        steps: optimiser steps of the run.
        warmup_steps: steps of the ramp from 0; "constant" has none whatever this says.
        options: `lr_scheduler_kwargs`.

    Returns:
        Rates, shape (steps,).

    Raises:
        ValueError: an unknown schedule, a parameter it does not take, or one it needs and lacks.
    """
    if name not in HUGGING_FACE:
        raise ValueError(f"{_cannot(name)}; followed are {', '.join(HUGGING_FACE)}")
    unknown = sorted(set(options) - set(HUGGING_FACE[name]))
    if unknown:
        raise ValueError(f"lr_scheduler_kwargs of {name!r} has {', '.join(unknown)}, which is not known there")
    if peak == 0:
        return np.zeros(steps)
    chosen = {**HUGGING_FACE[name], **options}
    step, warm = np.arange(steps, dtype=float), min(warmup_steps, steps)
    progress = np.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    if name == "warmup_stable_decay":
        return peak * _stable_then_decay(step, steps, warmup_steps, chosen)
    body = _BODIES[name](progress, step, warmup_steps, peak, chosen)
    if name != "constant":
        body[:warm] = step[:warm] / max(1, warmup_steps)
    return peak * body


def _cosine(progress: np.ndarray, step: np.ndarray, warmup: int, peak: float, options: Options) -> np.ndarray:
    return np.maximum(0.0, 0.5 * (1 + np.cos(2 * np.pi * options["num_cycles"] * progress)))


def _restarts(progress: np.ndarray, step: np.ndarray, warmup: int, peak: float, options: Options) -> np.ndarray:
    return 0.5 * (1 + np.cos(np.pi * ((options["num_cycles"] * progress) % 1.0)))


def _cosine_to(progress: np.ndarray, step: np.ndarray, warmup: int, peak: float, options: Options) -> np.ndarray:
    if (options["min_lr"] is None) == (options["min_lr_rate"] is None):
        raise ValueError("lr_scheduler_kwargs of 'cosine_with_min_lr' must have one of min_lr and min_lr_rate")
    low = options["min_lr_rate"] if options["min_lr"] is None else options["min_lr"] / peak
    wave = 0.5 * (1 + np.cos(2 * np.pi * options["num_cycles"] * progress))
    return np.maximum(0.0, wave * (1 - low) + low)


def _polynomial(progress: np.ndarray, step: np.ndarray, warmup: int, peak: float, options: Options) -> np.ndarray:
    end = options["lr_end"] / peak
    if not end < 1:
        raise ValueError(f"the polynomial schedule ends at lr_end = {options['lr_end']:g}, not below lr = {peak:g}")
    return (1 - end) * (1 - progress) ** options["power"] + end


def _inverse_root(progress: np.ndarray, step: np.ndarray, warmup: int, peak: float, options: Options) -> np.ndarray:
    scale = warmup or 10_000
    # below the warm-up the root may be of a negative number; the ramp replaces those values
    return 1 / np.sqrt(np.maximum(step - warmup, 0.0) / scale + 1)


_BODIES: dict[str, Callable[..., np.ndarray]] = {
    "linear": lambda progress, *_: 1 - progress,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "cosine_with_min_lr": _cosine_to,
    "polynomial": _polynomial,
    "constant": lambda progress, *_: np.ones_like(progress),
    "constant_with_warmup": lambda progress, *_: np.ones_like(progress),
    "inverse_sqrt": _inverse_root,
}


def _stable_then_decay(step: np.ndarray, steps: int, warmup: int, options: Options) -> np.ndarray:
    decay, stable = options["num_decay_steps"], options["num_stable_steps"]
    if decay is None:
        raise ValueError("lr_scheduler_kwargs of 'warmup_stable_decay' must have num_decay_steps")
    stable = steps - warmup - decay if stable is None else stable
    if stable < 0:
        raise ValueError(f"{warmup} warm-up and {decay} decay steps are more than the {steps} steps of the run")
    rising = np.clip(step / max(1, warmup), 0.0, 1.0)
    falling = np.clip((step - warmup - stable) / max(1, decay), 0.0, 1.0)
    wave = 0.5 * (1 + np.cos(2 * np.pi * options["num_cycles"] * falling))
    up = _form(options["warmup_type"], rising, 0.5 * (1 - np.cos(np.pi * rising)), 1 - np.sqrt(1 - rising))
    down = _form(options["decay_type"], 1 - falling, wave, 1 - np.sqrt(falling))
    value = np.where(step < warmup, up, np.where(step < warmup + stable, 1.0, down))
    value = np.where(step >= warmup + stable + decay, 0.0, value)
    return np.maximum(0.0, value * (1 - options["min_lr_ratio"]) + options["min_lr_ratio"])


def _form(name: Any, linear: np.ndarray, cosine: np.ndarray, root: np.ndarray) -> np.ndarray:
    forms = {"linear": linear, "cosine": cosine, "1-sqrt": root}
    if name not in forms:
        raise ValueError(f"warm-up and decay of 'warmup_stable_decay' are linear, cosine or 1-sqrt, not {name!r}")
    return forms[name]


def timm(name: str, *, peak: float, steps: int, epochs: float, options: Options) -> np.ndarray:
    """Rates of a run of timm's training script.

    Args:
        name: `sched`, one of `TIMM`.
        peak: `lr`.
        steps: optimiser steps of the whole run, warm-up and cool-down included.
        epochs: `epochs` of the schedule itself.
        options: the script's other arguments: warmup_epochs, warmup_lr, warmup_prefix, min_lr, cooldown_epochs, decay_epochs,
            decay_rate, sched_on_updates.

    Returns:
        Rates, shape (steps,); piecewise constant over epochs unless `sched_on_updates`.

    Raises:
        ValueError: an unknown schedule, or restarts, noise or k-decay, which are not followed.
    """
    if name not in TIMM:
        raise ValueError(f"{_cannot(name)}; followed are {', '.join(TIMM)}")
    warmup = options["warmup_epochs"]
    time = np.arange(steps) * (total_epochs(name, epochs, options) / steps)
    if not options["sched_on_updates"]:
        time = np.floor(time + 1e-9)
    if name == "none":
        return np.full(steps, peak)
    after = time - warmup if options["warmup_prefix"] else time
    if name == "cosine":
        low = options["min_lr"]
        body = np.where(after < epochs, low + 0.5 * (peak - low) * (1 + np.cos(np.pi * after / epochs)), low)
    elif name == "step":
        body = peak * options["decay_rate"] ** np.floor(after / options["decay_epochs"] + 1e-9)
    else:
        body = np.full(steps, peak)
    ramp = options["warmup_lr"] + time * ((peak - options["warmup_lr"]) / warmup if warmup else 0.0)
    return np.where(time < warmup, ramp, body)


def total_epochs(name: str, epochs: float, options: Options) -> float:
    """Epochs of a timm run: those of the schedule, a warm-up put before it, and the cool-down that only "cosine" has."""
    cooldown = options["cooldown_epochs"] if name == "cosine" else 0
    return epochs + cooldown + (options["warmup_epochs"] if options["warmup_prefix"] else 0)


def _cannot(name: str) -> str:
    return f"the learning-rate schedule {name!r} is not followed here, so its e-folds are not known before the run"
