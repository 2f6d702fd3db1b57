"""The trainings of the patch figures: three arms, each with the patch and without, and what was chosen beforehand.

* "large": the large rate, then the small one.
* "small": the small rate throughout.
* "noise": the small rate, with noise in front of every ReLU until the large rate anneals.

Seed by seed the arms and their controls share start, order of the images, choice of patched ones and the patch itself.

What was chosen at the size "small", on seeds that are not reported (100 to 103), by patch-only accuracy before annealing and
nothing else: rates, separation and length. At a large rate of 0.4 the patch was memorised at separations of 0.4 and 0.6 (0.62
and 0.95 of it right after 12 epochs) and not at 0.25 (0.11 after 20), where the small rate of 0.02 had 0.60. At 0.8 and 0.03,
separation 0.35, the large rate had 0.20 and 0.22 after 12 epochs and the small one 1.00 and 0.61. At 0.8 and 0.04, after 16
epochs, 0.11 and 1.00: taken. Noise of 0.4, the paper's, left the patch to be memorised in a first run of seed 0 (0.55) and at
seed 103 (1.00); 0.8 did not (0.15 and 0.10 at seeds 100 and 103): taken. The paper's size has the settings of the authors'
published code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from decaycast.core.experiment import Run, Scalar, Size

PAPER = "Li, Wei & Ma 2019"
LARGE, SMALL, NOISE = ARMS = ("large", "small", "noise")
SEEDS = 5  # fewer decide nothing


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size: what all runs share, how many seeds each arm has, and the noise of that arm in units of its activations."""

    config: Mapping[str, Scalar]
    seeds: Mapping[str, int]
    noise: float

    def runs(self, arms: Iterable[str] = ARMS) -> list[Run]:
        """These arms with the patch and without, seed by seed, so that an early end leaves whole ones."""
        chosen = tuple(arms)
        return [
            Run(config={**self.config, **self._own(arm), "arm": arm, "patch": patch}, seed=seed)
            for seed in range(max(self.seeds.values()))
            for arm in chosen
            for patch in (True, False)
            if seed < self.seeds[arm]
        ]

    def _own(self, arm: str) -> dict[str, Scalar]:
        return {"noise": self.noise} if arm == NOISE else {}


_SHARED: dict[str, Scalar] = {
    "experiment": "large_lr/patch",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "clean_share": 0.2,
    "alone_share": 0.16,
    "scale": 1.25,
}
PLANS: dict[Size, Plan] = {
    "smoke": Plan(
        config={
            **_SHARED,
            "data": "digits",
            "train_size": 300,
            "validation_size": 200,
            "test_size": None,
            "pool": 1,
            "network": "conv-8-16",
            "lr": 0.4,
            "small_lr": 0.05,
            "steps": 60,
            "anneal_at": 30,
            "batch_size": 32,
            "patch_size": 3,
            "separation": 1.0,
            "points": 4,
        },
        seeds={LARGE: 1, SMALL: 1, NOISE: 1},
        noise=0.4,
    ),
    "small": Plan(
        config={
            **_SHARED,
            "data": "cifar10",
            "train_size": 4000,
            "validation_size": 2000,
            "test_size": None,
            "pool": 2,
            "network": "conv-24-48-96",
            "lr": 0.8,
            "small_lr": 0.04,
            "steps": 1488,  # 24 epochs of 62 batches
            "anneal_at": 992,  # after 16 of them
            "batch_size": 64,
            "patch_size": 4,
            "separation": 0.35,
            "points": 8,
        },
        seeds={LARGE: 5, SMALL: 5, NOISE: 5},
        noise=0.8,
    ),
    "paper": Plan(
        config={
            **_SHARED,
            "data": "cifar10",
            "train_size": 48_000,
            "validation_size": 2000,
            "test_size": None,
            "pool": 1,
            "network": "wrn-16-10",
            "lr": 0.1,
            "small_lr": 0.004,
            "steps": 22_500,  # 60 epochs of 375 batches
            "anneal_at": 10_875,  # after 29 of them
            "batch_size": 128,
            "patch_size": 7,
            "separation": 0.1,
            "points": 20,
            "device": "cuda",
        },
        seeds={LARGE: 5, SMALL: 5, NOISE: 5},
        noise=0.4,
    ),
}
