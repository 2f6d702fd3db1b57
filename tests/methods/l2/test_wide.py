"""The figure of wide networks: its training and kernel against autograd and infinite width, its judgement on made-up rows."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import functional_call, jacrev

from decaycast.core.experiment import Row, Run
from decaycast.core.kernel import ntk
from decaycast.core.train import DivergedError
from decaycast.lab import data
from decaycast.methods.l2 import theory
from decaycast.methods.l2.figures import wide_net
from decaycast.methods.l2.figures.wide import DECAY, WideNetwork, errors, slope_with_interval
from decaycast.methods.l2.identities import homogeneity

FIGURE = WideNetwork()


class Module(torch.nn.Module):
    """The network of the figure as torch would write it."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Parameter(weight.clone()) for weight in weights)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        gain = (2 / len(self.first)) ** 0.5
        hidden = gain * torch.relu(u @ self.first.T)
        return (gain * torch.relu(hidden @ self.second.T) @ self.third.T)[:, 0]


def small(samples: int = 7, width: int = 12, seed: int = 1) -> tuple[wide_net.Pair, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    x = torch.nn.functional.normalize(torch.randn(samples, 5, generator=generator, dtype=torch.float64))
    pair = wide_net.Pair(inputs=x, labels=torch.where(x[:, 0] > 0, 1.0, -1.0).double())
    return pair, wide_net.initial_weights(5, width, seed, x)


def digits(samples: int | None = 24) -> wide_net.Pair:
    return wide_net.two_classes(data.load("digits", train_size=320).train, 2, 7, samples)


# the network


def test_outputs_and_kernel_are_those_of_the_module():
    pair, weights = small()
    module = Module(weights)
    now, part = wide_net.passes(weights, pair.inputs), wide_net.passes(weights, pair.inputs[:3])
    assert torch.allclose(now.outputs, module(pair.inputs), rtol=1e-13)
    assert homogeneity(module, pair.inputs) == wide_net.DEGREE
    jacobian = jacrev(lambda w: functional_call(module, w, (pair.inputs,)))(dict(module.named_parameters()))
    flat = torch.cat([entry.flatten(1) for entry in jacobian.values()], dim=1)
    assert torch.allclose(wide_net.kernel(now, now), flat @ flat.T, rtol=1e-12)
    assert torch.allclose(wide_net.kernel(part, now), flat[:3] @ flat.T, rtol=1e-12)


def test_its_kernel_is_that_of_infinite_width_at_large_width():
    pair, _ = small()
    drawn = []
    for seed in range(8):
        now = wide_net.passes(wide_net.initial_weights(5, 1000, seed, pair.inputs), pair.inputs)
        drawn.append(wide_net.kernel(now, now))
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 8**0.5
    infinite = ntk(pair.inputs * (5 / 2) ** 0.5, depth=2)  # u_1 = sqrt(2/d)*x
    assert ((mean - infinite).abs() < 5 * spread + 0.005).all()
    assert (spread < 0.06 * infinite.max()).all()


def test_it_descends_as_torch_does():
    pair, weights = small()
    module = Module(weights)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, weight_decay=0.2)
    seen = {step: now.outputs for step, now in wide_net.descend(weights, pair, lr=0.3, weight_decay=0.2, at=[0, 3, 40])}
    assert list(seen) == [0, 3, 40]
    for step in range(41):
        outputs = module(pair.inputs)
        if step in seen:
            assert torch.allclose(seen[step], outputs, rtol=1e-10, atol=1e-12)
        optimizer.zero_grad()
        ((outputs - pair.labels) ** 2).mean().div(2).backward()
        optimizer.step()


def test_every_layer_gains_the_same_norm_from_the_data():
    """d||W||^2/dt = -2*lambda*||W||^2 + (2/n) sum f*(y - f): why the error at infinite width is of order 1/(lambda*width)."""
    pair, weights = small()
    start, lr, decay = copy.deepcopy(weights), 1e-6, 0.2
    *_, (_, _) = wide_net.descend(weights, pair, lr=lr, weight_decay=decay, at=[0])
    f = wide_net.passes(start, pair.inputs).outputs
    gain = float(2 * (f * (pair.labels - f)).mean())
    for before, after in zip(start, weights):
        rate = float(after.square().sum() - before.square().sum()) / lr
        assert rate == pytest.approx(gain - 2 * decay * float(before.square().sum()), rel=1e-4)


def test_the_columns_are_what_they_say():
    pair, weights = small(width=40)
    other = replace(pair, inputs=pair.inputs.flip(0)[:4], labels=pair.labels.flip(0)[:4])
    case = {"width": 40, "seed": 1, "lr": 0.02, "weight_decay": 0.3}
    found = wide_net.compare(pair, other, **case, at=[0, 1, 25, 60])
    assert {len(column) for column in found.values()} == {4}
    assert found["step"] == [0, 1, 25, 60] and found["efolds"] == pytest.approx([0, 0.006, 0.15, 0.36])
    assert found["output_error"][0] < 1e-12 and found["kernel_norm"][0] == 1.0
    assert found["kernel_norm_theory"] == pytest.approx(np.exp(-4 * np.array(found["efolds"])))
    start = wide_net.passes(copy.deepcopy(weights), pair.inputs)
    theta = wide_net.kernel(start, start)
    law = theory.function_evolution(
        [0.0, 0.02, 0.5, 1.2], theta, pair.labels, initial=start.outputs, weight_decay=0.3, homogeneity=3
    )
    *_, (_, last) = wide_net.descend(weights, pair, lr=0.02, weight_decay=0.3, at=[60])
    f, y = last.outputs.numpy(), pair.labels.numpy()
    assert found["output_error"][-1] == pytest.approx(np.linalg.norm(f - law[-1]) / np.linalg.norm(law[-1]))
    assert found["kernel_norm"][-1] == pytest.approx(float(wide_net.kernel(last, last).norm() / theta.norm()))
    assert found["train_loss"][-1] == pytest.approx(((f - y) ** 2).mean() / 2)
    assert found["train_loss_theory"][-1] == pytest.approx(((law[-1] - y) ** 2).mean() / 2)
    assert found["train_accuracy"][-1] == (np.sign(f) == y).mean()
    assert found["validation_accuracy"][-1] == (np.sign(f[::-1][:4]) == y[::-1][:4]).mean()
    # the same points held out: theory through the cross kernel is theory on the training set
    assert found["validation_accuracy_theory"][2] == (np.sign(law[2][::-1][:4]) == y[::-1][:4]).mean()
    vectors = torch.linalg.eigh(theta)[1].numpy()
    first = vectors[:, np.abs(y @ vectors).argmax()]
    assert found["mode_1"][-1] == pytest.approx(float(f @ first * np.sign(y @ first)))
    assert found["mode_1_theory"][-1] == pytest.approx(float(law[-1] @ first * np.sign(y @ first)))


def test_the_modes_shown_carry_most_of_the_labels_and_point_their_way():
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    shares = np.array([0.1, -3.0, 2.0, 0.0, -0.5])
    vectors = wide_net.largest_modes(rotation @ np.diag([5.0, 4.0, 3.0, 2.0, 1.0]) @ rotation.T, rotation @ shares)
    assert (rotation @ shares) @ vectors == pytest.approx([3.0, 2.0, 0.5])
    assert vectors.T @ vectors == pytest.approx(np.eye(3), abs=1e-12)


def test_wider_networks_are_nearer_to_infinite_width():
    case = {"lr": 0.1, "weight_decay": DECAY, "at": range(0, 201, 20)}
    pair = digits()
    means = [
        np.mean([errors(wide_net.compare(pair, pair, width=width, seed=seed, **case))["outputs"] for seed in range(3)])
        for width in (64, 512)
    ]
    assert means[1] < 0.1 and means[0] > 3 * means[1]


# classes


def test_two_classes_are_picked_scaled_and_labelled():
    split = data.load("digits", train_size=320)
    pair = digits(None)
    wanted = [int(c) for c in split.train[1] if c in (2, 7)]
    assert pair.labels.tolist() == [1.0 if c == 7 else -1.0 for c in wanted]
    assert torch.allclose(pair.inputs.norm(dim=1), torch.ones(len(wanted)))
    first = split.train[0][(split.train[1] == 2) | (split.train[1] == 7)][0].flatten()
    assert torch.allclose(pair.inputs[0], first / first.norm())
    assert torch.equal(digits(10).inputs, pair.inputs[:10])
    with pytest.raises(
        ValueError, match="wanted 500 samples of the classes 2 and 7, but the data have .*raise train_size"
    ):
        digits(500)
    with pytest.raises(ValueError, match=r"wanted .* classes 2 and 11, but the data have \d+ and 0"):
        wide_net.two_classes(split.train, 2, 11)


# the figure


def test_every_run_is_one_efold_long_and_names_its_experiment():
    for size in ("smoke", "small", "paper"):
        for run in FIGURE.runs(size):
            config = run.config
            assert config["lr"] * config["weight_decay"] * config["steps"] == pytest.approx(1.0)
            assert config["experiment"] == "wide-network"
    assert {run.seed for run in FIGURE.runs("small") if run.config["width"] == 2048} == {0, 1, 2}


def test_a_run_trains_to_a_row():
    run = FIGURE.runs("smoke")[0]
    split = data.load("digits", train_size=320, validation_size=300)
    row = FIGURE.train(run, split)
    assert row.status == "done" and row.run == run and len(row.curve["step"]) == 51
    assert row.final == errors(row.curve) and row.curve["efolds"][-1] == pytest.approx(1.0)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        FIGURE.train(Run(config={**run.config, "lr": 1e4}), split)


def made_up(width: int, seed: int, kernel: float, outputs: float, lr: float = 0.025, decay: float = DECAY) -> Row:
    config = {"experiment": "wide-network", "width": width, "lr": lr, "weight_decay": decay}
    names = ["train_loss", "validation_accuracy", *(f"mode_{i}" for i in (1, 2, 3))]
    curve = {name + suffix: [0.1, 0.2] for name in names for suffix in ("", "_theory")}
    curve |= {"efolds": [0.0, 1.0], "kernel_norm": [1.0, 0.02]}
    return Row(run=Run(config=config, seed=seed), curve=curve, final={"kernel": kernel, "outputs": outputs})


def sweep(power: float = -1.0, at_widest: float = 0.015, widths: tuple[int, ...] = (512, 1024, 2048)) -> list[Row]:
    rows = []
    for width in widths:
        for seed, factor in enumerate((0.9, 1.0, 1.1)):
            error = at_widest * (width / max(widths)) ** power * factor
            rows.append(made_up(width, seed, error, error / 2))
    return rows


def test_the_claim_holds_when_wide_networks_are_near_and_the_trend_falls():
    verdict = FIGURE.judge([*sweep(), made_up(512, 0, 0.07, 0.04, lr=0.0125), made_up(512, 0, 0.5, 0.5, decay=0.02)])
    assert verdict.outcome == "held"
    assert verdict.numbers["kernel_error_2048"] == pytest.approx(0.015)
    assert verdict.numbers["outputs_error_2048"] == pytest.approx(0.0075)
    assert verdict.numbers["kernel_slope"] == pytest.approx(-1.0)
    assert verdict.numbers["kernel_error_from_step_size_512"] == pytest.approx(0.01)
    assert verdict.numbers["outputs_error_512_decay_0.02_lr_0.025"] == 0.5
    assert "kernel: 1.50% at width 2,048, slope against width -1.00" in verdict.reason


def test_the_claim_does_not_hold_otherwise():
    assert FIGURE.judge(sweep(at_widest=0.031)).outcome == "not held"
    assert FIGURE.judge(sweep(power=0.1)).outcome == "not held"
    far = [made_up(4096, seed, 0.05, 0.001) for seed in range(3)]  # every width from 2,048 on counts
    assert FIGURE.judge(sweep() + far).outcome == "not held"


def test_incomplete_rows_are_not_judged():
    for rows in [[], sweep(widths=(256, 512, 1024)), sweep(widths=(1024, 2048)), sweep()[:-2]]:
        assert FIGURE.judge(rows).outcome == "not enough data"
    failed = [replace(row, status="failed") if row.run.config["width"] == 2048 else row for row in sweep()]
    assert FIGURE.judge(failed).outcome == "not enough data"


def test_the_panels_show_theory_beside_networks():
    panels = FIGURE.draw([*sweep(), made_up(512, 0, 0.07, 0.04, lr=0.0125)])
    assert [panel.title for panel in panels] == [
        "Kernel norm",
        "Single modes at width 2,048",
        "Error of the kernel norm against width",
        "Error of the outputs against width",
        "Training loss without penalty at width 2,048",
        "Validation accuracy",
    ]
    law = panels[0].traces[-1]
    assert law.y == pytest.approx(np.exp(-4 * np.array(law.x)).tolist())
    measured = panels[2].traces[0]
    assert measured.name == "λ = 0.05, lr = 0.025" and list(measured.x) == [512, 1024, 2048]
    assert measured.low[-1] == pytest.approx(0.0135) and measured.high[-1] == pytest.approx(0.0165)


def test_the_slope_and_its_interval_are_those_of_linear_regression():
    generator = np.random.default_rng(4)
    x = np.repeat([128.0, 256.0, 512.0, 1024.0], 2)
    y = 3.0 * x**-0.8 * np.exp(0.1 * generator.normal(size=8))
    found = slope_with_interval(list(zip(x, y)))
    want = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, 6) * want.stderr
    assert found == pytest.approx((want.slope, want.slope - half, want.slope + half), rel=2e-3)
    assert math.isclose(found[0], -0.8, abs_tol=0.2)
