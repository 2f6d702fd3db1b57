"""Trainings of the escape figures: networks, the adversarial start, every arm, on made-up images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from decaycast.core.experiment import Run
from decaycast.methods.label_noise.figures import arms, networks, starts
from decaycast.methods.label_noise.figures.networks import RESNET, ResNet18, build
from decaycast.methods.label_noise.figures.runs import PLANS
from decaycast.methods.label_noise.flips import smoothed_loss
from decaycast.methods.label_noise.method import LabelNoise

CLASSES = 4


@dataclass(frozen=True)
class Images:
    """What the lab hands to a figure: parts of made-up images whose class shows in their mean."""

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int = CLASSES


def part(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = 2.0 * torch.randn(CLASSES, 1, 3, 3, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(count, 1, 3, 3, generator=generator), labels


DATA = Images(part(40, 0), part(30, 1), part(20, 2))
CONFIG: dict[str, Any] = {
    **PLANS["smoke"].config,
    **PLANS["smoke"].start,
    "data": "made-up",
    "train_size": 40,
    "network": "mlp-8",
    "start": "adversarial",
    "lr": 0.1,
    "batch_size": 8,
    "steps": 12,
    "points": 3,
}


def run_of(arm: str, seed: int = 0, **more: Any) -> Run:
    return Run(config={**CONFIG, "arm": arm, **({"rho": 0.1} if arm == "sam" else {}), **more}, seed=seed)


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# networks


def test_a_network_follows_from_its_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = (build("mlp-8x6", (1, 3, 3), 4, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)  # torch's own numbers go on
    assert torch.equal(weights_of(first), weights_of(second)) and not torch.equal(weights_of(first), weights_of(third))
    shapes = [tuple(module.weight.shape) for module in first.modules() if isinstance(module, nn.Linear)]
    assert shapes == [(8, 9), (6, 8), (4, 6)]
    assert isinstance(list(first.children())[-1], nn.Linear)


@pytest.mark.parametrize("name", ["mlp-", "mlp-8x", "resnet", "mlp"])
def test_an_unknown_network_is_refused(name: str):
    with pytest.raises(ValueError, match="a network is called resnet18-groupnorm, or mlp-128x128"):
        build(name, (1, 3, 3), 4, torch.Generator())


@pytest.mark.slow
def test_the_papers_network_is_resnet18_with_group_norm():
    model = build(RESNET, (3, 32, 32), 10, torch.Generator().manual_seed(0))
    # ResNet-18 for CIFAR has 11,173,962 weights; the two of a norm's channels are the same in batch and group norm
    assert sum(weight.numel() for weight in model.parameters()) == 11_173_962
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 20 and {norm.num_channels // norm.num_groups for norm in norms} == {32}
    assert isinstance(model, ResNet18)


@pytest.mark.slow
def test_the_trace_of_the_papers_network_is_estimated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(networks, "TRACE_IMAGES", 6)
    monkeypatch.setattr(networks, "TRACE_BATCH", 4)
    monkeypatch.setattr(networks, "TRACE_ERROR", 0.5)
    model = build(RESNET, (1, 8, 8), 3, torch.Generator().manual_seed(0))
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = networks.trace(model, x, functional.cross_entropy)
    # squared gradients over labels drawn from the softmax
    q, wanted = functional.softmax(model(x[:6]), 1).detach(), 0.0
    for i in range(6):
        for c in range(3):
            loss = functional.cross_entropy(model(x[i : i + 1]), torch.tensor([c]))
            wanted += (
                float(q[i, c] * sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))) / 6
            )
    assert found == pytest.approx(wanted, rel=0.5)


# starts


def test_an_adversarial_start_is_made_once_and_handed_out_as_a_copy():
    first = starts.starting_network(CONFIG, DATA.train, CLASSES, 0)
    before = starts.adversarial.cache_info().hits
    with torch.no_grad():
        next(first.parameters()).zero_()
    second = starts.starting_network({**CONFIG, "arm": "sam", "lr": 9.0}, DATA.train, CLASSES, 0)
    assert starts.adversarial.cache_info().hits == before + 1
    assert not torch.equal(weights_of(first), weights_of(second))
    other = starts.starting_network(CONFIG, DATA.train, CLASSES, 1)
    assert not torch.equal(weights_of(other), weights_of(second))


def test_an_adversarial_start_fits_the_true_labels_after_memorising_false_ones():
    settings = {"copies": 2, "memorise_steps": 600, "relabel_steps": 400, "settle_steps": 300, "memorise_batch": 16}
    config = {**CONFIG, **settings, "network": "mlp-32", "memorise_lr": 0.1, "relabel_lr": 0.1}
    random = {**config, "start": "random"}
    model = starts.starting_network(config, DATA.train, CLASSES, 0)
    images, labels = DATA.train
    assert (model(images).argmax(1) == labels).float().mean() == 1.0
    assert smoothed_loss(model(images), labels, 0.2) < 0.1
    fresh = starts.starting_network(random, DATA.train, CLASSES, 0)
    plain = torch.optim.SGD(fresh.parameters(), lr=0.1)
    for _ in range(400):
        plain.zero_grad()
        functional.cross_entropy(fresh(images), labels).backward()
        plain.step()
    held_out = torch.cat([DATA.validation[0], DATA.test[0]]), torch.cat([DATA.validation[1], DATA.test[1]])
    bad, good = ((net(held_out[0]).argmax(1) == held_out[1]).float().mean() for net in (model, fresh))
    assert bad < good
    assert weights_of(model).norm() > weights_of(fresh).norm()


def test_false_images_have_a_share_of_pixels_off_in_all_channels_and_labels_that_say_nothing():
    images, labels = torch.ones(50, 2, 8, 8), torch.zeros(50, dtype=torch.int64)
    settings = {name: CONFIG[name] for name in starts.Adversarial.__dataclass_fields__ if name in CONFIG}
    task = starts.Adversarial(**{**settings, "copies": 20, "zeroed": 0.3}, classes=4, seed=0, images=(images, labels))
    many, random = starts._corrupted(task, torch.Generator().manual_seed(0))
    assert many.shape == (1000, 2, 8, 8) and torch.equal(many[:, 0], many[:, 1])
    assert float((many == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.bincount(random, minlength=4).float().div(1000).sub(0.25).abs().max() < 0.05
    assert torch.equal(images, torch.ones(50, 2, 8, 8)) and not labels.any()


def test_batches_are_drawn_with_replacement_or_are_all():
    images, labels = DATA.train
    drawn = starts.sampled((images, labels), 64, torch.Generator().manual_seed(0))
    inputs, target = next(drawn)
    assert len(inputs) == 64 > len(labels)  # so some twice
    places = [int((images == one).flatten(1).all(1).nonzero()[0, 0]) for one in inputs]
    assert torch.equal(labels[places], target)
    assert not torch.equal(next(drawn)[1], target)
    assert next(starts.sampled((images, labels), 0, torch.Generator()))[0] is images


# arms


@pytest.mark.parametrize("arm", arms.ARMS)
def test_an_arm_trains_and_measures(arm: str):
    if arm == "sam":
        pytest.importorskip("pytorch_optimizer")
    row = arms.train_arm(None, run_of(arm), DATA)
    assert row.status == "done" and list(row.curve["step"]) == [0.0, 4.0, 8.0, 12.0]
    assert row.curve["drift"][1] == pytest.approx(4 * 0.1**2 / 8)
    assert {len(column) for column in row.curve.values()} == {4}
    assert row.final["trace"] == pytest.approx(row.curve["trace"][3])
    assert row.final["accuracy"] == row.curve["accuracy"][-1] and row.final["start_trace"] == row.curve["trace"][0]
    again = arms.train_arm(None, run_of(arm), DATA)
    assert dict(again.curve) == dict(row.curve)
    other = arms.train_arm(None, run_of(arm, lr=0.05), DATA)
    assert other.curve["trace"][0] == row.curve["trace"][0] and other.curve["trace"][1] != row.curve["trace"][1]


def test_arms_of_a_seed_share_the_start_and_differ_after():
    rows = [arms.train_arm(None, run_of(arm), DATA) for arm in ("label noise", "smoothing", "clean")]
    assert len({row.curve["trace"][0] for row in rows}) == 1
    assert len({row.curve["trace"][1] for row in rows}) == 3
    noise_off = arms.train_arm(None, run_of("label noise", flip=0.0), DATA)
    clean = arms.train_arm(None, run_of("clean", flip=0.0), DATA)
    assert dict(noise_off.curve) == dict(clean.curve)


def test_a_repetition_has_the_start_of_its_seed_and_luck_of_its_own():
    first, again, other = (
        arms.train_arm(None, run_of("label noise", **more), DATA) for more in ({}, {"repeat": 1}, {"repeat": 2})
    )
    assert len({row.curve["trace"][0] for row in (first, again, other)}) == 1
    assert len({row.curve["trace"][-1] for row in (first, again, other)}) == 3


@pytest.mark.parametrize("arm", ["label noise", "smoothing", "clean"])
def test_what_is_measured_is_recomputed_by_hand(arm: str):
    row = arms.train_arm(None, run_of(arm, steps=4, points=1), DATA)
    model = starts.starting_network(CONFIG, DATA.train, CLASSES, 0)
    batches = starts.sampled(DATA.train, 8, torch.Generator().manual_seed(1))
    noise = LabelNoise(0.2, CLASSES, torch.Generator().manual_seed(2))
    for _ in range(4):
        inputs, target = next(batches)
        if arm == "smoothing":
            loss = smoothed_loss(model(inputs), target, 0.2)
        else:
            loss = functional.cross_entropy(model(inputs), noise(target) if arm == "label noise" else target)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, slope in zip(model.parameters(), slopes):
                weight -= 0.1 * slope
    wanted = smoothed_loss(model(DATA.train[0]), DATA.train[1], 0.2).item()
    assert row.curve["loss"][-1] == pytest.approx(wanted, rel=1e-4)
    right = sum(float((model(x).argmax(1) == y).sum()) for x, y in (DATA.validation, DATA.test))
    assert row.final["accuracy"] == pytest.approx(right / 50)


def test_sam_climbs_before_it_steps():
    pytest.importorskip("pytorch_optimizer")
    model = starts.starting_network(CONFIG, DATA.train, CLASSES, 0)
    own, config = starts.starting_network(CONFIG, DATA.train, CLASSES, 0), dict(run_of("sam").config)
    arms.advance(
        model, arms.make_optimizer(model, config), starts.sampled(DATA.train, 0, torch.Generator()), None, config, 0, 1
    )

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(smoothed_loss(own(DATA.train[0]), DATA.train[1], 0.2), list(own.parameters()))

    here = slopes()
    length = torch.sqrt(sum(slope.square().sum() for slope in here))  # type: ignore[arg-type]
    with torch.no_grad():
        climbed = [0.1 * slope / length for slope in here]
        for weight, move in zip(own.parameters(), climbed):
            weight += move
        there = slopes_with_grad(slopes)
        for weight, move, slope in zip(own.parameters(), climbed, there):
            weight -= move + 0.1 * slope
    torch.testing.assert_close(weights_of(model), weights_of(own), rtol=1e-4, atol=1e-6)


def slopes_with_grad(slopes: Any) -> Any:
    with torch.enable_grad():
        return slopes()


def test_without_the_library_sam_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pip install --no-deps pytorch_optimizer"):
        arms.train_arm(None, run_of("sam"), DATA)


def test_a_training_that_blows_up_is_said_to():
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        arms.train_arm(None, run_of("smoothing", lr=1e9, steps=4), DATA)


def test_the_papers_size_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="trains on a GPU, which torch does not find here; take --size small"):
        arms.train_arm(None, run_of("clean", device="cuda"), DATA)


def test_late_traces_are_averaged():
    row = arms.train_arm(None, run_of("clean", points=6), DATA)
    assert row.final["trace"] == pytest.approx(np.mean(row.curve["trace"][-2:]))
