"""The hand-written network and SGD of the figures against autograd and torch.optim, and its rows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from decaycast.core.experiment import Run
from decaycast.core.measure import COLUMNS
from decaycast.methods.l2.figures import fc


def problem(count: int = 24, features: int = 6, classes: int = 4) -> Any:
    generator = torch.Generator().manual_seed(3)

    def part(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(size, 1, 2, features // 2, generator=generator)
        return inputs, (inputs.flatten(1)[:, :classes].argmax(1))

    return SimpleNamespace(train=part(count), validation=part(50), test=part(60), classes=classes)


def run(seed: int = 0, **changes: Any) -> Run:
    config = {
        "model": "mlp-16x2",
        "init_gain": 1.5,
        "lr": 0.1,
        "weight_decay": 0.02,
        "steps": 120,
        "batch_size": 8,
        "points": 20,
    }
    return Run(config={**config, **changes}, seed=seed)


def as_torch(layers: fc.Layers) -> torch.nn.Sequential:
    modules: list[torch.nn.Module] = []
    for weight, bias in layers:
        linear = torch.nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.t().clone(), bias.clone()
        modules += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("model", ["mlp-5x1", "mlp-7x3"])
def test_steps_are_those_of_autograd_and_torchs_sgd(model: str):
    layers = [(w.double(), b.double() + 0.1) for w, b in fc.start(model, 6, 4, gain=2.0, seed=1)]
    net = as_torch(layers)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, weight_decay=0.07)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        inputs = torch.randn(9, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 4, (9,), generator=generator)
        scores = fc.step(layers, inputs, functional.one_hot(labels, 4).double(), lr=0.3, shrink=1 - 0.3 * 0.07)
        output = net(inputs)
        assert torch.allclose(scores, output.detach(), rtol=1e-12, atol=1e-12)
        optimizer.zero_grad()
        functional.cross_entropy(output, labels).backward()
        optimizer.step()
    inputs, labels = torch.randn(9, 6, generator=generator, dtype=torch.float64), torch.randint(0, 4, (9,))
    loss, accuracy = fc.evaluate(layers, inputs, labels)
    assert loss == pytest.approx(functional.cross_entropy(net(inputs), labels).item(), rel=1e-11)
    assert accuracy == pytest.approx((net(inputs).argmax(1) == labels).double().mean().item(), rel=1e-12)


def test_a_run_equals_one_with_a_module_and_the_labs_order_of_batches():
    from decaycast.lab.data import batches

    data, planned = problem(), run(points=5)
    row = fc.train_fc(planned, data)
    net = as_torch(fc.start("mlp-16x2", 6, 4, gain=1.5, seed=0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.02)
    stream = batches(data.train[0].flatten(1), data.train[1], 8, 0)
    losses = {}
    for made in range(1, 121):
        inputs, labels = next(stream)
        loss = functional.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[made] = functional.cross_entropy(net(data.validation[0].flatten(1)), data.validation[1]).item()
    assert row.curve["step"] == [2, 4, 12, 38, 120]
    assert row.curve["validation_loss"] == pytest.approx([losses[int(step)] for step in row.curve["step"]], rel=1e-4)
    assert row.final["test_loss"] == pytest.approx(
        functional.cross_entropy(net(data.test[0].flatten(1)), data.test[1]).item(), rel=1e-4
    )


def test_rows_have_the_fixed_columns_and_their_efolds():
    row = fc.train_fc(run(), problem())
    assert row.status == "done" and tuple(row.curve) == COLUMNS and row.seconds > 0
    assert row.curve["efolds"] == pytest.approx([0.1 * 0.02 * step for step in row.curve["step"]])
    assert row.curve["step"][-1] == 120 and set(row.curve["weight_decay"]) == {0.02}
    assert row.curve["validation_accuracy"][-1] > row.curve["validation_accuracy"][0]


def test_the_seed_decides_and_the_full_batch_has_no_order():
    data = problem()
    assert fc.train_fc(run(), data).curve == fc.train_fc(run(), data).curve
    assert fc.train_fc(run(seed=1), data).curve != fc.train_fc(run(), data).curve
    full = fc.train_fc(run(batch_size=24, steps=1, points=2), data)
    layers = fc.start("mlp-16x2", 6, 4, gain=1.5, seed=0)
    assert full.curve["train_loss"][0] == pytest.approx(fc.evaluate(layers, data.train[0].flatten(1), data.train[1])[0])


def test_a_run_that_diverges_is_a_failed_row_with_what_was_measured():
    row = fc.train_fc(run(lr=30.0, weight_decay=0.5), problem())
    assert row.status == "failed" and "a loss is not finite at step" in row.reason and row.final == {}
    assert all(math.isfinite(value) for column in row.curve.values() for value in column)


def test_starts_have_the_gain_and_biases_of_zero():
    layers = fc.start("mlp-400x2", 300, 10, gain=2.0, seed=0)
    assert [tuple(weight.shape) for weight, _ in layers] == [(300, 400), (400, 400), (400, 10)]
    for weight, bias in layers[:2]:
        # 120,000 and 160,000 numbers: their standard deviation is known to 1/sqrt(2n), here 0.2 %
        assert weight.std().item() == pytest.approx(2 * math.sqrt(2 / len(weight)), rel=0.01) and not bias.any()


@pytest.mark.parametrize("model", ["cnn-8", "mlp", "mlp-8", "mlp-8x2-bn"])
def test_other_networks_are_refused(model: str):
    with pytest.raises(
        ValueError, match=f"trains fully connected networks, got model '{model}'; name one like mlp-128x3"
    ):
        fc.train_fc(run(model=model), problem())


def test_measuring_is_even_in_the_logarithm_and_the_same_in_efolds():
    assert fc.geometric_steps(100, 3) == [1, 10, 100]
    long, short = fc.geometric_steps(100_000, 60), fc.geometric_steps(10_000, 60)
    assert np.array(short) / 10_000 == pytest.approx(np.array(long) / 100_000, abs=1e-4)
    assert len(fc.geometric_steps(50, 100)) <= 50 and fc.geometric_steps(50, 100)[0] >= 1
