"""Sharpness-aware minimisation: closed forms, another library, and what must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from tests.lab.comparison.compared_models import (
    blobs,
    plain,
)
from torch import nn

from decaycast.core.train import train
from decaycast.lab import data
from decaycast.lab.comparison.sharpness import SharpnessAware


def quadratic(model: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    weight = model.weight.flatten()  # type: ignore[union-attr,operator]
    return weight @ matrix @ weight / 2  # type: ignore[operator]


def test_a_step_of_sam_on_a_quadratic():
    torch.manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64)
    matrix, model = root @ root.T, nn.Linear(3, 1, bias=False, dtype=torch.float64)
    sam = SharpnessAware(model, lambda output, target: quadratic(model, matrix), rho=0.7)
    start = model.weight.detach().clone().flatten()
    sam.on_batch(0, (torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1)))
    quadratic(model, matrix).backward()
    sam.climb(torch.zeros(1))
    slope = matrix @ start
    assert torch.equal(model.weight.flatten(), start), "the weights are back to the bit"
    expected = matrix @ (start + 0.7 * slope / slope.norm())
    torch.testing.assert_close(model.weight.grad.flatten(), expected, rtol=1e-12, atol=0)  # type: ignore[union-attr]


def sam_loop(model: nn.Module, rho: float, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    hook = SharpnessAware(model, functional.cross_entropy, rho)
    x, y = (torch.from_numpy(each) for each in blobs(64))
    train(model, data.batches(x, y, 16, 0), functional.cross_entropy, optimizer, stop=steps, hooks=[hook])


def test_sam_agrees_with_another_library():
    library = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(1)
    ours, theirs = plain(), plain()
    theirs.load_state_dict(ours.state_dict())
    sam_loop(ours, 0.3, 12)
    optimizer = library.SAM(
        theirs.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False
    )
    x, y = (torch.from_numpy(each) for each in blobs(64))
    batches = data.batches(x, y, 16, 0)
    for _ in range(12):
        inputs, target = next(batches)

        def closure(inputs: torch.Tensor = inputs, target: torch.Tensor = target) -> torch.Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(theirs(inputs), target)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_sam_leaves_running_statistics_to_the_first_pass():
    def statistics(rho: float | None) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        nn.init.eye_(model[0].weight)  # type: ignore[arg-type]
        x, y = (torch.from_numpy(each) for each in blobs(16))
        functional.cross_entropy(model(x), y).backward()
        if rho is not None:
            sam = SharpnessAware(model, functional.cross_entropy, rho)
            sam.on_batch(0, (x, y))
            sam.climb(y)
        return [value.clone() for value in model[1].buffers()]

    torch.manual_seed(0)
    plainly = statistics(None)
    torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(plainly, statistics(5.0)))


def test_sam_of_radius_zero_and_of_gradient_zero():
    torch.manual_seed(1)
    ours, theirs = plain(), plain()
    theirs.load_state_dict(ours.state_dict())
    sam_loop(ours, 0.0, 5)
    x, y = (torch.from_numpy(each) for each in blobs(64))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(theirs, data.batches(x, y, 16, 0), functional.cross_entropy, optimizer, stop=5)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters()))
    flat = SharpnessAware(theirs, lambda output, target: 0.0 * output.sum())
    flat.on_batch(0, (x, y))
    (0.0 * theirs(x).sum()).backward()
    flat.climb(y)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters()))
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got -1"):
        SharpnessAware(theirs, functional.cross_entropy, -1)
