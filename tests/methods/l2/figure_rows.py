"""Rows made up for the figures: what a run would have measured if its accuracy followed a given function of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from decaycast.core.experiment import Row, Run


def made_up(run: Run, accuracy: Callable[[np.ndarray], np.ndarray], *, points: int = 400, **columns: float) -> Row:
    """A finished row of `run` whose validation accuracy is `accuracy(step)` at evenly log-spaced steps; loss is 1 - accuracy."""
    steps = np.geomspace(1.0, float(run.config["steps"]), points)  # type: ignore[arg-type]
    lr, decay = float(run.config["lr"]), float(run.config["weight_decay"])  # type: ignore[arg-type]
    momentum = float(run.config.get("momentum") or 0.0)
    seen = np.broadcast_to(accuracy(steps), steps.shape)
    curve = {
        "step": steps,
        "efolds": steps * lr * decay / (1 - momentum),
        "lr": np.full(points, lr),
        "weight_decay": np.full(points, decay),
        "train_accuracy": np.full(points, 1.0),
        "validation_accuracy": seen,
        "validation_loss": 1 - seen,
        **{name: np.full(points, value) for name, value in columns.items()},
    }
    return Row(run=run, curve={name: tuple(map(float, values)) for name, values in curve.items()})


def failed(rows: Iterable[Row]) -> list[Row]:
    """The same runs, all failed before their first measurement."""
    return [replace(row, status="failed", reason="made up", curve={}) for row in rows]


def seed_noise(seed: int, *names: object) -> float:
    """A standard normal number that depends on the seed and the names alone."""
    text = repr((seed, *names)).encode()
    return float(np.random.default_rng(list(text)).standard_normal())
