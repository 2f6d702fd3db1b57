"""Options and sample weights of the estimators, checked when they are fitted, as scikit-learn wants it."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np

from decaycast.core.names import choose
from decaycast.methods.self_distill.tuning import CRITERIA


def check_options(model: Any) -> None:
    """Refuse options of a `KernelSelfDistillation` that are out of range."""
    alpha, rounds, mix = model.alpha, model.rounds, model.mix
    if alpha != "auto" and not (_number(alpha) and alpha > 0):
        raise ValueError(f"alpha has to be a finite number above 0 or 'auto', got {alpha!r}")
    if model.tolerance is not None and not (_number(model.tolerance) and model.tolerance > 0):
        raise ValueError(
            f"tolerance has to be a finite number above 0, a mean squared distance, or None for alpha; got {model.tolerance!r}"
        )
    if rounds != "auto" and (isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1):
        raise ValueError(
            f"rounds is the number of fits, a whole number >= 1 (1 is plain kernel ridge) or 'auto', got {rounds!r}"
        )
    if mix != "auto" and not _number(mix):
        raise ValueError(
            f"mix is the weight of the original labels in later fits, a finite number or 'auto', got {mix!r}"
        )
    choose(model.criterion, CRITERIA, "criterion")


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_weights(sample_weight: Any, n: int) -> np.ndarray:
    """Sample weights as float64 of shape (n,); ones for None."""
    weights = np.ones(n) if sample_weight is None else np.asarray(sample_weight, dtype=float)
    if weights.ndim == 0:
        weights = np.full(n, float(weights))
    if weights.shape != (n,):
        raise ValueError(f"sample_weight has to have shape ({n},), got {weights.shape}")
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError("sample_weight has to be finite and >= 0; a weight of 0 leaves a sample out")
    if weights.max() == 0:
        raise ValueError("every sample_weight is zero, so there is nothing to fit; give one sample a weight above 0")
    return weights
