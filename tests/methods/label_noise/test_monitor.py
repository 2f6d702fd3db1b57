from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from decaycast.core.curvature import Curvature
from decaycast.core.hook import StepContext, chain
from decaycast.core.train import train
from decaycast.methods.label_noise import monitor as module
from decaycast.methods.label_noise.method import LabelNoise
from decaycast.methods.label_noise.monitor import COLUMNS, CurvatureMonitor
from decaycast.methods.label_noise.theory import regularizer

loss_fn = nn.functional.cross_entropy


def problem(width: int = 4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    return model, x, (x[:, 0] > 0).long()


def run(model, x, y, hook, steps: int = 25, lr: float = 0.2, momentum: float = 0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    hooks = [hook] if hook else []
    train(model, iter([(x, y)] * steps), loss_fn, optimizer, stop=steps, hooks=hooks)
    return optimizer


def test_rows_are_the_dense_matrix_at_the_weights_before_the_update():
    model, x, y = problem()
    start = copy.deepcopy(model)
    monitor = CurvatureMonitor([(x, y)], loss_fn, every=10, relative_error=0.01)
    model = monitor.prepare(model)
    run(model, x, y, monitor)
    assert [row["step"] for row in monitor.rows] == [0, 10, 20]
    assert all(tuple(row) == COLUMNS for row in monitor.rows)
    for row in monitor.rows:
        again = copy.deepcopy(start)
        run(again, x, y, None, steps=int(row["step"]))
        values = torch.linalg.eigvalsh(Curvature(again, loss_fn, [(x, y)], "ggn").dense())
        assert row["trace"] == pytest.approx(float(values.sum())) and row["trace_stderr"] == 0
        assert row["top_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-3)
        assert row["top_residual"] <= 0.01 * row["top_eigenvalue"]
        assert row["regularizer"] == pytest.approx(float(regularizer(values, 0.2, 0.5)))
        assert (row["lr"], row["momentum"]) == (0.2, 0.5)
        assert row["share_of_limit"] == pytest.approx(0.2 * float(values[-1]) / 3, rel=1e-3)
        assert row["seconds"] > 0 and row["products"] >= 2 * Curvature(model, loss_fn, [(x, y)]).size


def test_estimates_of_a_larger_network_are_within_their_errors():
    model, x, y = problem(width=60)
    monitor = CurvatureMonitor([(x[:10], y[:10]), (x[10:], y[10:])], loss_fn, every=1, matrix="hessian", seed=3)
    row = monitor.measure(0, run(monitor.prepare(model), x, y, None))
    values = torch.linalg.eigvalsh(Curvature(model, loss_fn, [(x, y)]).dense())
    assert 0 < row["trace_stderr"] <= 0.1 * row["trace"]
    assert abs(row["trace"] - float(values.sum())) < 4 * row["trace_stderr"]
    assert 0 < row["regularizer_stderr"] <= 0.1 * row["regularizer"]
    assert abs(row["regularizer"] - float(regularizer(values, 0.2, 0.5))) < 4 * row["regularizer_stderr"] + 1e-3
    assert row["products"] < len(values)


def test_training_goes_on_as_if_nobody_looked():
    found = []
    for hook in (None, CurvatureMonitor([problem()[1:]], loss_fn, every=3)):
        model, x, y = problem(width=20)
        if hook:
            model = hook.prepare(model)
        noise = LabelNoise(flip=0.2, num_classes=2)
        run(model, x, y, chain(noise, hook) if hook else noise)
        found.append((copy.deepcopy(model.state_dict()), torch.rand(3)))
        assert model.training
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_the_same_rows_again_and_after_a_restart():
    def monitored(stop: int, start: int = 0, state=None, model=None):
        fresh, x, y = problem(width=60)
        monitor = CurvatureMonitor([(x, y)], loss_fn, every=4, seed=5)
        model = monitor.prepare(model or fresh)
        if state:
            monitor.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        train(model, iter([(x, y)] * 20), loss_fn, optimizer, start=start, stop=stop, hooks=[monitor])
        return monitor, model

    def numbers(monitor):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in monitor.rows]

    whole, again = monitored(12)[0], monitored(12)[0]
    first, model = monitored(6)
    second, _ = monitored(12, 6, first.state_dict(), model)
    assert numbers(whole) == numbers(again) == numbers(second) and len(whole.rows) == 3
    state = second.state_dict()
    assert state["training_seconds"] > first.state_dict()["training_seconds"] > 0
    assert state["measuring_seconds"] == pytest.approx(sum(row["seconds"] for row in second.rows))
    with pytest.raises(ValueError, match="CurvatureMonitor"):
        second.load_state_dict({"rows": []})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(monkeypatch: pytest.MonkeyPatch, cost, steps: int, share: float = 0.05) -> CurvatureMonitor:
    """Steps of one second, measurements of cost(number) seconds."""
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)

    def fill(self, row, generator):
        clock.now += cost(len(self.rows))

    monkeypatch.setattr(CurvatureMonitor, "_fill", fill)
    monitor = CurvatureMonitor([], loss_fn, share=share)
    model = monitor.prepare(nn.Linear(1, 1))
    context = StepContext(
        loss=torch.zeros(()),
        output=torch.zeros(1),
        target=torch.zeros(1),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    for step in range(steps):
        monitor.on_step(step, context)
        clock.now += 1.0
    return monitor


def test_without_a_cadence_it_keeps_to_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch):
    monitor = paced(monkeypatch, lambda _: 2.0, steps=1000)
    assert [row["step"] for row in monitor.rows[:4]] == [0, 80, 120, 160]  # 4 s are 5 % of 80 s
    assert sum(row["seconds"] for row in monitor.rows) == pytest.approx(0.05 * 1000, abs=2.1)
    assert monitor.cost() == "curvature: 24 measurements of 0 products took 48.00 s beside 999.00 s of training (4.8 %)"


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_nor_does_a_measurement_that_grows_dearer_break_it(share: float, monkeypatch: pytest.MonkeyPatch):
    monitor = paced(monkeypatch, lambda number: 0.5 * 1.05**number, steps=3000, share=share)
    spent = sum(row["seconds"] for row in monitor.rows)
    assert len(monitor.rows) > 5
    assert 0.9 * share * 3000 - monitor.rows[-1]["seconds"] * 1.1 < spent <= 1.06 * share * 3000


@pytest.mark.parametrize("share", [0.001, 0.03, 0.06])
def test_far_below_the_limit_the_trace_is_enough_for_r(share: float):
    model, x, y = problem()
    values = torch.linalg.eigvalsh(Curvature(model, loss_fn, [(x, y)], "ggn").dense())
    monitor = CurvatureMonitor([(x, y)], loss_fn, every=1)
    lr = 2 * share / float(values[-1])
    row = monitor.measure(0, torch.optim.SGD(monitor.prepare(model).parameters(), lr=lr))
    size = len(values)
    assert (row["products"] < 2 * size) == (share < 0.04)  # no products of its own
    assert row["regularizer"] == pytest.approx(float(regularizer(values, lr)), rel=0.01)


def test_beyond_stability_and_with_other_optimisers():
    model, x, y = problem()
    monitor = CurvatureMonitor([(x, y)], loss_fn, every=1)
    parameters = list(monitor.prepare(model).parameters())
    sgd = torch.optim.SGD
    row = monitor.measure(0, sgd(parameters, lr=1e4))
    assert row["regularizer"] == math.inf and row["share_of_limit"] > 1 and math.isnan(row["regularizer_stderr"])
    for optimizer in (
        torch.optim.Adam(parameters, lr=0.1),
        sgd(parameters, lr=0.1, momentum=0.9, nesterov=True),
        sgd(parameters, lr=0.1, momentum=0.9, dampening=0.1),
        sgd([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.2}]),
        sgd([{"params": parameters[:1], "momentum": 0.1}, {"params": parameters[1:]}], lr=0.1),
    ):
        row = monitor.measure(1, optimizer)
        assert math.isnan(row["regularizer"]) and math.isnan(row["share_of_limit"])
        assert row["trace"] > 0 and row["top_eigenvalue"] > 0
    cheap = CurvatureMonitor([(x, y)], loss_fn, every=1, with_regularizer=False)
    cheap.prepare(model)
    row = cheap.measure(1, sgd(parameters, lr=0.1))
    assert math.isnan(row["regularizer"]) and 0 < row["share_of_limit"] < 1
    assert math.isnan(monitor.measure(2, sgd(parameters, lr=0.0))["regularizer"])  # the end of a schedule


def test_a_network_that_has_diverged_is_a_row_of_nan():
    model, x, y = problem()
    monitor = CurvatureMonitor([(x, y)], loss_fn, every=1)
    monitor.prepare(model)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    row = monitor.measure(7, torch.optim.SGD(model.parameters(), lr=0.1))
    assert row["step"] == 7 and math.isnan(row["trace"]) and math.isnan(row["top_eigenvalue"])


def test_other_ranks_than_the_first_leave_it_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    model, x, y = problem()
    monitor = CurvatureMonitor([(x, y)], loss_fn, every=1)
    run(monitor.prepare(model), x, y, monitor, steps=2)
    assert monitor.rows == []
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    run(model, x, y, monitor, steps=2)
    assert len(monitor.rows) == 2


def test_bad_input():
    model, x, y = problem()
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="every"):
            CurvatureMonitor([(x, y)], loss_fn, every=wrong)  # type: ignore[arg-type]
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="share is of the training's time and has to be in \\(0, 1\\), got"):
            CurvatureMonitor([(x, y)], loss_fn, share=wrong)
    with pytest.raises(ValueError, match="relative_error has to be positive, got 0"):
        CurvatureMonitor([(x, y)], loss_fn, relative_error=0)
    with pytest.raises(ValueError, match="matrix"):
        CurvatureMonitor([(x, y)], loss_fn, matrix="fisher")
    monitor = CurvatureMonitor([], loss_fn)
    with pytest.raises(RuntimeError, match="does not know the model; call prepare\\(model\\) before training"):
        monitor.measure(0, torch.optim.SGD(model.parameters(), lr=0.1))
    assert monitor.cost() == "curvature: 0 measurements of 0 products took 0.00 s beside 0.00 s of training"
    monitor.prepare(model)
    with pytest.raises(ValueError, match="batches is empty"):
        monitor.measure(0, torch.optim.SGD(model.parameters(), lr=0.1))
