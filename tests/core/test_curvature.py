from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.networks import NETWORKS, function_of, loss_fn, network, true_ggn, true_hessian
from torch import nn

from decaycast.core import curvature
from decaycast.core.curvature import Curvature

mse = nn.functional.mse_loss


def small(seed: int = 0, n: int = 12):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(n, 3, dtype=torch.float64), torch.randint(0, 2, (n,))


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_is_torchs(name: str):
    model, x, y = network(name)
    found = Curvature(model, loss_fn, [(x, y)]).dense()
    torch.testing.assert_close(found, true_hessian(name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_ggn_is_that_of_the_jacobian(name: str):
    model, x, y = network(name)
    found = Curvature(model, loss_fn, [(x, y)], "ggn").dense()
    torch.testing.assert_close(found, true_ggn(name), rtol=1e-9, atol=1e-12)


def test_hessian_agrees_with_finite_differences_of_gradients():
    model, x, y = network("attention")
    function, flat = function_of(model, x, lambda output: loss_fn(output, y))
    direction = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def slope(theta):
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(function(theta), theta)[0]

    expected = (slope(flat + 1e-5 * direction) - slope(flat - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(
        Curvature(model, loss_fn, [(x, y)]).products(direction[None])[0], expected, rtol=1e-6, atol=1e-8
    )


def test_hessian_equals_ggn_at_zero_loss_and_nowhere_else():
    model, x, _ = small()
    target = model(x).detach()
    hessian, ggn = (Curvature(model, mse, [(x, target)], which).dense() for which in curvature.MATRICES)
    torch.testing.assert_close(hessian, ggn)
    hessian, ggn = (Curvature(model, mse, [(x, target + 1)], which).dense() for which in curvature.MATRICES)
    assert (hessian - ggn).norm() > 0.1 * ggn.norm()


@pytest.mark.parametrize("which", curvature.MATRICES)
def test_gradient_is_that_of_the_mean_loss(which: str):
    model, x, y = small()
    expected = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    found = Curvature(model, loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])], which).gradient()
    torch.testing.assert_close(found, torch.cat([part.flatten() for part in expected]))


@settings(max_examples=15, deadline=None)
@given(
    cut=st.integers(1, 11), which=st.sampled_from(curvature.MATRICES), rows=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_batches_of_unequal_size_count_by_their_samples(cut: int, which: str, rows: int, seed: int):
    model, x, y = small(seed)
    whole = Curvature(model, loss_fn, [(x, y)], which)
    parts = Curvature(model, loss_fn, [(x[:cut], y[:cut]), (x[cut:], y[cut:])], which)
    vectors = torch.randn(rows, whole.size, dtype=torch.float64)
    torch.testing.assert_close(parts.products(vectors), whole.products(vectors))


@pytest.mark.parametrize("which", curvature.MATRICES)
def test_products_one_by_one_are_those_of_a_block(which: str, monkeypatch: pytest.MonkeyPatch):
    model, x, y = network("mlp")
    vectors = torch.randn(7, true_hessian("mlp").shape[0], dtype=torch.float64)
    together = Curvature(model, loss_fn, [(x, y)], which).products(vectors)
    monkeypatch.setitem(curvature._TOGETHER, "cpu", 1)
    torch.testing.assert_close(Curvature(model, loss_fn, [(x, y)], which).products(vectors), together)


def test_a_generator_of_batches_is_gone_through_again_and_again():
    model, x, y = small()
    both = [(x[:5], y[:5]), (x[5:], y[5:])]
    stream = Curvature(model, loss_fn, (batch for batch in both))
    torch.testing.assert_close(stream.dense(), Curvature(model, loss_fn, both).dense())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    torch.testing.assert_close(Curvature(model, loss_fn, loader).dense(), stream.dense())


class Tricky(nn.Module):
    """Tied weights, an unused and a frozen parameter, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.two(torch.tanh(self.one(x)))) * self.frozen)


@pytest.mark.parametrize("which", curvature.MATRICES)
def test_tied_unused_and_frozen_parameters(which: str):
    torch.manual_seed(0)
    model, x, y = Tricky().double(), torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 3, (9,))
    model.norm.running_mean += 0.3
    found = Curvature(model, loss_fn, [(x, y)], which)
    assert list(found.shapes) == ["unused", "one.weight", "one.bias", "two.bias", "norm.weight", "norm.bias"]
    assert found.size == 2 + 9 + 3 + 3 + 3 + 3
    matrix = found.dense()
    assert not matrix[:2].any() and matrix[2:].abs().sum(1).min() > 0

    def loss_at(flat):
        parts = {name: part.view(shape) for (name, shape), part in zip(found.shapes.items(), found.parts(flat))}
        return loss_fn(torch.func.functional_call(copy.deepcopy(model).eval(), parts, (x,)), y)

    if which == "hessian":
        flat = torch.cat([dict(model.named_parameters())[name].detach().flatten() for name in found.shapes])
        torch.testing.assert_close(matrix, torch.autograd.functional.hessian(loss_at, flat))


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model, x, y = Tricky(), torch.randn(9, 3), torch.randint(0, 3, (9,))
    model.train()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    Curvature(model, loss_fn, [(x, y)]).dense()
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not model.frozen.requires_grad and torch.equal(random, torch.random.get_rng_state())


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    with pytest.raises(RuntimeError):
        Curvature(model, loss_fn, [(torch.zeros(2, 5), torch.zeros(2).long())]).dense()
    assert model[1].training


class Named(nn.Module):
    """As Hugging Face's models: named inputs, an output object that holds the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, values, labels=None):
        logits = self.line(values)
        return SimpleNamespace(logits=logits, loss=loss_fn(logits, labels) if labels is not None else None)


def test_dict_batches_and_output_objects():
    torch.manual_seed(0)
    model, x, y = Named().double(), torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    expected = Curvature(model.line, loss_fn, [(x, y)]).dense()
    torch.testing.assert_close(
        Curvature(model, lambda output, _: output.loss, [{"values": x, "labels": y}]).dense(), expected
    )
    by_logits = lambda output, target: loss_fn(output.logits, target)  # noqa: E731
    for batch in ({"values": x, "labels": y}, ({"values": x}, y), ((x,), y)):
        for which in curvature.MATRICES:  # a linear model: both are the same
            torch.testing.assert_close(Curvature(model, by_logits, [batch], which).dense(), expected)


@pytest.mark.parametrize("which", curvature.MATRICES)
def test_recurrent_layers_go_one_by_one(which: str):
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.read = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.read(self.cells(x)[0][:, -1])

    model, x, y = Last().double(), torch.randn(6, 4, 2, dtype=torch.float64), torch.randint(0, 2, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Curvature(model, loss_fn, [(x, y)], which)
        matrix = found.dense()
    if which == "hessian":
        function, flat = function_of(model, x, lambda output: loss_fn(output, y))
        torch.testing.assert_close(matrix, torch.autograd.functional.hessian(function, flat))


def test_parameters_of_two_dtypes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    mixed = copy.deepcopy(model)
    mixed[0].double()

    class Cast(nn.Module):
        def forward(self, x):
            return x.float()

    mixed.insert(1, Cast())
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    found = Curvature(mixed, loss_fn, [(x.double(), y)])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.dense().float(), Curvature(model, loss_fn, [(x, y)]).dense(), rtol=1e-3, atol=1e-5)


def test_the_module_inside_data_parallel_and_compile():
    model, x, y = small()
    expected = Curvature(model, loss_fn, [(x, y)]).dense()
    wrapped = nn.DataParallel(model)
    torch.testing.assert_close(Curvature(wrapped, loss_fn, [(x, y)]).dense(), expected)
    torch.testing.assert_close(Curvature(torch.compile(model, backend="eager"), loss_fn, [(x, y)]).dense(), expected)


class Rounded(torch.autograd.Function):
    """A first derivative, and none of it."""

    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * 2


X, Y = torch.ones(4, 3), torch.zeros(4).long()
LINE = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("model", "loss", "batches", "which", "text"),
    [
        (
            nn.Linear(3, 2).requires_grad_(False),
            loss_fn,
            [(X, Y)],
            "hessian",
            "no parameter of Linear requires a gradient",
        ),
        (nn.Sequential(nn.Flatten()), loss_fn, [(X, Y)], "hessian", "no parameter of Sequential requires a gradient"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta")),
            loss_fn,
            [(X, Y)],
            "hessian",
            "several devices \\(cpu, meta\\)",
        ),
        (LINE, loss_fn, [(X, Y)], "fisher", "matrix"),
        (LINE, loss_fn, [], "hessian", "batches is empty"),
        (LINE, loss_fn, X, "hessian", "batches has to be a list or loader of \\(inputs, target\\), got Tensor"),
        (LINE, loss_fn, 3, "hessian", "batches has to be a list or loader of \\(inputs, target\\), got int"),
        (LINE, loss_fn, [X], "hessian", "a batch must be a pair \\(inputs, target\\) or a dict .* got Tensor"),
        (LINE, loss_fn, [(X[:0], Y[:0])], "hessian", "a batch of size 0"),
        (LINE, loss_fn, [("text", Y)], "hessian", "hold no tensor with a dimension of samples"),
        (LINE, loss_fn, [(X, Y + 2)], "hessian", "labels run from 2 to 2, but the model has 2 outputs"),
        (
            LINE,
            nn.CrossEntropyLoss(reduction="none"),
            [(X, Y)],
            "hessian",
            "loss_fn has to return one number.*shape \\(4,\\)",
        ),
        (LINE, lambda output, target: 1.0, [(X, Y)], "hessian", "loss_fn has to return one number.*got float"),
        (
            LINE,
            lambda output, target: output.detach().sum(),
            [(X, Y)],
            "hessian",
            "the loss does not depend on any param",
        ),
        (
            LINE,
            lambda output, target: output.argmax(1).float().sum(),
            [(X, Y)],
            "hessian",
            "the loss does not depend on",
        ),
        (
            LINE,
            lambda output, target: Rounded.apply(output).square().sum(),
            [(X, Y)],
            "hessian",
            "cannot be differentiated twice",
        ),
        (
            Named(),
            lambda output, target: output.loss,
            [{"values": X}],
            "hessian",
            "loss_fn has to return one number.*None",
        ),
    ],
)
def test_bad_input(model, loss, batches, which, text):
    with pytest.raises(ValueError, match=text):
        Curvature(model, loss, batches, which).dense()


def test_an_output_without_tensor_or_gradient_has_no_ggn():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="the model returns tuple, but the ggn needs a tensor of outputs"):
        Curvature(Pair(3, 2), lambda output, target: loss_fn(output[0], target), [(X, Y)], "ggn").dense()

    batch = {"values": X, "labels": Y}
    with pytest.raises(ValueError, match="the loss does not use the model's outputs"):
        Curvature(Named(), lambda output, _: output.loss, [batch], "ggn").dense()

    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="the output does not depend on any parameter"):
        Curvature(Cut(3, 2), loss_fn, [(X, Y)], "ggn").dense()


def test_numbers_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        Curvature(LINE, loss_fn, [(X * torch.nan, Y)]).dense()
    line = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(line.weight)
    with pytest.raises(FloatingPointError, match="a product with the hessian of 3 parameters is not finite"):
        Curvature(line, lambda output, target: output.abs().sqrt().sum() + 1, [(X, Y)]).dense()


def test_vectors_of_another_shape():
    matrix = Curvature(LINE, loss_fn, [(X, Y)])
    for wrong in (torch.zeros(8), torch.zeros(2, 7)):
        with pytest.raises(ValueError, match="each row has to hold the 8 parameters"):
            matrix.products(wrong)
