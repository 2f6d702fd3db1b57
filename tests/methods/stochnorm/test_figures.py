"""Figures of fine-tuning: which runs they ask for, what they draw, and how they judge rows of known gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.methods.stochnorm.figure_plans import JUDGES, failed, of_arm, rows

from decaycast.core.experiment import SIZES, Figure, Row
from decaycast.methods.stochnorm.figures import FIGURES
from decaycast.methods.stochnorm.figures.best_p import BestProbability
from decaycast.methods.stochnorm.figures.fine_tuning import FineTuning
from decaycast.methods.stochnorm.figures.reading import by_arm, gains, mean, setup
from decaycast.methods.stochnorm.figures.runs import PLAIN, PLANS, SCRATCH, stochnorm

TUNING, BEST = FineTuning(), BestProbability()


def as_claimed(p: float, fraction: float) -> float:
    return {0.0: -0.02, 0.5: 0.03}.get(p, 0.01) * (1 - fraction)


def nothing(p: float, fraction: float) -> float:
    return 0.0


def everywhere(p: float, fraction: float) -> float:
    return 0.02


def harm_with_all(p: float, fraction: float) -> float:
    return 0.03 - 0.06 * fraction


# the plan


def test_figures_share_their_runs_and_their_training():
    assert FIGURES == (TUNING, BEST)
    assert FineTuning.train is BestProbability.train
    for size in SIZES:
        keys = [run.key for run in TUNING.runs(size)]
        own = [run.key for run in BEST.runs(size)]
        assert set(own) < set(keys) and len(set(keys)) == len(keys)
        smallest = min(PLANS[size].fractions)
        assert {run.config["fraction"] for run in BEST.runs(size)} == {smallest}
        assert {0.0, 0.5, 1.0} <= {run.config["p"] for run in BEST.runs(size)}


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_arm_has_five_seeds_at_every_fraction_and_what_is_judged_has_more(size: Any):
    counts: dict[Any, int] = {}
    for run in TUNING.runs(size):
        name = run.config["arm"], run.config.get("p"), run.config["fraction"]
        counts[name] = counts.get(name, 0) + 1
    assert {name[2] for name in counts} == {0.15, 0.3, 0.5, 1.0}
    assert {name[:2] for name in counts} == {
        ("plain", 1.0),
        ("frozen", None),
        ("l2-sp", None),
        ("scratch", None),
        *(("stochnorm", p) for p in (0.0, 0.25, 0.5, 0.75)),
    }
    judged = [count for name, count in counts.items() if name[:2] in (("plain", 1.0), ("stochnorm", 0.5))]
    assert min(counts.values()) == 5 and set(judged) == {16}


def test_arms_of_a_plan_differ_in_their_arm_alone():
    shared: Any = {"arm", "p", "anchor", "lr"}
    for size in SIZES:
        for fraction in PLANS[size].fractions:
            own = [run.config for run in TUNING.runs(size) if run.config["fraction"] == fraction]
            assert len({tuple(sorted((k, v) for k, v in c.items() if k not in shared)) for c in own}) == 1
            assert len({c["lr"] for c in own if c["arm"] != SCRATCH}) == 1


def test_the_papers_size_has_the_settings_of_the_papers_code():
    config = PLANS["paper"].config
    wanted = {"network": "resnet50", "steps": 9050, "batch_size": 48, "lr": 1e-3, "weight_decay": 5e-4}
    assert wanted.items() <= config.items()


# judging


def test_the_claim_is_held_where_it_is_true():
    verdict = TUNING.judge(rows(as_claimed))
    assert verdict.outcome == "held"
    assert verdict.numbers["gain at 15%"] == pytest.approx(0.03 * 0.85, abs=0.002)
    assert verdict.numbers["more than at 100% by"] == pytest.approx(0.03 * 0.85, abs=0.002)
    assert verdict.numbers["gain at 100%"] == pytest.approx(0, abs=0.002)
    assert BEST.judge(rows(as_claimed)).outcome == "held"


@pytest.mark.parametrize(
    ("gain", "where"),
    [(nothing, "gain at 15%"), (everywhere, "more than at 100% by"), (harm_with_all, "gain at 100%")],
    ids=["no gain", "the same gain everywhere", "harm with all data"],
)
def test_one_part_that_is_ruled_out_is_enough(gain: Any, where: str):
    verdict = TUNING.judge(rows(gain))
    assert verdict.outcome == "not held"
    parts = {part.partition(" +")[0].partition(" -")[0]: part for part in verdict.reason.split("; ")[:3]}
    assert parts[where].partition(".  ")[0].split("pairs: ")[1].startswith("no")


@pytest.mark.parametrize(
    ("gain", "noise", "outcome"),
    [(-0.009, 1e-5, "held"), (-0.011, 1e-5, "not held"), (-0.01, 0.002, "not enough data")],
)
def test_neutral_is_not_a_point_below(gain: float, noise: float, outcome: str):
    found = rows(lambda p, fraction: gain if fraction == 1 else 0.05, noise=noise)
    assert TUNING.judge(found).outcome == outcome


def test_an_intermediate_p_has_to_beat_both_ends():
    assert BEST.judge(rows(lambda p, fraction: 0.02 * p)).outcome == "held"
    assert BEST.judge(rows(lambda p, fraction: -0.02 * p)).outcome == "not held"
    assert BEST.judge(rows(lambda p, fraction: 0.03)).outcome == "not held"
    assert BEST.judge(rows(lambda p, fraction: 0.03 - 0.01 * p)).outcome == "not held"
    assert BEST.judge(rows(lambda p, fraction: 0.02 * p, noise=0.05)).outcome == "not enough data"


@pytest.mark.parametrize(
    "few",
    [
        rows(as_claimed, noise=0.04),
        rows(nothing, noise=0.02),
        rows(as_claimed, plan=replace(JUDGES, seeds=4, judged_seeds=4)),
        rows(nothing, plan=replace(JUDGES, seeds=4, judged_seeds=4)),
        rows(as_claimed, plan=replace(JUDGES, seeds=1, judged_seeds=1)),
        rows(as_claimed, plan=replace(JUDGES, fractions=(0.15,))),
        of_arm(rows(as_claimed), PLAIN, "p = 0.25"),
        of_arm(rows(as_claimed), "p = 0.5"),
        failed(rows(as_claimed)),
        [],
    ],
    ids=[
        "noise",
        "noise, no gain",
        "4 seeds",
        "4, no gain",
        "1 seed",
        "1 fraction",
        "no 0.5",
        "no plain",
        "failed",
        "none",
    ],
)
def test_too_little_is_no_verdict(few: list[Row]):
    assert TUNING.judge(few).outcome == "not enough data"


def test_too_little_for_p_is_no_verdict():
    assert BEST.judge(of_arm(rows(as_claimed), PLAIN, "p = 0.5")).outcome == "not enough data"
    assert "with 5 seeds each" in BEST.judge([]).reason
    assert BEST.judge(rows(as_claimed, plan=replace(JUDGES, seeds=4))).outcome == "not enough data"


def test_seeds_are_compared_in_pairs():
    for shift in (0.0, 0.3):  # however much the seeds differ among themselves
        verdict = TUNING.judge(rows(as_claimed, shift=shift, noise=0.004))
        assert verdict.numbers["gain at 15%_stderr"] < 0.004
    whole = rows(as_claimed)
    thinned = [row for row in whole if (row.run.config["arm"], row.run.seed) not in {("plain", 0), ("stochnorm", 3)}]
    own = gains(by_arm(thinned), "p = 0.5")[0.15]
    assert sorted(own) == [1, 2, 4, 5, 6, 7]
    assert "6 pairs" in TUNING.judge(thinned).reason


def test_numbers_are_those_of_scipy():
    found = rows(as_claimed, noise=0.01)
    verdict = TUNING.judge(found)
    own = {(r.run.seed, r.run.config.get("p"), r.run.config["fraction"]): r.final["accuracy"] for r in found}
    pairs = [own[s, 0.5, 0.15] - own[s, 1.0, 0.15] for s in range(8)]
    low, high = stats.t.interval(0.95, 7, np.mean(pairs), stats.sem(pairs))
    assert verdict.numbers["gain at 15%_low"] == pytest.approx(low, abs=2e-5)  # quantiles of three decimals
    assert verdict.numbers["gain at 15%_high"] == pytest.approx(high, abs=2e-5)
    assert verdict.numbers["p = 0.5 over plain at 15%"] == pytest.approx(np.mean(pairs))
    assert verdict.numbers["gap_mean"] == pytest.approx(0.1)


def test_the_reason_tells_every_fraction_and_which_p_leads():
    verdict = TUNING.judge(rows(lambda p, fraction: 0.02 * p * (1 - fraction) - 0.001))
    for words in ("+0.73", "at 15% (largest mean: p = 0.75)", "at 30%", "at 50%", "15% frozen +1.0", "l2-sp"):
        assert words in verdict.reason
    assert verdict.reason.count("(largest mean: p = 0.75)") == 3 and "100% (largest mean: p = 1)" in verdict.reason
    assert verdict.numbers["frozen over plain at 30%"] == pytest.approx(0.01, abs=0.002)
    assert verdict.numbers["scratch over plain at 100%"] == pytest.approx(-0.1, abs=0.002)


# drawing


def test_panels_show_the_numbers():
    found = rows(as_claimed)
    accuracy, by_p, by_method, curves = TUNING.draw(found)
    arms = by_arm(found)
    assert [trace.name for trace in accuracy.traces] == list(arms) and len(arms) == 8
    plain = next(trace for trace in accuracy.traces if trace.name == PLAIN)
    assert plain.y == [mean([row.final["accuracy"] for row in of_seed.values()]) for of_seed in arms[PLAIN].values()]
    few = by_p.traces[0]
    assert few.name == "15% of the data" and list(few.x) == [0.25, 0.5, 0.75, 1]
    assert few.y == pytest.approx([0.85, 2.55, 0.85, 0], abs=0.2) and few.y[-1] == 0
    assert few.low and few.high and few.low[1] < few.y[1] < few.high[1]
    assert [trace.name for trace in by_method.traces] == ["p = 0.5", "frozen", "l2-sp", "plain"]
    assert by_method.traces[1].y == pytest.approx([1] * 4, abs=0.2)
    assert len(curves.traces) == 8 and list(curves.traces[0].x) == [1, 2]
    assert "0.10 running deviations" in accuracy.caption and "500 images" in accuracy.caption


def test_panels_of_p_show_the_numbers():
    accuracy, difference, loss = BEST.draw(rows(as_claimed))
    assert list(accuracy.traces[0].x) == [0, 0.25, 0.5, 0.75, 1] and accuracy.traces[0].name == "mean over 6 seeds"
    assert list(difference.traces[0].x) == [0, 0.25, 0.75, 1]
    assert difference.traces[0].y == pytest.approx([-4.25, -1.7, -1.7, -2.55], abs=0.2)
    assert np.add(loss.traces[0].y, accuracy.traces[0].y) == pytest.approx(np.ones(5))


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_whatever_there_is_can_be_drawn(figure: Figure):
    whole = rows(as_claimed)
    assert figure.draw([]) == [] and figure.draw(failed(whole)) == []
    parts = [
        whole[:1],
        whole[:5],
        of_arm(whole, PLAIN),
        of_arm(whole, "frozen"),
        of_arm(whole, "p = 0.5"),
        [row for row in whole if row.run.seed == 0],
        of_arm(whole, PLAIN)[:2] + of_arm(whole, "p = 0.25")[3:],
    ]
    for part in parts:
        for panel in figure.draw(part):
            assert panel.traces
            for trace in panel.traces:
                assert np.isfinite(trace.y).all() and len(trace.x) == len(trace.y) > 0


def test_a_caption_says_what_was_trained():
    assert setup([]) == ""
    small, paper = (setup([Row(run=TUNING.runs(size)[0])]) for size in ("small", "paper"))
    assert "resnet-8-16 on cifar10, pooled by 2, pre-trained on the first 5 classes" in small and "32 images" in small
    assert "resnet50 on flowers89, weights from a file" in paper and "all training images" in paper
    assert stochnorm(0.25) == "p = 0.25"
