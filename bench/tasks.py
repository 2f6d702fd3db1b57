"""The live tasks of the forecast benchmark: real data, small networks, the ways people train.

Each task is a run description without its weight decay. A grid of weight decays over five decades, lambda = 0 and the
framework's usual default give the truth; its place on the axis follows the optimiser's convention, so that the spent
e-folds run from about 1e-3 to 1e2 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Run, Scalar
from decaycast.core.schedule import lr_by_name

SGD_DEFAULT, ADAMW_DEFAULT = 5e-4, 1e-2
GRID_POINTS = 11
GRID_SEEDS, FINALIST_SEEDS = (0, 1), (2, 3, 4, 5)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table."""

    name: str
    config: dict[str, Scalar]

    @property
    def steps(self) -> int:
        """The budget in optimiser steps."""
        return int(self.config["steps"])  # type: ignore[arg-type]

    @property
    def default(self) -> float:
        """What the framework's users put when they do not tune."""
        return SGD_DEFAULT if self.config["optimizer"] == "sgd" else ADAMW_DEFAULT

    @property
    def grid(self) -> list[float]:
        """11 weight decays, half a decade apart."""
        low = -5.0 if self.config["optimizer"] == "sgd" else -3.0
        return [float(f"{value:.6g}") for value in np.logspace(low, low + 5, GRID_POINTS)]

    def learning_rates(self) -> np.ndarray:
        """Learning rate of every step."""
        schedule = lr_by_name(str(self.config["schedule"]), self.steps)
        return np.array([float(self.config["lr"]) * schedule(step) for step in range(self.steps)])  # type: ignore[arg-type]

    def run(self, weight_decay: float, seed: int) -> Run:
        """The full training at one weight decay."""
        return Run(config={**self.config, "weight_decay": weight_decay}, seed=seed)


def task(name: str, data: str, train_size: int, model: str, how: str, schedule: str, **rest: Scalar) -> Task:
    """A task by what distinguishes it: data, network, how it is trained."""
    optimizer, momentum = {"sgd": ("sgd", 0.0), "sgdm": ("sgd", 0.9), "adamw": ("adamw", 0.0)}[how]
    validation = {"digits": 400, "shakespeare": 200}.get(data, 1000)
    config: dict[str, Scalar] = {
        "data": data,
        "train_size": train_size,
        "validation_size": validation,
        "test_size": 4000,
        "model": model,
        "optimizer": optimizer,
        "momentum": momentum,
        "schedule": schedule,
        **rest,
    }
    return Task(name=name, config=config)


def tasks() -> list[Task]:
    """13 tasks; a run takes 3 to 16 s on one core."""
    small = {"batch_size": 64}
    conv = {"batch_size": 32, "pool": 2, "points": 40}
    tiny = {"batch_size": 32, "pool": 4, "points": 40}
    return [
        task("digits mlp sgd constant", "digits", 512, "mlp-128x3", "sgd", "constant", lr=0.1, steps=3000, **small),
        task("digits mlp adamw cosine", "digits", 512, "mlp-128x3", "adamw", "cosine", lr=1e-3, steps=2000, **small),
        task("mnist-512 mlp sgd constant", "mnist", 512, "mlp-256x3", "sgd", "constant", lr=0.05, steps=3000, **small),
        task("mnist-512 mlp sgdm cosine", "mnist", 512, "mlp-256x3", "sgdm", "cosine", lr=0.02, steps=2000, **small),
        task(
            "mnist-5k mlp sgdm constant", "mnist", 5000, "mlp-128x3", "sgdm", "constant", lr=0.02, steps=2500, **small
        ),
        task("mnist-5k cnn-bn adamw cosine", "mnist", 5000, "cnn-bn-8", "adamw", "cosine", lr=2e-3, steps=1500, **conv),
        task(
            "fashion-5k mlp adamw constant",
            "fashion_mnist",
            5000,
            "mlp-128x3",
            "adamw",
            "constant",
            lr=1e-3,
            steps=2500,
            **small,
        ),
        task(
            "fashion-5k cnn sgdm cosine", "fashion_mnist", 5000, "cnn-8", "sgdm", "cosine", lr=0.02, steps=2500, **conv
        ),
        task("cifar-5k cnn-bn sgdm cosine", "cifar10", 5000, "cnn-bn-8", "sgdm", "cosine", lr=0.02, steps=1500, **conv),
        task(
            "cifar-5k cnn-bn sgd constant", "cifar10", 5000, "cnn-bn-8", "sgd", "constant", lr=0.1, steps=1500, **conv
        ),
        task("cifar-10k cnn adamw cosine", "cifar10", 10000, "cnn-8", "adamw", "cosine", lr=1e-3, steps=2000, **conv),
        task(
            "cifar-5k wrn sgdm constant", "cifar10", 5000, "wrn-10-1", "sgdm", "constant", lr=0.02, steps=1500, **tiny
        ),
        task(
            "cifar-10k wrn adamw cosine", "cifar10", 10000, "wrn-10-1", "adamw", "cosine", lr=2e-3, steps=1500, **tiny
        ),
    ]


def grid_runs(task: Task) -> list[Run]:
    """The grid, lambda = 0 and the default, on the first seeds."""
    return [task.run(value, seed) for seed in GRID_SEEDS for value in (0.0, task.default, *task.grid)]
