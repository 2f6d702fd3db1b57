"""The slope of t* and its judge on rows whose t* is known, and what the figures share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.l2.figure_rows import failed, made_up, seed_noise

from decaycast.core.experiment import Row, Run
from decaycast.core.schedule import lr_by_name
from decaycast.core.seeds import group
from decaycast.methods.l2.figures import shared
from decaycast.methods.l2.figures.time_to_best import TimeToBest, common_slope

FIGURE = TimeToBest()
LRS, DECAYS = (0.1, 0.05), (0.2, 0.02, 0.002, 0.0002)


def rising(time: float) -> Callable[[np.ndarray], np.ndarray]:
    """An accuracy that rises with log t and comes within half a percent of its best, 0.9, at `time`."""
    return lambda step: np.minimum(0.9, 0.895 + 0.05 * np.log10(step / time))


def rows(
    slope: float = -1.0, *, spread: float = 0.02, seeds: int = 5, lrs=LRS, decays=DECAYS, efolds: float = 0.7
) -> list[Row]:
    """t* = c_lr * lambda^slope * noise, with c_lr different for each learning rate."""
    found = []
    for lr in lrs:
        for decay in decays:
            for seed in range(seeds):
                time = (
                    efolds / (lr**1.3 * 0.01) * (decay / 0.01) ** slope * math.exp(spread * seed_noise(seed, lr, decay))
                )
                run = Run(config={"lr": lr, "weight_decay": decay, "steps": 40 * time, "model": "mlp-64x3"}, seed=seed)
                found.append(made_up(run, rising(time), points=4000))
    return found


def test_the_law_is_held_where_it_holds():
    verdict = FIGURE.judge(rows())
    assert verdict.outcome == "held"
    assert verdict.numbers["slope"] == pytest.approx(-1, abs=0.02) and verdict.numbers["width"] < 0.05
    assert verdict.numbers["e-folds at t*, lr 0.1"] == pytest.approx(0.7 / 0.1**0.3, rel=0.03)
    assert "at lr 0.05" in verdict.reason and "5 seeds" in verdict.reason


@pytest.mark.parametrize("slope", [-0.9, -1.1])
def test_another_slope_is_not_held(slope: float):
    verdict = FIGURE.judge(rows(slope))
    assert verdict.outcome == "not held" and verdict.numbers["slope"] == pytest.approx(slope, abs=0.02)


def test_an_interval_too_wide_decides_nothing():
    verdict = FIGURE.judge(rows(spread=1.2))
    assert verdict.numbers["slope_low"] < -1 < verdict.numbers["slope_high"] and verdict.numbers["width"] > 0.15
    assert verdict.outcome == "not enough data"


def test_the_common_slope_is_that_of_a_regression_with_dummies():
    found = rows(-0.8, spread=0.3, seeds=1)
    groups = group(found, "lr", "weight_decay")
    design = np.array([[math.log(d), float(lr == 0.1), float(lr == 0.05)] for lr, d in groups])
    times = np.log([shared.time_to_best(of_seed[0]) for of_seed in groups.values()])
    assert common_slope(groups, 0) == pytest.approx(np.linalg.lstsq(design, times, rcond=None)[0][0], rel=1e-9)


@pytest.mark.parametrize(
    "few",
    [
        rows(seeds=2),
        rows(decays=DECAYS[:2]),
        [row for row in rows() if row.run.config["lr"] == 0.1 or row.run.config["weight_decay"] > 0.01],
        failed(rows()),
        [],
    ],
    ids=["two seeds", "two decays", "two decays at one rate", "failed", "none"],
)
def test_too_few_rows_are_no_verdict(few: list[Row]):
    assert FIGURE.judge(few).outcome == "not enough data"


def test_failed_rows_and_no_decay_are_passed_over():
    more = rows()
    zero = [
        made_up(Run(config={**row.run.config, "weight_decay": 0.0}, seed=row.run.seed), rising(9)) for row in more[:5]
    ]
    other = [
        replace(row, run=Run(config={**row.run.config, "weight_decay": 0.05}, seed=row.run.seed)) for row in more[:5]
    ]
    assert FIGURE.judge([*more, *zero, *failed(other)]) == FIGURE.judge(more)
    assert FIGURE.draw([*more, *zero, *failed(other)]) == FIGURE.draw(more)


def test_it_draws_whatever_there_is():
    assert FIGURE.draw([]) == [] and FIGURE.draw(failed(rows())) == []
    law, collapse, *curves = FIGURE.draw(rows()[:-3])
    assert [trace.name for trace in law.traces] == ["lr = 0.1", "c/λ, lr = 0.1", "lr = 0.05", "c/λ, lr = 0.05"]
    assert law.traces[0].y == pytest.approx([shared_law(0.1, decay) for decay in law.traces[0].x], rel=0.1)
    assert len(collapse.traces) == 2 and np.ptp(np.log(collapse.traces[0].y)) < 0.1
    assert [len(panel.traces) for panel in curves] == [4, 4]
    assert len(FIGURE.draw(rows()[:1])) == 3


def shared_law(lr: float, decay: float) -> float:
    return 0.7 / (lr**1.3 * 0.01) * (0.01 / decay)


# what the figures share


def test_time_to_best_is_the_papers():
    run = Run(config={"lr": 0.1, "weight_decay": 0.01, "steps": 1000})
    curve = {"step": [10.0, 20.0, 30.0, 40.0], "validation_accuracy": [0.80, 0.894, 0.90, 0.896]}
    assert shared.time_to_best(Row(run=run, curve=curve)) == 30.0  # 0.894 is below 0.895
    tie = {"step": [10.0, 20.0], "validation_accuracy": [3560 / 4000, 3580 / 4000]}
    assert shared.time_to_best(Row(run=run, curve=tie)) == 10.0
    assert shared.best_accuracy(Row(run=run, curve=curve), 25) == 0.894
    assert math.isnan(shared.best_accuracy(Row(run=run, curve=curve), 5))


@given(st.floats(1e-6, 0.5), st.floats(0.5, 10), st.sampled_from(["constant", "step_decay", "cosine"]))
def test_a_ladder_spends_its_efolds(rate: float, efolds: float, schedule: str):
    ladder = shared.Ladder(
        config={"momentum": 0.9, "schedule": schedule}, lrs=(0.05,), rates=(rate,), efolds=efolds, seeds=1
    )
    (run,) = ladder.runs()
    steps, decay = int(run.config["steps"]), float(run.config["weight_decay"])  # type: ignore[arg-type]
    spent = 0.05 * decay / 0.1 * shared.mean_multiplier(schedule) * steps
    assert spent == pytest.approx(efolds, rel=1e-5, abs=rate + 1e-5)
    (zero,) = ladder.without_decay(0.05)
    assert zero.config["steps"] == steps and zero.config["weight_decay"] == 0.0


def test_the_mean_multiplier_is_that_of_the_schedule():
    assert shared.mean_multiplier("constant") == 1.0
    assert shared.mean_multiplier("step_decay") == pytest.approx(0.3 + 0.3 * 0.2 + 0.3 * 0.04 + 0.1 * 0.008)
    shape = lr_by_name("cosine", 777)
    assert shared.mean_multiplier("cosine") == pytest.approx(np.mean([shape(step) for step in range(777)]), abs=1e-3)


def test_rates_of_a_row_count_momentum():
    run = Run(config={"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9})
    assert shared.rate_of(Row(run=run)) == pytest.approx(0.01)
    assert shared.decay_of(run.config, 0.02, 0.01) == pytest.approx(0.05)


def test_tuning_does_not_flatter_itself():
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(400):  # 8 decays that are all alike: the best of them on all seeds looks better than it is
        table = {float(d): {s: float(rng.standard_normal()) for s in range(5)} for d in range(8)}
        gains.append(float(np.mean(shared.tuned(table, range(5)))))
    assert np.mean(gains) == pytest.approx(0, abs=3 * np.std(gains) / 20)
    assert shared.leader({0.1: {0: 1.0, 1: 0.0}, 0.2: {0: 0.4, 1: 0.5}}) == 0.1
    assert shared.tuned({0.1: {3: 0.2}, 0.2: {3: 0.4}}, [3]) == [0.4]


def test_captions_name_the_setup():
    config = {"model": "mlp-64x3", "data": "mnist", "train_size": 1512, "pool": 2, "init_gain": 2.0, "momentum": 0.9}
    words = shared.setup([Row(run=Run(config={**config, "schedule": "step_decay"}))])
    assert words.startswith(
        "Network: mlp-64x3 on 1,512 mnist images, pooled by 2, momentum 0.9, step decay learning rate. Its"
    )
    assert "2 times the usual scale" in words and shared.setup([]) == ""
    assert (
        shared.setup([Row(run=Run(config={"model": "cnn-300", "data": "cifar10"}))]) == "Network: cnn-300 on cifar10."
    )
