"""The layers against the two-branch formula and against torch's batch norm; precision, layouts, transforms, bad input."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.stochnorm.layers import MASK, activations, away_from_start
from torch import nn

from decaycast.methods.stochnorm import kernels, theory
from decaycast.methods.stochnorm.method import StochNorm, StochNorm1d, StochNorm2d, StochNorm3d

LAYERS = {2: (StochNorm1d, nn.BatchNorm1d), 3: (StochNorm1d, nn.BatchNorm1d), 4: (StochNorm2d, nn.BatchNorm2d)}
LAYERS[5] = (StochNorm3d, nn.BatchNorm3d)
SHAPES = ((8, 6), (8, 6, 7), (4, 6, 5, 3), (3, 6, 4, 3, 2))


def two_branch_step(
    layer: StochNorm, x: torch.Tensor, mask: torch.Tensor, grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Output, gradients and moved buffers from the paper's formula in float64, with torch's batch norm moving the buffers."""
    wide = {name: value.detach().double().clone() for name, value in layer.state_dict().items()}
    x, weight, bias = (v.detach().double().clone().requires_grad_() for v in (x, wide["weight"], wide["bias"]))
    y = theory.two_branch(x, mask, wide["running_mean"], wide["running_var"], weight, bias, layer.eps)
    y.backward(grad.double())
    nn.functional.batch_norm(
        x.detach(), wide["running_mean"], wide["running_var"], training=True, momentum=layer.momentum
    )
    moved = {name: wide[name] for name in ("running_mean", "running_var")}
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad, **moved}  # type: ignore[dict-item]


def step(layer: StochNorm, x: torch.Tensor, mask: torch.Tensor | None, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    y = layer(x, mask)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {**found, "running_mean": layer.running_mean, "running_var": layer.running_var}  # type: ignore[dict-item]


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(
        float((found[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-30))
        for name, value in expected.items()
    )


# equality


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_a_step_is_that_of_the_two_branches(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, last: bool):
    if last and len(shape) < 4:
        pytest.skip("channels-last needs images or volumes")
    layer = away_from_start(LAYERS[len(shape)][0](6, dtype=dtype))
    x, grad = activations(shape, dtype, last), activations(shape, dtype, seed=1).detach()
    expected = two_branch_step(layer, x, MASK, grad)
    found = step(layer, x, MASK, grad)
    assert largest_difference(found, expected) < tolerance
    assert found["y"].stride() == x.stride() and found["x"].stride() == x.stride()


@given(
    seed=st.integers(0, 2**31),
    centre=st.floats(-1e3, 1e3),
    width=st.floats(1e-2, 1e2),
    momentum=st.floats(0, 1),
    mask=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_wherever_the_activations_lie(seed: int, centre: float, width: float, momentum: float, mask: list[bool]):
    layer = away_from_start(StochNorm2d(6, momentum=momentum, dtype=torch.float64), seed)
    x = (activations((4, 6, 5, 3), torch.float64, seed=seed) * width + centre).detach().requires_grad_()
    grad, chosen = activations((4, 6, 5, 3), torch.float64, seed=seed + 1).detach(), torch.tensor(mask)
    expected = two_branch_step(layer, x, chosen, grad)
    # what rounding of x itself, relative to its spread, does to (x - mean)
    tolerance = 1e-12 * max(1.0, abs(centre) / width)
    assert largest_difference(step(layer, x, chosen, grad), expected) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_p_one_is_batch_norm_to_the_bit(shape: tuple[int, ...], momentum: float | None):
    ours, theirs = LAYERS[len(shape)]
    layer, norm = away_from_start(ours(6, p=1, momentum=momentum)), away_from_start(theirs(6, momentum=momentum))
    for seed in range(3):
        x, grad = activations(shape, torch.float32, seed=seed), activations(shape, torch.float32, seed=9).detach()
        other = x.detach().clone().requires_grad_()
        y, expected = layer(x), norm(other)
        y.backward(grad)
        expected.backward(grad)
        assert torch.equal(y, expected) and torch.equal(x.grad, other.grad)
    for (name, found), expected in zip(layer.state_dict().items(), norm.state_dict().values()):
        assert torch.equal(found, expected), name
    assert torch.equal(layer.weight.grad, norm.weight.grad)


def test_p_one_without_statistics_and_without_affine():
    layer, norm = StochNorm1d(6, p=1, track_running_stats=False, affine=False), nn.BatchNorm1d(6, affine=False)
    x = activations((8, 6), torch.float32).detach()
    assert torch.equal(layer(x), norm(x))
    assert torch.equal(layer.eval()(x), nn.BatchNorm1d(6, affine=False, track_running_stats=False).eval()(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_p_zero_gives_the_output_of_evaluation_while_buffers_move(shape: tuple[int, ...]):
    layer = away_from_start(LAYERS[len(shape)][0](6, p=0))
    still, x = copy.deepcopy(layer).eval(), activations(shape, torch.float32).detach()
    assert torch.equal(layer(x), still(x))
    moved = away_from_start(LAYERS[len(shape)][1](6))
    moved(x)
    for name in ("running_mean", "running_var"):
        assert not torch.equal(getattr(layer, name), getattr(still, name))
        torch.testing.assert_close(getattr(layer, name), getattr(moved, name), rtol=1e-6, atol=1e-6)


def test_without_momentum_the_running_mean_is_the_plain_average():
    layer = StochNorm1d(6, momentum=None, dtype=torch.float64)
    batches = [activations((8, 6), torch.float64, seed=seed).detach() for seed in range(4)]
    for batch in batches:
        layer(batch)
    assert int(layer.num_batches_tracked) == 4
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))


def test_evaluation_is_batch_norm_and_does_not_look_at_a_mask():
    layer, norm = away_from_start(StochNorm2d(6)).eval(), away_from_start(nn.BatchNorm2d(6)).eval()
    x = activations((4, 6, 5, 3), torch.float32).detach()
    assert torch.equal(layer(x), norm(x)) and torch.equal(layer(x, MASK), norm(x))
    assert torch.equal(layer(x[:1, :, :1, :1]), norm(x[:1, :, :1, :1]))
    assert int(layer.num_batches_tracked) == 0


# gradients


@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 2, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape: tuple[int, ...]):
    layer = away_from_start(LAYERS[len(shape)][0](6, dtype=torch.float64))
    mean, variance = layer.running_mean, layer.running_var

    def output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kernels.mixed_norm(x, MASK, mean, variance, weight, bias, layer.eps)[0]

    inputs = activations(shape, torch.float64), layer.weight, layer.bias
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_the_backward_uses_the_statistics_from_before_they_moved():
    # the public implementations read the buffers after their update, which scales dx by sqrt(r_old/r_new)
    layer = StochNorm1d(1, p=0, momentum=1.0, dtype=torch.float64)
    x = (10 * activations((50, 1), torch.float64)).detach().requires_grad_()
    layer(x).sum().backward()
    assert float(layer.running_var) > 100
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / (1 + layer.eps) ** 0.5))


def test_without_affine_and_with_frozen_parts():
    bare = StochNorm2d(6, affine=False, dtype=torch.float64)
    x, mask = activations((4, 6, 5, 3), torch.float64), MASK
    full = StochNorm2d(6, dtype=torch.float64)
    other = x.detach().clone().requires_grad_()
    torch.testing.assert_close(bare(x, mask), full(other, mask))
    full.load_state_dict({**full.state_dict(), **bare.state_dict()})
    bare(x, mask).square().sum().backward(), full(other, mask).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    full.weight.requires_grad_(False)
    full.zero_grad()
    full(x.detach(), mask).sum().backward()
    assert full.weight.grad is None and full.bias.grad is not None
    full.bias.requires_grad_(False)
    assert not full(x.detach(), mask).requires_grad


def test_no_gradient_is_asked_for():
    layer = away_from_start(StochNorm2d(6))
    with torch.no_grad():
        assert not layer(activations((4, 6, 5, 3), torch.float32)).requires_grad


def test_activations_without_spread_are_no_trouble():
    layer = StochNorm2d(6)
    x = torch.zeros(4, 6, 5, 3, requires_grad=True)
    with torch.no_grad():
        x[:, 1] = 1e3
    layer(x, MASK).sum().backward()
    assert x.grad.isfinite().all() and layer.running_var.isfinite().all() and (layer.running_var >= 0).all()


def test_not_finite_activations_stay_visible():
    layer, x = StochNorm2d(6), activations((4, 6, 5, 3), torch.float32).detach()
    x[0, 0, 0, 0], x[0, 1, 0, 0] = torch.nan, torch.inf
    y = layer(x, MASK)
    assert y[:, 0].isnan().all() and y[0, 1].isinf().any() and y[:, 2:].isfinite().all()


# reduced precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["float32", "reduced"])
@pytest.mark.parametrize("last", [False, True])
def test_reduced_precision_keeps_its_dtype(dtype: torch.dtype, parameters: str, last: bool):
    layer = away_from_start(StochNorm2d(6)).to(dtype if parameters == "reduced" else torch.float32)
    x, grad = activations((4, 6, 5, 3), dtype, last), activations((4, 6, 5, 3), dtype, seed=1).detach()
    expected = two_branch_step(layer, x, MASK, grad)
    found = step(layer, x, MASK, grad)
    assert found["y"].dtype == found["x"].dtype == dtype and found["weight"].dtype == layer.weight.dtype
    assert largest_difference(found, expected) < 3 * torch.finfo(dtype).eps


def test_autocast():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), away_from_start(StochNorm2d(6)), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    assert model[1].running_mean.dtype == torch.float32


# masks


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_masks_mean_is_p(p: float):
    layer = StochNorm1d(1000, p=p, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([layer._drawn(torch.zeros(1)) for _ in range(100)])
    assert abs(float(drawn.double().mean()) - p) <= 4 * (p * (1 - p) / drawn.numel()) ** 0.5
    assert drawn.any() == (p > 0) and drawn.all() == (p == 1)


def test_channels_are_drawn_one_by_one_and_anew_at_every_call():
    layer = StochNorm1d(2000, generator=torch.Generator().manual_seed(0))
    a, b = (layer._drawn(torch.zeros(1)).double() for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1])) < 0.1


def test_a_layer_uses_the_mask_it_draws():
    layer = away_from_start(StochNorm2d(6, p=0.5, generator=torch.Generator().manual_seed(5)))
    mask = torch.rand(6, generator=torch.Generator().manual_seed(5)) < 0.5
    x, other = activations((4, 6, 5, 3), torch.float32).detach(), copy.deepcopy(layer)
    assert 0 < mask.sum() < 6
    assert torch.equal(layer(x), other(x, mask))


def test_seeds_reproduce():
    x = activations((4, 6, 5, 3), torch.float32).detach()

    def outputs(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        layer = away_from_start(StochNorm2d(6))
        return torch.stack([layer(x) for _ in range(5)])

    assert torch.equal(outputs(1), outputs(1)) and not torch.equal(outputs(1), outputs(2))


def test_p_can_be_changed():
    layer = StochNorm2d(6, p=0.5)
    layer.p = 0.25
    assert layer.p == 0.25 and "p=0.25" in repr(layer)


# state and copies


def test_state_loads_both_ways_strictly():
    layer, norm = away_from_start(StochNorm2d(6), 1), away_from_start(nn.BatchNorm2d(6), 2)
    assert list(layer.state_dict()) == list(norm.state_dict())
    norm.load_state_dict(layer.state_dict())
    assert torch.equal(norm.running_var, layer.running_var)
    away_from_start(norm, 3)
    layer.load_state_dict(norm.state_dict())
    assert torch.equal(norm.weight, layer.weight)


def test_copies_go_on_alike():
    layer = away_from_start(StochNorm2d(6, generator=torch.Generator().manual_seed(0)))
    x = activations((4, 6, 5, 3), torch.float32).detach()
    layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.running_mean, other.running_mean)


def test_a_whole_layer_can_be_saved():
    layer, kept = away_from_start(StochNorm2d(6, p=0.3)), io.BytesIO()
    torch.save(layer, kept)
    kept.seek(0)
    other = torch.load(kept, weights_only=False)
    assert other.p == 0.3 and torch.equal(other.weight, layer.weight)


# bad input


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), float("inf")])
def test_p_outside_its_range(p: float):
    for make in (lambda: StochNorm2d(6, p=p), lambda: setattr(StochNorm2d(6), "p", p)):
        with pytest.raises(ValueError, match=r"p is the probability of batch statistics and must lie in \[0, 1\], got"):
            make()


def test_p_of_numpy():
    assert StochNorm2d(6, p=np.float32(0.5)).p == 0.5


@pytest.mark.parametrize("p", ["0.5", None, True, 1j])
def test_p_that_is_no_number(p: Any):
    with pytest.raises(TypeError, match="p must be a number in"):
        StochNorm2d(6, p=p)


def test_no_running_statistics():
    with pytest.raises(ValueError, match=r"p = 0\.5 needs running statistics; set track_running_stats=True"):
        StochNorm2d(6, track_running_stats=False)
    layer = StochNorm2d(6, p=1, track_running_stats=False)
    layer.p = 0.5
    with pytest.raises(ValueError, match="needs running statistics, which this layer does not track"):
        layer(torch.zeros(2, 6, 2, 2))


@pytest.mark.parametrize(
    ("layer", "shape"), [(StochNorm1d, (1, 6)), (StochNorm2d, (1, 6, 1, 1)), (StochNorm1d, (0, 6))]
)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_one_value_per_channel(layer: type[StochNorm], shape: tuple[int, ...], p: float):
    norm = layer(6, p=p)
    with pytest.raises(ValueError, match="training needs more than one value per channel"):
        norm(torch.ones(shape))
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_one_value_per_channel_at_p_one():
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # torch's own words
        StochNorm2d(6, p=1)(torch.ones(1, 6, 1, 1))


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (StochNorm1d, (2, 6, 3, 3), "expected 2D or 3D input"),
        (StochNorm2d, (2, 6), "expected 4D input"),
        (StochNorm3d, (2, 6, 3, 3), "expected 5D input"),
        (StochNorm2d, (2, 5, 3, 3), r"expected 6 channels, got an input of shape \(2, 5, 3, 3\)"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_dimensions(layer: type[StochNorm], shape: tuple[int, ...], words: str, training: bool):
    with pytest.raises(ValueError, match=words):
        layer(6).train(training)(torch.ones(shape))


@pytest.mark.parametrize(
    "mask", [torch.ones(6), torch.ones(5, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)], ids=str
)
def test_masks_of_another_kind(mask: torch.Tensor):
    with pytest.raises(ValueError, match=r"a mask holds booleans of shape \(6,\) on cpu, got"):
        StochNorm2d(6)(torch.ones(2, 6, 3, 3), mask)


def test_a_generator_of_another_device():
    layer = StochNorm1d(6, generator=torch.Generator(), device="meta")
    with pytest.raises(ValueError, match="the generator is on cpu and the input on meta"):
        layer(torch.ones(4, 6, device="meta"))


def test_no_channels():
    with pytest.raises(ValueError, match="training needs more than one value per channel"):
        StochNorm1d(0)(torch.ones(4, 0))


def test_inputs_that_are_not_floating():
    with pytest.raises(TypeError, match=r"expected a floating input, got torch\.int64"):
        StochNorm1d(6)(torch.ones(4, 6, dtype=torch.int64))


def test_the_base_class_is_no_layer():
    with pytest.raises(TypeError, match="StochNorm is what the layers share; make a StochNorm1d, StochNorm2d"):
        StochNorm(6)
