"""Which distillations of a network are made at each size.

What was chosen at the size "small", on two seeds that are not reported (100 and 101): SGD with momentum in place of Adam, so that
the tangent kernel describes the training; the learning rate, at which a teacher has fitted part of the flipped labels (at a half
of it hardly any, and every round hurts); and the number of epochs. The diagnostic's way to set its ridge from the
teacher's training error was found on them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from decaycast.core.experiment import Run, Scalar, Size

JUDGED = 0.4  # share of flipped labels in the figure on noisy labels
SEEDS = 5  # fewer decide nothing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size of the figures on images: settings of every run, shares of flipped labels, seeds."""

    config: Mapping[str, Scalar]
    flips: tuple[float, ...]
    seeds: int

    def runs(self, flips: tuple[float, ...] = ()) -> list[Run]:
        """One run per seed and share of flips, or only those named."""
        return [
            Run(config={**self.config, "flips": share}, seed=seed)
            for seed in range(self.seeds)
            for share in flips or self.flips
        ]


_SHARED: dict[str, Scalar] = {
    "experiment": "self_distill/network",
    "rounds": 6,
    "momentum": 0.9,
    "batch_size": 50,
    "lr": 0.015,
}
PLANS: dict[Size, Plan] = {
    "smoke": Plan(
        config={
            **_SHARED,
            "data": "digits",
            "train_size": 100,
            "validation_size": 100,
            "test_size": None,
            "pool": 1,
            "rounds": 3,
            "epochs": 10,
            "channels": 4,
        },
        flips=(0.0, JUDGED),
        seeds=1,
    ),
    "small": Plan(
        config={
            **_SHARED,
            "data": "mnist",
            "train_size": 500,
            "validation_size": 500,
            "test_size": 5000,
            "pool": 2,
            "epochs": 40,
            "channels": 8,
        },
        flips=(0.0, 0.2, JUDGED, 0.6),
        seeds=SEEDS,
    ),
    "paper": Plan(
        config={
            **_SHARED,
            "data": "cifar10",
            "train_size": 5000,
            "validation_size": 5000,
            "test_size": None,
            "pool": 1,
            "epochs": 75,
            "channels": 64,
            "device": "cuda",
        },
        flips=(0.0, 0.2, JUDGED, 0.6),
        seeds=10,
    ),
}
