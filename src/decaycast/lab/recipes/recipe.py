"""Recipes as people have them: a Trainer's arguments saved as JSON, timm's args.yaml, or options; read without running code.

What a library's files leave out is taken as that library's default, and noted; what the audit needs and nobody says stays None.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from decaycast.core.names import choose
from decaycast.core.schedule import LR_NAMES, lr_by_name, whole
from decaycast.lab.recipes import conventions, lr_shapes
from decaycast.lab.recipes.config_files import NUMBER, Config, load
from decaycast.lab.trial import OPTIMIZERS

HUGGING_FACE_KEYS = ("learning_rate", "per_device_train_batch_size", "lr_scheduler_type", "num_train_epochs", "optim")

Rates = Callable[[int, float], np.ndarray]  # (steps, peak lr) -> lr of each step


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a recipe; None where it is not said. Batch sizes in samples (for text: sequences)."""

    source: str = "options"
    lr: float | None = None
    weight_decay: float | None = None
    optimizer: str | None = None
    momentum: float = 0.0
    schedule: str = "constant"
    rates: Rates | None = None
    steps: int | None = None
    epochs: float | None = None
    """Epochs of the whole run, warm-up and cool-down included."""
    batch_size: int | None = None
    """Samples per optimiser step: per device x devices x gradient accumulation."""
    accumulation: int = 1
    drop_last: bool = False
    convention: Callable[[str], str] | None = None
    """What `weight_decay` means in the optimiser of that name."""
    notes: tuple[str, ...] = ()

    def rates_for(self, steps: int) -> np.ndarray:
        """The learning rate of each of `steps` optimiser steps."""
        peak = self.lr or 0.0
        return np.full(steps, peak) if self.rates is None else self.rates(steps, peak)

    def steps_per_epoch(self, samples: float) -> int | None:
        """Optimiser steps in one pass over `samples`; None without a batch size."""
        if self.batch_size is None:
            return None
        loads = samples * self.accumulation / self.batch_size
        batches = math.floor(loads) if self.drop_last else math.ceil(loads)
        return max(1, math.ceil(batches / self.accumulation))


def with_options(
    facts: Facts,
    *,
    optimizer: str | None = None,
    schedule: str | None = None,
    batch_size: int | None = None,
    **numbers: float | None,
) -> Facts:
    """`facts` with what options say instead; None says nothing.

    Args:
        facts: as read from a file, or `Facts()`.
        optimizer: one of `OPTIMIZERS`; its convention goes with it.
        schedule: a learning-rate schedule of `core.schedule`, over the whole run.
        batch_size: samples per optimiser step.
        numbers: lr, weight_decay, steps, epochs, momentum.

    Raises:
        ValueError: an unknown optimiser or schedule, a batch size below 1, epochs that are not finite and > 0.
    """
    changes: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    if "epochs" in changes:
        if not (math.isfinite(changes["epochs"]) and changes["epochs"] > 0):
            raise ValueError(f"--epochs must be a finite number > 0, got {changes['epochs']}")
        changes = {"steps": None, **changes}  # a file's steps give way to the epochs asked for
    if batch_size is not None:
        changes |= {"batch_size": whole("--batch-size", batch_size, least=1), "accumulation": 1}
    if optimizer is not None:
        changes |= {"optimizer": choose(optimizer, OPTIMIZERS, "optimizer"), "convention": conventions.of_option}
    if schedule is not None:
        choose(schedule, LR_NAMES, "schedule")
        changes |= {"schedule": schedule, "rates": functools.partial(_scheduled, schedule)}
    return replace(facts, **changes)


def _scheduled(schedule: str, steps: int, peak: float) -> np.ndarray:
    shape = lr_by_name(schedule, steps)
    return peak * np.array([shape(step) for step in range(steps)])


def read_config(path: str | Path, devices: int | None = None) -> Facts:
    """The facts in a saved configuration.

    Args:
        path: JSON of a Hugging Face Trainer's arguments (`args.to_json_string()`), or timm's args.yaml (or the same as JSON).
        devices: world size where the file does not say it (None: 1 is assumed, and noted).

    Returns:
        What the file says; what it leaves out is None, or the library's default, noted.

    Raises:
        ValueError: the file is no such configuration, or a value in it makes no sense; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    devices = None if devices is None else whole("--world-size", devices, least=1)
    values = load(path)
    known = [key for key in HUGGING_FACE_KEYS if key in values]
    if "opt" in values and len(known) < 2:
        return _timm(Config(path.name, values), devices)
    if len(known) >= 2:
        return _hugging_face(Config(path.name, values), devices)
    raise ValueError(
        f"{path.name} is neither a Trainer's arguments (with learning_rate, optim, lr_scheduler_type, ...) nor timm's (with opt, "
        "lr, sched, ...); give the recipe as options: --lr, --weight-decay, --steps"
    )


# what the two libraries mean


def _hugging_face(config: Config, devices: int | None) -> Facts:
    optimizer, schedule = config.text("optim", "adamw_torch"), config.text("lr_scheduler_type", "linear")
    world, notes = config.devices(devices)
    accumulation = config.whole("gradient_accumulation_steps", 1, least=1) or 1
    per_device = config.whole("per_device_train_batch_size", least=1)
    if config.values.get("deepspeed"):
        notes.append(
            "a DeepSpeed configuration is named in the file; it may replace optimiser and schedule and is not read"
        )
    notes += [f"{key} is not in the file: {value!r}, the Trainer's default, is assumed"
              for key, value in (("optim", optimizer), ("lr_scheduler_type", schedule)) if key not in config.values]  # fmt: skip
    options = config.values.get("lr_scheduler_kwargs") or {}
    steps = config.number("max_steps", -1, least=-1)
    ratio, warmup = config.number("warmup_ratio", 0.0) or 0.0, config.number("warmup_steps", 0.0) or 0.0
    ratio, warmup = (warmup, 0.0) if 0 < warmup < 1 else (ratio, warmup)
    if ratio > 1:
        raise ValueError(f"{config.name}: warmup_ratio must be a share of the run in [0, 1], got {ratio:g}")

    def rates(total: int, peak: float) -> np.ndarray:
        ramp = int(warmup) if warmup else math.ceil(total * ratio)
        return lr_shapes.hugging_face(
            schedule, peak=peak, steps=total, warmup_steps=ramp, options=_numeric(config.name, options)
        )

    return Facts(
        source=f"Hugging Face arguments {config.name}",
        lr=config.number("learning_rate"),
        weight_decay=config.number("weight_decay"),
        optimizer=optimizer,
        momentum=_momentum_of(config) if optimizer == "sgd" else 0.0,
        schedule=schedule,
        rates=rates,
        steps=config.whole("max_steps", least=-1) if steps and steps > 0 else None,
        epochs=config.number("num_train_epochs", zero=False),
        batch_size=None if per_device is None else per_device * world * accumulation,
        accumulation=accumulation,
        drop_last=config.flag("dataloader_drop_last"),
        convention=conventions.of_hugging_face,
        notes=tuple(notes),
    )


def _numeric(name: str, options: Any) -> dict[str, Any]:
    """The parameters of a schedule: numbers and names, nothing nested."""
    if not isinstance(options, dict):
        raise ValueError(f"{name}: lr_scheduler_kwargs must be an object of names and numbers")
    config = Config(f"{name}: lr_scheduler_kwargs", options)
    return {
        key: value if key.endswith("_type") else config.number(key)
        for key, value in options.items()
        if value is not None
    }


def _momentum_of(config: Config) -> float:
    """Momentum from a Trainer's `optim_args`, "momentum=0.9,nesterov=True"."""
    said = config.text("optim_args", "")
    found = re.search(r"(?:^|,)\s*momentum\s*=\s*([^,\s]+)", said)
    if not found:
        return 0.0
    if not NUMBER.match(found[1]):
        raise ValueError(f"{config.name}: optim_args names the momentum {found[1][:40]!r}, which is no number")
    return float(found[1])


def _timm(config: Config, devices: int | None) -> Facts:
    optimizer, schedule = config.text("opt", "sgd"), config.text("sched", "cosine")
    world, notes = config.devices(devices)
    accumulation = config.whole("grad_accum_steps", 1, least=1) or 1
    per_device = config.whole("batch_size", least=1)
    batch = None if per_device is None else per_device * world * accumulation
    options = _timm_schedule(config)
    epochs = config.number("epochs", zero=False)
    if config.values.get("layer_decay"):
        notes.append(
            "layer_decay lowers the rate of the lower layers, and with it their e-folds; these are the top layer's"
        )
    if config.values.get("opt_kwargs"):
        notes.append("opt_kwargs may change the decay and is not read")

    def rates(total: int, peak: float) -> np.ndarray:
        if epochs is None:
            raise ValueError(f"{config.name} has no epochs, by which its schedule counts; give --schedule")
        return lr_shapes.timm(schedule, peak=peak, steps=total, epochs=epochs, options=options)

    return Facts(
        source=f"timm arguments {config.name}",
        lr=_timm_lr(config, optimizer, batch),
        weight_decay=config.number("weight_decay"),
        optimizer=optimizer,
        momentum=config.number("momentum", 0.9) or 0.0,
        schedule=schedule,
        rates=rates,
        epochs=None if epochs is None else lr_shapes.total_epochs(schedule, epochs, options),
        batch_size=batch,
        accumulation=accumulation,
        drop_last=True,
        convention=conventions.of_timm,
        notes=tuple(notes),
    )


def _timm_schedule(config: Config) -> dict[str, Any]:
    for key, harmless in (("lr_noise", None), ("lr_cycle_mul", 1), ("lr_cycle_limit", 1), ("lr_k_decay", 1)):
        if config.values.get(key) not in (None, harmless, []):
            raise ValueError(
                f"{config.name}: {key} changes the schedule in a way that is not followed; give --schedule"
            )
    defaults = {"warmup_epochs": 5, "warmup_lr": 1e-5, "min_lr": 0.0, "cooldown_epochs": 0}
    options: dict[str, Any] = {key: config.number(key, value) for key, value in defaults.items()}
    options["decay_rate"] = config.number("decay_rate", 0.1)
    options["decay_epochs"] = config.number("decay_epochs", 90, zero=False)
    return options | {key: config.flag(key) for key in ("warmup_prefix", "sched_on_updates")}


def _timm_lr(config: Config, optimizer: str, batch: int | None) -> float | None:
    """The rate, or timm's way to it from the batch: lr_base*(batch/lr_base_size), under a root for adaptive optimisers."""
    lr, base = config.number("lr"), config.number("lr_base")
    if lr or base is None or batch is None:
        return lr
    root = "sqrt" if any(part in optimizer.lower() for part in ("ada", "lamb")) else "linear"
    ratio = batch / (config.whole("lr_base_size", 256, least=1) or 256)
    return base * (math.sqrt(ratio) if config.text("lr_base_scale", root) == "sqrt" else ratio)
