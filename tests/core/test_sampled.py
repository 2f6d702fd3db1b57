from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.core.networks import NETWORKS, loss_fn, network, true_ggn
from torch import nn

from decaycast.core import sampled
from decaycast.core.sampled import sampled_trace

half_squares = lambda output, target: (output - target).square().mean() / 2  # noqa: E731


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_on_the_outputs_has_the_covariance_of_drawn_labels():
    scores = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    q = scores.detach().softmax(1)
    source = sampled._OwnNoise(loss_fn, seeded(0))
    covariance = torch.zeros(3, 3, dtype=torch.float64)
    for signs in itertools.product((-1.0, 1.0), repeat=3):  # all there are, in the formula
        root = q.sqrt()[0] * torch.tensor(signs, dtype=torch.float64)
        noise = root - q[0] * root.sum()
        covariance += torch.outer(noise, noise) / 8
    torch.testing.assert_close(covariance, torch.diag(q[0]) - torch.outer(q[0], q[0]))
    drawn = torch.stack(
        [torch.autograd.grad(source(scores, torch.tensor([0]), 1), scores)[0][0] for _ in range(400)]
    )  # and those of the code
    assert len(drawn.unique(dim=0)) <= 8
    torch.testing.assert_close(drawn.T @ drawn / 400, covariance, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_of_the_gauss_newton_matrix(name: str):
    model, x, y = network(name)
    true = float(true_ggn(name).trace())
    found = sampled_trace(model, loss_fn, [(x, y)], generator=seeded(1))
    assert found.stderr <= 0.05 * found.value and found.probes >= sampled.FIRST
    assert abs(found.value - true) < 4 * found.stderr
    halves = sampled_trace(model, loss_fn, [(x[:11], y[:11]), (x[11:], y[11:])], generator=seeded(2))
    assert abs(halves.value - true) < 4 * halves.stderr


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 3])
def test_its_intervals_cover_nearly_as_often_as_they_say(batches: int):
    model, x, y = network("mlp")
    true = float(true_ggn("mlp").trace())
    data = list(zip(x.chunk(batches), y.chunk(batches)))
    found = [sampled_trace(model, loss_fn, data, None, 0.1, seeded(seed)) for seed in range(300)]
    assert 0.88 <= sum(each.interval[0] <= true <= each.interval[1] for each in found) / 300 <= 0.98
    assert sum(each.value for each in found) / 300 == pytest.approx(true, rel=0.02)


def test_noise_on_the_targets_of_a_regression_by_all_draws():
    # one sample, one output: both noises are +-sigma, the difference 0 or 2 sigma, and the mean over draws sigma^2*||J||^2
    line = nn.Linear(2, 1).double()
    x, y = torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1, 1).double()
    signs = itertools.cycle((0.5, 0.5, 0.5, -0.5, -0.5, 0.5, -0.5, -0.5))
    found = sampled_trace(line, half_squares, [(x, y)], lambda _, target: target + next(signs), relative_error=10.0)
    assert found.probes == 60  # 30 of the first are nothing
    assert found.value == pytest.approx(0.25 * (1 + 4 + 1)) and found.stderr > 0


def test_flips_give_their_share_of_the_curvature():
    # flips of probability p at the minimum of the smoothed loss: there the ratio of noise and curvature is 1
    torch.manual_seed(0)
    line = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[math.log(4.0)], [0.0]]))  # q = (0.8, 0.2)
    x, y = torch.ones(200, 1).double(), torch.zeros(200).long()
    generator = seeded(0)

    def flips(_, target):
        return torch.where(torch.rand(target.shape, generator=generator) < 0.2, 1 - target, target)

    given = sampled_trace(line, loss_fn, [(x, y)], flips, 0.05)
    own = sampled_trace(line, loss_fn, [(x, y)], None, 0.05, seeded(1))
    assert abs(given.value - 2 * 0.16) < 4 * given.stderr  # tr(diag q - q q^T)
    assert abs(own.value - 2 * 0.16) < 4 * own.stderr


def test_labels_that_do_not_count():
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 3, 1).double()
    x, y = torch.randn(6, 2, 5, dtype=torch.float64), torch.randint(0, 3, (6, 5))
    y[:, 3:] = -100
    some = sampled_trace(layer, loss_fn, [(x, y)], None, 0.03, seeded(0))
    cut = sampled_trace(layer, loss_fn, [(x[:, :, :3], y[:, :3])], None, 0.03, seeded(1))
    assert abs(some.value - cut.value) < 4 * math.hypot(some.stderr, cut.stderr)
    with pytest.raises(ValueError, match="no label counts: all of them are -100"):
        sampled_trace(layer, loss_fn, [(x, torch.full_like(y, -100))])


def test_rare_noise_is_not_taken_for_none():
    # labels that change once in a hundred: the first thirty draws may all be 0, and their standard error is, too
    line = nn.Linear(1, 1).double()
    count = itertools.count(1)

    def rarely(_, target):
        return target + (next(count) % 100 == 0)

    batch = (torch.ones(1, 1).double(), torch.zeros(1, 1).double())
    with pytest.warns(RuntimeWarning, match="2 of them with any noise.* raise max_draws"):
        found = sampled_trace(line, half_squares, [batch], rarely, max_draws=100)
    assert found.value > 0 and found.probes == 100


def test_bad_input():
    model, x, y = network("mlp")
    batch = (x, y)
    with pytest.raises(ValueError, match="relative_error has to be positive, got 0"):
        sampled_trace(model, loss_fn, [batch], relative_error=0)
    with pytest.raises(ValueError, match="max_draws is 29, but no standard error can be trusted before 30 draws"):
        sampled_trace(model, loss_fn, [batch], max_draws=29)
    with pytest.raises(ValueError, match="batches is empty"):
        sampled_trace(model, loss_fn, [])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]).double())
    for other in (weighted, nn.CrossEntropyLoss(reduction="sum"), lambda output, target: 2 * loss_fn(output, target)):
        with pytest.raises(ValueError, match="the loss is not the plain mean of softmax cross-entropy"):
            sampled_trace(model, other, [batch])
    with pytest.raises(ValueError, match="scores \\(n, classes, ...\\) .* the model returns shape \\(60, 3\\)"):
        sampled_trace(model, half_squares, [(x, torch.zeros(60, 3).double())])
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        sampled_trace(model, lambda output, target: output.detach().sum(), [batch], lambda _, target: target)
    with pytest.raises(FloatingPointError, match="a gradient with noise on the labels is not finite"):
        sampled_trace(model, half_squares, [(x, torch.zeros(60, 3).double())], lambda _, target: target * math.nan)
    # label smoothing moves the minimum, not the curvature
    smooth = sampled_trace(model, nn.CrossEntropyLoss(label_smoothing=0.1), [batch], None, 0.1, seeded(0))
    assert smooth == sampled_trace(model, loss_fn, [batch], None, 0.1, seeded(0))
