"""Schedules as functions: their shapes off the ends, their names, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core import schedule as sc
from decaycast.core.names import choose
from decaycast.core.timescale import efolds

KNOWN = ["constant", "linear", "cosine", "step_decay"]


# names


def test_a_known_name_is_returned_and_the_nearest_is_offered():
    assert choose("cosine", KNOWN, "schedule") == "cosine"
    message = "unknown schedule 'Cosin'; did you mean 'cosine'\\? known: constant, linear, cosine, step_decay$"
    with pytest.raises(ValueError, match=message):
        choose("Cosin", KNOWN, "schedule")


def test_a_name_like_none_of_them_gets_the_list_only():
    with pytest.raises(ValueError, match="^unknown data 'zzzz'; known: digits, mnist$"):
        choose("zzzz", iter(["digits", "mnist"]), "data")


# functions of the step


@settings(deadline=None)
@given(total=st.integers(1, 10_000), end=st.floats(0, 5), name=st.sampled_from(["linear", "cosine"]))
def test_falls_from_one_to_its_end_and_stays_there(total, end, name):
    value = getattr(sc, name)(total, end)
    assert value(0) == 1.0 == value(-3)
    assert value(total) == end == value(total + 7)
    middle = value(total // 2)
    assert min(1, end) - 1e-12 <= middle <= max(1, end) + 1e-12


def test_linear_and_cosine_off_the_ends():
    assert sc.linear(8, 0.2)(3) == pytest.approx(1 - 0.8 * 3 / 8, rel=1e-15)
    assert sc.cosine(8, 0.2)(3) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 3 / 8)), rel=1e-15)


def test_cosine_is_the_one_torch_uses_for_learning_rates():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=37, eta_min=0.25)
    ours = sc.cosine(37, 0.25)
    for step in range(38):
        assert ours(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("total", [10, 70, 200, 9600])
def test_step_decay_drops_at_the_papers_milestones(total):
    value = sc.step_decay(total)
    for drops, at in enumerate((3 * total // 10, 6 * total // 10, 9 * total // 10)):
        assert value(at - 1) == pytest.approx(0.2**drops)
        assert value(at) == pytest.approx(0.2 ** (drops + 1))


def test_step_decay_between_whole_steps_acts_at_the_next():
    value = sc.step_decay(15, milestones=(0.3,), factor=0.5)  # 4.5 steps
    assert [value(step) for step in (4, 5)] == [1.0, 0.5]


def test_step_decay_is_not_late_by_a_rounding_error():
    assert 0.55 * 100 > 55  # in float64
    value = sc.step_decay(100, milestones=(0.55,), factor=0.5)
    assert [value(step) for step in (54, 55)] == [1.0, 0.5]


def test_warmup_multiplies_and_keeps_the_horizon():
    value = sc.warmup(sc.linear(100), 5)
    assert [value(step) for step in (0, 1)] == pytest.approx([0.2, 0.4 * 0.99])
    assert value(4) == pytest.approx(0.96)
    assert value(50) == 0.5
    assert sc.warmup(sc.linear(100), 0)(50) == 0.5


def test_join_restarts_each_piece_at_its_boundary():
    value = sc.join([sc.linear(10), sc.constant(), sc.linear(4, end=3.0)], [5, 8])
    assert [value(step) for step in (4, 5, 7, 8, 10, 99)] == pytest.approx([0.6, 1.0, 1.0, 1.0, 2.0, 3.0])
    assert sc.join([sc.linear(10)], [])(5) == 0.5


def test_exponential_falls_by_the_same_factor_every_step():
    value = sc.exponential(40, end=0.2)
    ratios = {round(value(step + 1) / value(step), 12) for step in range(40)}
    assert ratios == {round(0.2 ** (1 / 40), 12)}
    assert value(40) == pytest.approx(0.2, rel=1e-15) == value(90)


def test_inverse_time_is_omega_over_time_as_in_adana():
    omega, lr, total = 4.0, 3e-3, 500
    shape, timescale = sc.inverse_time(total), total / 10
    gamma = sc.wsd(total)
    weight_decay = omega / (lr * timescale)
    shrinks = [lr * gamma(step) * weight_decay * shape(step) for step in range(total)]
    assert shrinks == pytest.approx([gamma(step) * omega / (timescale + step) for step in range(total)], rel=1e-14)
    assert sc.inverse_time(total, timescale_steps=7)(14) == pytest.approx(1 / 3)
    assert shape(total + 9) == shape(total) == pytest.approx(1 / 11)


def test_the_efolds_of_inverse_time_are_the_harmonic_sum():
    total, timescale = 1000, 100.0
    spent = efolds(lr=sc.inverse_time(total), weight_decay=1 / timescale, steps=total)  # omega 1, lr 1
    ends = torch.tensor([timescale + total, timescale], dtype=torch.float64)
    assert spent == pytest.approx(float(torch.digamma(ends).diff().neg()), rel=1e-12)
    assert spent == pytest.approx(math.log(11), rel=2e-3)


def test_wsd_has_a_ramp_a_plateau_and_a_straight_end():
    value = sc.wsd(1000, warmup_share=0.05, cooldown_share=0.3, end=0.1)
    assert [value(step) for step in (0, 24, 49)] == pytest.approx([0.02, 0.5, 1.0])
    assert {value(step) for step in range(49, 701)} == {1.0}
    assert [value(step) for step in (850, 1000, 1200)] == pytest.approx([0.55, 0.1, 0.1])


def test_wsd_without_its_ends_is_constant_or_linear():
    flat, sloped = sc.wsd(20, 0.0, 0.0), sc.wsd(20, 0.0, 1.0, end=0.4)
    assert [flat(step) for step in range(20)] == [1.0] * 20
    assert [sloped(step) for step in range(25)] == [sc.linear(20, 0.4)(step) for step in range(25)]


@pytest.mark.parametrize("total", [7, 10, 200, 9600])
def test_decay_is_off_exactly_while_wsd_cools_down(total):
    rate, decay = sc.wsd(total, warmup_share=0.0), sc.off_in_cooldown(total)
    start = next(step for step in range(total) if decay(step) == 0)
    assert start == math.ceil(0.8 * total)
    assert rate(start) == 1.0 > rate(start + 1)
    assert [decay(step) for step in (0, start - 1, start, total, total + 5)] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_rising_schedules_end_at_ten_times_their_start_as_in_dino():
    base = 0.04
    for name in ("cosine_up", "linear_up"):
        value = sc.by_name(name, 100)
        assert base * value(0) == 0.04
        assert base * value(50) == pytest.approx(0.22)
        assert base * value(100) == pytest.approx(0.4) == base * value(150)


def test_lr_proportional_is_the_corrected_convention():
    lr, total, weight_decay = 0.3, 60, 0.02
    schedule = sc.warmup(sc.cosine(total), 6)  # its peak is neither 1 nor at step 0
    shape = sc.lr_proportional(total, schedule)
    by_shape = efolds(lr=lambda step: lr * schedule(step) * shape(step), weight_decay=weight_decay, steps=total)
    corrected = efolds(
        lr=lambda step: lr * schedule(step), weight_decay=weight_decay, steps=total, convention="corrected"
    )
    assert by_shape == pytest.approx(corrected, rel=1e-13)
    assert max(shape(step) for step in range(total)) == 1.0
    assert max(schedule(step) for step in range(total)) < 1.0


# all of them, by name


RISING, FALLING = (
    ("linear_up", "cosine_up"),
    tuple(name for name in sc.WEIGHT_DECAY_NAMES if name not in ("linear_up", "cosine_up", "wsd")),
)


def named(name: str, total: int) -> sc.Schedule:
    return sc.by_name(name, total, lr_schedule=sc.cosine(total))


@settings(deadline=None)
@given(total=st.integers(1, 3000), name=st.sampled_from(sc.WEIGHT_DECAY_NAMES), steps=st.data())
def test_every_schedule_stays_where_its_horizon_ends_and_is_a_multiplier(total, name, steps):
    value = named(name, total)
    assert value(total) == value(total + 1) == value(10 * total)
    assert value(-5) == value(0)
    inside = [value(step) for step in steps.draw(st.lists(st.integers(0, total), min_size=1))]
    assert all(0 <= one <= sc.RISE for one in inside)


@settings(deadline=None)
@given(total=st.integers(1, 3000), name=st.sampled_from(RISING + FALLING), steps=st.data())
def test_every_schedule_but_wsd_keeps_its_direction(total, name, steps):
    value = named(name, total)
    early, late = sorted(steps.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    assert value(0) == 1.0
    assert value(early) <= value(late) if name in RISING else value(early) >= value(late)
    assert (value(total) == 1.0) == (name == "constant")


@settings(deadline=None)
@given(total=st.integers(1, 2000), name=st.sampled_from(RISING + FALLING), steps=st.data())
def test_twice_the_steps_stretch_the_shape(total, name, steps):
    step = steps.draw(st.integers(0, total))
    assert named(name, 2 * total)(2 * step) == pytest.approx(named(name, total)(step), rel=1e-12, abs=1e-15)


def test_names_say_what_they_are_for():
    assert set(sc.LR_NAMES) < set(sc.WEIGHT_DECAY_NAMES)
    assert set(sc.WEIGHT_DECAY_NAMES) - set(sc.LR_NAMES) == {
        "off_in_cooldown", "linear_up", "cosine_up", "inverse_time", "lr_proportional"
    }  # fmt: skip


@pytest.mark.parametrize("name", sc.WEIGHT_DECAY_NAMES)
def test_by_name_gives_the_default_shape(name):
    half = sc.linear(40, end=0.5)
    expected = {
        "constant": sc.constant(),
        "linear": sc.linear(40),
        "cosine": sc.cosine(40),
        "step_decay": sc.step_decay(40),
        "exponential": sc.exponential(40),
        "wsd": sc.wsd(40),
        "off_in_cooldown": sc.off_in_cooldown(40),
        "linear_up": sc.linear(40, end=10.0),
        "cosine_up": sc.cosine(40, end=10.0),
        "inverse_time": sc.inverse_time(40),
        "lr_proportional": half,
    }[name]
    assert [sc.by_name(name, 40, half)(step) for step in range(45)] == [expected(step) for step in range(45)]
    if name in sc.LR_NAMES:
        assert [sc.lr_by_name(name, 40)(step) for step in range(45)] == [expected(step) for step in range(45)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sc.linear(0), "total_steps must be a whole number >= 1, got 0"),
        (lambda: sc.cosine(2.5), "total_steps must be a whole number >= 1, got 2.5"),
        (lambda: sc.cosine(math.inf), "total_steps must be a whole number >= 1, got inf"),
        (lambda: sc.step_decay("9"), "total_steps must be a whole number >= 1, got '9'"),
        (lambda: sc.by_name("constant", True), "total_steps must be a whole number >= 1, got True"),
        (lambda: sc.linear(5, end=-0.1), "end must be a finite number >= 0, got -0.1"),
        (lambda: sc.cosine(5, end=math.nan), "end must be a finite number >= 0, got nan"),
        (lambda: sc.step_decay(5, factor=math.inf), "factor must be a finite number >= 0, got inf"),
        (lambda: sc.step_decay(5, milestones=(0.5, 0.2)), "milestones must be rising fractions .* got \\(0.5, 0.2\\)"),
        (lambda: sc.step_decay(5, milestones=(0.5, 1.2)), "milestones must be rising fractions"),
        (lambda: sc.warmup(sc.constant(), -1), "warmup_steps must be a whole number >= 0, got -1"),
        (lambda: sc.join([sc.constant()], [3]), "1 pieces need 0 boundaries between them, got 1"),
        (lambda: sc.join([sc.constant()] * 3, [4, 4]), "boundaries must rise, got \\[4, 4\\]"),
        (lambda: sc.join([sc.constant()] * 2, [0]), "a boundary must be a whole number >= 1, got 0"),
        (lambda: sc.by_name("cosin", 5), "unknown schedule 'cosin'; did you mean 'cosine'"),
        (lambda: sc.by_name("lr_proportional", 5), "'lr_proportional' follows the learning rate; give its schedule as"),
        (lambda: sc.by_name("lr_proportional", 0, sc.constant()), "total_steps must be a whole number >= 1, got 0"),
        (lambda: sc.lr_by_name("linar", 5), "unknown schedule 'linar'; did you mean 'linear'"),
        (
            lambda: sc.lr_by_name("cosine_up", 5),
            "'cosine_up' is a schedule of the weight decay, not of the learning rate",
        ),
        (lambda: sc.exponential(5, end=0), "end must be > 0 for an exponential schedule, got 0; use linear or cosine"),
        (lambda: sc.exponential(5, end=-1), "end must be a finite number >= 0, got -1"),
        (lambda: sc.inverse_time(5, timescale_steps=0), "timescale_steps must be > 0, got 0; leave it out for a tenth"),
        (lambda: sc.inverse_time(5, timescale_steps=math.inf), "timescale_steps must be a finite number >= 0, got inf"),
        (lambda: sc.wsd(5, warmup_share=0.5, cooldown_share=0.6), "together at most 1, got 0.5 and 0.6"),
        (lambda: sc.wsd(5, warmup_share=-0.1), "warmup_share and cooldown_share must be >= 0 .* got -0.1 and 0.2"),
        (lambda: sc.wsd(5, end=-1), "end must be a finite number >= 0, got -1"),
        (lambda: sc.off_in_cooldown(5, 1.2), r"cooldown_share must be in \[0, 1\], got 1.2"),
        (lambda: sc.lr_proportional(5, lambda step: 0.0), "the learning rate is zero at every step, so it has no peak"),
        (lambda: sc.lr_proportional(5, lambda step: -1.0), r"lr_schedule\(0\) must be a finite number >= 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_learning_rate_schedule_has_to_be_a_function():
    with pytest.raises(TypeError, match="lr_schedule must be a function step -> multiplier, got float"):
        sc.lr_proportional(5, 0.1)  # type: ignore[arg-type]


def test_whole_numbers_of_other_types_pass():
    assert sc.linear(np.int64(10))(5) == 0.5 == sc.linear(10.0)(5)


def test_numbers_may_be_of_numpy_or_torch():
    for half in (np.float32(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5)):
        assert sc.linear(10, end=half)(10) == 0.5
    for ten in (torch.tensor(10), np.array(10.0), np.int64(10)):
        assert sc.linear(ten)(5) == 0.5


@pytest.mark.parametrize(
    "value",
    [torch.tensor([0.5, 0.1]), np.array([0.5, 0.1]), np.array([]), "0.5", None, 10**400],
    ids=lambda v: type(v).__name__,
)
def test_what_is_not_one_number_is_named(value):
    with pytest.raises(ValueError, match="end must be a finite number >= 0, got "):
        sc.linear(10, end=value)
    if not isinstance(value, int):
        with pytest.raises(ValueError, match="total_steps must be a whole number >= 1, got "):
            sc.linear(value)
