"""Noise in front of activations: what is shared, what evaluation does, and its level over a training."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from decaycast.core.schedule import linear, step_decay
from decaycast.core.train import endless, train
from decaycast.methods.large_lr.noise import ActivationNoise, NoiseSchedule, activation_noises

SHAPES = [((6,), 0), ((5, 6), 1), ((5, 3, 6), 2), ((5, 3, 4, 6), 2), ((5, 3, 2, 4, 6), 2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "shared"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_map_is_shared_by_batch_and_channels(shape: tuple[int, ...], shared: int, dtype: torch.dtype):
    x = torch.zeros(shape, dtype=dtype)
    found = ActivationNoise(0.5, generator=seeded())(x)
    drawn = torch.randn((1,) * shared + shape[shared:], generator=seeded(), dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, (0.5 * drawn).expand(shape))


def test_noise_per_element_and_its_spread():
    x = torch.full((50, 4, 10, 10), 3.0, dtype=torch.float64)
    found = ActivationNoise(0.7, per_element=True, generator=seeded())(x) - 3.0
    assert found.unique().numel() == x.numel()
    # 20,000 draws: five standard errors of the mean, and of the deviation
    assert abs(found.mean().item()) < 5 * 0.7 / math.sqrt(x.numel())
    assert abs(found.std().item() - 0.7) < 5 * 0.7 / math.sqrt(2 * x.numel())


def test_every_call_draws_anew():
    noise, x = ActivationNoise(1.0), torch.zeros(2, 3, 4, 4)
    assert not torch.equal(noise(x), noise(x))


@pytest.mark.parametrize("make", [lambda: ActivationNoise(0.0), lambda: ActivationNoise(0.4).eval()])
def test_without_noise_the_input_itself_comes_out(make: Any):
    x = torch.ones(2, 3)
    before = torch.get_rng_state()
    assert make()(x) is x
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn where nothing is added"


def test_gradients_pass_through():
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    ActivationNoise(0.4)(x).mul(torch.arange(4.0)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.arange(4.0).expand(2, 3, 4, 4))


def test_in_place_is_the_same_in_the_same_memory():
    x = torch.ones(2, 3, 4, 4)
    wanted = ActivationNoise(0.4, generator=seeded())(x)
    assert torch.equal(x, torch.ones_like(x))
    assert ActivationNoise(0.4, generator=seeded(), inplace=True)(x) is x
    assert torch.equal(x, wanted)


def test_memory_format_is_kept():
    x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert ActivationNoise(0.4)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("std", [-0.1, math.nan, math.inf, "0.4", None, True * 1j])
def test_a_bad_level_is_refused(std: Any):
    with pytest.raises(ValueError, match="std must be a finite number >= 0"):
        ActivationNoise(std)
    noise = ActivationNoise(0.3)
    with pytest.raises(ValueError, match="std must be a finite number >= 0"):
        noise.std = std
    assert noise.std == 0.3


def test_bad_inputs_are_refused():
    with pytest.raises(TypeError, match=r"expected a floating input, got torch\.int64"):
        ActivationNoise(0.4)(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the generator is on cpu and the input on meta"):
        ActivationNoise(0.4, generator=seeded())(torch.ones(2, 3, device="meta"))
    with pytest.raises(RuntimeError, match="cannot be traced symbolically in training mode"):
        torch.fx.symbolic_trace(nn.Sequential(ActivationNoise(0.4)))
    torch.fx.symbolic_trace(nn.Sequential(ActivationNoise(0.4)).eval())


def test_checkpoints_repeat_the_noise_or_refuse():
    x = torch.randn(6, 5, generator=seeded(), dtype=torch.float64, requires_grad=True)

    def gradient(noise: ActivationNoise, repeated: bool) -> torch.Tensor:
        torch.manual_seed(3)
        body = nn.Sequential(noise, nn.ReLU(), nn.Tanh())
        output: Any = checkpoint(body, x, use_reentrant=False) if repeated else body(x)
        return torch.autograd.grad(output.sum(), x)[0]

    assert torch.equal(gradient(ActivationNoise(1.0), True), gradient(ActivationNoise(1.0), False))
    with pytest.raises(RuntimeError, match="use generator=None"):
        gradient(ActivationNoise(1.0, generator=seeded()), True)


def test_copies_and_text():
    noise = ActivationNoise(0.4, per_element=True, generator=seeded(), inplace=True)
    for copied in (copy.deepcopy(noise), pickle.loads(pickle.dumps(noise))):
        assert repr(copied) == "ActivationNoise(std=0.4, per_element=True, inplace=True)"
        assert torch.equal(copied(torch.zeros(3, 4)), ActivationNoise(0.4, True, seeded())(torch.zeros(3, 4)))
    assert noise.state_dict() == {} and list(noise.parameters()) == []


def two_noises() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 3), ActivationNoise(0.4), nn.ReLU(), ActivationNoise(0.1), nn.GELU(), nn.Linear(3, 2)
    )


def levels(model: nn.Module) -> list[float]:
    return [noise.std for noise in activation_noises(model).values()]


def test_a_schedule_moves_every_level_by_its_own_start():
    model = two_noises()
    schedule = NoiseSchedule(model, linear(4))
    found = [levels(model)]
    for _ in range(5):
        schedule.step()
        found.append(levels(model))
    wanted = [[0.4 * m, 0.1 * m] for m in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0)]
    assert found == [pytest.approx(each) for each in wanted]


def test_the_schedule_is_a_hook_of_the_loop():
    model, seen = two_noises(), []
    model.register_forward_hook(lambda *_: seen.append(levels(model)))
    batches = endless([(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = NoiseSchedule(model, step_decay(6, milestones=(0.5,), factor=0.0))
    train(model, batches, nn.functional.cross_entropy, optimizer, stop=6, hooks=[schedule])
    assert seen == [[0.4, 0.1]] * 3 + [[0.0, 0.0]] * 3


def test_a_resumed_schedule_goes_on():
    schedule = NoiseSchedule(two_noises(), linear(4))
    schedule.step()
    model = two_noises()
    resumed = NoiseSchedule(model, linear(4))
    resumed.load_state_dict(schedule.state_dict())
    assert levels(model) == [pytest.approx(0.3), pytest.approx(0.075)]
    resumed.step()
    schedule.step()
    assert resumed.state_dict() == schedule.state_dict()


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="no ActivationNoise to schedule; call insert_activation_noise"):
        NoiseSchedule(nn.Linear(2, 2), linear(4))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
        NoiseSchedule(3, linear(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fn must be a function step -> multiplier, got float"):
        NoiseSchedule(two_noises(), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fn\(0\) must be a finite number >= 0, got -1"):
        NoiseSchedule(two_noises(), lambda step: -1)
    model = two_noises()
    schedule = NoiseSchedule(model, linear(4))
    state = schedule.state_dict()
    with pytest.raises(ValueError, match="this is no state of NoiseSchedule: missing"):
        schedule.load_state_dict({"last_step": 1})
    with pytest.raises(ValueError, match=r"this is no state of NoiseSchedule for this model: missing \['3'\]"):
        schedule.load_state_dict({**state, "initial": {"1": 0.4}})
    with pytest.raises(ValueError, match="saved std of 3 must be"):
        schedule.load_state_dict({**state, "initial": {"1": 0.2, "3": -0.4}})
    assert levels(model) == [0.4, 0.1] and schedule.state_dict() == state
