"""Figures of the two-layer model: which runs they ask for, what they draw, and how they judge rows of known answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from decaycast.core.experiment import SIZES, Row, Run
from decaycast.lab.figures import run_figures
from decaycast.lab.store import Store
from decaycast.methods.large_lr import two_layer
from decaycast.methods.large_lr.figures.arms import (
    ARMS,
    LARGE,
    MITIGATED,
    PLANS,
    QUIET,
    SMALL,
    _is_calm,
    at,
    by_arm,
    ratios,
    setting_of,
    steps_to,
    time_trace,
    train_arm,
)
from decaycast.methods.large_lr.figures.controls import ActivationNoiseControl, NoNoiseControl
from decaycast.methods.large_lr.figures.order import Order
from decaycast.methods.large_lr.figures.two_layer import TwoLayer
from decaycast.methods.large_lr.two_layer import RELAXATIONS, Setting

FIGURES: tuple[Any, ...] = (TwoLayer(), Order(), NoNoiseControl(), ActivationNoiseControl())
Errors = Callable[[str, float], float]
"""Arm and training loss -> P-only error."""
ERRORS = {LARGE: 0.026, SMALL: 0.065, QUIET: 0.07, MITIGATED: 0.025}


def as_claimed(arm: str, level: float) -> float:
    return ERRORS[arm] + (0.0 if arm in (LARGE, MITIGATED) else 0.03 * math.log(0.03 / level))


def made(
    figure: Any,
    errors: Errors = as_claimed,
    *,
    loss_gap: float = 0.25,
    with_q: float = 0.0,
    known: dict[str, float] | None = None,
    luck: float = 0.05,
) -> list[Row]:
    """Rows of the small size with these errors, times what a seed's luck makes of them."""
    heights = {LARGE: 0.32, SMALL: 0.65, QUIET: 0.66, MITIGATED: 0.3} | (known or {})
    rows = []
    for run in figure.runs("small"):
        config: dict[str, Any] = dict(run.config)
        factor = math.exp(luck * np.random.default_rng([run.seed, ARMS.index(config["arm"])]).standard_normal())
        final = {"step": 1e5, "first_error": 0.04, "mixture_test_error": 1e-3}
        final |= {"q_only_test_error": 0.0, "both_test_error": with_q}
        for level in map(float, config["levels"].split()):
            final[f"p_only_test_error_at_{level:g}"] = factor * errors(config["arm"], level)
            final[f"p_only_test_loss_at_{level:g}"] = 0.3 + loss_gap * (config["arm"] == SMALL) + 0.1 * math.log(factor)
        curve = {
            "step": [0.0, 1.0, 10.0, 100.0],
            "time": [0.0, 0.8, 8.0, 80.0],
            "p_only_test_error": [0.5, 0.04, 0.03, 0.03],
        }
        curve |= {"q_only_test_loss": [0.69, 0.6, 0.09, 0.01], "both_test_loss": [0.69, 0.6, 0.08, 0.01]}
        curve |= {"p_only_test_loss": [0.69, 0.68, heights[config["arm"]] * factor**0.2, 0.25]}
        rows.append(Row(run=run, curve=curve, final=final))
    return rows


def changed(arm: str, by: float) -> Errors:
    """The claimed errors, those of one arm times `by`."""
    return lambda which, level: as_claimed(which, level) * (by if which == arm else 1.0)


# runs


def test_the_figures_share_their_training_and_the_runs_of_both_algorithms():
    assert all(type(figure).train is train_arm for figure in FIGURES)
    keys = [{run.key for run in figure.runs("small")} for figure in FIGURES]
    assert keys[0] == keys[1] < keys[2] and keys[0] < keys[3] and keys[2] & keys[3] == keys[0]


@pytest.mark.parametrize("size", SIZES)
def test_a_run_says_all_of_its_setting(size: Any):
    plan = PLANS[size]
    for run in {run.key: run for figure in FIGURES for run in figure.runs(size)}.values():
        found, config = setting_of(json.loads(json.dumps(dict(run.config)))), run.config
        wanted = replace(plan.setting, stop_loss=found.stop_loss, longest=found.longest, anneal=found.anneal)
        if config["arm"] == QUIET:
            wanted = replace(wanted, noise=0.0)
        if config["arm"] == MITIGATED:
            assert found.activation_noise is not None
            spread = 3 * wanted.q_std * wanted.patterns.scale * wanted.patterns.separation
            levels = [found.activation_noise(step) for step in (0, plan.noisy_steps - 1, plan.noisy_steps)]
            assert levels == pytest.approx([spread, spread, 0.0])
            wanted = replace(wanted, activation_noise=found.activation_noise)
        assert found == wanted
        assert found.stop_loss == (plan.late_levels if config["arm"] == QUIET else plan.levels)[-1]
        if config["arm"] in (LARGE, QUIET):
            assert [found.anneal.update(step, None) for step in (plan.annealed_at - 1, plan.annealed_at)] == [
                False,
                True,
            ]


def test_the_setting_is_that_of_the_relaxations_and_seeds_are_fresh():
    for size in ("small", "paper"):
        common = {name: getattr(Setting(), name) for name in ("test_examples", "grouped", "longest", "anneal")}
        assert replace(PLANS[size].setting, **common) == replace(Setting(), **common)
        assert not set(PLANS[size].seeds) & {*range(20), *range(100, 105)}
        assert len(PLANS[size].seeds) >= 5
    assert PLANS["paper"].setting.grouped == 1, "nothing is approximated there"
    for relaxation in RELAXATIONS:
        for figure in FIGURES[:2]:
            assert relaxation in figure.draw(made(figure))[0].caption


@pytest.mark.parametrize("longest", [1, 7, 400, 400_000])
def test_steps_are_evenly_spaced_in_their_logarithm(longest: int):
    steps = steps_to(longest)
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == longest
    assert all(b / a < 10 ** (1 / 12) * 1.05 for a, b in zip(steps, steps[1:]) if a > 30)


# training


SMOKE = {run.config["arm"]: run for figure in FIGURES for run in figure.runs("smoke") if run.seed == 20}


@pytest.mark.parametrize("arm", ARMS)
def test_a_row_is_what_the_experiment_measured(arm: str):
    run = SMOKE[arm]
    row, setting, config = train_arm(None, run, None), setting_of(run.config), dict(run.config)
    levels = [float(level) for level in str(config["levels"]).split()]
    algorithm = "L-S" if arm in (LARGE, QUIET) else "S"
    whole = two_layer.run(setting, [20], algorithm, measure_at=range(4000))[0]
    assert row.status == "done" and row.final["step"] == whole.last["step"]
    assert row.final["train_loss"] == whole.last["train_loss"] <= setting.stop_loss
    assert len({len(column) for column in row.curve.values()}) == 1
    calm = [
        each
        for each in whole.rows
        if each["step"] >= (200 if arm == MITIGATED else 0) and (arm == QUIET or each["lr"] == setting.small)
    ]
    for level in levels:
        first = next(each for each in calm if each["train_loss"] <= level)
        for name in ("train_loss", "p_only_test_error", "p_only_test_loss"):
            assert row.final[f"{name}_at_{level:g}"] == first[name], (level, name)
    every = {each["step"]: each for each in whole.rows}
    for index, step in enumerate(row.curve["step"]):
        assert row.curve["q_only_test_loss"][index] == every[step]["q_only_test_loss"]
    assert row.final["first_error"] == row.curve["p_only_test_error"][1]


def test_a_loss_counts_where_no_noise_disturbs_it():
    noisy, quiet = Setting(), Setting(noise=0.0)
    large, small = {"step": 60.0, "lr": noisy.large}, {"step": 60.0, "lr": noisy.small}
    assert [_is_calm(row, noisy, 0) for row in (large, small)] == [False, True]
    assert [_is_calm(row, quiet, 0) for row in (large, small)] == [True, True]
    assert [_is_calm(small, noisy, until) for until in (60, 61)] == [True, False]


def test_a_loss_that_is_not_reached_is_a_failed_row():
    run = Run(config={**SMOKE[SMALL].config, "longest": 40}, seed=20)
    row = train_arm(None, run, None)
    assert row.status == "failed" and "after 40 steps, wanted 0.3" in row.reason and row.curve["step"][-1] == 40


# reading


def test_rows_are_found_by_arm_and_seed_without_failed_ones():
    rows = made(FIGURES[2])
    bad = [replace(row, status="failed") if row.run.seed == 22 else row for row in reversed(rows)]
    found = by_arm(bad)
    assert list(found) == [LARGE, SMALL, QUIET]
    assert all(list(each) == [20, 21, *range(23, 32)] for each in found.values())
    assert set(at(found[LARGE], "p_only_test_error", 0.02)) == set(), "measured in the arm without noise alone"
    assert len(at(found[QUIET], "p_only_test_error", 0.02)) == 11
    assert ratios({1: 2.0, 2: 3.0, 4: 1.0}, {1: 4.0, 3: 1.0, 4: 0.0}) == {1: 0.5, 4: math.inf}


def test_a_trace_over_time_is_the_mean_where_all_seeds_were_measured():
    rows = {row.run.seed: row for row in made(FIGURES[0])[:4:2]}
    short = {name: column[:3] for name, column in rows[21].curve.items()}
    rows[21] = replace(rows[21], curve={**short, "q_only_test_loss": [0.69, 0.5, 0.07]})
    trace = time_trace("Q", rows, "q_only_test_loss")
    assert trace.x == [0.8, 8.0] and trace.y == pytest.approx([0.55, 0.08])
    assert trace.low is not None and trace.low[0] == pytest.approx(0.55 - 0.05)


# judging


def quiet_is_good_early(arm: str, level: float) -> float:
    return as_claimed(arm, level) * (0.5 if arm == QUIET and level >= 0.03 else 1.0)


def above_half(arm: str, level: float) -> float:
    """L-S below half of S, activation noise above it, and within 1.1 of L-S."""
    return {LARGE: 0.48, MITIGATED: 0.52}.get(arm, 1.0) * as_claimed(SMALL, level)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda each: each.name)
def test_rows_as_claimed_hold_and_few_of_them_decide_nothing(figure: Any):
    rows = made(figure)
    verdict = figure.judge(rows)
    assert verdict.outcome == "held", verdict
    assert all(math.isfinite(value) for value in verdict.numbers.values())
    for few in ([], rows[:1], [row for row in rows if row.run.seed < 24], [row for row in rows if row.run.seed < 21]):
        assert figure.judge(few).outcome == "not enough data"
    for arm in {str(row.run.config["arm"]) for row in rows}:
        assert figure.judge([row for row in rows if row.run.config["arm"] != arm]).outcome == "not enough data"
    failed = [replace(row, status="failed", curve={}, final={}) for row in rows]
    assert figure.judge(failed).outcome == "not enough data" and figure.draw(failed) == []


BROKEN: list[tuple[str, Any, dict[str, Any], str]] = [
    ("error twice as high", FIGURES[0], {"errors": changed(LARGE, 2.0)}, "not held"),
    ("the ratio is open", FIGURES[0], {"errors": changed(LARGE, 1.25)}, "not enough data"),
    ("the losses are too near", FIGURES[0], {"loss_gap": 0.1}, "not held"),
    ("Q is not fitted", FIGURES[0], {"with_q": 0.01}, "not held"),
    ("S learns P first as well", FIGURES[1], {"known": {SMALL: 0.5}}, "not held"),
    ("L-S learns Q first as well", FIGURES[1], {"known": {LARGE: 0.6}}, "not held"),
    ("no noise is as good", FIGURES[2], {"errors": changed(QUIET, 0.5)}, "not held"),
    ("no noise is as good at 0.03", FIGURES[2], {"errors": quiet_is_good_early}, "not held"),
    ("no noise does not memorise", FIGURES[2], {"errors": lambda *at: min(as_claimed(*at), 0.08)}, "not held"),
    ("activation noise does nothing", FIGURES[3], {"errors": changed(MITIGATED, 2.5)}, "not held"),
    ("activation noise is a little worse", FIGURES[3], {"errors": above_half, "luck": 0.005}, "not held"),
    ("activation noise is half as good", FIGURES[3], {"errors": changed(MITIGATED, 1.2)}, "not held"),
]


@pytest.mark.parametrize(
    ("figure", "change", "outcome"), [each[1:] for each in BROKEN], ids=[each[0] for each in BROKEN]
)
def test_rows_against_a_claim_do_not_hold(figure: Any, change: dict[str, Any], outcome: str):
    assert figure.judge(made(figure, **change)).outcome == outcome


def test_one_seed_in_which_the_large_rate_is_worse_refutes_the_claim():
    rows = made(FIGURES[0])
    for index, row in enumerate(rows):
        if row.run.seed == 25 and row.run.config["arm"] == LARGE:
            rows[index] = replace(row, final={**row.final, "p_only_test_error_at_0.03": 0.09})
    verdict = FIGURES[0].judge(rows)
    assert verdict.outcome == "not held" and "L-S is not below S in seed 25." in verdict.reason


def test_the_order_is_read_where_q_is_first_learnt():
    rows = made(FIGURES[1], luck=0.0)
    verdict = FIGURES[1].judge(rows)
    assert verdict.numbers["P-only loss when Q is learnt, S"] == pytest.approx(0.65)
    assert verdict.numbers["P-only loss when Q is learnt, L-S"] == pytest.approx(0.32)
    assert "gradient time 8 in S and 8 in L-S" in verdict.reason
    never = [replace(row, curve={**row.curve, "q_only_test_loss": [0.69, 0.5, 0.4, 0.3]}) for row in rows]
    assert FIGURES[1].judge(never).outcome == "not enough data"


def test_the_words_say_what_the_rows_say():
    reason = TwoLayer().judge(made(FIGURES[0], luck=0.0)).reason
    assert "P-only error, L-S over S 0.4 (0.4 to 0.4), wanted <= 0.5, 12 seeds: yes" in reason
    assert "2.60% and 2.89% at 0.1, 2.60% and 4.97% at 0.05, 2.60% and 6.50% at 0.03" in reason
    reason = NoNoiseControl().judge(made(FIGURES[2], luck=0.0)).reason
    assert "At 0.03 the error without noise is 7.00%, 1.08 times that of S" in reason


# drawing


def test_panels_have_the_traces_of_their_rows():
    titles = {figure.name: [panel.title for panel in figure.draw(made(figure))] for figure in FIGURES}
    assert [len(each) for each in titles.values()] == [3, 3, 2, 2]
    error, loss, pairs = FIGURES[0].draw(made(FIGURES[0], luck=0.0))
    assert [trace.name for trace in error.traces] == [LARGE, SMALL] and list(error.traces[0].x) == [0.1, 0.05, 0.03]
    assert list(error.traces[0].y) == pytest.approx([0.026] * 3) and list(loss.traces[1].y) == pytest.approx([0.55] * 3)
    assert list(pairs.traces[0].x) == pytest.approx([0.065] * 12) and pairs.traces[0].mode == "markers"
    late = FIGURES[2].draw(made(FIGURES[2]))[0].traces[2]
    assert late.name == QUIET and list(late.x) == [0.1, 0.05, 0.03, 0.02, 0.01, 0.007]
    assert FIGURES[3].draw(made(FIGURES[0])) == [], "nothing without the arm that it is about"


def test_the_smallest_size_trains_draws_and_judges(tmp_path: Any):
    with Store(tmp_path / "rows.sqlite") as store:
        found = run_figures(FIGURES, "smoke", store)
    for figure in FIGURES:
        rows = found[figure.name]
        assert [row.status for row in rows] == ["done"] * len(rows)
        assert figure.draw(rows) and figure.judge(rows).outcome == "not enough data"
