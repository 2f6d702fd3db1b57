"""Checks of the numbers that rules are given: a number or an array in, a float64 array out, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Values = Any  # a number or an array of numbers; what comes back is a float or an array of the broadcast shape


def positive(name: str, value: Values) -> np.ndarray:
    """`value` as float64, finite and > 0 throughout, else a ValueError naming it."""
    return _checked(name, value, "finite and > 0", lambda x: x > 0)


def at_least_zero(name: str, value: Values) -> np.ndarray:
    """`value` as float64, finite and >= 0 throughout, else a ValueError naming it."""
    return _checked(name, value, "finite and >= 0", lambda x: x >= 0)


def momentum_like(name: str, value: Values) -> np.ndarray:
    """`value` as float64 in [0, 1) throughout, else a ValueError naming it."""
    return _checked(name, value, "in [0, 1)", lambda x: (x >= 0) & (x < 1))


def plain(value: Any) -> Values:
    """A float for a 0-d array or number; arrays with axes as they are."""
    return float(value) if np.ndim(value) == 0 else value


def _checked(name: str, value: Values, rule: str, good: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    numbers = _numbers(name, value)
    wrong = numbers[~(np.isfinite(numbers) & good(numbers))]
    if wrong.size:
        raise ValueError(f"{name} must be {rule}, got {wrong.flat[0]:g}")
    return numbers


def _numbers(name: str, value: Values) -> np.ndarray:
    # text and flags would pass numpy's own conversion to float
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that require gradients
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be a number or an array of numbers, got {value!r}")
    return numbers.astype(float)
