"""The closed forms against quadrature, against random networks, and against what must hold for any kernel."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from decaycast.core import kernel
from decaycast.core.kernel import nngp, ntk

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PHI = {"relu": lambda u: np.maximum(u, 0.0), "erf": erf}
SLOPE = {"relu": lambda u: (u > 0).astype(float), "erf": lambda u: 2.0 / math.sqrt(math.pi) * np.exp(-(u**2))}


def inputs(n: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expectation(phi, q1: float, q2: float, covariance: float) -> float:
    """E[phi(u) phi(v)] in polar coordinates of (u, v), angle by angle between the kinks; no closed form involved."""
    cosine = np.clip(covariance / math.sqrt(q1 * q2), -1.0, 1.0)
    angle = math.acos(cosine)
    # u = sqrt(q1)*r*cos(t), v = sqrt(q2)*r*cos(t - angle): both change sign where a cosine does
    kinks = sorted({t % (2 * math.pi) for base in (0.0, angle) for t in (base + math.pi / 2, base - math.pi / 2)})
    edges = [*kinks, kinks[0] + 2 * math.pi]
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r, r_weights = 6.5 * (nodes + 1.0), 6.5 * weights
    total = 0.0
    for low, high in itertools.pairwise(edges):
        t, t_weights = low + (high - low) * (nodes + 1.0) / 2.0, (high - low) * weights / 2.0
        u = math.sqrt(q1) * r[:, None] * np.cos(t)
        v = math.sqrt(q2) * r[:, None] * np.cos(t - angle)
        total += float((r * np.exp(-(r**2) / 2) * r_weights) @ (phi(u) * phi(v)) @ t_weights)
    return total / (2 * math.pi)


def by_quadrature(x, y, *, depth, activation, vw, vb, weights_share, bias_share) -> tuple[float, float]:
    """K and Theta of one pair, layer by layer, every expectation by quadrature."""
    d = len(x)
    q1, q2, k = (vw * float(a @ b) / d + vb for a, b in ((x, x), (y, y), (x, y)))
    theta = weights_share[0] * float(x @ y) / d + bias_share
    for share in weights_share[1:]:
        second = expectation(PHI[activation], q1, q2, k)
        slope = expectation(SLOPE[activation], q1, q2, k)
        theta = share * second + bias_share + vw * slope * theta
        q1, q2 = (vw * expectation(PHI[activation], q, q, q) + vb for q in (q1, q2))
        k = vw * second + vb
    assert len(weights_share) == depth + 1
    return k, theta


# the recursion


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("vb", [0.0, 0.3])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_layer_is_the_gaussian_expectation(activation: str, vb: float, depth: int):
    x, y = inputs(3, 4), inputs(2, 4, seed=1)
    options = {"depth": depth, "activation": activation, "weight_variance": 1.7, "bias_variance": vb}
    widths = [50, 70, 90][:depth]
    found = nngp(x, y, **options), ntk(x, y, **options), ntk(x, y, parametrisation="standard", widths=widths, **options)
    for i, j in itertools.product(range(3), range(2)):
        pair = {"depth": depth, "activation": activation, "vw": 1.7, "vb": vb}
        k, theta = by_quadrature(x[i].numpy(), y[j].numpy(), weights_share=[1.7] * (depth + 1), bias_share=vb, **pair)
        _, standard = by_quadrature(
            x[i].numpy(), y[j].numpy(), weights_share=[4, *widths], bias_share=float(vb > 0), **pair
        )
        want = torch.tensor([k, theta, standard], dtype=torch.float64)
        got = torch.stack([kernel[i, j] for kernel in found])
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-11), (i, j)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("vb", [0.0, 0.3])
@pytest.mark.parametrize("train_bias", [False, True])
def test_biases_may_be_fixed_or_start_at_zero(activation: str, vb: float, train_bias: bool):
    x, y = inputs(1, 4), inputs(1, 4, seed=1)
    options = {"depth": 2, "activation": activation, "weight_variance": 1.3, "bias_variance": vb}
    pair = {"depth": 2, "activation": activation, "vw": 1.3, "vb": vb}
    for parametrisation, share, one in (("ntk", [1.3] * 3, vb), ("standard", [4, 30, 20], 1.0)):
        _, want = by_quadrature(x[0].numpy(), y[0].numpy(), weights_share=share, bias_share=one * train_bias, **pair)
        widths = None if parametrisation == "ntk" else (30, 20)
        found = ntk(x, y, parametrisation=parametrisation, widths=widths, train_bias=train_bias, **options)
        assert float(found) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("function", [nngp, ntk])
@pytest.mark.parametrize("options", [{}, {"bias_variance": 0.2}, {"activation": "erf", "bias_variance": 0.2}])
def test_blocks_and_symmetry_change_nothing(function, options, monkeypatch: pytest.MonkeyPatch):
    x, y = inputs(23, 5), inputs(11, 5, seed=1)
    both = torch.cat([x, y])
    whole = function(both, depth=3, **options)
    for sizes in [(5, 7), (4, 1), (16, 60)]:
        monkeypatch.setattr(kernel, "_block_sizes", lambda out, sizes=sizes: sizes)
        assert torch.allclose(function(both, depth=3, **options), whole, rtol=1e-13)
        assert torch.allclose(function(x, y, depth=3, **options), whole[:23, 23:], rtol=1e-13)
    assert torch.equal(whole, whole.T)


def test_one_width_stands_for_all_layers():
    x = inputs(4, 3)
    standard = {"depth": 2, "parametrisation": "standard"}
    assert torch.equal(ntk(x, widths=60, **standard), ntk(x, widths=[60, 60], **standard))


# networks: with one hidden layer the mean over random networks is exact at every width


def random_networks(count: int, x: torch.Tensor, activation: str, vw: float, vb: float, width: int):
    """Outputs f, and the kernel by hand in both parametrisations, of `count` networks with one hidden layer."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d = x.shape[1]
    hidden = math.sqrt(vw / d) * draw(count, width, d) @ x.T + math.sqrt(vb) * draw(count, width, 1)
    read = math.sqrt(vw / width) * draw(count, width, 1)
    phi = hidden.clamp(min=0.0) if activation == "relu" else torch.erf(hidden)
    slope = (hidden > 0).double() if activation == "relu" else 2 / math.sqrt(math.pi) * torch.exp(-(hidden**2))
    outputs = (read * phi).sum(1) + math.sqrt(vb) * draw(count, 1)
    signals = read * slope
    gram = signals.transpose(1, 2) @ signals
    last = phi.transpose(1, 2) @ phi
    standard = last + 1.0 + gram * (x @ x.T + 1.0)
    scaled = vw / width * last + vb + gram * (vw / d * x @ x.T + vb)
    return outputs, scaled, standard


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("vb", [0.0, 0.4])
def test_means_over_random_networks_agree_within_their_standard_error(activation: str, vb: float):
    count, x = 20_000, inputs(3, 4)
    outputs, scaled, standard = random_networks(count, x, activation, 1.6, vb, width=4)
    options = {"depth": 1, "activation": activation, "weight_variance": 1.6, "bias_variance": vb}
    for draws, want in (
        (outputs[:, :, None] * outputs[:, None, :], nngp(x, **options)),
        (scaled, ntk(x, **options)),
        (standard, ntk(x, parametrisation="standard", widths=4, train_bias=True, **options)),
    ):
        error = draws.std(0) / math.sqrt(count)
        assert ((draws.mean(0) - want).abs() < 4.0 * error).all()
        assert (error < 0.05 * want.diagonal().max()).all()


# identities


def test_relu_without_bias_is_homogeneous_in_inputs_and_weights():
    x, y, depth = inputs(4, 3), inputs(3, 3, seed=1), 3
    for function in (nngp, ntk):
        base = function(x, y, depth=depth, weight_variance=1.7)
        assert torch.allclose(function(-2.5 * x, -0.3 * y, depth=depth, weight_variance=1.7), 0.75 * base, rtol=1e-13)
        # kernels are of degree depth + 1 in the variance, that is 2*(depth + 1) in the weights
        stronger = function(x, y, depth=depth, weight_variance=1.7 * 3.0)
        assert torch.allclose(stronger, 3.0 ** (depth + 1) * base, rtol=1e-13)


def test_the_diagonal_of_a_bias_free_relu_network_is_depth_plus_one_variances():
    # Euler: every layer contributes the same, and V_w = 2 keeps the variance at 2*|x|^2/d
    x = inputs(5, 3)
    variance = 2.0 * x.square().sum(1) / 3
    for depth in (0, 1, 4):
        assert torch.allclose(nngp(x, depth=depth).diagonal(), variance, rtol=1e-14)
        assert torch.allclose(ntk(x, depth=depth).diagonal(), (depth + 1) * variance, rtol=1e-14)


def test_a_linear_model_has_the_linear_kernel():
    x, y = inputs(4, 3), inputs(2, 3, seed=1)
    options = {"depth": 0, "weight_variance": 1.5, "bias_variance": 0.2}
    assert torch.allclose(nngp(x, y, **options), 0.5 * x @ y.T + 0.2)
    assert torch.allclose(ntk(x, y, **options), 0.5 * x @ y.T + 0.2)
    assert torch.allclose(ntk(x, y, parametrisation="standard", **options), x @ y.T + 1.0)


variances = st.floats(0.1, 4.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 5),
    activation=st.sampled_from(["relu", "erf"]),
    vw=variances,
    vb=st.sampled_from([0.0, 0.05, 1.5]),
    scale=st.floats(0.01, 30.0),
)
def test_kernels_are_symmetric_and_positive(seed, depth, activation, vw, vb, scale):
    x = scale * inputs(9, 4, seed=seed)
    x[3] = x[0]  # a repeated input makes the kernel singular, not indefinite
    options = {"depth": depth, "activation": activation, "weight_variance": vw, "bias_variance": vb}
    for function in (nngp, ntk):
        found = function(x, **options)
        assert torch.equal(found, found.T)
        values = torch.linalg.eigvalsh(found)
        assert values[0] > -1e-7 * values[-1]
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(function(x[order], **options), found[order][:, order], rtol=1e-9, atol=1e-12)
        assert torch.allclose(function(x, x.clone(), **options), found, rtol=1e-6, atol=1e-12)
    # training adds to what the last layer alone gives
    assert (ntk(x, **options).diagonal() >= nngp(x, **options).diagonal() * (1 - 1e-12)).all()


# rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [3, 784, 3072])
@pytest.mark.parametrize("vb", [0.0, 0.1])
def test_repeated_inputs_have_the_diagonal_also_across_sets(dtype: torch.dtype, features: int, vb: float):
    x = inputs(6, features, dtype=dtype)
    y = torch.cat([inputs(2, features, seed=1, dtype=dtype), x, 3.0 * x[:1]])
    eps = torch.finfo(dtype).eps
    for function in (nngp, ntk):
        same = function(x, depth=3, bias_variance=vb).diagonal()
        found = function(x, y, depth=3, bias_variance=vb)[:, 2:8].diagonal()
        assert ((found - same).abs() < 40 * eps * same).all()


def test_small_angles_keep_their_digits():
    for angle in (1e-1, 1e-3, 1e-5):
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        y = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        found = float(ntk(x, y, depth=1)) / 2.0
        want = (math.sin(angle) + 2 * (math.pi - angle) * math.cos(angle)) / (2 * math.pi)
        assert found == pytest.approx(want, abs=1e-15 / angle)


def test_opposite_inputs_share_nothing_but_biases():
    x = inputs(3, 4)
    assert ntk(x, -x, depth=1).diagonal().abs().max() < 1e-7  # rounding eps of the cosine is sqrt(eps) of the angle
    assert torch.isfinite(ntk(x, -x, depth=4, bias_variance=0.1)).all()


def test_an_input_of_zeros_has_no_kernel_but_that_of_biases():
    x = inputs(4, 3)
    x[2] = 0.0
    assert (ntk(x, depth=2)[2] == 0).all() and (ntk(x, depth=2)[:, 2] == 0).all()
    assert (nngp(x, x[1:], depth=2)[:, 1] == 0).all()
    started_at_zero = {"parametrisation": "standard", "widths": 9, "train_bias": True}
    assert (ntk(x, depth=2, **started_at_zero)[2] == 1).all()  # relu'(0) = 0, so only the last bias has a gradient
    for options in ({"bias_variance": 0.1}, {"activation": "erf"}):
        assert torch.isfinite(ntk(x, depth=2, **options)).all()
        assert (ntk(x, depth=2, bias_variance=0.1)[2, 2]) > 0


def test_very_large_and_very_small_inputs_stay_finite():
    x = inputs(4, 3)
    for scale, activation in itertools.product((1e-150, 1e-9, 1e9, 1e100), ("relu", "erf")):
        found = ntk(scale * x, depth=3, activation=activation, bias_variance=0.1)
        assert torch.isfinite(found).all() and torch.isfinite(ntk(scale * x, x, depth=3, activation=activation)).all()


def test_saturated_erf_layers_keep_their_diagonal_and_stay_finite():
    # here 1 - c^2 is 1/q, which float32 cannot tell from 0: the diagonal comes from the variances instead
    x = inputs(4, 3) * 1e5
    want = ntk(x, depth=2, activation="erf").diagonal()
    assert torch.allclose(ntk(x.float(), depth=2, activation="erf").diagonal().double(), want, rtol=1e-5)
    for dtype in (torch.float32, torch.float64):
        large = 1e6 * x.to(dtype)
        assert torch.isfinite(ntk(large, large.clone(), depth=2, activation="erf")).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_device_and_dtype_follow_the_input(device: str, activation: str):
    x, y = inputs(7, 30), inputs(5, 30, seed=1)
    options = {"depth": 3, "activation": activation, "bias_variance": 0.1}
    for dtype, accuracy in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        found = ntk(x.to(device, dtype), y.to(device, dtype), **options)
        assert (found.dtype, found.device.type, found.shape) == (dtype, device, (7, 5))
        want = ntk(x, y, **options)
        assert (found.cpu().double() - want).abs().max() < accuracy * want.abs().max()


# bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x1": torch.ones(3)}, r"x1 has to be a tensor of shape \(samples, features\), got \(3,\)"),
        ({"x1": torch.ones(0, 3)}, r"x1 has to be a tensor of shape .* got \(0, 3\)"),
        ({"x1": [[1.0]]}, "x1 has to be a tensor of shape .* got list"),
        ({"x2": torch.ones(2, 4)}, "x1 has 3 features and x2 has 4"),
        ({"x2": torch.ones(2, 3, dtype=torch.float64)}, r"x2 is torch.float64 on cpu; move one with x2.to\(x1\)"),
        ({"x1": torch.ones(2, 3, dtype=torch.int64)}, r"x1 has to be float32 or float64, got torch.int64"),
        ({"x1": torch.ones(2, 3, requires_grad=True)}, r"x1 requires a gradient.*x1.detach\(\)"),
        ({"x1": torch.tensor([[1.0, math.nan, 0.0]])}, "x1 has to be finite"),
        ({"x2": torch.tensor([[1.0, math.inf, 0.0]])}, "x2 has to be finite"),
        ({"depth": -1}, "depth is the number of hidden layers, a whole number >= 0, got -1"),
        ({"depth": 2.0}, "depth is the number of hidden layers, a whole number >= 0, got 2.0"),
        ({"activation": "rleu"}, "relu"),
        ({"weight_variance": 0.0}, "weight_variance must be finite and > 0, got 0.0"),
        ({"weight_variance": -1.0}, "weight_variance must be finite and > 0, got -1.0"),
        ({"weight_variance": math.inf}, "weight_variance must be finite and > 0, got inf"),
        ({"bias_variance": -0.1}, "bias_variance must be finite and >= 0, got -0.1"),
        ({"bias_variance": math.nan}, "bias_variance must be finite and >= 0, got nan"),
    ],
)
@pytest.mark.parametrize("function", [nngp, ntk])
def test_bad_arguments_are_named(function, changed, message: str):
    arguments = {"x1": torch.ones(2, 3), "depth": 1} | changed
    with pytest.raises(ValueError, match=message):
        function(arguments.pop("x1"), arguments.pop("x2", None), **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parametrisation": "mup"}, "parametrisation"),
        ({"widths": 100}, "widths do not matter in the ntk parametrisation, got 100"),
        ({"parametrisation": "standard"}, "grows with the width: give widths"),
        ({"parametrisation": "standard", "widths": [5]}, "widths has 1 entries for 2 hidden layers"),
        ({"parametrisation": "standard", "widths": [5, 0]}, r"whole numbers >= 1, got \[5, 0\]"),
        ({"parametrisation": "standard", "widths": [5, 2.5]}, r"whole numbers >= 1, got \[5, 2.5\]"),
    ],
)
def test_bad_widths_are_named(changed, message: str):
    with pytest.raises(ValueError, match=message):
        ntk(torch.ones(2, 3), depth=2, **changed)


def test_the_examples_are_true():
    assert doctest.testmod(kernel).failed == 0 and doctest.testmod(kernel).attempted > 2
