"""Figures of the label-noise room: which runs they ask for, what they draw, and how they judge rows of known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.methods.label_noise.figure_rows import (
    COVARIANCE,
    EQUAL,
    ESCAPE,
    RANDOM,
    SPARSE,
    TRAJECTORY,
    Config,
    covariance,
    escaped,
    failed,
    of_seeds,
    sparse,
    sparse_as_claimed,
    trained,
    trajectory,
)

from decaycast.core.experiment import Figure, Row
from decaycast.core.seeds import by_seed, number
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures import FIGURES
from decaycast.methods.label_noise.figures.equal_strength import EqualStrength
from decaycast.methods.label_noise.figures.escape import Escape, correlation
from decaycast.methods.label_noise.figures.random_start import RandomStart
from decaycast.methods.label_noise.figures.runs import PLANS


def of_random(config: Config) -> tuple[float, float]:
    return {"label noise": (0.965, 12.5), "smoothing": (0.967, 31.7), "clean": (0.96, 0.01)}[config["arm"]]


def same_trace(config: Config) -> tuple[float, float]:
    return 0.9, 20.0 + 400.0 * config["lr"] / (config["batch_size"] * (1 - config["momentum"]))


AS_CLAIMED: dict[str, tuple[Figure, list[Row]]] = {
    "sparse": (SPARSE, sparse(sparse_as_claimed)),
    "trajectory": (TRAJECTORY, trajectory(0.05, 1.5, 4.0)),
    "covariance": (COVARIANCE, covariance(0.005)),
    "escape": (ESCAPE, trained(ESCAPE.runs("small"), escaped)),
    "equal": (EQUAL, trained(EQUAL.runs("small"), same_trace)),
    "random": (RANDOM, trained(RANDOM.runs("small"), of_random)),
}


# rows


def test_rows_are_found_by_config_in_order_of_seed_without_failed_ones():
    rows = AS_CLAIMED["covariance"][1]
    mixed = [*reversed(rows[10:]), *failed(rows[:9])]
    found = by_seed(mixed, product=1.0, momentum=0.9, batch_size=0)
    assert list(found) == [1, 2, 3, 4, 5]
    assert {row.run.config["momentum"] for row in found.values()} == {0.9}


# the plans


def test_the_escape_figures_share_their_training_and_no_run():
    assert Escape.train is EqualStrength.train is RandomStart.train
    keys = [run.key for figure in (ESCAPE, EQUAL, RANDOM) for run in figure.runs("small")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_judged_arm_has_five_seeds(size: Any):
    for figure in FIGURES:
        seeds: dict[Any, set[int]] = {}
        for run in figure.runs(size):
            seeds.setdefault(tuple(sorted(run.config.items(), key=str)), set()).add(run.seed)
        assert min(map(len, seeds.values())) >= 5, figure.name


@pytest.mark.parametrize("size", ["small", "paper"])
def test_runs_of_equal_strength_have_it_and_the_same_drift_time(size: Any):
    plan = PLANS[size]
    for groups in plan.equal:
        strengths = {
            round(theory.strength(lr=lr, batch_size=batch, noise_variance=1.0, momentum=beta), 12)
            for lr, batch, beta in groups
        }
        assert len(strengths) == 1
        assert groups[0][0] == max(lr for lr, _, _ in groups)  # what the others are compared with
    for run in plan.equal_strength():
        config: dict[str, Any] = dict(run.config)
        settings = {name: config[name] for name in ("lr", "steps", "batch_size", "momentum")}
        assert theory.drift_time(noise_variance=1.0, **settings) == pytest.approx(plan.equal_drift, rel=1e-3)


def test_sparse_runs_have_the_drift_time_that_they_name():
    for run in SPARSE.runs("small"):
        config: dict[str, Any] = dict(run.config)
        drift = theory.drift_time(lr=config["lr"], steps=config["steps"], batch_size=1, noise_variance=0.5)
        assert drift == pytest.approx(config["drift"], rel=1e-3)


# judges


@pytest.mark.parametrize("name", AS_CLAIMED)
def test_rows_as_claimed_hold(name: str):
    figure, rows = AS_CLAIMED[name]
    verdict = figure.judge(rows)
    assert verdict.outcome == "held", verdict.reason
    assert verdict.numbers and all(np.isfinite(value) for value in verdict.numbers.values())
    assert figure.judge([*failed(rows), *reversed(rows)]) == figure.judge(rows)


@pytest.mark.parametrize("name", AS_CLAIMED)
def test_too_few_or_failed_rows_are_not_enough(name: str):
    figure, rows = AS_CLAIMED[name]
    for few in (of_seeds(rows, 1), of_seeds(rows, 4), failed(rows), []):
        assert figure.judge(few).outcome == "not enough data"
        figure.draw(few)


def broken_sparse(kind: str, value: float) -> list[Row]:
    return sparse(
        lambda config: value if config["kind"] == kind and config["drift"] == 6 else sparse_as_claimed(config)
    )


def escape_with(arm: str, accuracy: float, trace: float) -> list[Row]:
    return trained(ESCAPE.runs("small"), lambda config: (accuracy, trace) if config["arm"] == arm else escaped(config))


def random_with(accuracy: float, trace: float) -> list[Row]:
    return trained(
        RANDOM.runs("small"), lambda config: (accuracy, trace) if config["arm"] == "label noise" else of_random(config)
    )


BROKEN: dict[str, tuple[Figure, list[Row]]] = {
    "label noise does not recover": (SPARSE, broken_sparse("label", 0.1)),
    "descent alone recovers": (SPARSE, broken_sparse("none", 1.0)),
    "spherical noise recovers": (SPARSE, broken_sparse("spherical", 1.0)),
    "far from R": (TRAJECTORY, trajectory(0.3, 1.5, 4.0)),
    "near the trace's path": (TRAJECTORY, trajectory(0.05, 0.5, 4.0)),
    "hardly moved": (TRAJECTORY, trajectory(0.05, 1.5, 1.0)),
    "another covariance": (COVARIANCE, covariance(0.04)),
    "no escape": (ESCAPE, escape_with("label noise", 0.8, 18.0)),
    "smoothing escapes": (ESCAPE, escape_with("smoothing", 0.9, 30.0)),
    "sharper and better": (ESCAPE, escape_with("label noise", 0.92, 400.0)),
    "momentum matters": (
        EQUAL,
        trained(EQUAL.runs("small"), lambda c: (0.9, same_trace(c)[1] * (1.2 if c["momentum"] else 1.0))),
    ),
    "batches matter": (
        EQUAL,
        trained(EQUAL.runs("small"), lambda c: (0.9, same_trace(c)[1] * (0.8 if c["batch_size"] < 20 else 1.0))),
    ),
    "more accurate": (RANDOM, random_with(0.98, 12.5)),
    "not flatter": (RANDOM, random_with(0.965, 30.0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_part_of_a_claim_can_break(name: str):
    figure, rows = BROKEN[name]
    assert figure.judge(rows).outcome == "not held"


def test_a_ratio_near_its_bound_decides_nothing():
    rows = trained(EQUAL.runs("small"), lambda c: (0.9, same_trace(c)[1] * (1.03 if c["momentum"] else 1.0)), noise=0.1)
    assert EQUAL.judge(rows).outcome == "not enough data"


def test_repetitions_of_a_seed_count_as_one():
    rows = trained(EQUAL.runs("small"), same_trace, noise=0.0)
    factors = {1: 0.7, 2: 1.9}
    bent = [
        replace(row, final={**row.final, "trace": row.final["trace"] * factors.get(int(number(row, "repeat")), 1.0)})
        if row.run.config["lr"] == 0.04
        else row
        for row in rows
    ]
    verdict = EQUAL.judge(bent)
    name = "lambda 0.0125, lr 0.04, batch 32, momentum 0.9"
    assert verdict.numbers[name] == pytest.approx((10 + 0.7 + 1.9) / 12)
    assert verdict.numbers[f"{name}_stderr"] == pytest.approx(0.0, abs=1e-12) and "8 seeds" in verdict.reason


def test_other_drift_times_and_sample_counts_do_not_touch_the_verdict():
    rows = sparse(lambda config: 1e3 if config["drift"] < 6 or config["samples"] != 40 else sparse_as_claimed(config))
    assert SPARSE.judge(rows).outcome == "held"


def test_chains_that_diverged_are_told_and_do_not_decide():
    verdict = COVARIANCE.judge(covariance(0.005))
    assert verdict.outcome == "held" and "6 of 6 diverged at 1" in verdict.reason
    assert "diverged" not in COVARIANCE.judge(covariance(0.005, batches_diverge=False)).reason


def test_correlation_is_that_of_accuracy_and_the_log_of_the_trace():
    row = AS_CLAIMED["escape"][1][0]
    assert correlation(row) == pytest.approx(-1.0)
    flat = replace(row, curve={**row.curve, "trace": [3.0] * len(row.curve["trace"])})
    assert correlation(flat) == 0.0


def test_a_random_start_reports_points():
    reason = RANDOM.judge(AS_CLAIMED["random"][1]).reason
    assert "in points: -0." in reason and "smoothing 96." in reason


# drawing


@pytest.mark.parametrize("name", AS_CLAIMED)
def test_panels_have_words_and_columns_of_one_length(name: str):
    figure, rows = AS_CLAIMED[name]
    panels = figure.draw(rows)
    assert len(panels) >= 2 and len({panel.title for panel in panels}) == len(panels)
    for panel in panels:
        assert panel.title and panel.x_label and panel.y_label and panel.caption and panel.traces
        names = [trace.name for trace in panel.traces]
        assert len(set(names)) == len(names)
        for trace in panel.traces:
            assert len(trace.x) == len(trace.y) > 0 and np.isfinite([*trace.x, *trace.y]).all()
            assert not panel.y_log or min(trace.y) > 0
            assert not panel.x_log or min(trace.x) > 0


def test_ratios_are_drawn_at_their_learning_rates():
    panel = EQUAL.draw(AS_CLAIMED["equal"][1])[-1]
    first = next(trace for trace in panel.traces if trace.name == "lambda = 0.0125")
    assert list(first.x) == [0.1, 0.04]


def test_the_clean_arm_is_shown_where_its_trace_says_something():
    panels = {panel.title: [trace.name for trace in panel.traces] for panel in ESCAPE.draw(AS_CLAIMED["escape"][1])}
    assert "clean" in panels["Test accuracy"] and "clean" not in panels["Flatness"]
    assert {"SAM, radius 0.5", "SAM, radius 2"} <= set(panels["Flatness"])
