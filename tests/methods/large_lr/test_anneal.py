"""When to anneal, and the learning rate that follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decaycast.methods.large_lr import theory
from decaycast.methods.large_lr.anneal import AtStep, BelowLoss, LargeThenSmallLR, OnPlateau, Trigger

LOSSES = [1.0, 0.7, 0.9, 0.5, 0.45, 0.6, 0.44, 0.43, 0.45, 0.44, 0.43, 0.46]


def optimizer(*rates: float) -> torch.optim.SGD:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1)


def first_yes(trigger: Trigger, losses: list[float]) -> int | None:
    return next((step for step, loss in enumerate(losses) if trigger.update(step, loss)), None)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=30), st.integers(1, 10))
def test_the_smoothed_loss_is_a_weighted_mean(losses: list[float], window: int):
    trigger = BelowLoss(1e-9, window)
    for step, loss in enumerate(losses):
        trigger.update(step, loss)
    weights = [(1 - 1 / window) ** age for age in range(len(losses))][::-1]
    wanted = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
    assert trigger.smoothed() == pytest.approx(wanted)


def test_the_threshold_of_the_theory():
    threshold = theory.anneal_loss(0.1, 0.5)  # 0.1 + 0.5*log(2) = 0.447
    assert first_yes(BelowLoss(threshold, window=1), LOSSES) == 6
    # smoothed, one low loss among high ones is not enough
    assert first_yes(BelowLoss(0.5, window=1), LOSSES) == 3 and first_yes(BelowLoss(0.5, window=3), LOSSES) == 8
    assert first_yes(BelowLoss(0.5, window=8), LOSSES[3:5]) is None, "a window has to be seen"
    assert math.isnan(BelowLoss(0.5).smoothed())


def test_the_plateau():
    assert first_yes(OnPlateau(patience=4, window=1), LOSSES) == 11  # best 0.43 at step 7
    assert first_yes(OnPlateau(patience=2, window=1, improvement=0.2), LOSSES) == 5  # 0.45 is no fifth below 0.5
    assert first_yes(OnPlateau(patience=3, window=1), [1.0 / (step + 1) for step in range(50)]) is None
    assert first_yes(OnPlateau(patience=3, window=5), [1.0] * 50) == 4 + 3


TRIGGERS: list[Callable[[], Trigger]] = [
    lambda: AtStep(9),
    lambda: BelowLoss(0.5, window=3),
    lambda: OnPlateau(patience=2, improvement=0.1, window=2),
]


@pytest.mark.parametrize("make", TRIGGERS)
@pytest.mark.parametrize("stop", [0, 3, 7])
def test_a_resumed_trigger_decides_alike(make: Callable[[], Trigger], stop: int):
    whole, first, second = make(), make(), make()
    wanted = [whole.update(step, loss) for step, loss in enumerate(LOSSES)]
    found = [first.update(step, loss) for step, loss in enumerate(LOSSES[:stop])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.update(step, loss) for step, loss in enumerate(LOSSES[stop:], start=stop)]
    assert found == wanted and True in wanted


def rates(scheduler: LargeThenSmallLR, losses: list[float]) -> list[list[float]]:
    found = []
    for loss in losses:
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return found


def test_large_and_then_small_in_every_group():
    scheduler = LargeThenSmallLR(optimizer(0.1, 0.4), [0.004, 0.02], AtStep(5), total_steps=12)
    assert rates(scheduler, LOSSES) == [[0.1, 0.4]] * 5 + [[0.004, 0.02]] * 7
    assert (scheduler.annealed_at, scheduler.reason) == (5, "trigger")
    assert scheduler.get_last_lr() == [0.004, 0.02]


def test_a_trigger_by_the_loss_and_its_latest_step():
    # the loss of step 6 is the first below, so step 7 is the first with the small rate
    scheduler = LargeThenSmallLR(optimizer(), 0.01, BelowLoss(0.447, window=1), total_steps=12)
    assert rates(scheduler, LOSSES) == [[0.1]] * 7 + [[0.01]] * 5
    late = LargeThenSmallLR(optimizer(), 0.01, BelowLoss(1e-3, window=1), total_steps=12)
    assert rates(late, LOSSES) == [[0.1]] * 9 + [[0.01]] * 3, "4/5 of the run"
    assert (late.annealed_at, late.reason) == (9, "latest")
    said = LargeThenSmallLR(optimizer(), 0.01, BelowLoss(1e-3, window=1), total_steps=12, latest=4)
    assert rates(said, LOSSES) == [[0.1]] * 4 + [[0.01]] * 8


@given(st.lists(st.floats(0.0, 3.0), min_size=2, max_size=40), st.floats(0.1, 2.0), st.integers(1, 5))
def test_every_run_ends_in_the_small_rate(losses: list[float], threshold: float, window: int):
    for trigger in (BelowLoss(threshold, window), OnPlateau(patience=window, window=window)):
        found = rates(LargeThenSmallLR(optimizer(), 0.01, trigger, total_steps=len(losses)), losses)
        assert found[0] == [0.1] and found[-1] == [0.01]
        assert found == sorted(found, reverse=True), "it never goes back"


@pytest.mark.parametrize("make", TRIGGERS)
@pytest.mark.parametrize("stop", [2, 8, 11])
def test_a_resumed_run_goes_on(make: Callable[[], Trigger], stop: int):
    wanted = rates(LargeThenSmallLR(optimizer(), 0.01, make(), total_steps=12), LOSSES)
    before = LargeThenSmallLR(optimizer(), 0.01, make(), total_steps=12)
    found = rates(before, LOSSES[:stop])
    after = LargeThenSmallLR(optimizer(), 0.01, make(), total_steps=12)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    found += rates(after, LOSSES[stop:])
    assert found == wanted
    assert (after.annealed_at, after.reason) != (None, "")


def test_the_loss_may_be_a_tensor_and_is_not_needed_for_a_step():
    trigger = BelowLoss(0.5, window=1)
    assert trigger.update(0, torch.tensor(0.4)) is True  # type: ignore[arg-type]
    scheduler = LargeThenSmallLR(optimizer(), 0.01, AtStep(1), total_steps=2)
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.01]


def large_then_small(trigger: Any = None, small: Any = 0.01, total: Any = 12, latest: Any = None) -> LargeThenSmallLR:
    return LargeThenSmallLR(optimizer(), small, trigger or BelowLoss(0.1), total, latest)


BAD: list[tuple[Any, str]] = [
    (lambda: large_then_small(AtStep(12)), "the run ends at step 12, before it anneals at step 12"),
    (lambda: large_then_small(latest=30), "the run ends at step 12, before it anneals at step 30"),
    (lambda: large_then_small(latest=0), "latest must be a whole number >= 1, got 0"),
    (lambda: large_then_small(total=1), "total_steps must be a whole number >= 2, got 1"),
    (lambda: large_then_small(small=0.2), r"small must be rates from 0 to the optimizer's own \[0.1\], got 0.2"),
    (lambda: large_then_small(small=-0.1), "small must be rates from 0"),
    (lambda: large_then_small(small=math.nan), "small must be rates from 0"),
    (lambda: large_then_small(small=[0.01, 0.01]), "small has 2 rates and the optimizer 1 groups"),
    (lambda: large_then_small().step(), "BelowLoss needs the training loss at every step, got None at step 1"),
    (lambda: OnPlateau(3).update(4, math.nan), "OnPlateau needs the training loss at every step, got nan at step 4"),
    (lambda: AtStep(0), "step must be a whole number >= 1, got 0"),
    (lambda: BelowLoss(0.0), "threshold must be a finite loss > 0, got 0"),
    (lambda: BelowLoss(0.1, window=0), "window must be a whole number >= 1, got 0"),
    (lambda: OnPlateau(0), "patience must be a whole number >= 1, got 0"),
    (lambda: OnPlateau(3, improvement=1.0), r"improvement must be a fraction in \[0, 1\), got 1"),
    (lambda: BelowLoss(0.1).load_state_dict({"best": 1.0}), "this is no state of BelowLoss: missing"),
    (lambda: large_then_small().load_state_dict({}), "this is no state of LargeThenSmallLR: missing"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_trigger_is_refused():
    with pytest.raises(TypeError, match="trigger must be an AtStep, BelowLoss, OnPlateau or other Trigger, got int"):
        large_then_small(5)
