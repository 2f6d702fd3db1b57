"""What a framework's finder returns: a `Forecast` with the verbs of Lightning's `lr_find`, and no number where there is none."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from decaycast.core.randomness import generators_of, randomness, set_randomness
from decaycast.core.timescale import group_rate, shrink_gain
from decaycast.methods.l2.forecast import Forecast


@dataclass(frozen=True, kw_only=True)
class FoundWeightDecay:
    """A forecast weight decay, to be taken or not."""

    forecast: Forecast
    """All of it: verdict, reason, interval, e-folds, cost in full runs."""

    @property
    def results(self) -> dict[float, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Weight decay -> (updates, metric) of each arm that was trained."""
        return {arm.weight_decay: (arm.steps, arm.values) for arm in self.forecast.arms}

    @property
    def verdict(self) -> str:
        """``"trust"``, ``"weak"`` or ``"refuse"``."""
        return self.forecast.verdict

    def suggestion(self) -> float | None:
        """The weight decay, or None, with a warning that says why, where the forecast is refused."""
        if self.forecast.verdict == "refuse":
            warnings.warn(f"no weight decay is suggested: {self.forecast.reason}", stacklevel=2)
            return None
        return self.forecast.weight_decay

    def interval(self) -> tuple[float, float]:
        """What the weight decay may as well be: its 5 and 95 % quantiles."""
        return self.forecast.interval

    def plot(self) -> Any:
        """Plotly figure of the arms; needs ``decaycast[lab]``."""
        return self.forecast.plot()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.forecast.to_dict()


def set_largest(optimizer: Any, weight_decay: float) -> None:
    """Give the group that decays most `weight_decay`; the others keep their ratio to it, and groups at 0 stay 0.

    Raises:
        ValueError: no group decays.
    """
    largest = max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)
    if not largest:
        raise ValueError(
            "no parameter group has a weight decay, so it is not known which should; give the groups that shall decay a "
            "positive one"
        )
    for group in optimizer.param_groups:
        group["weight_decay"] = float(group["weight_decay"]) / largest * weight_decay


def shrink_per_decay(optimizer: Any, rates: np.ndarray | None) -> np.ndarray | None:
    """Shrink per update and unit of the largest weight decay, shape (steps,): what `forecast` calls lr.

    Args:
        optimizer: with the weight decays of an arm.
        rates: learning rates of the run, shape (steps, groups), or None.

    Raises:
        ValueError: an optimiser in which weight decay has no shrink rate.
    """
    groups = optimizer.param_groups
    largest = max(float(group["weight_decay"]) for group in groups)
    for group in groups:
        group_rate(optimizer, group)
    if rates is None:
        return None
    gains = [
        shrink_gain(optimizer, group) * float(group["weight_decay"]) / largest if group["weight_decay"] else 0.0
        for group in groups
    ]
    return (rates * np.array(gains)).max(1)


@contextlib.contextmanager
def random_state(*loaders: Any) -> Iterator[Any]:
    """Random generators, those of data loaders included, put back at the end; yields a function that puts them back now."""
    generators = [generator for loader in loaders for generator in generators_of(loader)]
    state = randomness(generators)
    try:
        yield lambda: set_randomness(state, generators)
    finally:
        set_randomness(state, generators)
