"""Questions over seeds and the verdicts made of them, on values whose interval is known by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from decaycast.core.seeds import interval
from decaycast.core.standing import NEGLIGIBLE, Question, answer

SPREAD = [-1e-4, 0.0, 0.0, 0.0, 1e-4]  # of a number that is known well
WIDE = [-0.05, 0.0, 0.01, 0.02, 0.06]  # of one that is not


def question(size: float | None, name: str = "gain", **more: float) -> Question:
    """Five seeds that say `size`, or nothing."""
    return Question(name=name, values=WIDE if size is None else [size + d for d in SPREAD], **more)


# one question


@pytest.mark.parametrize(
    ("values", "above", "worth", "standing"),
    [
        ([0.01, 0.011, 0.012], 0.0, 0.005, "yes"),
        ([0.001, 0.0011, 0.0012], 0.0, 0.005, "yes"),  # little, but certain
        ([0.0, 0.001, 0.002], 0.0, 0.005, "no"),  # whatever it is, it is not worth having
        ([-0.02, 0.0, 0.02], 0.0, 0.005, "open"),
        ([-0.02, -0.021, -0.022], -0.01, 0.0, "no"),
        ([-0.002, -0.001, 0.0], -0.01, 0.0, "yes"),
        ([-0.011, -0.01, -0.009], -0.01, 0.0, "open"),
    ],
)
def test_what_an_interval_says(values: Sequence[float], above: float, worth: float, standing: str):
    assert Question(name="gain", values=values, above=above, worth=worth).standing == standing


def test_half_a_point_is_worth_having_if_nothing_else_is_said():
    assert NEGLIGIBLE == 0.005
    values = [-0.004, 0.0, 0.004]  # the interval ends 2.4843*0.004 from the mean: at 0.00994
    assert stats.t.ppf(0.975, 2) / 3**0.5 * 0.004 == pytest.approx(0.00994, abs=1e-5)
    assert Question(name="gain", values=[value - 0.0050 for value in values]).standing == "no"
    assert Question(name="gain", values=[value - 0.0049 for value in values]).standing == "open"
    assert Question(name="gain", values=[value + 0.0099 for value in values]).standing == "open"
    assert Question(name="gain", values=[value + 0.0100 for value in values]).standing == "yes"


@pytest.mark.parametrize("bound", [-0.3, 0.0, 2.0])
def test_only_the_distance_to_the_bound_counts(bound: float):
    for size, standing in ((0.01, "yes"), (0.001, "yes"), (-0.01, "no"), (0.0, "no")):
        assert question(bound + size, above=bound).standing == standing


@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=8), st.floats(0, 0.05))
def test_more_is_never_worse(values: list[float], more: float):
    order = ("no", "open", "yes")
    before = Question(name="gain", values=values).standing
    after = Question(name="gain", values=[value + more for value in values]).standing
    assert order.index(after) >= order.index(before)


# a verdict


@pytest.mark.parametrize(
    ("sizes", "outcome"),
    [
        ((0.02,), "held"),
        ((0.02, 0.03), "held"),
        ((0.02, 0.0), "not held"),
        ((0.02, None), "not enough data"),
        ((0.0, None), "not held"),
        ((0.02, 0.0, None), "not held"),
        ((None, None), "not enough data"),
    ],
)
def test_one_no_is_enough_and_all_must_be_yes(sizes: Sequence[float | None], outcome: str):
    questions = [question(size, f"part {i}") for i, size in enumerate(sizes)]
    for order in (questions, questions[::-1]):
        assert answer(order, least=5, words="", numbers={}).outcome == outcome


def test_too_few_seeds_decide_nothing():
    clear = [question(0.02, "one"), question(0.03, "other")]
    assert answer(clear, least=6, words="", numbers={}).outcome == "not enough data"
    short = Question(name="short", values=[0.02, 0.02, 0.0201])
    assert answer([*clear, short], least=5, words="", numbers={}).outcome == "not enough data"
    assert answer([*clear, short], least=3, words="", numbers={}).outcome == "held"


def test_the_verdict_tells_each_question_and_more():
    verdict = answer([question(0.02, "one"), question(None, "other")], least=5, words="More.", numbers={"more": 1.0})
    one, other = verdict.reason.removesuffix(". More.").split("; ")
    assert one.startswith("one +2.00 (+1.99 to +2.01) points, 5 pairs: yes")
    assert other.startswith("other +0.80 (") and other.endswith("points, 5 pairs: open")
    assert verdict.numbers == {
        **interval([0.02 + d for d in SPREAD]).numbers("one"),
        **interval(WIDE).numbers("other"),
    } | {"more": 1.0}
    assert answer([question(0.02)], least=5, words="", numbers={}).reason.endswith("yes.")
