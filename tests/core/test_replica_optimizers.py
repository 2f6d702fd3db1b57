"""Stacked optimisers step as torch's own do, replica by replica."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.replica_optimizers import stacked

STEPS = 4
SHAPES = ((2, 3), (3,))
rates = st.floats(1e-4, 1.0)
decays = st.one_of(st.just(0.0), st.floats(1e-4, 1.0))
momenta = st.one_of(st.just(0.0), st.floats(0.1, 0.99))


def gradients(seed: int, replicas: int) -> list[list[torch.Tensor]]:
    """[step][parameter], each (K, ...)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(replicas, *shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(STEPS)
    ]


def by_torch(kind: Any, settings: list[dict[str, Any]], grads: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Final parameters, [replica][parameter]; lr is halved after the second step."""
    finals = []
    for place, setting in enumerate(settings):
        weights = [torch.ones(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
        optimizer = kind(weights, **setting)
        for step, parts in enumerate(grads):
            for weight, part in zip(weights, parts, strict=True):
                weight.grad = part[place].clone()
            if step == 2:
                optimizer.param_groups[0]["lr"] /= 2
            optimizer.step()
        finals.append(weights)
    return finals


def by_us(kind: Any, settings: list[dict[str, Any]], grads: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    names = [str(place) for place in range(len(SHAPES))]
    weights = {
        n: torch.ones(len(settings), *shape, dtype=torch.float64) for n, shape in zip(names, SHAPES, strict=True)
    }
    torch_ones = [kind([torch.zeros(1, requires_grad=True)], **setting) for setting in settings]
    optimizer = stacked(torch_ones)
    for step, parts in enumerate(grads):
        named = {name: part.clone() for name, part in zip(names, parts, strict=True)}
        lr = [setting["lr"] / (2 if step >= 2 else 1) for setting in settings]
        optimizer.step(weights, named, lr, [setting["weight_decay"] for setting in settings])
    return list(weights.values())


def check(kind: Any, settings: list[dict[str, Any]], seed: int) -> None:
    grads = gradients(seed, len(settings))
    found, expected = by_us(kind, settings, grads), by_torch(kind, settings, grads)
    for index, stack in enumerate(found):
        torch.testing.assert_close(
            stack, torch.stack([one[index].detach() for one in expected]), rtol=1e-12, atol=1e-12
        )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(st.tuples(rates, decays, momenta), min_size=1, max_size=4), dampening=st.sampled_from([0.0, 0.3])
)
def test_sgd(values: list[tuple[float, float, float]], dampening: float):
    each = [{"lr": lr, "weight_decay": wd, "momentum": m, "dampening": dampening} for lr, wd, m in values]
    check(torch.optim.SGD, each, seed=len(values))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(values=st.lists(st.tuples(rates, decays, st.floats(0.1, 0.99)), min_size=1, max_size=4))
def test_nesterov(values: list[tuple[float, float, float]]):
    each = [{"lr": lr, "weight_decay": wd, "momentum": m, "nesterov": True} for lr, wd, m in values]
    check(torch.optim.SGD, each, seed=len(values))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(st.tuples(rates, decays), min_size=1, max_size=4), betas=st.sampled_from([(0.9, 0.999), (0.5, 0.8)])
)
def test_adamw(values: list[tuple[float, float]], betas: tuple[float, float]):
    check(torch.optim.AdamW, [{"lr": lr, "weight_decay": wd, "betas": betas} for lr, wd in values], seed=len(values))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_keeping_some_goes_on_with_their_state(kind: Any):
    extra: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    made = [kind([torch.zeros(1, requires_grad=True)], lr=0.1, **extra) for _ in range(3)]
    if extra:
        made[1].param_groups[0]["momentum"] = 0.5
    whole, part = stacked(made), stacked(made)
    ours, theirs = ({"w": torch.ones(3, 2, dtype=torch.float64)} for _ in range(2))
    for step, (grad, _) in enumerate(gradients(0, 3)):
        whole.step(ours, {"w": grad[:, 0, :2].clone()}, [0.1, 0.2, 0.3], [0.1, 0.0, 0.2])
        if step < 2:
            part.step(theirs, {"w": grad[:, 0, :2].clone()}, [0.1, 0.2, 0.3], [0.1, 0.0, 0.2])
        else:
            if step == 2:
                part.keep([2, 1])
                theirs = {"w": theirs["w"][[2, 1]]}
            part.step(theirs, {"w": grad[[2, 1], 0, :2].clone()}, [0.3, 0.2], [0.2, 0.0])
    assert torch.equal(theirs["w"], ours["w"][[2, 1]])


def made(kind: Any, *settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    return [kind([torch.zeros(1, requires_grad=True)], **{"lr": 0.1, **setting}) for setting in settings]


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ([], "replicas are trained by torch's SGD or AdamW, one kind per batch, got none"),
        (made(torch.optim.SGD, {}) + made(torch.optim.AdamW, {}), "one kind per batch, got AdamW, SGD"),
        (made(torch.optim.Adam, {}), "one kind per batch, got Adam"),
        (
            made(torch.optim.AdamW, {"eps": 1e-8}, {"eps": 1e-7}),
            r"eps has to be the same in all replicas .*\[1e-08, 1e-07\]",
        ),
        (made(torch.optim.AdamW, {"amsgrad": True}), "replicas do not know the option amsgrad of AdamW; leave it out"),
    ],
)
def test_what_cannot_be_stacked_is_refused(optimizers: list[torch.optim.Optimizer], message: str):
    with pytest.raises(ValueError, match=message):
        stacked(optimizers)


def test_groups_and_steps_made_are_refused():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    with pytest.raises(
        ValueError, match="a replica's optimizer must have one parameter group, got 2; train networks with"
    ):
        stacked([torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)])
    stepped = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    weights[0].grad = torch.ones(1)
    stepped.step()
    with pytest.raises(ValueError, match="a replica's optimizer has already made steps; start from a fresh one"):
        stacked([stepped])
