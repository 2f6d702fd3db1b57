"""The small language model: shapes, what a place may see, and its beginning."""

from __future__ import annotations

import math

import pytest
import torch

from decaycast.lab import models
from decaycast.lab.transformer import Transformer

CONTEXT, CLASSES = 12, 7


def model(width: int = 32, layers: int = 2, seed: int = 0) -> Transformer:
    return Transformer(CONTEXT, CLASSES, width=width, layers=layers, seed=seed)


def codes(count: int = 3) -> torch.Tensor:
    return torch.randint(CLASSES, (count, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_scores_have_the_shape_cross_entropy_takes(width: int):
    assert model(width)(codes()).shape == (3, CLASSES, CONTEXT)


def test_a_place_sees_only_what_stands_before_it():
    text, network = codes(1), model()
    changed = text.clone()
    changed[0, 6] = (text[0, 6] + 1) % CLASSES
    before, after = network(text), network(changed)
    assert torch.allclose(before[..., :6], after[..., :6], atol=1e-6)
    assert not torch.allclose(before[..., 6:], after[..., 6:], atol=1e-3)


def test_order_matters():
    text = codes(1)
    assert not torch.allclose(model()(text)[..., -1], model()(text.flip(1))[..., -1], atol=1e-3)


def test_the_seed_alone_decides_the_weights():
    assert torch.equal(model(seed=3)(codes()), model(seed=3)(codes()))
    assert not torch.equal(model(seed=3)(codes()), model(seed=4)(codes()))


def test_weights_start_as_stated():
    network = model(width=128, layers=8)
    layer = network.layers[0]
    for weight, scale in (
        (layer.attend.weight, 1 / math.sqrt(128)),
        (layer.up.weight, 1 / math.sqrt(128)),
        (layer.mix.weight, 1 / math.sqrt(128 * 16)),
        (layer.down.weight, 1 / math.sqrt(512 * 16)),
        (network.characters.weight, 0.02),
    ):
        spread = weight.std().item()
        assert spread == pytest.approx(scale, rel=0.1)
    assert torch.equal(layer.norm1.weight, torch.ones(128))


def test_a_width_that_heads_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 32 .*, got 65"):
        model(width=65)


@pytest.mark.parametrize(("name", "shape"), [("gpt-64x2", (1, 8, 8)), ("mlp-16x1", (64,)), ("wrn-10-1", (64,))])
def test_a_network_for_the_other_kind_of_data_is_refused(name: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=f"{name} does not fit samples of shape"):
        models.build(name, shape, 10, seed=0)


def test_it_is_built_by_name():
    network = models.build("gpt-48x3", (CONTEXT,), CLASSES, seed=0)
    assert isinstance(network, Transformer)
    assert len(network.layers) == 3
    assert network.head.weight.shape == (CLASSES, 48)
