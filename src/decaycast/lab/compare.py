"""Which regulariser for this model and these data? Every arm with the same budget, over the same seeds, judged in pairs.

The path: `compare` checks what it was given, plans one run per arm and seed, trains those that a store lacks
(`decaycast.lab.comparison.train`), and sums up (`decaycast.lab.comparison.found`). Nothing is selected: settings are fixed
beforehand, and test data are read once, at the end of each run. Validation data are measured and shown; only the arm "forecast"
uses them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from decaycast.core.experiment import Run, Scalar
from decaycast.core.names import choose
from decaycast.core.schedule import LR_NAMES, whole
from decaycast.lab.comparison.arms import NONE, chosen, misfit, settings_of
from decaycast.lab.comparison.found import METRICS, Comparison, assess
from decaycast.lab.comparison.task import Model, Task, task
from decaycast.lab.comparison.train import train_arm
from decaycast.lab.execute import Execute, OnRow, in_process
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.sweeps import USUAL_LR
from decaycast.lab.trial import OPTIMIZERS

LEAST_STEPS = 20  # half of it is a student's or SAM's whole training
MOST_SEED = 2**32 - 1  # the largest that every generator takes, a model's own among them
POINTS = 12
EXPERIMENT = "compare"


def compare(
    make_model: Model,
    data: Any,
    arms: Iterable[str] | Mapping[str, Mapping[str, Scalar]] | None = None,
    *,
    budget_steps: int,
    seeds: int | Sequence[int] = 5,
    optimizer: str = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    schedule: str = "cosine",
    batch_size: int = 64,
    baseline: str = NONE,
    metric: str = "accuracy",
    train_size: int | None = None,
    standardise: bool = False,
    store: Store | str | os.PathLike[str] | None = None,
    execute: Execute = in_process,
    retry_failed: bool = False,
    data_dir: str | None = None,
    device: str = "cpu",
    on_row: OnRow | None = None,
    on_plan: Callable[[Sequence[Run]], None] | None = None,
) -> Comparison:
    """Train every arm with the same budget over the same seeds, and say which differ from the baseline.

    Called again with the same store it trains only what is missing, also for more seeds or arms.

    Args:
        make_model: what makes a new classifier for every training: a function of no argument or of ``seed``, its name as
            ``package.module:function``, or a network of `decaycast.lab.models` such as "cnn-bn-16".
        data: a data set's name; a pair (X, y) of arrays or tensors, split 60/20/20 by a fixed permutation; or a
            `decaycast.lab.data.Split`. y holds classes from 0.
        arms: names of `decaycast.lab.comparison.arms.ARMS`, or a mapping of names to settings that replace the defaults, as in
            ``{"sam": {"rho": 0.1}}``. None for all usual ones that fit the model; the others are named in the result.
        budget_steps: gradients of one batch that each arm may spend, >= 20. SAM makes half as many steps, self-distillation
            shares them between teacher and student.
        seeds: how many (5 is 0 to 4), or which; at least 2.
        optimizer: "sgd" or "adamw".
        lr: learning rate of all arms; by default 0.02 for sgd and 0.001 for adamw.
        momentum: of sgd, in [0, 1).
        schedule: of the learning rate, over the steps that an arm makes.
        batch_size: samples per gradient.
        baseline: the arm that the others are compared with.
        metric: what decides, "accuracy" or "loss" on the test data.
        train_size: training samples; None for all.
        standardise: give images of one's own mean 0 and standard deviation 1 per channel, by the training part.
        store: where rows are kept: a `Store`, or a file that is made where it is missing. None forgets them.
        execute: where to train: `in_process`, `processes(workers)`, or any other of `decaycast.lab.where`. A callable
            `make_model` has to be importable for any but the first.
        retry_failed: train runs again whose only rows are failed ones.
        data_dir: folder of named data sets; default the environment variable ``DECAYCAST_DATA``.
        device: where to train.
        on_row: called with each new row, for a progress display.
        on_plan: called once with the runs that the store lacks, before any is trained.

    Returns:
        A `Comparison`; printed, it is the table and the verdict.

    Raises:
        ValueError: a name or number out of range, arms that do not fit the model, samples that do not fit it.
        TypeError: a model or data of another kind; a model that other processes cannot be given.
        DataError: missing data.
        StoreError: rows cannot be kept.

    Example:
        >>> found = compare("mlp-8x1", "digits", ["label-smoothing"], budget_steps=20, seeds=2, train_size=100)
        >>> [arm.name for arm in found.arms], found.seeds
        (['none', 'label-smoothing'], 2)
    """
    choose(metric, METRICS, "metric")
    work = task(make_model, data, train_size=train_size, data_dir=data_dir, device=device, standardise=standardise)
    if execute is not in_process:
        work.check_travels()
    numbers = _seeds(seeds)
    config = _shared(budget_steps, optimizer, lr, momentum, schedule, batch_size)
    planned, left_out = _planned(work, arms, baseline, config)
    runs = [Run(config=own, seed=seed) for seed in numbers for own in planned]
    with ExitStack() as stack:
        kept = store if isinstance(store, Store) else stack.enter_context(_opened(store, stack))
        if on_plan is not None:
            on_plan(kept.missing(runs, retry_failed=retry_failed))
        rows = sweep(
            runs, kept, train=partial(train_arm, task=work), execute=execute, retry_failed=retry_failed, on_row=on_row
        )
    labels = work.split().test[1].numel()
    return assess(rows, baseline=baseline, metric=metric, test_samples=labels, left_out=left_out)


def _planned(
    work: Task, arms: Any, baseline: str, shared: Mapping[str, Scalar]
) -> tuple[list[dict[str, Scalar]], dict[str, str]]:
    """The configs of the arms that fit, and why others do not; an arm asked for by name has to fit."""
    asked = chosen(arms, baseline)
    split = work.split()
    about: dict[str, Scalar] = {"data": work.data, "model": work.described(split)}
    if work.train_size is not None:
        about["train_size"] = work.train_size
    optimizer, schedule = str(shared["optimizer"]), str(shared["schedule"])
    planned, left_out = [], {}
    for name, given in asked.items():
        settings = settings_of(name, given, optimizer=optimizer, schedule=schedule)
        reason = misfit(name, settings, work.network(split, 0), split.train[1], split.classes)
        if reason and (arms is not None or name == baseline):
            raise ValueError(f"arm {name!r} does not fit: {reason}; leave it out")
        if reason:
            left_out[name] = reason
        else:
            planned.append({"experiment": EXPERIMENT, "arm": name, **settings, **about, **shared})
    return planned, left_out


def _shared(
    budget_steps: int, optimizer: str, lr: float | None, momentum: float, schedule: str, batch_size: int
) -> dict[str, Scalar]:
    choose(optimizer, OPTIMIZERS, "optimizer")
    rate = float(USUAL_LR[optimizer] if lr is None else lr)
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"lr must be a finite number > 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if isinstance(budget_steps, bool) or not isinstance(budget_steps, int) or budget_steps < LEAST_STEPS:
        raise ValueError(
            f"the budget must be a whole number of at least {LEAST_STEPS} optimiser steps, got {budget_steps}: teacher and "
            "student share it, and SAM makes half as many steps"
        )
    return {
        "optimizer": optimizer,
        "lr": rate,
        "momentum": float(momentum) if optimizer == "sgd" else 0.0,
        "schedule": choose(schedule, LR_NAMES, "schedule"),
        "steps": budget_steps,
        "batch_size": whole("batch_size", batch_size, least=1),
        "points": POINTS,
    }


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    found = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if len(found) < 2:
        raise ValueError(
            f"one training tells nothing about a difference: give at least 2 seeds, better 5, got {len(found)}"
        )
    for seed in found:
        if whole("seed", seed, least=0) > MOST_SEED:
            raise ValueError(f"a seed must be at most {MOST_SEED}, got {seed}")
    return found


def _opened(store: str | os.PathLike[str] | None, stack: ExitStack) -> Store:
    if store is None:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "rows.sqlite"
    return Store(store)
