"""The log of e-folds: against the closed form, into each real logger, and what a missing or wrong framework says."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import decaycast as dc
from decaycast.adapters import loggers, loss_as_error, require
from decaycast.adapters.schedules import rates_ahead
from decaycast.core.hook import StepContext
from decaycast.core.schedule import linear

KEYS = {"reg/weight_decay", "reg/efolds", "reg/tau"}


def sgd(weight_decay: float = 0.3, lr: float = 0.1, momentum: float = 0.0) -> torch.optim.SGD:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": weight_decay},
        {"params": [torch.nn.Parameter(torch.ones(1))], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def run(log: Any, steps: int = 20, every: int = 5, optimizer: Any = None) -> None:
    optimizer = optimizer or sgd()
    reg, scheduler = loggers.DecayLog(log, steps, every), dc.WeightDecayScheduler(optimizer, linear(steps))
    for _ in range(steps):
        reg.step(optimizer)
        optimizer.step()
        scheduler.step()


def test_the_numbers_are_those_of_the_closed_form():
    rows: list[tuple[int, Any]] = []
    run(lambda step, values: rows.append((step, dict(values))), optimizer=sgd(momentum=0.5))
    assert [step for step, _ in rows] == [0, 5, 10, 15, 19]
    fn = linear(20)
    for step, values in rows:
        rate = 0.1 * 0.3 * fn(step) / 0.5
        spent = dc.efolds(lr=lambda t: 0.1 * fn(t), weight_decay=0.3, steps=step, momentum=0.5) if step else 0.0
        assert values == pytest.approx(
            {"reg/weight_decay": 0.3 * fn(step), "reg/efolds": spent, "reg/tau": 1 / (rate * 20)}
        )


@given(st.floats(1e-3, 1.0), st.integers(1, 30))
def test_at_a_constant_rate_tau_is_one_over_the_efolds(weight_decay: float, steps: int):
    rows: list[Any] = []
    optimizer, reg = sgd(weight_decay), loggers.DecayLog(lambda step, values: rows.append(values), steps)
    for _ in range(steps):
        reg.step(optimizer)
    assert rows[-1]["reg/tau"] == pytest.approx(1 / reg.efolds)
    assert reg.efolds == pytest.approx(dc.efolds(lr=0.1, weight_decay=weight_decay, steps=steps))


def test_what_has_no_value_is_left_out():
    rows: list[Any] = []
    for optimizer in (sgd(0.0), torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], weight_decay=0.1)):
        loggers.DecayLog(lambda step, values: rows.append(dict(values)), 5).step(optimizer)
    assert rows == [{"reg/weight_decay": 0.0, "reg/efolds": 0.0}, {"reg/weight_decay": 0.1}]


def test_it_is_a_hook_and_resumes():
    rows: list[Any] = []
    optimizer = sgd()
    nothing = torch.empty(0)
    context = StepContext(loss=nothing, output=nothing, target=nothing, optimizer=optimizer)
    first = loggers.DecayLog(lambda step, values: rows.append((step, values)), 8, every=2)
    for step in range(3):
        first.on_step(step, context)
    again = loggers.DecayLog(lambda step, values: rows.append((step, values)), 8, every=2)
    again.load_state_dict(first.state_dict())
    for step in range(3, 8):
        again.on_step(step, context)
    assert [step for step, _ in rows] == [0, 2, 4, 6, 7]
    assert [values["reg/efolds"] for _, values in rows] == pytest.approx([0.03 * step for step in (0, 2, 4, 6, 7)])


def test_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'decaycast[loggers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        run(loggers.tensorboard(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == KEYS
    found = [(event.step, event.value) for event in events.Scalars("reg/weight_decay")]
    assert found == [(step, pytest.approx(0.3 * (1 - step / 20))) for step in (0, 5, 10, 15, 19)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more than the client
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'decaycast[loggers]'")
    mlflow.set_tracking_uri(f"file:{tmp_path}/runs")
    with mlflow.start_run() as active:
        run(loggers.mlflow())
    other = mlflow.MlflowClient().create_run(active.info.experiment_id).info.run_id
    run(loggers.mlflow(other))
    for run_id in (active.info.run_id, other):
        history = mlflow.MlflowClient().get_metric_history(run_id, "reg/efolds")
        assert [metric.step for metric in history] == [0, 5, 10, 15, 19]
        assert history[-1].value == pytest.approx(
            dc.efolds(lr=lambda t: 0.1 * (1 - t / 20), weight_decay=0.3, steps=19)
        )


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed: pip install 'decaycast[loggers]'")
    started = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    seen = []
    real = started.log
    monkeypatch.setattr(
        started, "log", lambda values, **settings: (seen.append((values, settings)), real(values, **settings))
    )
    started.log({"loss": 1.0}, step=7)  # another logger's own steps are no obstacle
    run(loggers.wandb(started))
    assert set(started.summary.keys()) >= {*KEYS, "reg/step"}
    assert started.summary["reg/step"] == 19
    started.finish()
    assert [values["reg/step"] for values, settings in seen[1:] if not settings] == [0, 5, 10, 15, 19]


def test_wandb_by_its_protocol():
    calls: list[Any] = []

    class Started:
        def define_metric(self, *names: str, **settings: Any) -> None:
            calls.append((names, settings))

        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

    run(loggers.wandb(Started()), steps=2, every=1)
    assert calls[:2] == [(("reg/step",), {"hidden": True}), (("reg/*",), {"step_metric": "reg/step"})]
    assert [values["reg/step"] for values in calls[2:]] == [0, 1] and set(calls[2]) == {*KEYS, "reg/step"}


# refused


def test_what_is_no_logger_is_refused():
    with pytest.raises(
        TypeError, match="expected a SummaryWriter of torch.utils.tensorboard, got str, which has no add_scalar"
    ):
        loggers.tensorboard("runs")
    with pytest.raises(TypeError, match=r"expected a run, as wandb.init\(\) returns it, got str, which has no log"):
        loggers.wandb("project")
    with pytest.raises(TypeError, match=r"log must be a function of \(step, values\), got str"):
        loggers.DecayLog("log", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_steps must be a whole number >= 1, got 0"):
        loggers.DecayLog(print, 0)
    with pytest.raises(ValueError, match=r"no state of DecayLog: missing \['efolds'\]"):
        loggers.DecayLog(print, 5).load_state_dict({"steps": 1})


# missing and unsupported packages


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("decaycast.adapters.version", version)


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch)
    with pytest.raises(
        ImportError, match=r"needs mlflow-skinny or mlflow, which is not installed: pip install 'decaycast\[loggers\]'"
    ):
        loggers.mlflow()


ADAPTERS = {
    "lightning": ("lightning_base", "lightning or pytorch-lightning"),
    "hf": ("huggingface_base", "transformers"),
    "accelerate": ("accelerate", "accelerate"),
    "torchmetrics": ("torchmetrics", "torchmetrics"),
}


@pytest.mark.parametrize("extra", ADAPTERS)
def test_every_adapter_says_what_to_install(monkeypatch: pytest.MonkeyPatch, extra: str):
    module, wanted = ADAPTERS[extra]
    pretend(monkeypatch)
    monkeypatch.delitem(sys.modules, f"decaycast.adapters.{module}", raising=False)
    with pytest.raises(
        ImportError, match=rf"needs {wanted}, which is not installed: pip install 'decaycast\[{extra}\]'"
    ):
        importlib.import_module(f"decaycast.adapters.{module}")


@pytest.mark.parametrize(
    ("extra", "versions", "says"),
    [
        (
            "lightning",
            {"lightning": "2.6.2"},
            r"lightning 2.6.2 is installed, and this adapter works with lightning>=2.5,!=2.6.2",
        ),
        (
            "lightning",
            {"pytorch-lightning": "1.9.5"},
            r"pytorch-lightning 1.9.5 is installed, .* pytorch-lightning>=2.5",
        ),
        (
            "hf",
            {"transformers": "4.57.1"},
            r"transformers 4.57.1 is installed, and this adapter works with transformers>=5.0,<6",
        ),
        (
            "accelerate",
            {"accelerate": "0.34.0"},
            "accelerate 0.34.0 is installed, and this adapter works with accelerate>=",
        ),
        ("torchmetrics", {"torchmetrics": "2.0.0"}, "torchmetrics 2.0.0 is installed, .* torchmetrics>="),
    ],
)
def test_an_unsupported_version_names_the_range(monkeypatch: pytest.MonkeyPatch, extra: str, versions: Any, says: str):
    pretend(monkeypatch, **versions)
    monkeypatch.delitem(sys.modules, f"decaycast.adapters.{ADAPTERS[extra][0]}", raising=False)
    with pytest.raises(ImportError, match=says):
        importlib.import_module(f"decaycast.adapters.{ADAPTERS[extra][0]}")


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch):
    for found in ("2.10.0", "2.9", "2.9.1+cpu", "2.9.0rc1"):
        pretend(monkeypatch, some=found)
        assert require("x", some=">=2.9,<3,!=2.9.5") == "some"
    for found in ("2.8.9", "3.0", "2.9.5"):
        pretend(monkeypatch, some=found)
        with pytest.raises(ImportError, match="some .* is installed"):
            require("x", some=">=2.9,<3,!=2.9.5")


# what adapters share


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_loss_as_error_rises_with_the_loss(one: float, other: float):
    errors = [float(loss_as_error(torch.tensor(value, dtype=torch.float64))) for value in (one, other)]
    assert all(0 <= error <= 1 for error in errors)
    assert (errors[0] <= errors[1]) == (one <= other) or abs(one - other) < 1e-3


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "LambdaLR", "CosineAnnealingWarmRestarts"])
def test_rates_ahead_are_those_that_come_and_nothing_is_moved(name: str, every: int):
    from torch.optim import lr_scheduler

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.02}],
            lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9, weight_decay=0.1,
        )  # fmt: skip
        kinds = {
            "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
            "SequentialLR": lambda: lr_scheduler.SequentialLR(
                optimizer, [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.CosineAnnealingLR(optimizer, 10)], [3]
            ),
            "LambdaLR": lambda: lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
            "CosineAnnealingWarmRestarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        }
        return optimizer, kinds[name]()

    optimizer, scheduler = make()
    ahead = rates_ahead(optimizer, scheduler, 20, every)
    by_hand, expected = make(), []
    for step in range(20):
        expected.append([float(group["lr"]) for group in by_hand[0].param_groups])
        by_hand[0].step()
        if (step + 1) % every == 0 and step < 19:
            by_hand[1].step()
    assert ahead == pytest.approx(np.array(expected))
    fresh, other = make()
    for group, untouched in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in untouched.items() if k != "params"
        }
    assert scheduler.last_epoch == other.last_epoch


def test_a_plateau_cannot_be_foreseen():
    optimizer = sgd()
    assert rates_ahead(optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), 5) is None
    constant = rates_ahead(optimizer, None, 5)
    assert constant is not None and constant.tolist() == [[0.1, 0.1]] * 5
