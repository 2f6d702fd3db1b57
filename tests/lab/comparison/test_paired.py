"""Gains in pairs: Student's t and Holm by another route, and accidents of counting."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lab.comparison.compared_models import (
    found,
    plus,
)

from decaycast.core.seeds import interval
from decaycast.lab.comparison.paired import holm, mean_gain, p_value, t_beyond, t_quantile


def test_students_t_by_another_route():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 8, 9, 30):
        for t in (0.0, 0.1, 1.0, -2.5, 7.0):
            assert t_beyond(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)
        for tail in (0.5, 0.05, 0.001):
            assert t_quantile(tail, freedom) == pytest.approx(stats.t.isf(tail / 2, freedom), rel=1e-8)
    gains = [0.013, -0.002, 0.021, 0.004]
    assert p_value(gains) == pytest.approx(stats.ttest_1samp(gains, 0.0).pvalue, rel=1e-10)


def test_a_spread_below_one_sample_is_taken_as_one():
    """Five seeds that all gain five of 397 samples: no accident of that kind is certainty, nor is it nothing."""
    sample = 1 / 397
    gains = [5 * sample] * 5
    assert (
        p_value(gains, sample) == pytest.approx(t_beyond(5 * math.sqrt(5), 4), rel=1e-9)
        and p_value(gains) == 2 * 0.5**5
    )
    found_gain = mean_gain(gains, sample)
    assert found_gain.stderr == pytest.approx(sample / math.sqrt(5))
    assert found_gain.high - found_gain.mean == pytest.approx(2.776445 * sample / math.sqrt(5), rel=1e-6)
    assert p_value([3 * sample] * 2, sample) > 0.1, "two seeds prove nothing by agreeing"
    wide = [0.01, 0.05, 0.03]
    assert mean_gain(wide, sample) == mean_gain(wide) and p_value(wide, sample) == p_value(wide)
    ordinary = interval(wide)
    assert (mean_gain(wide).low, mean_gain(wide).high) == pytest.approx((ordinary.low, ordinary.high), rel=1e-3)
    assert mean_gain([0.0] * 4, sample).mean == 0 and p_value([0.0] * 4, sample) == 1
    comparison = found(("sam", plus([0.02] * 5)), test_samples=397)
    assert comparison.outcome == "better" and found(("sam", plus([0.02] * 5))).outcome == "no difference"
    assert found(("sam", plus([0.02] * 5)), test_samples=397, metric="loss").outcome == "no difference"


def test_equal_gains_have_the_p_of_signs():
    assert p_value([0.01] * 5) == 2 * 0.5**5 and p_value([-0.01] * 2) == 0.5 and p_value([0.0] * 9) == 1.0
    assert p_value([0.01, 0.01 + 1e-9, 0.01]) < 1e-6, "a spread, however small, is one"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.001, 0.5))
def test_holm_by_its_definition(p_values: list[float], level: float):
    """Go up the sorted p-values; at the first above level/(number left) stop."""
    rejected: set[int] = set()
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if (len(p_values) - rank) * p_values[i] > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected
    assert all(p <= each <= min(1.0, len(p_values) * p) for p, each in zip(p_values, holm(p_values)))
