"""What the tests of comparisons share: networks and samples (at the top level, for worker processes to import), made rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from decaycast.core.experiment import Row, Run
from decaycast.lab.compare import compare
from decaycast.lab.comparison.arms import ARMS
from decaycast.lab.comparison.found import Comparison, assess

MODULE = "tests.lab.comparison.compared_models"


def plain() -> nn.Sequential:
    """Six inputs, three classes."""
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def normed(seed: int) -> nn.Sequential:
    """With batch norm and dropout; takes its seed as an argument."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3))


class Odd(nn.Module):
    """A forward of its own, without an activation that noise could go in front of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


INSTANCE = plain()


def nothing() -> str:
    return "no module"


def broken() -> nn.Module:
    raise KeyError("width")


def drawn_elsewhere() -> nn.Module:
    """First weights by NumPy, which nobody seeds."""
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(3, 6))))
    return model


class Scaled(nn.Module):
    """A number and a method that neither its layers nor its forward show."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), scale

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(x)


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("not this one")


class Unanswered(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return {}["nowhere"]


def blobs(count: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping clouds in six dimensions."""
    draws = np.random.default_rng(seed)
    y = np.arange(count) % 3
    x = draws.normal(size=(count, 6)) + 1.2 * np.eye(3, 6)[y]
    return x.astype(np.float32), y


BASE = (0.80, 0.82, 0.81, 0.79, 0.83)
CLEAR = (0.020, 0.024, 0.022, 0.021, 0.023)
NOISE = (0.010, -0.010, 0.000, 0.012, -0.012)
FAINT = (0.005, 0.019, 0.022, 0.012, 0.002)  # t test alone: p 0.046


def made(arm: str, values: Sequence[float | None], **final: float) -> list[Row]:
    """Rows of an arm with these test accuracies; None is a failed run."""
    rows = []
    for seed, value in enumerate(values):
        run = Run(config={"arm": arm, **ARMS[arm].settings, "model": "m", "data": "d", "steps": 9}, seed=seed)
        if value is None:
            rows.append(Row(run=run, status="failed", reason="DivergedError: the training loss is nan"))
            continue
        numbers = {"test_accuracy": value, "test_loss": 1 - value, "validation_accuracy": value}
        numbers |= dict.fromkeys(("validation_loss", "efolds", "gradients", "optimizer_steps"), 9.0)
        rows.append(Row(run=run, final={**numbers, "train_seconds": 2.0 + seed, **final}, seconds=3.0))
    return rows


def plus(gains: Sequence[float]) -> list[float]:
    return [base + gain for base, gain in zip(BASE, gains)]


def found(*arms: tuple[str, Sequence[float | None]], base: Sequence[float | None] = BASE, **about: Any) -> Comparison:
    rows = [row for arm, values in (("none", base), *arms) for row in made(arm, values)]
    return assess(rows, baseline="none", **about)


def tiny(arms: Any = ("label-smoothing",), model: Any = plain, **changes: Any) -> Comparison:
    options: dict[str, Any] = {"budget_steps": 20, "seeds": 2, "batch_size": 16, **changes}
    return compare(model, options.pop("data", blobs()), arms, **options)
