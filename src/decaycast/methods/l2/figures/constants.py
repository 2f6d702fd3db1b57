"""Grids of constant weight decays on one convolutional task: what figs. 1b and 1c compare against, trained once for both.

Each run is as long as the longest budget. The learning rate is constant in `CONSTANT`, so that shorter budgets are read from
the same runs, and falls by a cosine in `COSINE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from decaycast.core.experiment import Run, Scalar, Size
from decaycast.methods.l2.figures.ladders import PAPER_SIZE, SMALL, SMOKE
from decaycast.methods.l2.figures.shared import decay_of, rates


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs of one length in steps over constant weight decays, zero included, and over rules."""

    config: Mapping[str, Scalar]  # everything but weight_decay
    rates: tuple[float, ...]
    seeds: int

    def runs(self) -> list[Run]:
        """One run per constant and seed."""
        return [self.run(decay, seed) for decay in self.decays() for seed in range(self.seeds)]

    def decays(self) -> list[float]:
        """Zero and the constants, rising."""
        return [0.0, *(decay_of(self.config, float(self.config["lr"]), rate) for rate in sorted(self.rates))]  # type: ignore[arg-type]

    def run(self, weight_decay: float, seed: int, **more: Scalar) -> Run:
        """One run of this task."""
        return Run(config={**self.config, "weight_decay": weight_decay, **more}, seed=seed)


def _with(grid: Grid, **more: Scalar) -> Grid:
    return replace(grid, config={**grid.config, **more})


_MOMENTUM: dict[str, Scalar] = {"lr": 0.02, "momentum": 0.9}
CONSTANT: dict[Size, Grid] = {
    "smoke": Grid(
        config={**SMOKE, **_MOMENTUM, "model": "wrn-10-1", "steps": 80, "points": 20},
        rates=rates(0.1, 0.0125, 4),
        seeds=1,
    ),
    "small": Grid(
        config={**SMALL, **_MOMENTUM, "train_size": 5000, "validation_size": 2000, "model": "cnn-bn-8", "steps": 2000},
        rates=rates(0.01, 0.00031623, 7),
        seeds=5,
    ),
    # the paper's grid of 5e-6 to 2e-3 is 1e-4 to 4e-2 in torch's unit
    "paper": Grid(
        config={**PAPER_SIZE, **_MOMENTUM, "model": "wrn-28-10", "batch_size": 1024, "steps": 9600},
        rates=rates(0.02, 2e-5, 10),
        seeds=5,
    ),
}
COSINE: dict[Size, Grid] = {size: _with(grid, schedule="cosine") for size, grid in CONSTANT.items()}
