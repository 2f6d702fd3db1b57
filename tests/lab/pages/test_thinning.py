"""What is left of long curves and of clouds of points: the ends, the extremes, the gaps and the outliers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from decaycast.lab.pages.thinning import thin, thin_line, thin_points

VALUES = some.lists(some.one_of(some.just(math.nan), some.floats(-1e6, 1e6)), max_size=400)


def test_thinning_keeps_both_ends():
    assert thin(3, 10) == [0, 1, 2]
    kept = thin(1000, 7)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 7)
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


@given(values=VALUES, limit=some.integers(8, 60))
def test_a_thinned_line_keeps_ends_and_extremes(values, limit):
    kept = thin_line(values, limit)
    assert kept == sorted(set(kept)) and len(kept) <= limit
    assert not values or (kept[0], kept[-1]) == (0, len(values) - 1)
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        left = [values[i] for i in kept if not math.isnan(values[i])]
        assert (min(left), max(left)) == (min(finite), max(finite))


def test_a_short_line_stays_as_it_is():
    assert thin_line([3.0, math.nan, 1.0], 8) == [0, 1, 2]


def test_a_gap_in_a_long_line_stays_a_gap():
    assert 50 in thin_line([math.nan if i == 50 else 0.0 for i in range(100)], 11)


def test_a_cloud_keeps_its_outlier_and_few_of_what_lies_together():
    x = [1.0] * 5000 + [1.0, 2.0]
    y = [1.0 + 1e-6 * i for i in range(5000)] + [3.0, 1.0]
    kept = thin_points(x, y, 100, logs=(False, False))
    assert kept == [0, 5000, 5001]
    assert thin_points([1.0] * 9, [2.0] * 9, 9, logs=(False, False)) == list(range(9))
    assert thin_points([1.0] * 99, [2.0] * 99, 9, logs=(False, False)) == [0]


@given(
    points=some.lists(
        some.tuples(some.floats(-10, 1e4), some.one_of(some.just(math.nan), some.floats(-5, 5))), max_size=300
    ),
    limit=some.integers(4, 50),
    log=some.booleans(),
)
def test_a_thinned_cloud_is_small_and_can_be_drawn(points, limit, log):
    x, y = [a for a, _ in points], [b for _, b in points]
    kept = thin_points(x, y, limit, logs=(log, False))
    assert kept == sorted(set(kept)) and len(kept) <= limit
    if len(points) > limit:
        drawable = [i for i in range(len(x)) if not math.isnan(y[i]) and (x[i] > 0 or not log)]
        assert set(kept) <= set(drawable) and bool(kept) == bool(drawable)


@pytest.mark.parametrize("log", [False, True])
def test_cells_are_even_on_the_axis_that_is_drawn(log):
    x = [10 ** (-6 + 12 * i / 9999) for i in range(10_000)]
    kept = thin_points(x, [0.0] * 10_000, 100, logs=(log, False))
    assert (len(kept), sum(x[i] < 1.0 for i in kept)) == (10, 5 if log else 1)
