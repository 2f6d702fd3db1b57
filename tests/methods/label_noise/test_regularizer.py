"""R of a network through its Gram matrix: against the dense Hessian, finite differences, the drift it stands for, and theory."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from decaycast.core.ntk_routes import plain_attention
from decaycast.methods.label_noise import regularizer as room
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.flips import flip_loss
from decaycast.methods.label_noise.regularizer import implicit_regularizer


def test_the_examples_run():
    assert doctest.testmod(room).failed == 0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


class Flat(nn.Module):
    """One output per sample, of shape (n,)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


class Branching(nn.Module):
    """Looks at its numbers, which `torch.func` cannot batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum().item() < 1e9 else x


def mlp(outputs: int = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def shared() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net[2].weight = net[0].weight
    return net


def normed() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.GELU(), nn.Linear(4, 2)).double()
    nn.init.normal_(net[1].running_mean), nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net


def frozen() -> nn.Sequential:
    net = mlp(2)
    net[0].weight.requires_grad_(False)
    return net


NETS = {
    "one output": mlp,
    "flat": lambda: Flat(mlp()),
    "three outputs": lambda: mlp(3),
    "shared": shared,
    "normed": normed,
    "frozen": frozen,
    "branching": lambda: Branching(mlp(2)),
}
X = normal(6, 3, seed=2)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().reshape(-1) for weight in model.parameters() if weight.requires_grad])


def loss_of_flat(model: nn.Module, x: Tensor, targets: Tensor):
    """(1/2) mean over the samples of the sum over the outputs of (f - y)^2, as a function of all weights in one vector."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    sizes = [weight.numel() for _, weight in named]
    model.eval()

    def loss(vector: Tensor) -> Tensor:
        pieces = {name: part.view_as(w) for (name, w), part in zip(named, vector.split(sizes))}
        return (functional_call(model, pieces, (x,)) - targets).square().sum() / (2 * len(x))

    return loss


def hessian_at_zero_loss(model: nn.Module, x: Tensor) -> Tensor:
    targets = model.eval()(x).detach()
    return torch.autograd.functional.hessian(loss_of_flat(model, x, targets), flat(model))


def lr_for(model: nn.Module, x: Tensor, share: float, momentum: float) -> float:
    return share * 2 * (1 + momentum) / torch.linalg.eigvalsh(hessian_at_zero_loss(model, x))[-1].item()


# value


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("share", "momentum"), [(0.02, 0.0), (0.7, 0.0), (0.97, 0.9)])
def test_it_is_r_of_the_dense_hessian(name: str, share: float, momentum: float):
    model = NETS[name]()
    lr = lr_for(model, X, share, momentum)
    expected = theory.regularizer(torch.linalg.eigvalsh(hessian_at_zero_loss(model, X)), lr, momentum).item()
    model.train()
    found = implicit_regularizer(model, X, lr, momentum)
    assert found.item() == pytest.approx(expected, rel=1e-9)  # the acceptance threshold is 1e-6
    assert found.shape == () and found.dtype == torch.float64
    with torch.no_grad():
        blocks = implicit_regularizer(model, X, lr, momentum)
    assert not blocks.requires_grad and blocks.item() == pytest.approx(expected, rel=1e-9)


def test_more_samples_than_weights():
    model, x = nn.Linear(2, 1).double(), normal(40, 2, seed=3)
    lr = lr_for(model, x, 0.8, 0.0)
    expected = theory.regularizer(torch.linalg.eigvalsh(hessian_at_zero_loss(model, x)), lr).item()
    assert implicit_regularizer(model, x, lr).item() == pytest.approx(expected, rel=1e-9)


def test_small_lr_is_a_quarter_of_the_trace():
    model = mlp(2)
    trace = hessian_at_zero_loss(model, X).trace().item()
    assert implicit_regularizer(model, X, 1e-7).item() == pytest.approx(trace / 4, rel=1e-6)
    single = implicit_regularizer(mlp(2).float(), X.float(), 1e-5)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(trace / 4, rel=2e-5)


def test_another_curvature_is_another_learning_rate():
    # H = alpha*G of a flip loss, from the eigenvalues, against what the head of the file says
    model, alpha = mlp(2), flip_loss("exponential", 0.2).curvature
    values = torch.linalg.eigvalsh(hessian_at_zero_loss(model, X))
    lr = 1.3 / values[-1].item()
    expected = theory.regularizer(alpha * values, lr, 0.5).item()
    assert alpha * implicit_regularizer(model, X, alpha * lr, 0.5).item() == pytest.approx(expected, rel=1e-9)
    # torch's mean-squared error of two outputs
    targets = model(X).detach()

    def mse(vector: Tensor) -> Tensor:
        return loss_of_flat(model, X, targets)(vector) * len(X) * 2 / targets.numel()

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(mse, flat(model)))
    assert mse(flat(model) + 0.1) == nn.functional.mse_loss(
        functional_call(model, {n: w + 0.1 for n, w in model.named_parameters()}, (X,)), targets
    )
    expected = theory.regularizer(values, lr).item()
    assert 2 / 2 * implicit_regularizer(model, X, 2 / 2 * lr).item() == pytest.approx(expected, rel=1e-9)


# gradient


@pytest.mark.parametrize("name", ["one output", "three outputs", "shared", "normed", "branching"])
@pytest.mark.parametrize(("share", "momentum"), [(0.05, 0.0), (0.9, 0.9)])
def test_its_gradient_is_that_of_finite_differences(name: str, share: float, momentum: float):
    model = NETS[name]()
    lr, weights = lr_for(model, X, share, momentum), list(model.parameters())
    implicit_regularizer(model, X, lr, momentum).backward()
    for seed in range(3):
        way = [normal(*weight.shape, seed=10 * seed + i) for i, weight in enumerate(weights)]
        expected = sum((w.grad * d).sum().item() for w, d in zip(weights, way))
        values, step = [], 1e-4
        for sign in (1.0, -1.0, 2.0, -2.0):
            with torch.no_grad():
                for weight, d in zip(weights, way):
                    weight.add_(d, alpha=sign * step)
                values.append(implicit_regularizer(model, X, lr, momentum).item())
                for weight, d in zip(weights, way):
                    weight.add_(d, alpha=-sign * step)
        found = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_it_is_the_drift_along_the_weights_of_zero_loss():
    """The mean force of the jitter, (1/2) grad <S, Hessian of L> with S held fixed, is lambda*grad R along the zeros of L."""
    model, weight = mlp(), 0.02
    targets = model(X).detach()
    lr = lr_for(model, X, 0.8, 0.0)
    start = flat(model).requires_grad_()
    hessian = hessian_at_zero_loss(model, X)
    jitter = theory.stationary_covariance(hessian, lr=lr, strength=weight)
    loss = loss_of_flat(model, X, targets)
    values, vectors = torch.linalg.eigh(jitter)
    force = torch.zeros_like(start)
    for value, vector in zip(values[values > 1e-12], vectors.T[values > 1e-12]):
        (slope,) = torch.autograd.grad(loss(start), start, create_graph=True)
        (bent,) = torch.autograd.grad(slope @ vector, start, create_graph=True)
        (pushed,) = torch.autograd.grad(bent @ vector, start)
        force += value * pushed / 2
    implicit_regularizer(model, X, lr).backward()
    grad = torch.cat([each.grad.reshape(-1) for each in model.parameters()])
    spectrum, basis = torch.linalg.eigh(hessian)
    along = basis[:, spectrum < 1e-10]
    assert along.shape[1] == len(start) - len(X)
    found, expected = along.T @ force, along.T @ grad * weight
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_it_is_differentiable_twice():
    model = mlp()
    lr = lr_for(model, X, 0.5, 0.0)
    value = implicit_regularizer(model, X, lr)
    slopes = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    sum(slope.square().sum() for slope in slopes).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_descending_it_lowers_the_trace():
    model, x = mlp(seed=4), X
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    lr, before = lr_for(model, x, 0.5, 0.0), hessian_at_zero_loss(model, x).trace()
    for _ in range(5):
        optimizer.zero_grad()
        implicit_regularizer(model, x, lr).backward()
        optimizer.step()
    assert hessian_at_zero_loss(model, x).trace() < 0.9 * before


# what it leaves alone, and what works


def test_modes_buffers_and_gradients_stay():
    model = normed().train()
    model[1].eval()  # frozen inside a training model
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with torch.no_grad():
        implicit_regularizer(model, X, 0.01)
    implicit_regularizer(model, X, 0.01)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(theory.UnstableError):
        implicit_regularizer(model, X, 1e9)
    assert [module.training for module in model.modules()] == modes


class Counting(nn.Module):
    """Counts its calls in a buffer, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def test_a_buffer_that_is_written_in_evaluation_is_put_back():
    model = Counting()
    implicit_regularizer(model, X, 0.01).backward()
    assert model.calls.item() == 0


def test_unused_parameters():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.spare = mlp(2), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Spare()
    found = implicit_regularizer(model, X, 0.1)
    found.backward()
    assert found.item() == pytest.approx(implicit_regularizer(mlp(2), X, 0.1).item(), rel=1e-12)
    assert not model.spare.weight.grad.any()  # zero, not none


def test_a_linear_model_has_a_gradient_of_zero():
    model = nn.Linear(3, 2).double()
    implicit_regularizer(model, X, 0.1).backward()
    assert not model.weight.grad.any() and not model.bias.grad.any()


def test_blocks_of_samples_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    model = mlp(3)
    expected = implicit_regularizer(model, X, 0.1)
    expected.backward()
    slope = model[0].weight.grad.clone()
    monkeypatch.setattr(room, "_BLOCK_BYTES", 1)
    model.zero_grad()
    found = implicit_regularizer(model, X, 0.1)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(model[0].weight.grad, slope, rtol=1e-11, atol=1e-14)


def test_convolutions_and_attention():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    images = normal(4, 1, 4, 4, seed=5)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    words = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 1)).double()
    for model, x in ((conv, images), (words, normal(4, 3, 4, seed=6))):
        with plain_attention():  # the fused kernels have no second derivative
            values = torch.linalg.eigvalsh(hessian_at_zero_loss(model, x))
        lr = 1.2 / values[-1].item()
        expected = theory.regularizer(values, lr).item()
        found = implicit_regularizer(model, x, lr)
        found.backward()
        assert found.item() == pytest.approx(expected, rel=1e-8)


# refusals


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_beyond_stability_it_carries_the_number(momentum: float):
    model = mlp(2)
    top = torch.linalg.eigvalsh(hessian_at_zero_loss(model, X))[-1].item()
    limit = 2 * (1 + momentum)
    implicit_regularizer(model, X, 0.999 * limit / top, momentum)
    # even numbers of eigenvalues beyond would have a positive determinant: a plain log|det| is wrong without a sign of it
    for share in (1.001, 3.0, 1e4):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context, pytest.raises(theory.UnstableError, match="lr times the largest eigenvalue is") as caught:
                implicit_regularizer(model, X, share * limit / top, momentum)
            assert caught.value.product == pytest.approx(share * limit, rel=1e-9)
            assert caught.value.limit == pytest.approx(limit) and caught.value.momentum == momentum


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out - out.mean(0)


class Cut(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach()


def broken() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1, bias=False), Root()).double()
    nn.init.zeros_(net[0].weight)
    return net


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: implicit_regularizer(mlp(), X, 0.0), "lr has to be finite and > 0, got 0.0"),
        (lambda: implicit_regularizer(mlp(), X, math.nan), "lr has to be finite and > 0, got nan"),
        (lambda: implicit_regularizer(mlp(), X, 0.1, 1.0), r"momentum has to be in \[0, 1\), got 1.0"),
        (lambda: implicit_regularizer(mlp(), X[:0], 0.1), r"one sample at least, got shape \(0, 3\)"),
        (lambda: implicit_regularizer(mlp(), [1.0], 0.1), "one sample at least, got list"),
        (lambda: implicit_regularizer(mlp(), X * math.inf, 0.1), "inputs have to be finite, but hold NaN or infinity"),
        (lambda: implicit_regularizer(nn.Tanh(), X, 0.1), "Tanh has no trainable parameter"),
        (lambda: implicit_regularizer(Cut(), X, 0.1), "the outputs do not depend on the chosen parameters"),
        (lambda: implicit_regularizer(Mixing(), X, 0.1), "the output of a sample depends on the other samples"),
        (lambda: implicit_regularizer(nn.Unflatten(1, (1, 3)), X, 0.1), "Unflatten has no trainable parameter"),
        (
            lambda: implicit_regularizer(nn.Sequential(mlp(4), nn.Unflatten(1, (2, 2))), X, 0.1),
            r"has to return a tensor of shape \(n, outputs\)",
        ),
        (lambda: implicit_regularizer(broken(), X, 0.1), "the gradients of the outputs are not finite; look at"),
    ],
)
def test_bad_input(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
