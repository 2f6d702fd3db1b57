"""Which trainings the escape figures make at each size: starts, arms, seeds.

What was chosen at the size "small", on two seeds that are not reported (100 and 101) but on the same held-out images:

* The start: eight copies, memorised at a learning rate of 0.05 and momentum 0.9. It ends at 67 % test accuracy. Five copies at
  0.1 end at 57 to 60 %, but with weights half as long again, from which label noise gets to 83 % in 12,000 steps at 0.3.
* SAM: radii 0.2, 0.5, 1 and 2 at learning rates 0.1 and 0.3, some of them from the other starts. The larger both, the better:
  92 % after 4,000 steps with radius 2 at 0.3 (one seed), 86 and 89 % with 0.5. These two radii are shown.

Nothing was chosen for label noise: learning rate 0.3, batch 32 and flip probability 0.2 were set before. Of the stronger runs
of equal strength each seed has several: a single run's trace fluctuates by 5 %, and with one run, then three, the interval of a
ratio over eight seeds was too wide to decide. Twelve make it 2 %; the shortest runs have that many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from decaycast.core.experiment import Run, Scalar, Size
from decaycast.methods.label_noise.figures.arms import ARMS, CLEAN, NOISE, SAM, SMOOTHING
from decaycast.methods.label_noise.figures.networks import RESNET

Settings = tuple[float, int, float]
"""Learning rate, batch size, momentum."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size of the three figures."""

    config: Mapping[str, Scalar]
    start: Mapping[str, Scalar]
    lr: float
    batch_size: int
    escape_steps: int
    escape_seeds: int
    radii: tuple[float, ...]
    equal: tuple[tuple[Settings, ...], ...]
    """Groups of settings of one strength each; the first of a group is what the others are compared with."""
    repeats: tuple[tuple[int, ...], ...]
    """How often each of these is run per seed, with other batches and flips."""
    equal_drift: float
    equal_seeds: int
    random_steps: int
    random_seeds: int

    def escape(self) -> list[Run]:
        """Every arm from the adversarial start."""
        arms: list[dict[str, Scalar]] = [{"arm": arm} for arm in ARMS if arm != SAM]
        arms += [{"arm": SAM, "rho": rho} for rho in self.radii]
        fixed = {**self._of(self.lr, self.batch_size), "start": "adversarial", **self.start, "steps": self.escape_steps}
        return [_run({**fixed, **arm}, seed) for seed in range(self.escape_seeds) for arm in arms]

    def equal_strength(self) -> list[Run]:
        """Label noise from the adversarial start at settings of equal strength, each as long as the drift time says."""
        found = []
        for seed in range(self.equal_seeds):
            for group, often in zip(self.equal, self.repeats, strict=True):
                for (lr, batch, momentum), repeats in zip(group, often, strict=True):
                    steps = round(self.equal_drift * batch * (1 - momentum) ** 2 / lr**2)
                    own = {**self._of(lr, batch), "momentum": momentum, "steps": steps, "arm": NOISE}
                    own |= {"start": "adversarial", **self.start}
                    again: list[dict[str, Scalar]] = [{"repeat": i} for i in range(1, repeats)]
                    found += [_run({**own, **each}, seed) for each in [{}, *again]]
        return found

    def random_start(self) -> list[Run]:
        """Label noise, the same loss without sampling, and clean labels from random weights."""
        fixed = {**self._of(self.lr, self.batch_size), "start": "random", "steps": self.random_steps}
        arms = (NOISE, SMOOTHING, CLEAN)
        return [_run({**fixed, "arm": arm}, seed) for seed in range(self.random_seeds) for arm in arms]

    def _of(self, lr: float, batch_size: int) -> dict[str, Scalar]:
        return {**self.config, "lr": lr, "batch_size": batch_size}


def _run(config: Mapping[str, Scalar], seed: int) -> Run:
    return Run(config=config, seed=seed)


_SHARED: dict[str, Scalar] = {"experiment": "label_noise/escape", "flip": 0.2}
_DIGITS: dict[str, Scalar] = {
    **_SHARED,
    "data": "digits",
    "train_size": 400,
    "validation_size": 1000,
    "test_size": None,
    "network": "mlp-128x128",
}
_START: dict[str, Scalar] = {
    "copies": 8,
    "zeroed": 0.1,
    "memorise_steps": 5000,
    "memorise_lr": 0.05,
    "memorise_momentum": 0.9,
    "memorise_batch": 50,
    "relabel_steps": 200,
    "relabel_lr": 0.05,
    "settle_steps": 1500,
    "settle_lr": 0.1,
    "full_batch": 0,
}
_STRONG: tuple[Settings, ...] = ((0.4, 32, 0.0), (0.1, 8, 0.0), (0.04, 32, 0.9))  # lambda 0.0125
_WEAK: tuple[Settings, ...] = ((0.2, 32, 0.0), (0.1, 16, 0.0), (0.02, 32, 0.9))  # lambda 0.00625
PLANS: dict[Size, Plan] = {
    "smoke": Plan(
        config={**_DIGITS, "train_size": 100, "network": "mlp-16", "points": 4},
        start={**_START, "copies": 1, "memorise_steps": 60, "relabel_steps": 20, "settle_steps": 20},
        lr=0.3,
        batch_size=32,
        escape_steps=40,
        escape_seeds=2,
        radii=(),  # the smallest size needs no other library
        equal=(_STRONG[:2],),
        repeats=((2, 1),),
        equal_drift=0.1,
        equal_seeds=2,
        random_steps=40,
        random_seeds=2,
    ),
    "small": Plan(
        config={**_DIGITS, "points": 12},
        start=_START,
        lr=0.3,
        batch_size=32,
        escape_steps=6000,
        escape_seeds=5,
        radii=(0.5, 2.0),
        equal=(_STRONG, _WEAK),
        repeats=((12, 2, 12), (1, 1, 1)),
        equal_drift=4.0,
        equal_seeds=8,
        random_steps=6000,
        random_seeds=8,
    ),
    "paper": Plan(
        config={
            **_SHARED,
            "data": "cifar10",
            "train_size": 45_000,
            "validation_size": 5000,
            "test_size": None,
            "network": RESNET,
            "points": 20,
            "device": "cuda",
        },
        start={
            **_START,
            "copies": 1,
            "memorise_steps": 120_000,
            "memorise_lr": 0.1,
            "memorise_momentum": 0.0,
            "memorise_batch": 128,
            "relabel_steps": 20_000,
            "relabel_lr": 0.1,
            "settle_steps": 10_000,
            "full_batch": 512,
        },
        lr=1.0,
        batch_size=256,
        escape_steps=200_000,
        escape_seeds=6,
        radii=(0.05, 0.2, 0.5),
        equal=(
            ((1.0, 256, 0.0), (0.5, 128, 0.0), (0.1, 256, 0.9)),
            ((0.5, 256, 0.0), (0.05, 256, 0.9), (0.25, 128, 0.0)),
        ),
        repeats=((12, 2, 12), (1, 1, 1)),
        equal_drift=100.0,
        equal_seeds=8,
        random_steps=100_000,
        random_seeds=10,
    ),
}
