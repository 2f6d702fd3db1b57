"""Intervals over seeds against Student's t by hand, and rows in groups."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decaycast.core.experiment import Row, Run
from decaycast.core.seeds import common_seeds, group, interval, mean_trace, points


def test_intervals_are_students():
    values = [0.3, 0.5, 0.9, 0.2, 0.6]
    found = interval(values)
    half = 2.776 * np.std(values, ddof=1) / math.sqrt(5)
    assert (found.low, found.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert found.stderr == pytest.approx(half / 2.776)
    assert interval([1.0, 2.0]).high == pytest.approx(1.5 + 12.706 * 0.5)
    assert interval(list(range(40))).high - 19.5 == pytest.approx(2.131 * np.std(range(40), ddof=1) / math.sqrt(40))


def test_groups_are_sorted_and_want_finished_rows():
    runs = [Run(config={"weight_decay": decay}, seed=seed) for decay in (0.1, 0.0, 0.01) for seed in (1, 0)]
    found = group(
        [*(Row(run=run) for run in runs), Row(run=Run(config={"weight_decay": 1.0}), status="failed")], "weight_decay"
    )
    assert list(found) == [0.0, 0.01, 0.1] and list(found[0.1]) == [0, 1]
    assert common_seeds([found[0.1], {1: 0, 5: 0}]) == [1] and common_seeds([]) == []  # type: ignore[dict-item]


def test_a_trace_has_a_band_of_one_standard_error():
    trace = mean_trace("a", [1.0, 2.0], [[0.0, 2.0], [3.0]])
    assert list(trace.y) == [1.0, 3.0] and list(trace.high or []) == [2.0, 3.0] and list(trace.low or []) == [0.0, 3.0]


def test_points_are_hundredths():
    assert points(interval([0.01, 0.03])) == "+2.00 (-10.71 to +14.71)"
