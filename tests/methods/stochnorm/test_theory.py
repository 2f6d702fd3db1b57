"""Mixed statistics against the paper's two branches, closed gradients against autograd, running statistics against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decaycast.methods.stochnorm import theory

EPS = 1e-5
SHAPES = ((6, 4), (5, 4, 3), (3, 4, 5, 2), (2, 4, 3, 2, 3))


def problem(shape: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random activations and vectors, away from the origin and from the unit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    return {
        "x": 3 * normal(*shape) + 2,
        "mask": torch.rand(channels, generator=generator) < 0.5,
        "running_mean": normal(channels) + 1,
        "running_variance": normal(channels).exp(),
        "weight": normal(channels) + 1.5,
        "bias": normal(channels),
    }


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@given(seed=st.integers(0, 2**31))
def test_mixing_statistics_is_mixing_outputs(shape: tuple[int, ...], seed: int):
    given_ = problem(shape, seed)
    one_pass, two = theory.stochastic_norm(**given_, eps=EPS), theory.two_branch(**given_, eps=EPS)
    assert largest_difference(one_pass, two) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_the_gradient_formula_is_autograds(shape: tuple[int, ...], affine: bool):
    given_ = problem(shape, seed=3)
    if not affine:
        given_ |= {"weight": None, "bias": None}
    wanted = [name for name in ("x", "weight", "bias") if given_[name] is not None]
    for name in wanted:
        given_[name].requires_grad_()
    output = theory.two_branch(**given_, eps=EPS)
    grad_output = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = dict(zip(wanted, torch.autograd.grad(output, [given_[name] for name in wanted], grad_output)))
    x, mask = given_["x"].detach(), given_["mask"]
    batch = theory.batch_statistics(x)
    mixed = [
        torch.where(mask, new, old) for new, old in zip(batch, (given_["running_mean"], given_["running_variance"]))
    ]
    weight = None if given_["weight"] is None else given_["weight"].detach()
    grads = theory.gradients(grad_output, x, mask, *mixed, weight, EPS)
    for name, found in zip(("x", "weight", "bias"), grads):
        if name in expected:
            assert largest_difference(found, expected[name]) < 1e-12
    a, b, d = theory.input_gradient_coefficients(
        mask, *mixed, torch.ones(4, dtype=torch.float64) if weight is None else weight, *grads[1:], x.numel() // 4, EPS
    )
    a, b, d = (theory.along_channels(each, x) for each in (a, b, d))
    assert largest_difference(a * grad_output + b * x + d, expected["x"]) < 1e-12


def test_gradients_of_a_channel_by_hand():
    # two values 1 and 3: mean 2, deviation 1, xhat -1 and 1; dy = (1, 0)
    x, dy = torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    two, one = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    batch, weight, bias = theory.gradients(dy, x, torch.tensor([True]), two, one, None, 0.0)
    assert batch.flatten().tolist() == [0.0, 0.0]  # 1 - 1/2 - (-1)(-1)/2, and 0 - 1/2 - (1)(-1)/2
    assert (weight.item(), bias.item()) == (-1.0, 1.0)
    running, *_ = theory.gradients(dy, x, torch.tensor([False]), two, 4 * one, 3 * one, 0.0)
    assert running.flatten().tolist() == [1.5, 0.0]  # gamma/sqrt(r) dy: nothing flows into the statistics


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_running_statistics_move_as_in_batch_norm(momentum: float):
    given_ = problem((5, 4, 3), seed=7)
    mean, variance = given_["running_mean"].clone(), given_["running_variance"].clone()
    torch.nn.functional.batch_norm(given_["x"], mean, variance, training=True, momentum=momentum)
    found = given_["running_mean"].clone(), given_["running_variance"].clone()
    theory.move_(*found, *theory.batch_statistics(given_["x"]), 15, momentum)
    assert largest_difference(found[0], mean) < 1e-14 and largest_difference(found[1], variance) < 1e-14
    low = given_["running_mean"].bfloat16(), given_["running_variance"].bfloat16()
    theory.move_(*low, *theory.batch_statistics(given_["x"]), 15, momentum)
    assert largest_difference(low[1].double(), variance) < 2**-8
