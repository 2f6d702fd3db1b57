"""Advice on a planned run: its numbers against the formulas, its words against what they recommend."""

from __future__ import annotations

import doctest
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.methods.label_noise import advice as room
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.advice import ENOUGH, advice


def test_the_examples_run():
    assert doctest.testmod(room).failed == 0


@pytest.mark.parametrize(
    ("plan", "drift", "verdict"),
    [
        # the digits of the fact sheet: 53 % before, 59.7 %, 81.9 % and 91.8 % after
        ({"lr": 0.03, "steps": 6_000, "batch_size": 32, "flip": 0.2}, 0.169, "too little"),
        ({"lr": 0.1, "steps": 20_000, "batch_size": 32, "flip": 0.2}, 6.25, "enough"),
        ({"lr": 0.3, "steps": 6_000, "batch_size": 32, "flip": 0.2}, 16.9, "enough"),
        ({"lr": 0.03, "steps": 20_000, "batch_size": 32, "flip": 0.2, "momentum": 0.9}, 56.25, "enough"),
        # its quadratic model: batch 1 recovers, batch 4 does not
        ({"lr": 0.01, "steps": 100_000, "batch_size": 1, "sigma": 0.3**0.5}, 3.0, "enough"),
        ({"lr": 0.01, "steps": 100_000, "batch_size": 4, "sigma": 0.3**0.5}, 0.75, "too little"),
        # flip losses: sigma^2/alpha is 1, 1/(2*0.4) and 0.64
        ({"lr": 0.1, "steps": 1_000, "batch_size": 1, "flip": 0.2, "loss": "logistic"}, 10.0, "enough"),
        ({"lr": 0.1, "steps": 1_000, "batch_size": 1, "flip": 0.2, "loss": "exponential"}, 12.5, "enough"),
        ({"lr": 0.1, "steps": 1_000, "batch_size": 1, "flip": 0.2, "loss": "square"}, 6.4, "enough"),
    ],
)
def test_drift_and_verdict(plan: dict, drift: float, verdict: str):
    found = advice(**plan)
    assert found.drift_time == pytest.approx(drift, rel=2e-3)
    assert found.verdict == verdict and math.isnan(found.share_of_limit)
    assert str(found) == f"{verdict}: {found.words}"


def test_the_flip_probability_does_not_matter_under_softmax_unless_it_is_zero():
    plan = {"lr": 0.1, "steps": 1_000, "batch_size": 8}
    assert advice(**plan, flip=0.1) == advice(**plan, flip=0.8)
    found = advice(**plan, flip=0.0)
    assert (found.strength, found.drift_time, found.steps_needed) == (0.0, 0.0, math.inf)
    assert found.words.startswith("There is no noise, so nothing drifts")
    assert advice(**plan, sigma=0.0).drift_time == 0


def test_a_schedule_counts_by_its_largest_and_by_its_sum():
    def lr(step: int) -> float:
        return 0.1 if step < 500 else 0.01

    found = advice(lr=lr, steps=1_000, batch_size=8, flip=0.2, top_eigenvalue=5.0, momentum=0.5)
    assert found.strength == pytest.approx(0.1 / 8 / 0.5)
    assert found.drift_time == pytest.approx((500 * 0.1**2 + 500 * 0.01**2) / 8 / 0.25)
    assert found.share_of_limit == pytest.approx(0.1 * 5 / 3)
    assert found.steps_needed == math.ceil(1_000 * ENOUGH / found.drift_time)


@settings(max_examples=50, deadline=None)
@given(
    st.floats(1e-9, 0.5), st.integers(1, 300), st.integers(1, 64), st.sampled_from([0.0, 0.5, 0.9]), st.floats(0.01, 3)
)
def test_what_it_recommends_is_enough(lr: float, steps: int, batch_size: int, momentum: float, top: float):
    plan = {"lr": lr, "steps": steps, "batch_size": batch_size, "flip": 0.2, "momentum": momentum}
    found = advice(**plan, top_eigenvalue=top)
    if found.verdict != "too little":
        assert found.drift_time >= ENOUGH or found.share_of_limit >= room.NEAR
        return
    (wanted,) = re.findall(r"(\d+) steps", found.words)
    assert int(wanted) == found.steps_needed
    assert advice(**{**plan, "steps": int(wanted)}).verdict == "enough"
    assert advice(**{**plan, "steps": int(wanted) - 1}).drift_time < ENOUGH * (1 + 1e-6)
    for rate in re.findall(r"or lr (\S+),", found.words):
        raised = advice(**{**plan, "lr": float(rate) * 1.005}, top_eigenvalue=top)  # printed to three digits
        assert raised.verdict in ("enough", "near the limit") and raised.share_of_limit < 1
    assert advice(**{**plan, "lr": [lr] * steps}).steps_needed == pytest.approx(found.steps_needed, rel=1e-9, abs=1)
    (smaller,) = re.findall(r"a batch (\S+) times", found.words)
    assert advice(**{**plan, "batch_size": batch_size / float(smaller) * 0.99}).drift_time >= ENOUGH


def test_near_and_beyond_the_limit():
    plan = {"lr": 0.1, "steps": 100, "batch_size": 4, "flip": 0.2, "momentum": 0.9}
    near = advice(**plan, top_eigenvalue=36.0)
    assert near.verdict == "near the limit" and near.share_of_limit == pytest.approx(3.6 / 3.8)
    # the jitter along the top eigenvector against lambda/2
    jitter = theory.stationary_variance(36.0, lr=0.1, strength=1.0, momentum=0.9) / 0.5
    assert f"jitter {jitter:.0f} times as strongly" in near.words and jitter == pytest.approx(19, rel=1e-9)
    assert "The drift time is 25" in near.words and "use lr < 0.095 unless" in near.words
    few = advice(**{**plan, "steps": 1}, top_eigenvalue=36.0)
    assert few.verdict == "near the limit" and "hardly move" in few.words and "or lr" not in few.words
    beyond = advice(**plan, top_eigenvalue=76.0)
    assert beyond.verdict == "unstable" and "use lr < 0.05, better 0.045 at most" in beyond.words
    assert beyond.share_of_limit == pytest.approx(2.0)
    assert advice(**plan, top_eigenvalue=38.0).verdict == "unstable"  # at the limit itself
    unknown = advice(**{**plan, "steps": 1})
    assert "if that is stable" in unknown.words


def test_the_page_shows_what_its_example_prints():
    page = (Path(__file__).parents[3] / "docs" / "label-noise.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"^print\(advice\((.*)\)\)$", page, re.MULTILINE)
    assert f"```text\n{eval(f'advice({arguments})')}\n```" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flip": None}, "give flip= for classification or sigma= for regression, one of the two"),
        ({"sigma": 0.1}, "give flip= for classification or sigma= for regression, one of the two"),
        ({"flip": 1.0}, r"flip is a probability and has to be in \[0, \(C-1\)/C\), got 1.0"),
        ({"flip": -0.1}, "flip must be a finite number >= 0, got -0.1"),
        ({"flip": None, "sigma": math.inf}, "sigma must be a finite number >= 0, got inf"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"loss": "logistic", "flip": 0.6}, r"flip has to be in \(0, 1/2\) for the logistic loss"),
        ({"top_eigenvalue": -1.0}, "top_eigenvalue must be a finite number >= 0, got -1.0"),
        ({"lr": -0.1}, "lr must be finite and >= 0 at every step"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "batch_size has to be finite and > 0, got 0"),
        ({"momentum": 1.0}, r"momentum has to be finite and in \[0, 1\), got 1"),
    ],
)
def test_bad_input(change: dict, words: str):
    plan = {"lr": 0.1, "steps": 100, "batch_size": 4, "flip": 0.2}
    with pytest.raises(ValueError, match=words):
        advice(**{**plan, **change})
