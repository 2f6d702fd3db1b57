"""The forecast against probes whose best weight decay is known, and against probes that misbehave."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import decaycast
from decaycast.methods.l2.arms import Plan
from decaycast.methods.l2.forecast import (
    Forecast,
    _bound_only,
    _Comparison,
    _Posterior,
    _second_opinion_doubt,
    forecast,
)

BUDGET, LR = 2000, 0.05
RATE = BUDGET * LR  # summed learning rate: e-folds per unit of weight decay
GRID = tuple(float(f"{value:.3g}") for value in np.logspace(-5, 0, 11))
ALGOPERF = "weight_decay_runs.csv.gz"


class Surface:
    """A metric that rises with the step and falls off with the squared distance of ln(lambda) from its best at that step.

    Larger is better. Counts the steps it was asked for. Noise depends on arm and step alone, so that an arm measured twice
    gives the same numbers.
    """

    def __init__(
        self,
        best: Callable[[float], float],
        *,
        noise: float = 0.002,
        every: int = 10,
        height: float = 0.02,
        level: Callable[[float], float] = lambda step: 0.1 * math.log(step),
    ) -> None:
        self.best, self.noise, self.every, self.height, self.level = best, noise, every, height, level
        self.asked: dict[float, list[int]] = {}

    def value(self, weight_decay: float, step: int) -> float:
        rng = np.random.default_rng([int(1e6 * abs(math.log(weight_decay))), step])
        distance = math.log(weight_decay / self.best(step))
        return self.level(step) - self.height * distance**2 + self.noise * float(rng.standard_normal())

    def __call__(self, weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        self.asked.setdefault(weight_decay, []).append(steps)
        at = [step for step in range(1, steps + 1) if step % self.every == 0 or step == steps]
        return [float(step) for step in at], [self.value(weight_decay, step) for step in at]

    @property
    def trained(self) -> int:
        """Steps of training it took to answer: each arm as far as it was ever asked."""
        return sum(max(steps) for steps in self.asked.values())


def law(efolds: float, rate: float = LR) -> Callable[[float], float]:
    """The paper's law: at every step the best weight decay is the one that has spent `efolds` by then."""
    return lambda step: efolds / (rate * step)


def fixed(weight_decay: float) -> Callable[[float], float]:
    """A best weight decay that does not depend on the step."""
    return lambda step: weight_decay


def negated(probe: Surface) -> Callable[[float, int], tuple[list[float], list[float]]]:
    def ask(weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        at, values = probe(weight_decay, steps)
        return at, [-value for value in values]

    return ask


def stretched(
    probe: Surface, factor: float = 1.0, offset: float = 0.0
) -> Callable[[float, int], tuple[list[float], list[float]]]:
    def ask(weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        at, values = probe(weight_decay, steps)
        return at, [factor * value + offset for value in values]

    return ask


def same_decision(one: Forecast, other: Forecast, *, scale: float = 1.0) -> None:
    """Up to rounding, the same answer with weight decays `scale` times as large."""
    assert one.verdict == other.verdict
    assert other.weight_decay == pytest.approx(scale * one.weight_decay, rel=1e-6)
    assert other.interval == pytest.approx(tuple(scale * end for end in one.interval), rel=1e-6)
    assert [arm.weight_decay for arm in other.arms] == pytest.approx(
        [scale * a.weight_decay for a in one.arms], rel=1e-6
    )


def factor_off(found: Forecast, truth: float) -> float:
    return math.exp(abs(math.log(found.weight_decay / truth)))


# -- known answers


@pytest.mark.parametrize("efolds", [0.6, 1.3, 2.6])
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_papers_law_is_found(efolds: float, noise: float):
    found = forecast(Surface(law(efolds), noise=noise), BUDGET, lr=LR)
    truth = efolds / RATE
    assert found.verdict != "refuse", found.reason
    assert found.interval[0] <= truth <= found.interval[1]
    assert factor_off(found, truth) < 4


def test_a_clear_case_is_trusted():
    found = forecast(Surface(law(1.3), height=0.1), BUDGET, lr=LR)
    assert found.verdict == "trust" and "by more than the noise" in found.reason


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_a_best_decay_that_does_not_drift_is_found(times: float):
    truth = times * 1.3 / RATE
    found = forecast(Surface(fixed(truth)), BUDGET, lr=LR)
    assert found.verdict != "refuse", found.reason
    assert found.interval[0] <= truth <= found.interval[1]
    assert factor_off(found, truth) < 5


def test_a_probe_of_the_whole_run_needs_no_extrapolation():
    truth = 0.7 / RATE
    cheap, full = (forecast(Surface(fixed(truth)), BUDGET, lr=LR, max_cost=cost) for cost in (0.1, 1.0))
    assert factor_off(full, truth) < 3
    assert math.log(full.interval[1] / full.interval[0]) < math.log(cheap.interval[1] / cheap.interval[0])


@pytest.mark.parametrize("candidates", [GRID, None])
def test_without_a_learning_rate_time_is_counted_in_steps(candidates: tuple[float, ...] | None):
    truth = 3e-3
    found = forecast(Surface(law(truth * BUDGET, rate=1.0)), BUDGET, candidates=candidates)
    assert found.efolds is None and found.rate_per_decay is None
    assert found.verdict != "refuse", found.reason
    assert factor_off(found, truth) < 6


def test_a_best_decay_outside_the_candidates_is_only_bounded():
    found = forecast(Surface(fixed(1e-3)), BUDGET, lr=LR, candidates=[0.01, 0.1, 1.0])
    assert found.verdict == "weak"
    assert "the smallest of the arms (0.01 to 1) was best" in found.reason and "a bound only" in found.reason
    assert found.weight_decay == 0.01
    found = forecast(Surface(fixed(10.0)), BUDGET, candidates=[0.01, 0.1, 1.0])
    assert found.verdict == "weak" and "the largest of the arms (0.01 to 1) was best" in found.reason
    assert found.weight_decay >= 0.1


def test_a_probe_at_odds_with_the_usual_number_of_efolds_is_not_trusted():
    found = forecast(Surface(fixed(3e4 / RATE), noise=0.0), BUDGET, lr=LR, candidates=np.logspace(-1, 6, 15) / RATE)
    assert found.verdict == "weak"
    assert "the probe and the usual number of e-folds disagree" in found.reason or "a bound only" in found.reason


def test_a_prior_out_of_reach_leaves_the_probe_its_word():
    """All prior weights underflow here; the answer must be the sample nearest to the prior, not the smallest one."""
    options = 1e-22 * 4.0 ** np.arange(-4, 5)
    found = forecast(Surface(fixed(1e-22), noise=0.0), BUDGET, lr=LR, candidates=options)
    assert found.verdict == "weak"
    assert found.weight_decay >= 1e-22 and found.interval[0] <= found.interval[1]


def test_wide_noise_widens_the_interval():
    """Measured to the end, so that nothing is left to extrapolate."""
    probes = (Surface(law(1.3), noise=noise, height=0.1) for noise in (0.0, 0.1))
    calm, loud = (forecast(probe, BUDGET, lr=LR, max_cost=1.0) for probe in probes)
    assert loud.interval[1] / loud.interval[0] > calm.interval[1] / calm.interval[0]


# -- symmetries


@pytest.mark.parametrize("lr", [None, LR])
def test_a_loss_and_its_negative_give_the_same_decision(lr: float | None):
    up = forecast(Surface(law(1.3)), BUDGET, lr=lr, candidates=GRID, higher_is_better=True)
    down = forecast(negated(Surface(law(1.3))), BUDGET, lr=lr, candidates=GRID, higher_is_better=False)
    mirrored = [replace(arm, values=tuple(-value for value in arm.values)) for arm in down.arms]
    assert replace(down, higher_is_better=True, arms=tuple(mirrored)) == up
    assert up.verdict != "refuse"


def test_the_direction_of_the_metric_matters():
    best = law(1e-3 * BUDGET, rate=1.0)
    right = forecast(Surface(best), BUDGET, candidates=GRID)
    wrong = forecast(Surface(best), BUDGET, candidates=GRID, higher_is_better=False)
    assert factor_off(right, 1e-3) < 6
    assert wrong.verdict != "trust"


@pytest.mark.parametrize(("factor", "offset"), [(10.0, 0.0), (1.0, 3.0), (0.01, -5.0)])
def test_the_metrics_unit_and_origin_do_not_matter(factor: float, offset: float):
    plain = forecast(Surface(law(2.0)), BUDGET, lr=LR)
    same_decision(plain, forecast(stretched(Surface(law(2.0)), factor, offset), BUDGET, lr=LR))


@pytest.mark.parametrize("factor", [2.0, 0.1])
def test_a_larger_learning_rate_asks_for_a_smaller_weight_decay(factor: float):
    plain = forecast(Surface(law(2.0), noise=0.0), BUDGET, lr=LR)
    faster = forecast(Surface(law(2.0, rate=factor * LR), noise=0.0), BUDGET, lr=factor * LR)
    same_decision(plain, faster, scale=1 / factor)
    assert faster.efolds == pytest.approx(plain.efolds, rel=1e-6)


def test_a_learning_rate_may_be_a_number_a_list_or_a_function():
    one, two, three = (forecast(Surface(law(1.3)), BUDGET, lr=lr) for lr in (LR, [LR] * BUDGET, lambda step: LR))
    assert one == two == three
    assert one.rate_per_decay == pytest.approx(RATE) and one.efolds == pytest.approx(RATE * one.weight_decay)


def test_a_cosine_learning_rate_sums_to_half():
    def cosine(step: int) -> float:
        return LR * (1 + math.cos(math.pi * step / BUDGET)) / 2

    clock = np.cumsum([cosine(step) for step in range(BUDGET)])
    found = forecast(Surface(lambda step: 1.3 / clock[int(step) - 1]), BUDGET, lr=cosine)
    assert found.rate_per_decay == pytest.approx(RATE / 2, rel=1e-3)
    assert found.interval[0] <= 1.3 / clock[-1] <= found.interval[1]
    assert factor_off(found, 1.3 / clock[-1]) < 4


@pytest.mark.parametrize("flat", [1, 5, 1500])
def test_a_warm_up_from_zero_does_not_divide_by_it(flat: int):
    """The clock stands still while the rate is zero, even beyond the probe."""
    lr = [0.0] * flat + [LR] * (BUDGET - flat)
    found = forecast(Surface(fixed(0.02)), BUDGET, lr=lr, max_cost=0.003)
    assert all(math.isfinite(end) and end > 0 for end in (*found.interval, found.weight_decay))


def test_the_same_curves_give_the_same_forecast():
    assert forecast(Surface(law(1.3)), BUDGET, lr=LR) == forecast(Surface(law(1.3)), BUDGET, lr=LR)


def test_the_order_of_measurements_does_not_matter():
    def shuffled(weight_decay: float, steps: int):
        at, values = probe(weight_decay, steps)
        order = np.random.default_rng(steps).permutation(len(at))
        return np.array(at)[order], np.array(values)[order]

    probe = Surface(law(1.3))
    assert forecast(shuffled, BUDGET, lr=LR) == forecast(Surface(law(1.3)), BUDGET, lr=LR)


# -- what it costs, and what it may look at


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    budget=st.integers(10, 3000),
    max_cost=st.floats(0.001, 1.0),
    every=st.integers(1, 200),
    lr=st.sampled_from([None, 0.1]),
    count=st.integers(0, 9),
    best=st.floats(1e-7, 10.0),
)
def test_no_more_is_spent_than_allowed_and_all_of_it_is_counted(
    budget: int, max_cost: float, every: int, lr: float | None, count: int, best: float
):
    probe = Surface(fixed(best), every=every)
    candidates = np.logspace(-5, 0, count) if count >= 2 else None
    found = forecast(probe, budget, lr=lr, candidates=candidates, max_cost=max_cost)
    assert found.cost == probe.trained / budget
    assert found.cost <= max_cost * (1 + 1e-9)
    assert all(earlier < later for steps in probe.asked.values() for earlier, later in zip(steps, steps[1:]))
    assert [arm.weight_decay for arm in found.arms] == sorted(probe.asked)
    low, high = found.interval
    assert 0 < low <= high < math.inf
    if candidates is None:
        assert low <= found.weight_decay * (1 + 1e-9) and found.weight_decay <= high * (1 + 1e-9)
    else:
        inside = min(max(found.weight_decay, low), high)
        nearest = candidates[np.argmin(np.abs(np.log(candidates / inside)))]
        assert found.weight_decay == nearest and set(probe.asked) <= set(candidates.tolist())


def test_most_of_the_money_is_used():
    found = forecast(Surface(law(1.3)), BUDGET, lr=LR, max_cost=0.3)
    assert 0.25 < found.cost <= 0.3


def test_too_little_money_for_a_single_step_is_refused():
    found = forecast(Surface(law(1.3)), 10, lr=LR, max_cost=0.05)
    assert found.verdict == "refuse" and found.cost == 0 and found.arms == ()
    assert "pays for no measurements: not one step for each of three arms; raise max_cost" in found.reason


@pytest.mark.parametrize("beyond", [1e9, math.nan])
def test_what_was_not_paid_for_is_not_looked_at(beyond: float):
    def generous(weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        at, values = probe(weight_decay, steps)
        return [*at, steps + 0.5, float(BUDGET)], [*values, beyond, beyond * weight_decay]

    probe = Surface(law(1.3))
    assert forecast(generous, BUDGET, lr=LR) == forecast(Surface(law(1.3)), BUDGET, lr=LR)


def test_candidates_come_back_as_the_numbers_given():
    options = [1 / 3, 1 / 30, 1 / 300, 1 / 3000]  # none of them survives twelve digits
    probe = Surface(fixed(1 / 30))
    found = forecast(probe, BUDGET, candidates=[*options, 1 / 3])
    assert set(probe.asked) <= set(options) and len(probe.asked) >= 3
    assert {arm.weight_decay for arm in found.arms} == set(probe.asked) and found.weight_decay in options


def test_two_candidates_are_enough():
    found = forecast(Surface(fixed(0.01)), BUDGET, lr=LR, candidates=[0.01, 10.0])
    assert found.weight_decay == 0.01 and len(found.arms) == 2


def test_arms_report_what_was_measured_in_the_metrics_own_sign():
    found = forecast(negated(Surface(law(1.3))), BUDGET, lr=LR, higher_is_better=False, metric="validation loss")
    reference = Surface(law(1.3))
    for arm in found.arms:
        expected = [-reference.value(arm.weight_decay, int(step)) for step in arm.steps]
        assert arm.status == "ok" and arm.reason == "" and list(arm.values) == expected
    assert found.metric == "validation loss" and found.budget_steps == BUDGET and not found.higher_is_better


# -- arms that fail, and metrics that say nothing


class Failing(Surface):
    """Fails above a weight decay: by NaN, by infinity, or by raising."""

    def __init__(self, how: str, above: float) -> None:
        super().__init__(law(1.3))
        self.how, self.above = how, above

    def __call__(self, weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        at, values = super().__call__(weight_decay, steps)
        if weight_decay <= self.above:
            return at, values
        if self.how == "raise":
            raise FloatingPointError("the loss is nan at step 7")
        if self.how == "raise bare":
            raise FloatingPointError
        return at, [*values[:-1], {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[self.how]]


@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "raise", "raise bare"])
def test_a_failed_arm_counts_as_worst_and_the_forecast_goes_on(how: str):
    whole = forecast(Surface(law(1.3)), BUDGET, lr=LR)
    largest = max(arm.weight_decay for arm in whole.arms)
    probe = Failing(how, above=largest * 0.99)
    found = forecast(probe, BUDGET, lr=LR)
    failed = [arm for arm in found.arms if arm.status == "failed"]
    assert [arm.weight_decay for arm in failed] == [largest]
    expected = {"raise": "the loss is nan at step 7", "raise bare": "diverged"}.get(
        how, "the metric is not finite at step"
    )
    assert failed[0].reason.startswith(expected) and failed[0].reason in found.reason
    assert found.verdict == "weak" and f"1 of {len(found.arms)} arms failed" in found.reason
    assert found.cost == probe.trained / BUDGET
    assert factor_off(found, 1.3 / RATE) < 6
    assert len(probe.asked[largest]) == 1, "a failed arm is not trained on"
    json.dumps(found.to_dict(), allow_nan=False)


def test_smaller_decays_are_tried_when_all_failed():
    found = forecast(Failing("nan", above=0.1 / RATE), BUDGET, lr=LR)
    assert min(arm.weight_decay for arm in found.arms) < max(a.weight_decay for a in found.arms if a.status == "failed")
    assert any(arm.status == "failed" for arm in found.arms) and found.verdict != "trust"


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_when_every_arm_fails_it_refuses_with_the_reason(how: str):
    probe = Failing(how, above=0.0)
    found = forecast(probe, BUDGET, lr=LR)
    assert found.verdict == "refuse"
    assert f"0 of {len(found.arms)} arms could be used (the " in found.reason
    assert "only the fallback, 1.3 e-folds" in found.reason and found.efolds == pytest.approx(1.3)
    assert found.cost == probe.trained / BUDGET > 0


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_metric_that_does_not_depend_on_decay_is_refused(noise: float):
    found = forecast(Surface(law(1.3), height=0.0, noise=noise), BUDGET, lr=LR)
    assert found.verdict == "refuse"
    assert "weight decay makes no measurable difference between" in found.reason
    assert "only the fallback, 1.3 e-folds" in found.reason


def test_constant_curves_are_refused_without_a_crash():
    """Accuracy stuck at chance: no noise to measure, no difference either."""
    found = forecast(lambda weight_decay, steps: (range(1, steps + 1), [0.1] * steps), BUDGET, candidates=GRID)
    assert found.verdict == "refuse" and "no measurable difference" in found.reason
    assert "only the fallback, the middle of the range" in found.reason and found.weight_decay in GRID


def test_arms_that_differ_but_stand_still_have_not_improved():
    """Noise measured as exactly zero is no reason to fail either."""
    found = forecast(lambda weight_decay, steps: (range(1, steps + 1), [weight_decay] * steps), BUDGET, candidates=GRID)
    assert found.verdict == "refuse" and "the best arm's metric has not improved within" in found.reason


def test_a_metric_that_only_falls_is_refused():
    found = forecast(Surface(law(1.3), level=lambda step: -0.2 * math.log(step)), BUDGET, lr=LR)
    assert found.verdict == "refuse" and "has not improved within" in found.reason


def test_too_few_measurements_are_named():
    found = forecast(Surface(law(1.3), every=BUDGET), BUDGET, lr=LR)  # measured at the end of each extension alone
    assert found.verdict == "refuse" and "fewer than three measurements within" in found.reason
    assert found.cost > 0


def test_no_measurement_at_all_is_named():
    found = forecast(lambda weight_decay, steps: ([], []), BUDGET, lr=LR)
    assert found.verdict == "refuse" and "arms could be used (no measurements)" in found.reason


def test_an_interrupt_and_a_broken_probe_are_not_swallowed():
    def broken(weight_decay: float, steps: int):
        raise error

    for error in (KeyboardInterrupt(), ZeroDivisionError("mean of nothing")):
        with pytest.raises(type(error)):
            forecast(broken, BUDGET, lr=LR)


# -- reports


def test_to_dict_is_json_without_nan():
    found = forecast(Failing("nan", above=1.3 / RATE), BUDGET, lr=LR)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["weight_decay"] == found.weight_decay and read["interval"] == list(found.interval)
    failed = [arm for arm in read["arms"] if arm["status"] == "failed"]
    assert failed and all(arm["values"][-1] is None for arm in failed)
    assert read["verdict"] == found.verdict and read["cost"] == found.cost


def test_plot_draws_every_arm():
    pytest.importorskip("plotly")
    found = forecast(Surface(law(1.3)), BUDGET, lr=LR, metric="accuracy")
    figure = found.plot()
    assert [trace.name for trace in figure.data] == [f"{arm.weight_decay:.3g}" for arm in found.arms]
    assert list(figure.data[0].y) == list(found.arms[0].values)
    assert found.verdict in figure.layout.title.text and figure.layout.yaxis.title.text == "accuracy"


def test_plot_without_plotly_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"draws with plotly: pip install 'decaycast\[lab\]'"):
        forecast(Surface(law(1.3)), BUDGET, lr=LR).plot()


# -- bad input


@pytest.mark.parametrize("budget", [9, 0, -5, 10.5, math.nan, math.inf, True, "100", None])
def test_the_budget_is_checked(budget: object):
    with pytest.raises(ValueError, match=r"budget_steps must be a whole number >= 10, got "):
        forecast(Surface(law(1.3)), budget, lr=LR)  # type: ignore[arg-type]


def test_a_whole_number_of_another_type_is_a_budget():
    expected = forecast(Surface(law(1.3)), BUDGET, lr=LR)
    for budget in (float(BUDGET), np.int64(BUDGET)):
        assert forecast(Surface(law(1.3)), budget, lr=LR) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("max_cost", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_the_most_to_spend_is_checked(max_cost: float):
    with pytest.raises(ValueError, match=r"max_cost must be in \(0, 1\] full-run equivalents, got "):
        forecast(Surface(law(1.3)), BUDGET, lr=LR, max_cost=max_cost)


@pytest.mark.parametrize(
    "candidates", [[], [0.1], [0.1, 0.1], [0.0, 0.1], [-0.1, 0.1], [0.1, math.nan], [0.1, math.inf]]
)
def test_candidates_are_checked(candidates: list[float]):
    with pytest.raises(ValueError, match="candidates must be at least two different positive weight decays, got "):
        forecast(Surface(law(1.3)), BUDGET, candidates=candidates)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (0.0, "the learning rate is zero at every step: nothing would train"),
        (-0.1, "lr must be finite and >= 0 at every step, got -0.1"),
        (math.nan, "lr must be finite and >= 0 at every step, got nan"),
        ([0.1] * 7, r"lr has shape \(7,\), but the run has 2000 steps"),
        (lambda step: -1.0 if step == 1999 else 1.0, "lr must be finite and >= 0 at every step, got -1.0"),
    ],
)
def test_the_learning_rate_is_checked(lr: object, message: str):
    with pytest.raises(ValueError, match=message):
        forecast(Surface(law(1.3)), BUDGET, lr=lr)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [([1.0, 2.0], [0.5]), ([[1.0, 2.0]], [[0.5, 0.6]]), (1.0, 0.5)])
def test_a_probe_of_unequal_arrays_is_named(answer: tuple):
    with pytest.raises(
        ValueError, match=r"the probe must return two equally long arrays \(steps, metric\), got shapes"
    ):
        forecast(lambda weight_decay, steps: answer, BUDGET, lr=LR)


# -- logged large trainings


@lru_cache(maxsize=1)
def algoperf() -> dict[tuple[str, str], dict[float, list[tuple[float, float]]]]:
    """(workload, study) -> weight decay -> (step, metric, larger better); empty where the file is not there."""
    roots = [os.environ.get("DECAYCAST_DATA"), Path(decaycast.__file__).parents[3] / "shared" / "data"]
    files = [Path(root) / "algoperf" / ALGOPERF for root in roots if root]
    found = next((file for file in files if file.is_file()), None)
    runs: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {}
    if found is not None:
        with gzip.open(found, "rt", newline="") as text:
            for row in csv.DictReader(text):
                sign = -1.0 if row["metric_name"] == "wer" else 1.0
                arms = runs.setdefault((row["workload"], row["study"]), {})
                value = sign * float(row["validation_metric"] or "nan")
                arms.setdefault(float(row["weight_decay"]), []).append((float(row["step"]), value))
    return runs


@pytest.mark.parametrize("workload", ["ogbg", "imagenet_resnet"])
def test_logged_large_runs_give_an_answer_among_the_candidates(workload: str):
    if not algoperf():
        pytest.skip(f"{ALGOPERF} is not there (DECAYCAST_DATA/algoperf)")
    runs = algoperf()[workload, "0"]
    budget = int(max(curve[-1][0] for curve in runs.values()))
    asked: dict[float, int] = {}

    def probe(weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        asked[weight_decay] = steps
        seen = [(step, value) for step, value in runs[weight_decay] if step <= steps]
        return [step for step, _ in seen], [value for _, value in seen]

    found = forecast(probe, budget, candidates=tuple(runs), max_cost=0.3)
    assert found.weight_decay in runs and set(asked) <= set(runs)
    assert found.cost == sum(asked.values()) / budget <= 0.3
    assert found.reason and all(end > 0 for end in found.interval)


# -- what the verdict must not overlook


def wandering(rho: float, seed: int):
    """Arms without any effect of the decay, whose measurements wander with correlation `rho`."""
    rng, curves = np.random.default_rng(seed), {}

    def probe(weight_decay: float, steps: int):
        if weight_decay not in curves:
            noise = np.zeros(200)
            for i in range(1, 200):
                noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * rng.standard_normal()
            curves[weight_decay] = 1 + 2 * np.exp(-np.arange(200) / 30) + 0.02 * noise
        at = np.arange(1, 201) * 10.0
        return at[at <= steps], curves[weight_decay][at <= steps]

    return probe


@pytest.mark.parametrize(("rho", "most"), [(0.0, 0.1), (0.5, 0.15), (0.9, 0.4)])
def test_arms_that_differ_by_chance_are_rarely_trusted(rho: float, most: float):
    verdicts = [
        forecast(wandering(rho, seed), 2000, lr=0.1, higher_is_better=False, metric="loss").verdict
        for seed in range(40)
    ]
    assert verdicts.count("trust") / len(verdicts) <= most


def test_a_best_decay_far_from_the_usual_efolds_is_not_trusted():
    for efolds in (0.02, 40.0):
        found = forecast(Surface(law(efolds)), BUDGET, lr=LR)
        assert found.verdict != "trust", (efolds, found.reason)


def test_the_answer_lies_in_its_interval_and_prefers_too_little_decay():
    found = forecast(Surface(law(1.3)), BUDGET, lr=LR, candidates=[1e-7, 1.0])
    low, high = found.interval
    assert low <= found.weight_decay <= high and found.weight_decay == 1e-7


def test_a_probe_may_return_only_what_is_new():
    whole, seen = Surface(law(1.3), every=1), {}

    def piecewise(weight_decay: float, steps: int):
        at, values = (np.asarray(part) for part in whole(weight_decay, steps))
        new = at > seen.get(weight_decay, 0)
        seen[weight_decay] = steps
        return at[new], values[new]

    assert forecast(piecewise, BUDGET, lr=LR).to_dict() == forecast(Surface(law(1.3), every=1), BUDGET, lr=LR).to_dict()


def test_tensors_that_require_a_gradient_are_read():
    plain = Surface(law(1.3))

    def probe(weight_decay: float, steps: int):
        at, values = plain(weight_decay, steps)
        return torch.tensor(np.asarray(at)), torch.tensor(np.asarray(values), requires_grad=True)

    assert forecast(probe, BUDGET, lr=LR).weight_decay == forecast(Surface(law(1.3)), BUDGET, lr=LR).weight_decay


def side_by_side(values: list[float], spacing: float = 4.0) -> _Comparison:
    count = len(values)
    decays = math.log(1e-3) + math.log(spacing) * np.arange(count)
    return _Comparison(
        step=100,
        decays=decays,
        values=np.array(values),
        errors=np.full(count, 0.1),
        shown=np.ones(count, bool),
        noise=0.1,
    )


def believed(**changes: float) -> _Posterior:
    plain = {"quantiles": (-5.0, -4.0, -3.0), "probe_alone": -4.0, "agreement": 0.5, "beyond": 0.0}
    return _Posterior(**{**plain, **changes})  # type: ignore[arg-type]


def test_what_makes_the_arms_a_bound_only():
    assert _bound_only(side_by_side([0.0, 1.0, 0.0]), believed(beyond=0.1)) == ""
    assert "by no more than noise" in _bound_only(side_by_side([0.0, 1.0, 0.0]), believed(beyond=0.3))
    assert "the smallest of the arms" in _bound_only(side_by_side([1.0, 0.5, 0.0]), believed())
    assert "the largest of the arms" in _bound_only(side_by_side([0.0, 0.5, 1.0]), believed())
    assert "lie a factor of 100 apart" in _bound_only(side_by_side([0.0, 1.0, 0.0], spacing=10.0), believed())


def test_what_makes_the_two_opinions_disagree():
    known, unknown = Plan.checked(BUDGET, LR, None, 0.3), Plan.checked(BUDGET, None, None, 0.3)
    assert _second_opinion_doubt(believed(), known) == ""
    for apart in (believed(agreement=0.05), believed(probe_alone=-4.0 - math.log(4.1))):
        assert "they disagree" in _second_opinion_doubt(apart, known)
        assert _second_opinion_doubt(apart, unknown) == "", "without a rate there is no second opinion"
    assert "spans a factor of 55" in _second_opinion_doubt(believed(quantiles=(-6.0, -4.0, -6.0 + math.log(55))), known)
