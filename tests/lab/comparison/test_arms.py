"""Each arm of a comparison is what its method says: against the lab's usual training, or a loop written here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from tests.lab.comparison.compared_models import (
    blobs,
    normed,
)
from torch import nn

from decaycast.core.experiment import Row, Run
from decaycast.core.measure import evaluate, measuring_steps
from decaycast.core.schedule import lr_by_name, step_decay
from decaycast.core.train import train
from decaycast.lab import data
from decaycast.lab.compare import POINTS
from decaycast.lab.comparison import train as compare_train
from decaycast.lab.comparison.arms import settings_of
from decaycast.lab.comparison.task import Task, task
from decaycast.lab.comparison.train import STUDENT, train_arm
from decaycast.lab.trial import Trial
from decaycast.methods.label_noise.method import LabelNoise
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.large_lr.noise import NoiseSchedule
from decaycast.methods.stochnorm.method import StochNorm

STEPS = 40
SHARED: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "schedule": "cosine",
    "steps": STEPS,
    "batch_size": 32,
    "points": POINTS,
}
DIGITS: dict[str, Any] = {"data": "digits", "train_size": 1200, "model": "mlp-12x1", **SHARED}


def arm_run(arm: str, seed: int = 0, **changes: Any) -> Run:
    settings = settings_of(arm, {}, optimizer="sgd", schedule="cosine")
    return Run(config={"experiment": "compare", "arm": arm, **settings, **DIGITS, **changes}, seed=seed)


def digits_task(model: str = "mlp-12x1") -> Task:
    return task(model, "digits", train_size=1200)


def trained(arm: str, seed: int = 0, model: str = "mlp-12x1", **changes: Any) -> Row:
    row = train_arm(arm_run(arm, seed, model=model, **changes), task=digits_task(model))
    assert row.status == "done", row.reason
    return row


def trial(seed: int = 0, model: str = "mlp-12x1", hooks: Sequence[Any] = (), **changes: Any) -> Trial:
    """The lab's own training of the same thing, not yet begun."""
    torch.manual_seed(seed)
    return Trial(Run(config={**DIGITS, "model": model, **changes}, seed=seed), hooks=hooks)


def same(row: Row, own: Trial) -> None:
    own.advance(STEPS)
    for name, values in own.curve().items():
        assert row.curve[name] == pytest.approx(values, rel=1e-12, nan_ok=True), name
    for name, value in own.test().items():
        assert row.final[name] == pytest.approx(value, rel=1e-12)


def test_no_regulariser_is_plain_training():
    row = trained("none", seed=3)
    same(row, trial(seed=3))
    assert row.final["gradients"] == row.final["optimizer_steps"] == STEPS == row.curve["gradients"][-1]
    assert row.final["efolds"] == 0 and 0 < row.final["train_seconds"] < row.seconds


def test_weight_decay_and_autol2_are_the_labs_own():
    row = trained("weight-decay")
    same(row, trial(weight_decay=5e-4))
    assert row.final["efolds"] > 0 and row.run.config["weight_decay"] == 5e-4
    same(trained("autol2"), trial(rule="autol2-efolds"))
    constant = train_arm(arm_run("autol2", clock="steps", schedule="constant"), task=digits_task())
    same(constant, trial(rule="autol2", weight_decay=0.1, schedule="constant"))


def test_label_noise_flips_the_batches_of_plain_training():
    torch.manual_seed(1)
    noise = LabelNoise(0.2, 10)
    same(trained("label-noise", seed=1), trial(seed=1, hooks=[noise]))
    assert trained("label-noise", seed=1).curve["train_loss"] != trained("none", seed=1).curve["train_loss"]


def test_activation_noise_stands_in_the_network_until_half_way():
    own = trial(seed=2)
    insert_activation_noise(own.model, 0.4, report=None)
    own.hooks.append(NoiseSchedule(own.model, step_decay(STEPS, milestones=(0.5,), factor=0.0)))
    torch.manual_seed(2)
    same(trained("activation-noise", seed=2), own)
    assert own.model[2].activation_noise.std == 0  # type: ignore[union-attr,index]


def test_stochnorm_replaces_batch_norm():
    own = trial(seed=2, model="wrn-10-1")
    StochNorm.convert(own.model, p=0.5, report=None)
    torch.manual_seed(2)
    same(trained("stochnorm", seed=2, model="wrn-10-1"), own)


def by_hand(seed: int, steps: int, loss_fn: Any, target: torch.Tensor | None = None) -> nn.Module:
    """Training without the parts of a comparison."""
    own = trial(seed=seed)
    inputs, labels = own.split.train
    batches = data.batches(inputs, labels if target is None else target, 32, seed)
    train(own.model, batches, loss_fn, own.optimizer, stop=steps, lr_schedule=lr_by_name("cosine", steps))
    return own.model


def on_test(model: nn.Module) -> tuple[float, float]:
    return evaluate(model, [digits_task().split().test], functional.cross_entropy)


def test_label_smoothing_is_torchs():
    row = trained("label-smoothing", seed=4)
    model = by_hand(4, STEPS, partial(functional.cross_entropy, label_smoothing=0.1))
    assert (row.final["test_loss"], row.final["test_accuracy"]) == pytest.approx(on_test(model), rel=1e-6)


def test_teacher_and_student_share_the_budget():
    row = trained("self-distillation", seed=1)
    teacher = by_hand(1, STEPS // 2, functional.cross_entropy)
    inputs, labels = digits_task().split().train
    with torch.no_grad():
        soft = 0.1 * functional.one_hot(labels, 10) + 0.9 * torch.softmax(teacher.eval()(inputs) / 2.0, 1)
    student = by_hand(1 + STUDENT, STEPS - STEPS // 2, functional.cross_entropy, soft)
    assert (row.final["test_loss"], row.final["test_accuracy"]) == pytest.approx(on_test(student), rel=1e-5)
    assert row.final["gradients"] == row.final["optimizer_steps"] == STEPS
    assert row.curve["gradients"][-1] == STEPS and row.curve["gradients"] == sorted(row.curve["gradients"])
    odd = trained("self-distillation", steps=41)
    assert odd.final["gradients"] == 41, "an odd step is the student's"


def test_sam_makes_half_the_steps_of_two_gradients():
    row = trained("sam", steps=41)
    assert (row.final["optimizer_steps"], row.final["gradients"]) == (20, 40)
    assert row.curve["gradients"][-1] == 40 and row.curve["step"][-1] == 20
    assert row.curve["lr"][-1] < 0.01 * 0.05 * 2, "the schedule spans the steps that it makes"


def test_a_forecast_pays_for_its_probes():
    row = trained("forecast", steps=130)
    assert row.curve["step"][-1] == 100 and 100 < row.final["gradients"] <= 130
    assert row.curve["gradients"][-1] == row.final["gradients"] and row.final["weight_decay"] > 0


@pytest.mark.parametrize("arm", ["none", "label-noise", "stochnorm", "activation-noise", "self-distillation", "sam"])
def test_a_seed_decides_everything(arm: str):
    work = task(normed, blobs())
    run = Run(config={"arm": arm, **settings_of(arm, {}, optimizer="sgd", schedule="cosine"), **SHARED}, seed=5)
    before = torch.get_rng_state()
    first = train_arm(run, task=work)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second = train_arm(run, task=work)
    torch.set_rng_state(before)
    timeless = {name: value for name, value in first.final.items() if name != "train_seconds"}
    assert first.curve == second.curve and timeless.items() <= second.final.items()


def test_measuring_is_no_arms_time(monkeypatch: pytest.MonkeyPatch):
    def slowly(*arguments: Any) -> tuple[float, float]:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass
        return evaluate(*arguments)

    monkeypatch.setattr(compare_train, "evaluate", slowly)
    row = trained("none")
    assert row.seconds > 0.03 * (POINTS + 1) > 2 * row.final["train_seconds"]


def test_steps_are_measured_where_the_lab_measures():
    row = trained("none")
    assert row.curve["step"] == measuring_steps(STEPS, POINTS)
