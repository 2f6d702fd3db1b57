"""Conversion of definitions people use: ResNet, EfficientNet, MobileNet, DenseNet and RegNet of timm, without weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from decaycast.methods.stochnorm.method import StochNorm

timm = pytest.importorskip("timm", reason="timm needs an environment of its own: make test-timm", exc_type=ImportError)
pytestmark = pytest.mark.timm

MODELS = {
    "resnet18": 20,
    "efficientnet_b0": 49,
    "mobilenetv2_100": 52,
    "mobilenetv3_small_100": 34,
    "densenet121": 121,
    "regnety_002": 44,
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 4])


def network(name: str) -> nn.Module:
    """A fresh network that has seen one batch, so that its running statistics are off their start."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_rate=0.0)
    with torch.no_grad():
        model.train()(IMAGES + 0.5)
    return model


def output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_converts_trains_a_step_and_reverts(name: str, dtype: torch.dtype):
    model = network(name).to(dtype)
    images, state = IMAGES.to(dtype), copy.deepcopy(model.state_dict())
    expected, kinds, words = output(model, images), [type(each) for each in model.modules()], []
    assert StochNorm.convert(model, p=0.5, report=words.append) is model
    assert f"{MODELS[name]} of {MODELS[name]} layers" in words[0] and "left alone" not in words[0]
    assert sum(isinstance(each, StochNorm) for each in model.modules()) == MODELS[name]
    assert torch.equal(output(model, images), expected)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    nn.functional.cross_entropy(model.train()(images), LABELS).backward()
    optimizer.step()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    assert all(each.dtype in (dtype, torch.int64) for each in model.state_dict().values())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert any(name.endswith("running_mean") for name in moved) and any(name.endswith("weight") for name in moved)

    model.load_state_dict(state)
    assert StochNorm.revert(model, report=None) is model
    assert [type(each) for each in model.modules()] == kinds
    assert torch.equal(output(model, images), expected)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_to_bfloat16(name: str):
    model = StochNorm.convert(network(name), report=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
    loss.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_at_p_one_a_step_is_batch_norms_to_the_bit(name: str):
    plain, converted = network(name), StochNorm.convert(network(name), p=1, report=None)
    for model in (plain, converted):
        torch.manual_seed(1)
        nn.functional.cross_entropy(model.train()(IMAGES), LABELS).backward()
    for a, b in zip(plain.parameters(), converted.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), converted.buffers(), strict=True):
        assert torch.equal(a, b)


def test_frozen_norms_are_left_alone():
    from timm.layers import freeze_batch_norm_2d

    model = network("efficientnet_b0")
    model.blocks[0] = freeze_batch_norm_2d(model.blocks[0])
    words: list[str] = []
    StochNorm.convert(model, report=words.append)
    assert "FrozenBatchNormAct2d: left alone, frozen" in words[0] and "47 of 49 layers" in words[0]


def test_a_converted_network_can_still_be_frozen_by_timm():
    from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d

    model = StochNorm.convert(network("efficientnet_b0"), report=None).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        frozen = freeze_batch_norm_2d(model)
        torch.testing.assert_close(frozen(IMAGES), expected)
    assert not any(isinstance(each, StochNorm) for each in frozen.modules())
    assert sum(isinstance(each, FrozenBatchNormAct2d) for each in frozen.modules()) == 49
