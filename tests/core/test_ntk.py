"""The empirical kernel: routes against one-by-one gradients, against the closed form in the limit of width, and refusals."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decaycast.core import kernel, ntk_routes
from decaycast.core import ntk as module_under_test
from decaycast.core.ntk import MODES, empirical_ntk, ntk_route, ntk_vector_product

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6, bias=False), nn.LayerNorm(6, elementwise_affine=False),
        nn.GELU(), nn.Linear(6, 3),
    )  # fmt: skip


def convolutional() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    net[1].running_mean.normal_()
    return net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Sneaky(nn.Module):
    """Uses a layer's weight a second time, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x))) + torch.tanh(x @ self.a.weight.T) @ self.a.weight


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.read = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.read(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.read = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.read(self.block(x)[:, -1])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.read(torch.tanh(self.embed(x)).mean(1))


class Flat(nn.Module):
    """One output per sample, without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.net(x)[:, 0]


CASES = {
    "mlp": (mlp, (5,), "structured", "3 Linear layers, each called once"),
    "flat": (Flat, (5,), "structured", "2 Linear layers"),
    "conv": (convolutional, (2, 4, 4), "generic", "0.weight belongs to Conv2d"),
    "tied": (Tied, (5,), "generic", "a.weight is shared with b"),
    "sneaky": (Sneaky, (5,), "generic", "a.weight is used beside its Linear layer"),
    "twice": (Twice, (5,), "generic", "a is called 2 times as a layer, not once"),
    "sequence": (lambda: nn.Sequential(nn.Linear(5, 2), nn.Flatten()), (3, 5), "generic", "not one vector per sample"),
    "attention": (Attention, (6, 4), "generic", "belongs to MultiheadAttention"),
    "words": (Words, (4,), "generic", "embed.weight belongs to Embedding"),
    "recurrent": (Recurrent, (6, 5), "loop", "torch.func cannot batch its gradients"),
}


def case(name: str, n1: int = 7, n2: int = 4):
    torch.manual_seed(1)
    make, shape, route, reason = CASES[name]
    model = make().double().eval()
    if name == "words":
        x1, x2 = torch.randint(6, (n1, *shape)), torch.randint(6, (n2, *shape))
    else:
        x1, x2 = torch.randn(n1, *shape).double(), torch.randn(n2, *shape).double()
    return model, x1, x2, route, reason


def jacobian(model: nn.Module, x: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
    """Shape (n, c, all parameters): plain backward passes, sample by sample and output by output."""
    known = dict(model.named_parameters())
    leaves = [known[name] for name in names or known]
    rows = [
        torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(f, leaves, retain_graph=True, materialize_grads=True)]
                )
                for f in model(sample[None]).reshape(-1)
            ]
        )
        for sample in x
    ]
    return torch.stack(rows)


def by_hand(model, x1, x2, names=None) -> torch.Tensor:
    return torch.einsum("iap,jbp->ijab", jacobian(model, x1, names), jacobian(model, x2, names))


def as_mode(full: torch.Tensor, mode: str) -> torch.Tensor:
    diagonal = full.diagonal(dim1=2, dim2=3)
    return {"full": full, "per_output": diagonal, "trace": diagonal.sum(-1), "mean": diagonal.mean(-1)}[mode]


# routes


@pytest.mark.parametrize("name", CASES)
def test_every_route_is_the_product_of_gradients(name: str):
    model, x1, x2, route, reason = case(name)
    found = ntk_route(model, x1)
    assert found.name == route and reason in found.reason
    possible = {"structured": ["structured", "generic", "loop"], "generic": ["generic", "loop"], "loop": ["loop"]}[
        route
    ]
    for other in (None, x2):
        want = by_hand(model, x1, x1 if other is None else other)
        for how in ["auto", *possible]:
            for mode in MODES:
                got = empirical_ntk(model, x1, other, mode=mode, route=how)
                assert torch.allclose(got, as_mode(want, mode), rtol=1e-10, atol=1e-12), (how, mode)


@pytest.mark.parametrize(("name", "memory"), [("mlp", 3_000), ("mlp", 30_000), ("conv", 30_000), ("tied", 9_000)])
def test_a_small_memory_only_makes_more_blocks(name: str, memory: int):
    model, x1, x2, route, _ = case(name, 18, 5)  # eighteen samples: several blocks even with all the memory
    for other in (None, x2):
        for mode in MODES:
            whole = empirical_ntk(model, x1, other, mode=mode, route=route, memory_bytes=2**30)
            found = empirical_ntk(model, x1, other, mode=mode, route=route, memory_bytes=memory)
            assert torch.allclose(found, whole, rtol=1e-11, atol=1e-12)
            if other is None:
                flipped = found.permute(1, 0, 3, 2) if mode == "full" else found.transpose(0, 1)
                assert torch.equal(found, flipped)


@pytest.mark.parametrize("memory", [8_000, 32_000, 2**20])
def test_blocks_of_outputs_are_not_mixed_up(memory: int):
    # 4,000 numbers: eight of sixteen outputs and four of seven samples at a time, the columns kept
    torch.manual_seed(0)
    model, x = nn.Linear(3, 16).double(), torch.randn(7, 3).double()
    want = torch.einsum("ij,ab->ijab", x @ x.T + 1.0, torch.eye(16).double())
    assert torch.allclose(empirical_ntk(model, x, memory_bytes=memory), want)
    assert torch.allclose(empirical_ntk(model, x, x.clone(), memory_bytes=memory), want)


@pytest.mark.parametrize("name", ["mlp", "conv", "words"])
def test_only_the_chosen_parameters_count(name: str):
    model, x1, x2, *_ = case(name)
    every = [name for name, _ in model.named_parameters()]
    for names in ([every[0]], every[1:2], every[:2] + every[-1:]):
        want = by_hand(model, x1, x2, names)
        assert torch.allclose(empirical_ntk(model, x1, x2, parameters=names), want, rtol=1e-10, atol=1e-12)
        generic = empirical_ntk(model, x1, x2, parameters=names, route="generic", mode="trace")
        assert torch.allclose(generic, as_mode(want, "trace"), rtol=1e-10, atol=1e-12)
    next(model.parameters()).requires_grad_(False)
    want = by_hand(model, x1, x2, every[1:])
    assert torch.allclose(empirical_ntk(model, x1, x2), want, rtol=1e-10, atol=1e-12)


def test_layers_alone_have_the_structured_route_beside_others_that_are_left_out():
    model, x1, *_ = case("conv")
    assert ntk_route(model, x1, parameters=["4.weight", "4.bias"]).name == "structured"
    assert ntk_route(model, x1, parameters=["4.weight", "1.bias"]).name == "generic"


@pytest.mark.parametrize("name", CASES)
def test_products_with_vectors_need_no_kernel(name: str):
    model, x1, x2, *_ = case(name)
    for other in (None, x2):
        full = by_hand(model, x1, x1 if other is None else other)
        vector = torch.randn(model(x1 if other is None else other).shape).double()
        want = torch.einsum("ijab,jb->ia", full, vector.reshape(len(vector), -1)).reshape(model(x1).shape)
        found = ntk_vector_product(model, x1, vector, other)
        assert torch.allclose(found, want, rtol=1e-9, atol=1e-11) and not found.requires_grad


@pytest.mark.parametrize("route", ["structured", "generic", "loop"])
def test_nothing_of_the_model_changes(route: str):
    model, x1, *_ = case("mlp")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].weight.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    empirical_ntk(model, x1, route=route)
    ntk_vector_product(model, x1, torch.ones(7, 3).double())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model[0].weight.grad == 1).all() and model[5].weight.grad is None
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error():
    model = Twice()
    ntk_route(model, torch.ones(2, 5))
    assert not model.a._forward_hooks


def test_buffers_are_used_and_stay():
    model, x1, *_ = case("conv")
    first = empirical_ntk(model, x1, mode="trace")
    model[1].running_var.mul_(4.0)
    assert not torch.allclose(empirical_ntk(model, x1, mode="trace"), first, rtol=0.1)
    assert int(model[1].num_batches_tracked) == 0


def test_a_kernel_inside_no_grad_is_the_same():
    model, x1, *_ = case("mlp")
    with torch.no_grad():
        inside = empirical_ntk(model, x1), empirical_ntk(model, x1, route="loop")
    assert torch.equal(inside[0], empirical_ntk(model, x1)) and torch.allclose(*inside)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_device_and_dtype_follow_the_model(device: str, name: str):
    model, x1, x2, *_ = case(name)
    want = empirical_ntk(model, x1, x2)
    found = empirical_ntk(model.to(device).float(), x1.to(device).float(), x2.to(device).float())
    assert (found.dtype, found.device.type, found.shape) == (torch.float32, device, (7, 4, 3, 3))
    assert (found.cpu() - want).abs().max() < 1e-5 * want.abs().max()


def test_the_full_kernel_is_a_free_view_of_a_matrix():
    model, x1, *_ = case("mlp")
    full = empirical_ntk(model, x1)
    matrix = full.transpose(1, 2).reshape(21, 21)
    assert matrix.data_ptr() == full.data_ptr()
    rows = jacobian(model, x1).flatten(0, 1)
    assert torch.allclose(matrix, rows @ rows.T)


# identities


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.2, 3.0), layers=st.integers(1, 4))
def test_bias_free_relu_networks_scale_with_their_degree(seed: int, scale: float, layers: int):
    torch.manual_seed(seed)
    widths = [4, *[6] * (layers - 1), 2]
    parts = [nn.Sequential(nn.Linear(a, b, bias=False), nn.ReLU()) for a, b in zip(widths, widths[1:])]
    model = nn.Sequential(*parts[:-1], parts[-1][0]).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    base = empirical_ntk(model, x)
    # f(scale*theta) = scale^layers * f(theta), so a gradient has one degree less and the kernel two of these
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    assert torch.allclose(empirical_ntk(model, x), scale ** (2 * (layers - 1)) * base, rtol=1e-10, atol=1e-14)
    assert torch.allclose(empirical_ntk(model, 3.0 * x), 9.0 * empirical_ntk(model, x), rtol=1e-10, atol=1e-14)
    values = torch.linalg.eigvalsh(base.transpose(1, 2).reshape(10, 10))
    assert values[0] > -1e-12 * values[-1]


# width


class NtkLinear(nn.Module):
    """A layer of the ntk parametrisation: z = sqrt(V_w/n)*W u + sqrt(V_b)*beta."""

    def __init__(self, inputs: int, outputs: int, vw: float, vb: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64)) if vb else None
        self.scales = math.sqrt(vw / inputs), math.sqrt(vb)

    def forward(self, u):
        z = self.scales[0] * u @ self.weight.T
        return z if self.bias is None else z + self.scales[1] * self.bias


def standard_linear(inputs: int, outputs: int, vw: float, vb: float) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=vb > 0, dtype=torch.float64)
    nn.init.normal_(layer.weight, std=math.sqrt(vw / inputs))
    if vb:
        nn.init.normal_(layer.bias, std=math.sqrt(vb))
    return layer


class Erf(nn.Module):
    def forward(self, x):
        return torch.erf(x)


def relative_errors(activation: str, vb: float, parametrisation: str, width: int, seeds: int) -> tuple[float, float]:
    """Root mean square over seeds of the relative error of one draw of the kernel, and of the mean over draws."""
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(width)
    vw = 1.8
    widths = [width, 2 * width]  # unequal, so that a wrong factor of width shows
    layer = NtkLinear if parametrisation == "ntk" else standard_linear
    act = nn.ReLU if activation == "relu" else Erf
    limit = kernel.ntk(
        x, depth=2, activation=activation, weight_variance=vw, bias_variance=vb, parametrisation=parametrisation,
        widths=None if parametrisation == "ntk" else widths,
    )  # fmt: skip
    off = []
    for _ in range(seeds):
        net = nn.Sequential(
            layer(5, widths[0], vw, vb), act(), layer(widths[0], widths[1], vw, vb), act(), layer(widths[1], 4, vw, vb)
        )
        off.append((empirical_ntk(net, x, mode="mean") - limit) / limit.norm())
    errors = torch.stack(off)
    return float(errors.square().sum((1, 2)).mean().sqrt()), float(errors.mean(0).norm())


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("vb", [0.0, 0.3])
@pytest.mark.parametrize("parametrisation", ["ntk", "standard"])
def test_wide_networks_reach_the_closed_form_like_one_over_the_root_of_width(
    activation: str, vb: float, parametrisation: str
):
    widths, seeds = (24, 96, 384), 24
    found = [relative_errors(activation, vb, parametrisation, width, seeds) for width in widths]
    one = [draw for draw, _ in found]
    # sixteen times the width is a quarter of the error: slope -1/2; with 24 draws it spreads by about 0.06
    slope = math.log(one[2] / one[0]) / math.log(widths[2] / widths[0])
    assert -0.7 < slope < -0.3, one
    assert one[2] < 0.2
    # no bias beyond noise: the mean of 24 draws is off by a fifth of what one draw is, three standard errors at most
    assert found[2][1] < 0.6 * one[2], found


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_a_very_wide_network_is_within_four_percent(activation: str):
    draw, _ = relative_errors(activation, 0.1, "standard", 4096, 2)
    assert draw < 0.04


# bad input


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x) - self.a(x).mean(0)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x).detach()


class Maps(nn.Module):
    def forward(self, x):
        return {"logits": x}


def frozen() -> nn.Module:
    return nn.Linear(5, 3).requires_grad_(False)


def exploded() -> nn.Module:
    model = nn.Linear(5, 3)
    nn.init.constant_(model.weight, math.inf)
    return model


REFUSED = [
    (nn.ReLU, {}, "ReLU has no trainable parameter, so its kernel is empty"),
    (frozen, {}, "Linear has no trainable parameter"),
    (lambda: nn.Linear(5, 3), {"parameters": []}, "parameters is an empty list"),
    (lambda: nn.Linear(5, 3), {"parameters": ["weigth"]}, "weight"),
    (lambda: nn.Linear(5, 3), {"parameters": "weight"}, r"got the text 'weight'; write \['weight'\]"),
    (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), {}, r"BatchNorm1d \(1\) is in training mode and ties"),
    (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.2)),
        {},
        r"Dropout \(1\) is in training mode and draws random",
    ),
    (Mixing, {}, "depends on the other samples of the batch, or on chance"),
    (Unused, {}, "the outputs do not depend on the chosen parameters"),
    (exploded, {}, "the model's outputs are not finite"),
    (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2))),
        {},
        r"has to return .* got \(2, 2, 2\) for n = 2",
    ),
    (lambda: nn.Sequential(nn.Linear(5, 3), Maps()), {}, "has to return .* got dict for n = 2"),
    (
        lambda: nn.Linear(5, 3),
        {"x": torch.ones(0, 5)},
        r"x1 has to be a tensor with at least one sample.* got \(0, 5\)",
    ),
    (lambda: nn.Linear(5, 3), {"x": [1.0]}, "x1 has to be a tensor with at least one sample.* got list"),
    (lambda: nn.Linear(5, 3), {"x": torch.full((2, 5), math.nan)}, "x1 has to be finite"),
]


@pytest.mark.parametrize(("make", "changed", "message"), REFUSED)
def test_what_has_no_kernel_is_refused(make, changed, message: str):
    x = changed.pop("x") if "x" in (changed := dict(changed)) else torch.linspace(-1.0, 1.0, 20).view(4, 5).sin()
    for call in (empirical_ntk, ntk_route, lambda *a, **k: ntk_vector_product(a[0], a[1], torch.ones(4, 3), **k)):
        with pytest.raises(ValueError, match=message):
            call(make(), x, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "sum"}, "mode"),
        ({"route": "fast"}, "route"),
        ({"memory_bytes": 0}, "memory_bytes has to be positive, got 0"),
        ({"x2": torch.full((2, 5), math.inf)}, "x2 has to be finite"),
    ],
)
def test_bad_arguments_are_named(changed, message: str):
    with pytest.raises(ValueError, match=message):
        empirical_ntk(nn.Linear(5, 3), torch.ones(4, 5), **changed)


def test_a_route_the_model_does_not_have_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no structured kernel: a.weight is shared with b; use route='auto'"):
        empirical_ntk(Tied(), torch.ones(4, 5), route="structured")


def test_a_vector_has_to_fit_the_outputs():
    with pytest.raises(ValueError, match=r"vector has shape \(4,\), but the outputs have \(4, 3\)"):
        ntk_vector_product(nn.Linear(5, 3), torch.ones(4, 5), torch.ones(4))


def test_the_examples_are_true():
    for module in (module_under_test, ntk_routes):
        assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module_under_test).attempted > 4
