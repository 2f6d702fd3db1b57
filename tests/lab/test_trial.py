"""Trials pause and go on without a trace, follow their weight decay rule, and fail as rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from decaycast.core.experiment import Run
from decaycast.core.hook import Hook
from decaycast.core.measure import COLUMNS, measuring_steps
from decaycast.core.schedule import WEIGHT_DECAY_NAMES, by_name
from decaycast.core.train import DivergedError
from decaycast.lab.trial import DEFAULTS, Trial, make_optimizer, train_run

STEPS = 200
TINY: dict[str, Any] = {
    "data": "digits",
    "train_size": 300,
    "validation_size": 100,
    "test_size": 100,
    "model": "mlp-16x1",
    "lr": 0.1,
    "batch_size": 32,
    "steps": STEPS,
    "weight_decay": 0.01,
}


def tiny(seed: int = 0, **changes: Any) -> Run:
    return Run(config={**TINY, **changes}, seed=seed)


def weights(trial: Trial) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trial.model.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0.9, "lr": 0.02, "schedule": "cosine"},
        {"optimizer": "adamw", "lr": 0.003, "schedule": "step_decay"},
        {"rule": "autol2"},
        {"rule": "cosine"},
    ],
    ids=str,
)
def test_a_trial_that_pauses_equals_one_that_does_not(changes: dict[str, Any]):
    paused, whole = Trial(tiny(**changes)), Trial(tiny(**changes))
    for stop in (1, 16, 16, 31, 5, 77):  # 1, 16, 31 and 77 are between measurements; going back does nothing
        paused.advance(stop)
    whole.advance(77)
    assert paused.step == whole.step == 77
    assert paused.curve() == whole.curve() and same(weights(paused), weights(whole))
    assert paused.curve()["step"] == [float(s) for s in measuring_steps(STEPS) if s < 77] + [77.0]
    paused.advance(STEPS)
    whole.advance(STEPS)
    assert paused.curve() == whole.curve() and paused.test() == whole.test()


def test_curves_have_the_fixed_columns_and_efolds_add_up():
    trial = Trial(tiny(momentum=0.5, schedule="cosine"))
    trial.advance(STEPS)
    curve = trial.curve()
    assert tuple(curve) == COLUMNS and len({len(values) for values in curve.values()}) == 1
    shape = by_name("cosine", STEPS)
    total = sum(0.1 * shape(step) * 0.01 / 0.5 for step in range(STEPS))
    assert curve["efolds"][-1] == pytest.approx(total, rel=1e-9)
    assert curve["lr"][-1] == pytest.approx(0.1 * shape(STEPS - 1))
    assert curve["validation_accuracy"][-1] > 0.8 and curve["validation_loss"][-1] < curve["validation_loss"][0]


def test_every_measurement_is_reported():
    trial, reported = Trial(tiny()), []
    trial.advance(50, reported.append)
    assert [row["step"] for row in reported] == trial.curve()["step"]
    assert reported[-1]["validation_loss"] == trial.curve()["validation_loss"][-1]


def test_a_constant_rule_keeps_the_decay():
    trial = Trial(tiny())
    trial.advance(STEPS)
    assert set(trial.curve()["weight_decay"]) == {0.01}


@pytest.mark.parametrize("rule", WEIGHT_DECAY_NAMES)
def test_a_schedule_as_rule_moves_the_decay(rule: str):
    trial = Trial(tiny(rule=rule, schedule="linear"))
    trial.advance(STEPS)
    shape = by_name(rule, STEPS, lr_schedule=by_name("linear", STEPS))
    curve = trial.curve()
    assert curve["weight_decay"] == pytest.approx([0.01 * shape(int(step) - 1) for step in curve["step"]], rel=1e-9)


def test_autol2_starts_at_the_given_decay_and_never_raises_it():
    trial = Trial(tiny(rule="autol2", weight_decay=0.1, steps=400))
    trial.advance(400)
    used = trial.curve()["weight_decay"]
    assert used[0] == pytest.approx(0.1) and used == sorted(used, reverse=True) and used[-1] < 0.1


def test_seeds_change_weights_and_batches_but_not_the_data():
    one, two = Trial(tiny(seed=1)), Trial(tiny(seed=2))
    assert not same(weights(one), weights(two))
    assert torch.equal(one.split.train[0], two.split.train[0])
    assert not torch.equal(next(one.batches)[1], next(two.batches)[1])


def test_hooks_of_the_caller_are_called():
    class Counting(Hook):
        calls = 0

        def on_step(self, step: int, context: Any) -> None:
            self.calls += 1

    hook = Counting()
    Trial(tiny(), hooks=[hook]).advance(7)
    assert hook.calls == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_deacy": 0.1}, "unknown run setting 'weight_deacy'; did you mean 'weight_decay'"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"rule": "autol"}, "unknown weight decay rule 'autol'; did you mean 'autol2'"),
        ({"schedule": "cosin"}, "unknown .*schedule 'cosin'; did you mean 'cosine'"),
        ({"schedule": "cosine_up"}, "'cosine_up' is a schedule of the weight decay, not of the learning rate"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"model": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"train_size": 10**6}, "digits has 1400 samples"),
    ],
    ids=str,
)
def test_settings_are_checked(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Trial(tiny(**changes))


def test_optimizers_get_their_settings():
    parameter = torch.nn.Parameter(torch.ones(1))
    sgd = make_optimizer({**DEFAULTS, "momentum": 0.9, "weight_decay": 0.3}, [parameter])
    adamw = make_optimizer({**DEFAULTS, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.3}, [parameter])
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.9
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["lr"] == 0.01
    assert sgd.param_groups[0]["weight_decay"] == adamw.param_groups[0]["weight_decay"] == 0.3


def test_a_run_ends_in_a_row_with_test_data():
    row = train_run(tiny(stop=40))
    assert row.status == "done" and row.reason == "" and row.run == tiny(stop=40)
    assert row.curve["step"][-1] == 40.0
    assert set(row.final) == {"test_loss", "test_accuracy"} and 0 <= row.final["test_accuracy"] <= 1
    assert row.seconds > 0 and row.provenance["torch"] == torch.__version__
    assert train_run(tiny(stop=40)).curve == row.curve


def test_a_diverging_run_is_a_failed_row_with_the_curve_so_far():
    run = tiny(lr=0.5, weight_decay=200.0)
    with pytest.raises(DivergedError, match="the training loss is (nan|inf) at step"):
        Trial(run).advance(STEPS)
    row = train_run(run)
    assert row.status == "failed" and row.reason.startswith("DivergedError: the training loss is ")
    assert row.final == {} and 0 < len(row.curve["step"]) < len(measuring_steps(STEPS))
    assert all(math.isfinite(value) for value in row.curve["train_loss"])


def test_a_trained_network_without_a_finite_test_loss_is_a_failed_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trial, "test", lambda self: {"test_loss": math.nan, "test_accuracy": 0.1})
    row = train_run(tiny(stop=3))
    assert row.status == "failed" and "the trained network's test loss is not finite" in row.reason


def test_a_decay_schedule_resumes_from_its_state():
    run = Run(
        config={
            "data": "digits",
            "train_size": 64,
            "model": "mlp-8x1",
            "steps": 40,
            "rule": "cosine",
            "weight_decay": 0.1,
        }
    )
    first, second = Trial(run), Trial(run)
    first.advance(20)
    second.hooks[0].load_state_dict(first.hooks[0].state_dict())
    assert second.optimizer.param_groups[0]["weight_decay"] == first.optimizer.param_groups[0]["weight_decay"] < 0.1
