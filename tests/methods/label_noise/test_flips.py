"""Flip losses against finite differences and minimisation, smoothed losses against all flips enumerated."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from decaycast.methods.label_noise import flips

RANDOM = 11


def test_the_examples_run():
    assert doctest.testmod(flips).failed == 0


def smoothed(loss: str, flip: float, z: float) -> float:
    of = {
        "logistic": lambda m: math.log1p(math.exp(-m)),
        "exponential": lambda m: math.exp(-m),
        "square": lambda m: (m - 1) ** 2 / 2,
    }[loss]
    return (1 - flip) * of(z) + flip * of(-z)


def sampled_slope(loss: str, z: float, sign: float, h: float = 1e-6) -> float:
    return (smoothed(loss, 0.0, sign * (z + h)) - smoothed(loss, 0.0, sign * (z - h))) / (2 * h)


def least(loss: str, flip: float) -> float:
    """Where the smoothed loss is least, by ternary search."""
    low, high = -1.0, 9.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if smoothed(loss, flip, a) < smoothed(loss, flip, b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("loss", flips.MARGIN_LOSSES)
@pytest.mark.parametrize("flip", [0.05, 0.2, 0.45])
def test_the_table_by_finite_differences(loss: str, flip: float):
    found = flips.flip_loss(loss, flip)
    c, h = found.minimiser, 1e-4
    assert c == pytest.approx(least(loss, flip), abs=1e-6)
    assert found.least == pytest.approx(smoothed(loss, flip, c), rel=1e-12)
    bent = (smoothed(loss, flip, c + h) - 2 * smoothed(loss, flip, c) + smoothed(loss, flip, c - h)) / h**2
    assert found.curvature == pytest.approx(bent, rel=1e-6)
    slopes = sampled_slope(loss, c, 1.0), sampled_slope(loss, c, -1.0)
    mean = (1 - flip) * slopes[0] + flip * slopes[1]
    assert mean == pytest.approx(0, abs=1e-8)
    variance = (1 - flip) * (slopes[0] - mean) ** 2 + flip * (slopes[1] - mean) ** 2
    assert found.noise_variance == pytest.approx(variance, rel=1e-7)
    assert found.noise_ratio == pytest.approx(variance / bent, rel=1e-6)


def test_the_table_broadcasts_and_its_losses_are_those():
    many = flips.flip_loss("exponential", np.array([0.1, 0.2]))
    one = flips.flip_loss("exponential", 0.2)
    assert isinstance(one.noise_variance, float)
    assert many.minimiser[1] == one.minimiser and many.noise_ratio.shape == (2,)
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for loss, of_margin in flips.MARGIN_LOSSES.items():
        np.testing.assert_allclose(of_margin(z), [smoothed(loss, 0.0, float(each)) for each in z], rtol=1e-12)
    assert flips.flip_loss("square", 0.0).noise_variance == 0


@pytest.mark.parametrize("flip", [0.05, 0.2, 0.6])
def test_softmax_has_noise_equal_to_its_curvature(flip: float):
    # covariance of the logits' gradient over all flips, against the Hessian of the smoothed loss, at its minimum
    classes = 4
    shares = torch.full((classes,), flip / (classes - 1), dtype=torch.float64)
    shares[1] = 1 - flip
    logits = shares.log() + 0.3
    slopes = torch.stack(
        [
            torch.func.grad(lambda z: functional.cross_entropy(z[None], torch.tensor([label])))(logits)  # noqa: B023
            for label in range(classes)
        ]
    )
    mean = shares @ slopes
    covariance = (slopes - mean).T @ torch.diag(shares) @ (slopes - mean)
    hessian = torch.autograd.functional.hessian(lambda z: flips.smoothed_loss(z[None], torch.tensor([1]), flip), logits)
    assert mean.abs().max() < 1e-12
    torch.testing.assert_close(covariance, hessian, rtol=0, atol=1e-12)


# conventions


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 0.999), st.integers(2, 1000))
def test_the_two_conventions_go_round(label_smoothing: float, classes: int):
    flip = flips.flip_from_smoothing(label_smoothing, classes)
    assert 0 <= flip < 1 - 1 / classes
    assert flips.smoothing_from_flip(flip, classes) == pytest.approx(label_smoothing, rel=1e-12, abs=1e-300)


def test_the_fact_sheets_conversion():
    assert flips.smoothing_from_flip(0.2, 10) == pytest.approx(2 / 9, rel=1e-14)
    assert flips.flip_from_smoothing(2 / 9, 10) == pytest.approx(0.2, rel=1e-14)


@pytest.mark.parametrize(("flip", "classes"), [(0.0, 3), (0.2, 10), (0.3, 2)])
def test_the_entropy_is_the_least_cross_entropy(flip: float, classes: int):
    shares = [1 - flip, *[flip / (classes - 1)] * (classes - 1)]
    expected = -sum(share * math.log(share) for share in shares if share)
    assert flips.flip_entropy(flip, classes) == pytest.approx(expected, rel=1e-12, abs=1e-15)


# the smoothed loss


def logits_and_labels(n: int = 3, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(RANDOM)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64) + 0.5
    return logits, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("flip", [0.0, 0.2, 0.6])
def test_it_is_the_mean_over_all_flips(flip: float):
    logits, labels = logits_and_labels()
    n, classes = logits.shape
    total = 0.0
    for drawn in itertools.product(range(classes), repeat=n):
        chance = math.prod(1 - flip if a == b else flip / (classes - 1) for a, b in zip(drawn, labels.tolist()))
        total += chance * functional.cross_entropy(logits, torch.tensor(drawn)).item()
    found = flips.smoothed_loss(logits, labels, flip).item()
    assert found == pytest.approx(total - flips.flip_entropy(flip, classes), rel=1e-12)
    soft = functional.one_hot(labels, classes).double()
    assert flips.smoothed_loss(logits, soft, flip).item() == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("loss", flips.MARGIN_LOSSES)
def test_margin_losses_are_the_mean_over_all_signs(loss: str):
    flip, f = 0.2, torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    y = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    total = 0.0
    for signs in itertools.product([1.0, -1.0], repeat=3):
        chance = math.prod(1 - flip if sign > 0 else flip for sign in signs)
        margins = (f * y).tolist()
        total += chance * sum(smoothed(loss, 0.0, s * m) for s, m in zip(signs, margins)) / 3
    found = flips.smoothed_loss(f, y, flip, loss=loss).item()
    assert found == pytest.approx(total - flips.flip_loss(loss, flip).least, rel=1e-12)
    assert flips.smoothed_loss(f, y.long(), flip, loss=loss).item() == pytest.approx(found, rel=1e-12)


def test_its_minimum_is_zero():
    logits, labels = logits_and_labels()
    classes, flip = logits.shape[1], 0.2
    best = torch.full_like(logits, flip / (classes - 1)).scatter(1, labels[:, None], 1 - flip).log() + 1.5
    best.requires_grad_()
    value = flips.smoothed_loss(best, labels, flip)
    (slope,) = torch.autograd.grad(value, best)
    assert abs(value.item()) < 1e-14 and slope.abs().max() < 1e-14
    for seed in range(20):
        other = best + torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert flips.smoothed_loss(other, labels, flip) > 0
    mixed = 0.7 * functional.one_hot(labels, classes).double() + 0.1
    mixed = mixed / mixed.sum(1, keepdim=True)
    shares = (1 - flip) * mixed + flip * (1 - mixed) / (classes - 1)
    assert abs(flips.smoothed_loss(shares.log(), mixed, flip).item()) < 1e-14
    for loss in flips.MARGIN_LOSSES:
        y = torch.tensor([1.0, -1.0], dtype=torch.float64)
        at = flips.flip_loss(loss, flip).minimiser * y
        assert abs(flips.smoothed_loss(at, y, flip, loss=loss).item()) < 1e-14
        assert flips.smoothed_loss(at * 1.1, y, flip, loss=loss) > 0


def test_ignored_labels_and_places():
    logits, labels = logits_and_labels(n=4)
    ignored = labels.clone()
    ignored[1] = -100
    kept = torch.tensor([0, 2, 3])
    expected = flips.smoothed_loss(logits[kept], labels[kept], 0.2)
    torch.testing.assert_close(flips.smoothed_loss(logits, ignored, 0.2), expected)
    ignored[1] = 255
    torch.testing.assert_close(flips.smoothed_loss(logits, ignored, 0.2, ignore_index=255), expected)
    # two samples of two places each
    places = logits.reshape(2, 2, -1).movedim(2, 1)
    torch.testing.assert_close(
        flips.smoothed_loss(places, labels.reshape(2, 2), 0.2), flips.smoothed_loss(logits, labels, 0.2)
    )


# bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flips.flip_loss("hinge", 0.2), "unknown loss 'hinge'"),
        (lambda: flips.flip_loss("logistic", 0.0), r"flip has to be in \(0, 1/2\) for the logistic loss, got 0.0"),
        (lambda: flips.flip_loss("square", 0.5), r"flip has to be in \[0, 1/2\) for the square loss, got 0.5"),
        (lambda: flips.flip_loss("square", math.nan), "for the square loss, got nan"),
        (lambda: flips.flip_loss("square", "0.1"), "for the square loss, got '0.1'"),
        (lambda: flips.flip_from_smoothing(1.0, 10), r"label_smoothing has to be in \[0, 1\), got 1.0"),
        (lambda: flips.flip_from_smoothing(0.1, 1), "num_classes must be a whole number >= 2, got 1"),
        (lambda: flips.smoothing_from_flip(0.9, 10), r"has to be in \[0, 0.9\) for 10 classes, got 0.9"),
        (lambda: flips.flip_entropy(-0.1, 10), "flip is the probability of another class"),
        (
            lambda: flips.smoothed_loss(torch.zeros(3), torch.zeros(3).long(), 0.1),
            r"shape \(n, classes, ...\), got \(3,\)",
        ),
        (
            lambda: flips.smoothed_loss(torch.zeros(0, 3), torch.zeros(0).long(), 0.1),
            r"no labels to take the mean of: outputs have shape \(0, 3\); is the batch empty\?",
        ),
        (
            lambda: flips.smoothed_loss(torch.zeros(3, 2), torch.zeros(3).long(), 0.5),
            "flip is the probability of another",
        ),
        (lambda: flips.smoothed_loss(torch.zeros(1), torch.ones(1), 0.1, loss="hinge"), "unknown loss 'hinge'"),
        (
            lambda: flips.smoothed_loss(torch.zeros(3, 1), torch.ones(3), 0.1, loss="square"),
            r"\(3, 1\), but labels \(3,\)",
        ),
        (
            lambda: flips.smoothed_loss(torch.zeros(3), torch.zeros(3), 0.1, loss="square"),
            "labels of the square loss are -1",
        ),
    ],
)
def test_bad_input(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
