"""AutoL2 on the clock of e-folds: what is spent when, what a stall does, and what a learning-rate drop does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.experiment import Run
from decaycast.core.schedule import cosine, step_decay
from decaycast.lab.trial import train_run
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook
from decaycast.methods.l2.budget import BudgetRule

STEPS = 1000


def left_after(steps: int, total: int = STEPS) -> float:
    """Share of the budget left after `steps` of `total` steps of equal rate: the recursion's product, by hand."""
    return (total - steps) * (total - steps - 1) / (total * (total - 1))


def drive(rule: BudgetRule, losses, errors, rates) -> list[float]:
    return [
        rule.update(step, loss, error, rate)
        for step, (loss, error, rate) in enumerate(zip(losses, errors, rates, strict=True))
    ]


def falling(count: int = STEPS) -> np.ndarray:
    return 1 / (1 + np.arange(count))


# what is spent when


@pytest.mark.parametrize("budget", [0.3, 1.3, 8.0])
def test_the_budget_is_spent_along_a_parabola(budget: float):
    rule = BudgetRule(budget, horizon=STEPS * 0.05)
    for step in range(STEPS):
        assert rule.efolds == pytest.approx(budget * (1 - left_after(step)), abs=1e-12)
        rule.update(step, falling()[step], falling()[step], rate=0.05)
    assert rule.efolds == pytest.approx(budget, rel=1e-12)
    assert rule.decays == []


@pytest.mark.parametrize("schedule", [cosine(STEPS), step_decay(STEPS)], ids=["cosine", "step"])
def test_under_a_schedule_the_coefficient_falls_in_a_line_on_the_rates_clock(schedule):
    rates = np.array([0.1 * schedule(step) for step in range(STEPS)])
    values = np.array(drive(BudgetRule(1.3, rates.sum()), falling(), falling(), rates))
    clock = np.concatenate([[0], rates.cumsum()[:-1]]) / rates.sum()
    assert values[0] == pytest.approx(2 * 1.3 / rates.sum(), rel=1e-12)
    early = clock < 0.9
    assert values[early] / values[0] == pytest.approx(1 - clock[early], rel=0.03)
    assert (values * rates).sum() == pytest.approx(1.3, rel=1e-9)


@given(unit=st.floats(1e-6, 1e6))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_the_weight_decay_does_not_matter(unit: float):
    rates, noise = np.full(300, 0.1), np.full(300, 0.5)
    one, other = BudgetRule(3.0, rates.sum()), BudgetRule(3.0, rates.sum() * unit)
    here, there = drive(one, noise, noise, rates), drive(other, noise, noise, rates * unit)
    assert one.decays == other.decays != []
    assert np.array(there) * unit == pytest.approx(np.array(here), rel=1e-9)


@given(
    losses=st.lists(st.floats(0, 5), min_size=40, max_size=120),
    budget=st.floats(0.01, 50),
    rate=st.floats(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_no_more_than_the_budget_is_spent(losses: list[float], budget: float, rate: float):
    rule = BudgetRule(budget, horizon=50.0, measure_every=1)
    values = drive(rule, losses, [min(1.0, loss / 5) for loss in losses], [rate] * len(losses))
    assert all(value >= 0 for value in values)
    assert rule.efolds <= budget * (1 + 1e-9)
    assert rule.efolds == pytest.approx(sum(value * rate for value in values))


def test_beyond_the_horizon_nothing_is_left():
    rule = BudgetRule(1.0, horizon=100.0)
    values = drive(rule, falling(150), falling(150), [1.0] * 150)
    assert set(values[100:]) == {0.0}
    assert rule.coefficient == 0.0


# stalls


def test_a_constant_loss_stalls_after_three_readings():
    """The steps at which readings are done, from the closed form of what is spent."""
    spent = [1.3 * (1 - left_after(step)) for step in range(0, STEPS, 10)]
    first = next(i for i, e in enumerate(spent) if e >= 0.2)
    second = next(i for i, e in enumerate(spent) if e - spent[first] >= 0.2)
    third = next(i for i, e in enumerate(spent) if e - spent[second] >= 0.2)
    rule = BudgetRule(1.3, horizon=float(STEPS))
    before = drive(rule, [1.0] * (10 * third), [0.5] * (10 * third), [1.0] * (10 * third))
    assert rule.decays == []
    after = rule.update(10 * third, 1.0, 0.5, 1.0)
    assert rule.decays == [10 * third] == [280]
    assert after == pytest.approx(before[-1] / 10, rel=0.01)


@pytest.mark.parametrize("column", ["loss", "error"])
def test_either_of_loss_and_error_can_stall(column: str):
    better, same = falling(), np.full(STEPS, 0.5)
    losses, errors = (same, better) if column == "loss" else (better, same)
    rule = BudgetRule(1.3, horizon=float(STEPS))
    drive(rule, losses, errors, [1.0] * STEPS)
    assert rule.decays[0] == 280


def test_one_bad_reading_is_no_stall():
    losses = falling().copy()
    losses[90:180] += 0.5  # the second reading
    rule = BudgetRule(1.3, horizon=float(STEPS))
    drive(rule, losses, falling(), [1.0] * STEPS)
    assert rule.decays == []


def test_a_stall_divides_what_is_left_of_the_budget():
    rule = BudgetRule(1.3, horizon=float(STEPS), factor=4.0)
    drive(rule, [1.0] * STEPS, [0.5] * STEPS, [1.0] * STEPS)
    assert rule.decays[0] == 280
    assert len(rule.decays) == 1  # less than a refractory period is left
    spent = 1.3 * (1 - left_after(280))
    assert rule.efolds == pytest.approx(spent + (1.3 - spent) / 4, rel=1e-9)


def test_divisions_keep_the_refractory_distance():
    rule = BudgetRule(20.0, horizon=float(STEPS), factor=1.5, refractory=0.8)
    spent = []
    for step in range(STEPS):
        before = len(rule.decays)
        rule.update(step, 1.0, 0.5, 1.0)
        if len(rule.decays) > before:
            spent.append(rule.efolds)
    assert len(spent) > 3
    assert min(np.diff([0.0, *spent])) >= 0.8


def test_a_reading_holds_five_measurements_however_fast_the_clock_goes():
    rule = BudgetRule(50.0, horizon=float(STEPS))
    drive(rule, [1.0] * STEPS, [0.5] * STEPS, [1.0] * STEPS)
    assert rule.decays[0] == 140  # measurements 0..4, 5..9, 10..14


def test_a_learning_rate_drop_starts_the_comparison_anew():
    """Two readings, then a drop: the third would be the second in a row that is no better, but is the new reference."""
    rates = np.where(np.arange(STEPS) < 200, 1.0, 0.5)
    losses = np.ones(STEPS)
    with_drop, without = BudgetRule(1.3, float(STEPS)), BudgetRule(1.3, float(STEPS))
    drive(with_drop, losses, losses / 2, rates)
    drive(without, losses, losses / 2, [1.0] * STEPS)
    assert without.decays[0] == 280
    assert with_drop.decays[0] > 400  # the third reading ends at step 360; two more have to follow


def test_a_drop_is_not_taken_for_progress():
    """After a drop the level is compared with itself: a loss that stays at its new low level stalls, as it should."""
    budget, total = 6.0, 4000
    rates = np.where(np.arange(total) < 1000, 1.0, 0.5)
    losses = np.where(np.arange(total) < 1000, np.linspace(2, 1, total), 0.2)
    rule = BudgetRule(budget, rates.sum())
    drive(rule, losses, losses / 4, rates)
    assert rule.decays
    assert rule.decays[0] > 1000


# state


@pytest.mark.parametrize("cut", [0, 3, 95, 300, 777])
def test_saved_and_restored_it_goes_on_the_same(cut: int):
    noise = np.random.default_rng(1).uniform(size=(2, STEPS))
    whole = BudgetRule(5.0, 100.0)
    expected = drive(whole, *noise, [0.1] * STEPS)
    rule = BudgetRule(5.0, 100.0)
    drive(rule, *noise[:, :cut], [0.1] * cut)
    resumed = BudgetRule(1.0, 1.0)
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    got = [resumed.update(s, noise[0, s], noise[1, s], 0.1) for s in range(cut, STEPS)]
    assert got == expected[cut:]
    assert resumed.state_dict() == whole.state_dict()


def test_a_foreign_state_is_refused_and_nothing_changes():
    rule = BudgetRule(5.0, 100.0)
    before = rule.state_dict()
    with pytest.raises(ValueError, match="no state of BudgetRule: missing"):
        rule.load_state_dict({"budget_efolds": 1.0})
    assert rule.state_dict() == before


def test_a_saved_state_does_not_change_afterwards():
    rule = BudgetRule(5.0, 100.0)
    saved = rule.state_dict()
    copy = json.dumps(saved)
    drive(rule, [1.0] * 300, [0.5] * 300, [0.1] * 300)
    assert json.dumps(saved) == copy


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_efolds": 0.0}, "budget_efolds must be a positive number"),
        ({"budget_efolds": math.nan}, "budget_efolds must be a positive number"),
        ({"horizon": -1.0}, "horizon must be a positive number"),
        ({"factor": 1.0}, "factor must be > 1, got 1.0; what is left of the budget is divided by it"),
        ({"refractory": 0.0}, "refractory must be a positive number"),
        ({"measure_every": 0}, "measure_every must be a whole number >= 1, got 0"),
    ],
)
def test_settings_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        BudgetRule(**{"budget_efolds": 1.0, "horizon": 1.0, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 0.5, 0.1), "step must be >= 0 and rise from call to call, got 0 after 0"),
        ((-1, 1.0, 0.5, 0.1), "step must be >= 0 and rise from call to call, got -1"),
        ((10, 1.0, 0.5, -0.1), "rate must be a finite number >= 0, got -0.1 at step 10"),
        ((10, math.nan, 0.5, 0.1), "loss must be finite, got nan at step 10"),
        ((10, 1.0, 1.5, 0.1), r"error must be a share of wrong predictions in \[0, 1\], got 1.5 at step 10"),
        ((10, None, 0.5, 0.1), "loss must be one number at step 10"),
    ],
)
def test_a_bad_measurement_is_refused_and_loses_nothing(arguments: tuple, message: str):
    rule = BudgetRule(1.0, 1.0)
    rule.update(0, 1.0, 0.5, 0.1)
    before = rule.state_dict()
    with pytest.raises(ValueError, match=message):
        rule.update(*arguments)
    assert rule.state_dict() == before


# on an optimiser


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((1,), value, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_real_optimiser_shrinks_weights_by_the_budget(kind: str):
    """Without gradients a weight keeps exp(-E*) of itself: an independent account of what was spent."""
    weight = parameter()
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = make([weight], lr=0.1, weight_decay=0.01)
    schedule = cosine(STEPS)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=STEPS, lr=lambda step: 0.1 * schedule(step))
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step)
        weight.grad = torch.zeros_like(weight)
        scheduler.step(loss=falling()[step], error=falling()[step])
        optimizer.step()
    assert weight.item() == pytest.approx(math.exp(-1.0), rel=2e-3)
    assert scheduler.rule.efolds == pytest.approx(1.0, rel=1e-9)


def test_momentum_counts():
    weight = parameter()
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, weight_decay=0.01)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=STEPS)
    assert scheduler.get_last_wd() == [pytest.approx(2 * 1.0 / (STEPS * 0.01 / 0.1))]
    for step in range(STEPS):
        weight.grad = torch.zeros_like(weight)
        scheduler.step(loss=falling()[step], error=falling()[step])
        optimizer.step()
    assert weight.item() == pytest.approx(math.exp(-1.0), rel=0.02)


def test_groups_keep_their_ratio_and_zero_stays():
    groups = [{"params": [parameter()], "weight_decay": decay} for decay in (0.01, 0.0, 0.02)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=100)
    assert scheduler.get_last_wd() == [pytest.approx(0.1), 0.0, pytest.approx(0.2)]


def test_a_rate_below_the_announced_one_leaves_budget():
    optimizer = torch.optim.AdamW([parameter()], lr=0.05, weight_decay=0.01)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=100, lr=0.1)
    for step in range(100):
        scheduler.step(loss=falling()[step], error=falling()[step])
    assert scheduler.rule.efolds == pytest.approx(0.75, abs=0.01)  # half-way on the announced clock


def test_a_run_interrupted_goes_on_the_same():
    def fresh() -> AutoL2:
        optimizer = torch.optim.SGD([parameter()], lr=0.1, weight_decay=0.5)
        return AutoL2(optimizer, clock="efolds", budget_efolds=4.0, steps=300)

    noise = np.random.default_rng(3).uniform(size=300)
    whole, first, second = fresh(), fresh(), fresh()
    values = []
    for step in range(300):
        whole.step(noise[step], noise[step])
        values += whole.get_last_wd()
    for step in range(137):
        first.step(noise[step], noise[step])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.get_last_wd() == [values[136]]
    for step in range(137, 300):
        second.step(noise[step], noise[step])
    assert second.get_last_wd() == [values[-1]]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "epochs"}, "clock must be one of|unknown clock|'epochs'"),
        ({"clock": "efolds"}, "clock='efolds' needs steps"),
        ({"clock": "efolds", "steps": 10, "start": 0.1}, "start cannot be given with clock='efolds'"),
        ({"budget_efolds": 1.0, "steps": 10}, "budget_efolds, steps cannot be given with clock='steps'"),
        ({"clock": "efolds", "steps": 10, "lr": 0.0}, "the learning rate is zero at every step"),
        ({"clock": "efolds", "steps": 10, "lr": [0.1]}, r"lr has shape \(1,\), but the run has 10 steps"),
        ({"clock": "efolds", "steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"clock": "efolds", "steps": 10, "budget_efolds": -1.0}, "budget_efolds must be a positive number"),
    ],
)
def test_settings_that_do_not_go_together(options: dict, message: str):
    optimizer = torch.optim.SGD([parameter()], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=message):
        AutoL2(optimizer, **options)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match=message):
        AutoL2Hook(**options)


def test_a_hook_refuses_settings_it_does_not_know():
    with pytest.raises(TypeError, match="budget"):
        AutoL2Hook(budget=1.0)


def test_the_state_of_the_other_clock_is_refused():
    optimizer = torch.optim.SGD([parameter()], lr=0.1, weight_decay=0.1)
    paper, ours = AutoL2(optimizer), AutoL2(optimizer, clock="efolds", steps=10)
    with pytest.raises(ValueError, match="no state of BudgetRule"):
        ours.load_state_dict(paper.state_dict())
    with pytest.raises(ValueError, match="no state of AutoL2Rule"):
        paper.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.0), ("adamw", 0.3)])
def test_a_training_spends_its_budget(optimizer: str, decay: float):
    config = {"data": "digits", "train_size": 200, "model": "mlp-16x1", "optimizer": optimizer, "schedule": "cosine"}
    settings = {"lr": 0.01, "steps": 200, "batch_size": 32, "points": 5, "weight_decay": decay}
    row = train_run(Run(config={**config, **settings, "rule": "autol2-efolds", "budget_efolds": 0.5}))
    assert row.status == "done", row.reason
    assert row.curve["efolds"][-1] == pytest.approx(0.5, rel=1e-6)
    assert list(row.curve["weight_decay"]) == sorted(row.curve["weight_decay"], reverse=True)


def test_a_larger_group_added_later_does_not_take_the_lead():
    """The coefficient is the first leader's, and so must be the rate that the budget is counted with."""
    optimizer = torch.optim.SGD([parameter()], lr=0.1, weight_decay=1.0)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=100)
    spent = 0.0
    for step in range(50):
        if step == 10:
            optimizer.add_param_group({"params": [parameter()], "weight_decay": 10.0, "lr": 0.5})
        scheduler.step(1.0 / (1 + step), 0.5 / (1 + step))
        spent += 0.1 * scheduler.get_last_wd()[0]
    assert scheduler.get_last_wd()[1] == pytest.approx(10 * scheduler.get_last_wd()[0])
    assert scheduler.rule.efolds == pytest.approx(spent) == pytest.approx(1 - left_after(50, 100))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("warmed", "message"),
    [
        (
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 50)),
            "0.002 now but 0.1 in",
        ),
        (
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=100),
            "0.004 now but 0.1 in .* by up to 25 times",
        ),
    ],
)
def test_a_warm_up_that_nobody_told_of_is_noticed(warmed, message: str):
    optimizer = torch.optim.SGD([parameter()], lr=0.1, weight_decay=1.0)
    warmed(optimizer)
    with pytest.warns(UserWarning, match=message) as caught:
        AutoL2(optimizer, clock="efolds", steps=100)
    assert caught[0].filename == __file__
    AutoL2(optimizer, clock="efolds", steps=100, lr=lambda step: 0.1 * min(1.0, (step + 1) / 50))  # told: no warning


def test_a_saved_leader_that_no_group_has_is_refused():
    scheduler = AutoL2(torch.optim.SGD([parameter()], lr=0.1, weight_decay=1.0), clock="efolds", steps=10)
    with pytest.raises(ValueError, match="saved largest must be one of the saved initial_weight_decay"):
        scheduler.load_state_dict({**scheduler.state_dict(), "largest": 2.0})


@pytest.mark.parametrize("order", [(0.001, 0.1), (0.1, 0.001)])
def test_among_groups_of_one_weight_decay_the_fastest_counts(order: tuple[float, float]):
    """With layer-wise learning rates no group may spend more than the budget."""
    groups = [{"params": [parameter()], "lr": lr} for lr in order]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5, weight_decay=1.0)
    scheduler = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=100)
    spent = 0.0
    for step in range(100):
        scheduler.step(1.0 / (1 + step), 0.5 / (1 + step))
        spent += 0.1 / (1 - 0.5) * max(scheduler.get_last_wd())
    assert spent == pytest.approx(1.0)
