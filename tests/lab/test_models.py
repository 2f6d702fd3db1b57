"""The paper's networks: sizes against published or hand-counted numbers, and a start that depends on the seed alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from decaycast.lab import models

IMAGE = (3, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_wrn_28_10_has_the_published_size():
    # 36.5 M in Zagoruyko & Komodakis 2016, table 4; to the unit as their code counts it for 10 classes
    with torch.device("meta"):
        model = models.WideResNet(IMAGE, 10, depth=28, widen=10)
    assert parameters(model) == 36_479_194


def test_wrn_10_1_counted_by_hand():
    def block(inputs: int, outputs: int) -> int:
        projection = inputs * outputs if inputs != outputs else 0
        return 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs + projection

    by_hand = 3 * 16 * 9 + block(16, 16) + block(16, 32) + block(32, 64) + 2 * 64 + 64 * 10 + 10
    assert parameters(models.build("wrn-10-1", IMAGE, 10, seed=0)) == by_hand


def test_the_fully_connected_net():
    model = models.build("mlp-2048x3", (1, 28, 28), 10, seed=0)
    assert parameters(model) == 784 * 2048 + 2 * 2048 * 2048 + 2048 * 10 + 3 * 2048 + 10
    assert parameters(models.build("mlp", (1, 8, 8), 10, seed=0)) == 64 * 256 + 2 * 256 * 256 + 256 * 10 + 3 * 256 + 10


@pytest.mark.parametrize(("shape", "side"), [((3, 32, 32), 6), ((1, 28, 28), 5), ((3, 16, 16), 2), ((1, 10, 10), 1)])
def test_the_convolutional_net(shape: tuple[int, int, int], side: int):
    model = models.build("cnn-6", shape, 7, seed=0)
    convolutions = (shape[0] * 9 + 1) * 6 + 3 * (6 * 9 + 1) * 6
    assert parameters(model) == convolutions + (6 * side * side + 1) * 500 + 501 * 7
    norms = [module for module in models.build("cnn-bn-6", shape, 7, seed=0) if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 4


@pytest.mark.parametrize("name", ["mlp", "mlp-16x1", "cnn-4", "cnn-bn-4", "wrn-10-1", "wrn-16-2"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16)])
def test_every_network_trains_on_every_shape(name: str, shape: tuple[int, int, int]):
    model = models.build(name, shape, 5, seed=0)
    output = model(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    assert output.shape == (3, 5)
    output.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = models.build("cnn-bn-4", IMAGE, 10, seed=5)
    torch.manual_seed(2)
    torch.rand(3)
    second, other = models.build("cnn-bn-4", IMAGE, 10, seed=5), models.build("cnn-bn-4", IMAGE, 10, seed=6)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_weights_start_with_variance_two_over_fan_in():
    for module in models.build("cnn-40", IMAGE, 10, seed=0).modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            count, fan_in = module.weight.numel(), module.weight[0].numel()
            if count >= 1000:  # the standard error of a standard deviation is 1/sqrt(2n) of it
                spread = float(module.weight.detach().std()) / math.sqrt(2 / fan_in)
                assert spread == pytest.approx(1.0, abs=4 / math.sqrt(2 * count))
            assert module.bias is not None
            assert torch.count_nonzero(module.bias) == 0


@pytest.mark.parametrize("name", models.EXAMPLES)
def test_the_examples_are_names(name: str):
    assert any(pattern.fullmatch(name) for pattern in models.PATTERNS.values())


@pytest.mark.parametrize(
    ("name", "nearest"), [("wrn-28", "wrn-28-10"), ("mpl", "mlp"), ("CNN", "cnn"), ("cnn_bn", "cnn-bn")]
)
def test_an_unknown_network_gets_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean '{nearest}'"):
        models.build(name, IMAGE, 10, seed=0)


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-4-1", "wrn-10-0"])
def test_a_wrns_depth_is_6n_plus_4(name: str):
    with pytest.raises(ValueError, match=r"a WRN's depth is 6n \+ 4 \(10, 16, 22, 28, 40\) and its widening >= 1, got"):
        models.build(name, IMAGE, 10, seed=0)


def test_images_too_small_for_the_cnn_are_refused():
    with pytest.raises(
        ValueError, match="images of side 8 are too small for this CNN, which needs at least 10; use an"
    ):
        models.build("cnn", (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("name", ["mlp-0x1", "cnn-0"])
def test_a_size_of_nothing_is_refused(name: str):
    with pytest.raises(ValueError, match="every size in a model's name must be at least 1, got"):
        models.build(name, (1, 28, 28), 10, seed=0)
