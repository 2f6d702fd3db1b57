"""Small fine-tunings for the tests: a plan on made-up images, and rows made up for the judges."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from decaycast.core.experiment import Row, Run
from decaycast.methods.stochnorm.figures.runs import PLAIN, PLANS, SCRATCH, Plan, stochnorm

CLASSES, SIDE = 5, 8


@dataclass(frozen=True)
class Images:
    """What the lab hands to a figure: parts of made-up images whose class shows in their mean colour."""

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int = CLASSES

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train[0].shape[1:])


def part(count: int, seed: int, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images of every class, their labels mixed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat(count)[torch.randperm(CLASSES * count, generator=generator)]
    colours = torch.randn(CLASSES, channels, 1, 1, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(len(labels), channels, SIDE, SIDE, generator=generator)
    return colours[labels] + noise, labels


def images(channels: int = 3) -> Images:
    return Images(part(20, 1, channels), part(6, 2, channels), part(9, 3, channels))


CONFIG: dict[str, Any] = {
    **PLANS["small"].config,
    "data": "made-up",
    "train_size": 100,
    "network": "resnet-8-8",
    "source_classes": 2,
    "pretrain_steps": 4,
    "target_size": 30,
    "steps": 6,
    "batch_size": 7,
    "lr": 0.01,
    "points": 2,
    "shift": 1,
}
PLAN = replace(PLANS["small"], config=CONFIG, seeds=2, judged_seeds=3, fractions=(0.4, 1.0))


def run_of(arm: str, fraction: float = 0.4, seed: int = 0, **more: Any) -> Run:
    """One small fine-tuning, as the plan says or changed by `more`."""
    return Run(config={**CONFIG, **PLAN.arms[arm], "fraction": fraction, **more}, seed=seed)


# rows made up for the judges

JUDGES = replace(PLANS["small"], seeds=6, judged_seeds=8)
Gain = Callable[[float, float], float]


def seed_noise(*names: object) -> float:
    """A standard normal number that depends on the names alone."""
    return float(np.random.default_rng(list(repr(names).encode())).standard_normal())


def rows(gain: Gain, *, noise: float = 0.001, plan: Plan = JUDGES, shift: float = 0.02) -> list[Row]:
    """Rows of a plan in which StochNorm with p gains gain(p, fraction) over plain; every seed has a shift of its own.

    Frozen batch norm gains a point everywhere, L2-SP nothing, and from scratch 10 points are lost.
    """
    found = []
    for run in plan.runs():
        fraction, arm = float(run.config["fraction"]), str(run.config["arm"])  # type: ignore[arg-type]
        gained = {PLAIN: 0.0, "frozen": 0.01, "l2-sp": 0.0, SCRATCH: -0.1}.get(arm, 0.0)
        if arm == "stochnorm":
            gained = gain(float(run.config["p"]), fraction)  # type: ignore[arg-type]
        accuracy = 0.6 + 0.1 * fraction + shift * seed_noise(run.seed) + gained
        accuracy += noise * seed_noise(run.seed, fraction, arm, run.config.get("p"))
        curve = {"step": [1.0, 2.0], "validation_loss": [2.0, 1.0 - gained], "validation_accuracy": [0.2, accuracy]}
        final = {"accuracy": accuracy, "loss": 1 - accuracy, "images": 500 * fraction}
        if arm != SCRATCH:
            final |= {"gap_mean": 0.1, "gap_variance": 0.9}
        found.append(Row(run=run, curve=curve, final=final))
    return found


def of_arm(found: Iterable[Row], *names: str) -> list[Row]:
    """The rows of some arms."""

    def name(row: Row) -> str:
        arm = str(row.run.config["arm"])
        return stochnorm(float(row.run.config["p"])) if arm == "stochnorm" else arm  # type: ignore[arg-type]

    return [row for row in found if name(row) in names]


def failed(found: Iterable[Row]) -> list[Row]:
    """The same runs, all failed."""
    return [replace(row, status="failed", reason="made up", curve={}, final={}) for row in found]
