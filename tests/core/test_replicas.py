"""K networks in one program: outputs, gradients and buffers are those of K networks, whatever they are built of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.replicas import Replicas
from decaycast.methods.large_lr.noise import ActivationNoise
from decaycast.methods.stochnorm.method import StochNorm1d

K = 3


class Tied(nn.Module):
    """A residual network that uses one matrix twice, with attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(6, 6, bias=False), nn.LayerNorm(6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 2, 3, 2).flatten(2)
        hidden = self.two(torch.relu(self.one(self.norm(x))))
        return (x + functional.scaled_dot_product_attention(hidden, hidden, hidden)).mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 5, bias=False), nn.GELU())
    )


def convolutions() -> nn.Module:
    blocks = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(1, -1), nn.Linear(4, 5))


def leaky() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LeakyReLU(float(torch.rand(()))), nn.PReLU())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (3, 2, 2)),
    "convolutions with batch norm": (convolutions, (3, 2, 2)),
    "linear over tokens": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (5, 4)),
    "tied weights and attention": (Tied, (12,)),
    "settings that differ": (leaky, (12,)),
}


def networks(build: Callable[[], nn.Module], count: int = K) -> list[nn.Module]:
    torch.manual_seed(1)
    return [build().double() for _ in range(count)]


def outputs_and_gradients(
    models: list[nn.Module], inputs: Tensor, weights: Tensor
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """By a loop over the networks."""
    outputs, gradients = [], []
    for model, x, weight in zip(models, inputs, weights, strict=True):
        outputs.append(model(x))
        named = dict(model.named_parameters())
        found = torch.autograd.grad((outputs[-1] * weight).sum(), list(named.values()))
        gradients.append(dict(zip(named, found, strict=True)))
    return torch.stack(outputs), gradients


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_buffers_are_those_of_the_networks(name: str):
    build, shape = NETWORKS[name]
    models = networks(build)
    replicas, inputs = Replicas(models), torch.randn(K, 6, *shape, dtype=torch.float64)
    output = replicas(inputs)
    weights = torch.randn_like(output)
    found = torch.autograd.grad((output * weights).sum(), list(replicas.parameters.values()))
    expected, gradients = outputs_and_gradients(models, inputs, weights)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for gradient, parameter in zip(found, replicas.parameters, strict=True):
        separate = torch.stack([one[parameter] for one in gradients])
        torch.testing.assert_close(gradient, separate, rtol=1e-11, atol=1e-12)
    for buffer, _ in models[0].named_buffers():
        separate = torch.stack([dict(model.named_buffers())[buffer] for model in models])
        torch.testing.assert_close(replicas.state[buffer], separate, rtol=1e-12, atol=1e-12)


def test_a_sample_without_batch_dimension():
    models = networks(lambda: nn.Linear(4, 3))
    inputs = torch.randn(K, 4, dtype=torch.float64)
    torch.testing.assert_close(
        Replicas(models)(inputs), torch.stack([m(x) for m, x in zip(models, inputs, strict=True)])
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_each_replicas_own():
    def noisy(count: int) -> list[nn.Module]:
        models = networks(lambda: nn.Sequential(nn.Linear(4, 3), nn.Identity(), nn.ReLU()), count)
        for place, model in enumerate(models):
            model[1] = ActivationNoise(0.3 * place, generator=seeded(place))  # type: ignore[operator]
        return models

    inputs = torch.randn(K, 5, 4, dtype=torch.float64)
    replicas, separate = Replicas(noisy(K)), noisy(K)
    for _ in range(2):
        expected = torch.stack([model(x) for model, x in zip(separate, inputs, strict=True)])
        torch.testing.assert_close(replicas(inputs), expected, rtol=1e-12, atol=1e-12)
    with replicas.evaluating():
        assert not torch.equal(replicas(inputs)[2], expected[2])


def test_a_layer_with_statistics_of_its_own_kind():
    torch.manual_seed(0)
    models = networks(lambda: nn.Sequential(nn.Linear(4, 6), StochNorm1d(6, p=1.0), nn.ReLU()))
    replicas, inputs = Replicas(models), torch.randn(K, 8, 4, dtype=torch.float64)
    for _ in range(2):
        output = replicas(inputs)
        expected = torch.stack([model(x) for model, x in zip(models, inputs, strict=True)])
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for name, buffer in models[2].named_buffers():
        torch.testing.assert_close(replicas.state[name][2], buffer, rtol=1e-12, atol=1e-12)


def test_dropout_draws_anew_for_each_replica_and_a_function_that_draws_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Dropout(0.5))
    output = Replicas([model, model])(torch.ones(1, 2, 40).expand(2, 2, 40))
    assert not torch.equal(output[0] == 0, output[1] == 0)
    hidden = nn.ModuleDict({"inner": nn.Linear(4, 4)})
    hidden.forward = lambda x: functional.dropout(x, 0.5)  # type: ignore[method-assign]
    with pytest.raises(
        RuntimeError, match="ModuleDict draws random numbers by a function, and in a batch every replica"
    ):
        Replicas([hidden, hidden])(torch.ones(2, 2, 4))


def test_other_errors_of_a_module_pass_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(RuntimeError, match=r"to have 3 channels|expected input"):
        Replicas([model, model])(torch.ones(2, 1, 4, 5, 5))


def test_hooks_on_modules_are_called():
    seen = []
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    for module in (model[0], model[1], model):
        module.register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    Replicas([model])(torch.ones(1, 2, 4))
    assert seen == ["Linear", "ReLU", "Sequential"]


def test_what_happens_in_one_replica_stays_there():
    models = networks(convolutions)
    inputs = torch.randn(K, 6, 3, 2, 2, dtype=torch.float64)
    clean = Replicas(copy.deepcopy(models))
    expected = clean(inputs)
    with torch.no_grad():
        models[1][0].weight.fill_(float("nan"))  # type: ignore[index,union-attr,operator]
    broken = Replicas(models)
    output = broken(inputs)
    assert torch.equal(output[::2], expected[::2]) and output[1].isnan().all()
    (gradient,) = torch.autograd.grad(output[0].sum(), [broken.parameters["0.weight"]])
    (wanted,) = torch.autograd.grad(expected[0].sum(), [clean.parameters["0.weight"]])
    assert torch.equal(gradient[0], wanted[0])


def test_keeping_some_and_writing_back():
    models = networks(convolutions)
    inputs = torch.randn(K, 6, 3, 2, 2, dtype=torch.float64)
    replicas = Replicas(models)
    replicas(inputs)
    replicas.keep([2, 0])
    with torch.no_grad():
        replicas.parameters["0.weight"].mul_(2)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    assert len(replicas) == 2 and replicas.parameters["5.weight"].shape == (2, 5, 4)
    replicas.write_back([1])
    assert all(torch.equal(value, models[2].state_dict()[name]) for name, value in before[2].items())
    assert torch.equal(models[0].state_dict()["0.weight"], 2 * before[0]["0.weight"])
    assert int(models[0].state_dict()["1.num_batches_tracked"]) == 1
    replicas.write_back()
    assert torch.equal(models[2].state_dict()["0.weight"], 2 * before[2]["0.weight"])
    with replicas.evaluating():
        output, expected = replicas(inputs[[2, 0]]), [models[k].eval()(inputs[k]) for k in (2, 0)]
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_modes_are_put_back_and_frozen_parameters_stay():
    models = networks(convolutions)
    for model in models:
        model[1].eval()  # type: ignore[index,operator]
        model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    replicas = Replicas(models)
    assert "0.weight" not in replicas.parameters and not replicas.state["0.weight"].requires_grad
    with replicas.evaluating():
        assert not models[1].training and not torch.is_grad_enabled()
    assert models[1].training and not models[1][1].training  # type: ignore[index,union-attr]
    replicas(torch.randn(K, 6, 3, 2, 2, dtype=torch.float64))
    assert int(replicas.state["1.num_batches_tracked"].sum()) == 0


def test_networks_that_differ_in_structure_are_refused():
    with pytest.raises(ValueError, match="there is no network to replicate; give at least one"):
        Replicas([])
    with pytest.raises(
        ValueError, match=r"network 1 is built differently from network 0 \(.*weight.*3, 4.* and .*weight.*2, 4"
    ):
        Replicas([nn.Linear(4, 3), nn.Linear(4, 2)])
    with pytest.raises(ValueError, match=r"network 2 is built differently from network 0 \(different lengths\)"):
        Replicas([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])
    with pytest.raises(ValueError, match="network 1 is built differently from network 0"):
        Replicas([nn.ReLU(), nn.ReLU().eval()])
