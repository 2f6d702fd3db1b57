"""Numbers over seeds against bounds: intervals against scipy's Student t, verdicts, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from decaycast.core.bounds import Bound, decide


def test_an_interval_within_the_bound_is_a_yes_beyond_it_a_no_and_across_it_open():
    values = [1.0, 2.0, 3.0, 4.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    for bound, standing in (
        (Bound(name="x", values=values, high=high + 0.01), "yes"),
        (Bound(name="x", values=values, high=high - 0.01), "open"),
        (Bound(name="x", values=values, high=low + 0.01), "open"),
        (Bound(name="x", values=values, high=low - 0.01), "no"),
        (Bound(name="x", values=values, low=low - 0.01), "yes"),
        (Bound(name="x", values=values, low=low + 0.01), "open"),
        (Bound(name="x", values=values, low=high + 0.01), "no"),
        (Bound(name="x", values=values, low=low - 0.01, high=high + 0.01), "yes"),
        (Bound(name="x", values=values, low=2.4, high=2.6), "open"),
    ):
        assert bound.standing == standing, bound


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ((5.0,), "held"),
        ((5.0, 5.0), "held"),
        ((5.0, 1.0), "not held"),
        ((5.0, 2.5), "not enough data"),
        ((2.5, 1.0), "not held"),
    ],
)
def test_a_verdict_is_held_when_all_bounds_are_and_not_held_when_one_is_broken(ends: Sequence[float], outcome: str):
    bounds = [Bound(name=f"x{i}", values=[2.0, 2.5, 3.0, 2.0, 3.0], high=end) for i, end in enumerate(ends)]
    verdict = decide(bounds, words="More.", numbers={"y": 7.0})
    assert verdict.outcome == outcome and verdict.reason.endswith("More.")
    assert verdict.numbers["x0"] == 2.5 and verdict.numbers["y"] == 7.0
    assert verdict.numbers["x0_low"] < 2.5 < verdict.numbers["x0_high"]


def test_too_few_seeds_decide_nothing():
    bound = Bound(name="x", values=[1.0, 1.1, 0.9, 1.0], high=5.0)
    assert decide([bound]).outcome == "not enough data" and decide([]).outcome == "not enough data"
    assert decide([bound], least=4).outcome == "held"


def test_a_bound_says_what_was_wanted():
    values = [1.0, 1.1, 0.9]
    assert "wanted <= 5" in str(Bound(name="x", values=values, high=5.0))
    assert "wanted >= 5, 3 seeds: no" in str(Bound(name="x", values=values, low=5.0))
    assert "wanted in 0 to 5" in str(Bound(name="x", values=values, low=0.0, high=5.0))


def test_what_speaks_against_a_claim_outweighs_bounds_that_are_kept():
    bound = Bound(name="x", values=[1.0, 1.1, 0.9], high=5.0)
    assert decide([bound], least=3).outcome == "held"
    assert decide([bound], least=4).outcome == "not enough data" and decide([], least=1).outcome == "not enough data"
    broken = decide([bound], least=3, broken="seed 7", words="More.", numbers={"y": 2.0})
    assert broken.outcome == "not held" and broken.reason.endswith("yes; seed 7. More.")
    assert broken.numbers["x"] == pytest.approx(1.0) and broken.numbers["y"] == 2.0
