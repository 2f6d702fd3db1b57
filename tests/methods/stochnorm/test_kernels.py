"""Statistics of one pass against torch's and against float64; dtypes, layouts, derivatives that are refused."""

from __future__ import annotations

import pytest
import torch
from tests.methods.stochnorm.layers import MASK, activations, away_from_start
from torch import nn

from decaycast.methods.stochnorm import kernels, theory
from decaycast.methods.stochnorm.method import StochNorm2d

# statistics from shifted sums


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("centre", "shift"), [(0.0, 0.0), (1.5, 0.0), (300.0, 300.5), (300.0, 0.0), (-80.0, 80.0), (100.0, 100.0)]
)
def test_statistics_lose_no_digits(centre: float, shift: float, last: bool):
    x = (activations((28, 6, 40, 40), torch.float64) + centre).float().detach()
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, variance = kernels.statistics(x, torch.full((6,), shift))
    torchs = torch.batch_norm_update_stats(x, torch.zeros(6), torch.ones(6), 0.0)
    expected = theory.batch_statistics(x.double())
    deviation = expected[1].sqrt()

    def errors(mean: torch.Tensor, variance: torch.Tensor) -> tuple[float, float]:
        return float(((mean - expected[0]) / deviation).abs().max()), float((variance / expected[1] - 1).abs().max())

    ours, theirs = errors(mean, variance), errors(*torchs)
    assert ours[0] <= max(theirs[0], 5e-7) and ours[1] <= max(theirs[1], 2e-6)


@pytest.mark.parametrize("last", [False, True])
def test_channels_far_from_the_origin_alone_are_done_by_torch(last: bool):
    x = activations((20, 16, 30, 30), torch.float64).float().detach()
    x[:, 3] += 1000
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, variance = kernels.statistics(x, torch.zeros(16))
    torchs = torch.batch_norm_update_stats(x[:, 3:4].contiguous(), torch.zeros(1), torch.ones(1), 0.0)
    assert mean[3] == torchs[0] and variance[3] == torchs[1]
    torch.testing.assert_close(variance, theory.batch_statistics(x.double())[1].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 100], ids=["few values", "many values"])
@pytest.mark.parametrize("last", [False, True])
def test_statistics_of_reduced_precision_are_float32(dtype: torch.dtype, size: int, last: bool):
    x = (200 * activations((8, 6, size, size), torch.float64).detach() + 900).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, variance = kernels.statistics(x, torch.zeros(6))
    assert mean.dtype == variance.dtype == torch.float32
    expected = theory.batch_statistics(x.double())
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), expected[1], rtol=1e-4, atol=0)  # 160,000: too large for float16


def test_half_precision_moves_buffers_like_batch_norm():
    layer, norm = StochNorm2d(6, momentum=1.0), nn.BatchNorm2d(6, momentum=1.0)
    x = (400 * activations((8, 6, 8, 8), torch.float64).detach()).to(torch.float16)
    layer(x, MASK), norm(x)
    torch.testing.assert_close(layer.running_var, norm.running_var, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)


def test_parts_of_a_channels_last_tensor_stay_channels_last():
    layer = away_from_start(StochNorm2d(6))
    whole = activations((4, 6, 9, 5), torch.float32, last=True)
    part = whole[:, :, ::2]
    y = layer(part, MASK)
    y.sum().backward()
    assert not part.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = away_from_start(StochNorm2d(6))(part.detach().contiguous(), MASK)
    torch.testing.assert_close(y, expected)


def test_other_devices_take_plain_operations():
    layer = StochNorm2d(6, device="meta")
    y = layer(torch.empty(4, 6, 5, 3, device="meta"))
    assert y.device.type == "meta" and y.shape == (4, 6, 5, 3)


def test_subclasses_of_tensors_stay_what_they_are():
    class Marked(torch.Tensor): ...

    layer, other = away_from_start(StochNorm2d(6)), away_from_start(StochNorm2d(6))
    x = activations((4, 6, 5, 3), torch.float32).detach()
    y = layer(x.as_subclass(Marked), MASK)
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(torch.Tensor), other(x, MASK))
    torch.testing.assert_close(layer.running_var, other.running_var)
