"""The exact identities of finite networks, against finite differences along the flow and against infinite width."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from decaycast.methods.l2 import theory
from decaycast.methods.l2.identities import homogeneity, mean_squared, rates

DECAY = 0.1


def network(degree: int, width: int = 6, outputs: int = 2, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    sizes = [4, *[width] * (degree - 1), outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def batch(outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (4, outputs))


class ScaleFree(nn.Module):
    """A linear map of directions only: degree 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight / self.weight.norm()).T)


def outputs_and_kernel(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    def flat(w):
        return functional_call(model, w, (x,)).reshape(-1)

    jacobian = torch.cat([part.flatten(1) for part in jacrev(flat)(weights).values()], dim=1)
    return flat(weights).detach(), (jacobian @ jacobian.T).detach()


def by_differences(model: nn.Module, x: Tensor, y: Tensor, decay: float, step: float = 1e-3) -> tuple[Tensor, Tensor]:
    """df/dt and dTheta/dt from the network a little earlier and later on its flow's tangent, to fourth order."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    slope = torch.func.grad(lambda w: mean_squared(functional_call(model, w, (x,)), y))(weights)
    at = {}
    for steps in (-2, -1, 1, 2):
        moved = {name: w - steps * step * (slope[name] + decay * w) for name, w in weights.items()}
        at[steps] = outputs_and_kernel(model, moved, x)
    return tuple((8 * (at[1][part] - at[-1][part]) - (at[2][part] - at[-2][part])) / (12 * step) for part in (0, 1))


@pytest.mark.parametrize("model", [network(1), network(2), network(3), network(4), ScaleFree()], ids=lambda m: "")
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_both_sides_agree_and_are_what_the_flow_does(model: nn.Module, decay: float):
    x, y = batch()
    found = rates(model, x, y, weight_decay=decay)
    assert (found.outputs_rate - found.outputs_identity).abs().max() < 1e-13
    assert (found.kernel_rate - found.kernel_identity).abs().max() < 1e-13
    slope, kernel_slope = by_differences(model, x, y, decay)
    assert (found.outputs_identity - slope).abs().max() < 1e-9
    assert (found.kernel_identity - kernel_slope).abs().max() < 1e-9
    f, kernel = outputs_and_kernel(model, dict(model.named_parameters()), x)
    assert torch.allclose(found.outputs, f, rtol=1e-14) and torch.allclose(found.kernel, kernel, rtol=1e-12)


def test_decay_takes_k_lambda_of_f_and_twice_k_minus_one_lambda_of_the_kernel():
    """k = 3, lambda = 0.1: what L2 adds to the two rates is 0.300 and 0.400 times f and Theta."""
    x, y = batch()
    model = network(3)
    with_decay, without = (rates(model, x, y, weight_decay=decay) for decay in (DECAY, 0.0))
    fraction = (without.outputs_rate - with_decay.outputs_rate) / with_decay.outputs
    assert fraction.numpy() == pytest.approx(np.full(10, 0.300), rel=1e-9)
    fraction = (without.kernel_rate - with_decay.kernel_rate) / with_decay.kernel
    assert fraction.numpy() == pytest.approx(np.full((10, 10), 0.400), rel=1e-9)
    shrunk = {name: weight.detach() * np.exp(-DECAY) for name, weight in model.named_parameters()}
    want = with_decay.kernel.numpy() * theory.kernel_scale(1.0, DECAY, 3)  # decay alone for a time of 1
    assert outputs_and_kernel(model, shrunk, x)[1].numpy() == pytest.approx(want, rel=1e-12)


def test_other_losses_have_the_same_identities():
    x, _ = batch(3)
    labels = torch.tensor([0, 2, 1, 1, 0])
    found = rates(network(3, outputs=3), x, labels, weight_decay=DECAY, loss=nn.functional.cross_entropy)
    assert (found.outputs_rate - found.outputs_identity).abs().max() < 1e-13
    assert (found.kernel_rate - found.kernel_identity).abs().max() < 1e-13


def test_theorem_1_is_the_identity_without_the_features():
    x, y = batch(1)
    found = rates(network(3, outputs=1), x, y, weight_decay=DECAY)
    soon = theory.function_evolution(
        [1e-6], found.kernel, y[:, 0], initial=found.outputs, weight_decay=DECAY, homogeneity=found.degree
    )
    assert (soon[0] - found.outputs.numpy()) / 1e-6 == pytest.approx(found.outputs_rate.numpy(), rel=1e-4)
    left_out = found.kernel_rate + 2 * (3 - 1) * DECAY * found.kernel
    assert torch.allclose(left_out, found.feature_learning, atol=1e-13)


class Wide(nn.Module):
    """NTK parametrisation: weights of size one, sums divided by the root of their length."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(width, 4), (width, width), (1, width)]
        self.layers = nn.ParameterList(torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:  # a slice rewraps its parameters
            x = torch.relu(x @ layer.T * (2 / x.shape[1]) ** 0.5)
        return x @ self.layers[-1].T * (2 / x.shape[1]) ** 0.5


def test_what_infinite_width_leaves_out_falls_like_one_over_the_width():
    x, y = batch(1)
    shares = []
    for width in (32, 256):
        found = [rates(Wide(width, seed), x, y, weight_decay=DECAY) for seed in range(40)]
        shares.append(np.mean([float(each.feature_learning.norm() / each.kernel.norm()) for each in found]))
        assert all((each.outputs_rate - each.outputs_identity).abs().max() < 1e-12 for each in found)
    assert 8 / 1.4 < shares[0] / shares[1] < 8 * 1.4  # the mean of 40 scatters by about 15 %


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False, eps=1e-14)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = batch(3)
    assert homogeneity(model, x) == 0.0
    assert rates(model, x, y, weight_decay=DECAY).degree == 0.0
    assert model.training and all((model.state_dict()[name] == value).all() for name, value in before.items())
    assert all(weight.grad is None for weight in model.parameters())


# degrees


def test_the_degree_counts_the_trained_layers():
    x, _ = batch()
    assert [homogeneity(network(k), x) for k in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]
    assert homogeneity(network(3).float(), x.float()) == 3.0
    assert homogeneity(ScaleFree(), x) == 0.0
    half_frozen = network(3)
    half_frozen[0].weight.requires_grad_(False)
    assert homogeneity(half_frozen, x) == 2.0
    frozen_bias = network(2, bias=True)
    for layer in (frozen_bias[0], frozen_bias[2]):
        layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="not homogeneous"):  # the bias stays while the weights scale
        homogeneity(frozen_bias, x)
    normalised = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).double()
    assert homogeneity(normalised, x, tolerance=1e-3) == pytest.approx(1.0, abs=1e-3)


class Powers(nn.Module):
    """Degree 2.5, which a module of its own may well have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() @ self.weight.abs() ** 2.5


def test_a_degree_need_not_be_whole():
    x, y = batch(1)
    assert homogeneity(Powers(), x) == pytest.approx(2.5, rel=1e-12)
    found = rates(Powers(), x, y, weight_decay=DECAY)
    assert (found.kernel_rate - found.kernel_identity).abs().max() < 1e-12


# what is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (network(2, bias=True), r"not homogeneous in its trained parameters: .* suggests degree 1\.\d+"),
        (nn.Sequential(network(1), nn.Tanh(), nn.Linear(2, 1, bias=False).double()), "not homogeneous"),
        (nn.Sequential(network(2), nn.Dropout(0.5)).train(), "not homogeneous"),
        (nn.ReLU(), "no trained parameters"),
    ],
)
def test_a_module_without_a_degree_is_refused(model: nn.Module, message: str):
    torch.manual_seed(0)
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        homogeneity(model, x)
    with pytest.raises(ValueError, match=message):
        rates(model, x, y, weight_decay=DECAY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(5, 4, dtype=torch.float64)}, "outputs have norm 0"),
        ({"inputs": torch.full((5, 4), np.nan, dtype=torch.float64)}, "outputs have norm nan"),
        ({"targets": batch(1)[1]}, r"targets have shape \(5, 1\), but the outputs \(5, 2\)"),
        ({"weight_decay": -0.1}, "weight_decay has to be finite and at least 0, got -0.1"),
        ({"weight_decay": np.inf}, "weight_decay has to be finite and at least 0, got inf"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        rates(**{"model": network(2), "inputs": x, "targets": y, "weight_decay": DECAY, **change})


def test_the_examples_are_true():
    from decaycast.methods.l2 import identities

    failed, tried = doctest.testmod(identities)
    assert failed == 0 and tried >= 5
