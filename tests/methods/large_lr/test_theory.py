"""The two patterns, the noise in the weights, and the speeds: closed forms against loops and simulations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decaycast.methods.large_lr import theory, two_layer
from decaycast.methods.large_lr.theory import Patterns

SOME = Patterns(dimension=7, p_only=0.3, q_only=0.25, margin=0.6, lowest=0.2, scale=3.0, separation=0.4)


def drawn(count: int = 40_000, kind: str | None = None, patterns: Patterns = SOME) -> theory.Examples:
    return theory.sample(patterns, count, torch.Generator().manual_seed(4), kind)


def test_the_mixture_has_its_fractions():
    found = drawn()
    shares = [(found.kind == index).double().mean().item() for index in range(3)]
    assert shares == pytest.approx([0.3, 0.25, 0.45], abs=5 * 0.5 / 200)
    assert (found.labels == 1).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 200)
    assert torch.equal(found.x1.abs().sum(1) == 0, found.kind == 1)
    assert torch.equal(found.x2.abs().sum(1) == 0, found.kind == 0)


@pytest.mark.parametrize("kind", theory.KINDS)
def test_one_kind_alone(kind: str):
    assert set(drawn(50, kind).kind.tolist()) == {theory.KINDS.index(kind)}


def test_p_is_separable_with_its_margin():
    found, d = drawn(kind="p_only"), SOME.dimension
    along = found.labels * found.x1[:, 0]
    assert along.min().item() >= 0.6 / math.sqrt(d)
    # a half Gaussian: mean sqrt(2/pi), mean square 1; the other coordinates N(0, 1/d)
    bare = along * math.sqrt(d) - 0.6
    assert bare.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=5 / 200)
    assert bare.square().mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(2) / 200)
    assert along.mean().item() == pytest.approx(SOME.drift / math.sqrt(d), abs=5 / 200 / math.sqrt(d))
    rest = found.x1[:, 1:] * math.sqrt(d)
    assert rest.mean(0).abs().max().item() < 5 / 200
    assert (rest.T @ rest / len(rest) - torch.eye(d - 1)).abs().max().item() < 5 * math.sqrt(2) / 200


def test_q_lies_on_three_rays_and_is_not_separable():
    found = drawn(kind="q_only")
    z, zeta = np.array([3.0, 0.0]), np.array([0.0, 1.2])
    for corner, (point, label) in enumerate([(z, 1.0), (z + zeta, -1.0), (z - zeta, -1.0)]):
        mask = found.corner == corner
        assert set(found.labels[mask].tolist()) == {label}
        wanted = found.amplitude[mask, None] * torch.from_numpy(point)
        torch.testing.assert_close(found.x2[mask], wanted)
    assert found.amplitude.min().item() >= 0.2 and found.amplitude.max().item() <= 1.0
    assert found.amplitude.mean().item() == pytest.approx(0.6, abs=5 * 0.8 / math.sqrt(12) / 200)
    counts = torch.bincount(found.corner).double() / len(found.corner)
    assert counts.tolist() == pytest.approx([0.5, 0.25, 0.25], abs=5 * 0.5 / 200)
    # the mean of the two ends of label -1 is the point of label +1
    assert SOME.directions[1:].mean(0) == pytest.approx(SOME.directions[0])


def test_the_papers_values():
    found = theory.paper_patterns(256, 0.2, q_only=0.3)
    assert (found.separation, found.p_only, found.q_only, found.margin) == (256**-0.75, pytest.approx(0.02), 0.3, 1.0)
    assert (found.scale, found.lowest) == (1.0, 0.0)


# the noise in the weights


@given(tau=st.floats(0.01, 10), lr=st.floats(1e-3, 10), product=st.floats(1e-9, 1.999))
def test_stationary_noise_keeps_the_spread(tau: float, lr: float, product: float):
    decay = product / lr
    noise = theory.stationary_noise(weight_std=tau, lr=lr, weight_decay=decay)
    assert (1 - lr * decay) ** 2 * tau**2 + lr**2 * noise**2 == pytest.approx(tau**2, rel=1e-12)
    after = theory.weight_std(37, initial_std=tau, noise_std=noise, lr=lr, weight_decay=decay)
    assert after == pytest.approx(tau, rel=1e-9)


@pytest.mark.parametrize("product", [0.0, 1e-12, 0.1, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 50])
def test_the_spread_after_some_steps(steps: int, product: float):
    variance = 1.7**2
    for _ in range(steps):
        variance = (1 - product) ** 2 * variance + (0.4 * 0.9) ** 2
    found = theory.weight_std(steps, initial_std=1.7, noise_std=0.9, lr=0.4, weight_decay=product / 0.4)
    assert found == pytest.approx(math.sqrt(variance), rel=1e-9)


# the speeds


def after_one_step(patterns: Patterns, lr: float = 1e-3) -> tuple[float, float]:
    """Speed of P's mean margin and of Q's gap in a wide network that made one step."""
    setting = two_layer.Setting(
        patterns=patterns,
        examples=20_000,
        p_neurons=2000,
        q_neurons=60_000,
        noise=0.0,
        small=lr,
        grouped=1,
        test_examples=4000,
    )
    member = two_layer._Member(setting, 3, "S", (), (), torch.float64)
    batch = two_layer._Batch(setting, [member])
    with torch.no_grad():
        batch.forward()
        batch.update()
        test, weights = member.tests[0], member.weights
        margin = test.labels * ((test.x1 @ weights.p.T).relu() @ weights.p_signs)
        at = (weights.corners @ weights.q.T).relu() @ weights.q_signs
    return margin.mean().item() / lr, (at[0] - at[1:].mean()).item() / lr


@pytest.mark.parametrize("margin", [0.0, 0.6])
def test_the_speed_of_p(margin: float):
    patterns = Patterns(dimension=5, p_only=1.0, q_only=0.0, margin=margin)
    # 20,000 examples, 4,000 test points: about 1 %
    assert after_one_step(patterns)[0] == pytest.approx(theory.p_speed(patterns), rel=0.04)


@pytest.mark.parametrize("separation", [0.05, 0.3])
def test_the_speed_of_q(separation: float):
    patterns = Patterns(dimension=2, p_only=0.0, q_only=1.0, lowest=0.2, scale=3.0, separation=separation)
    # 60,000 neurons, of which arctan(r)*2/pi have their kink inside: 30,000 pairs, 2.5 % at r = 0.05; corrections are O(r^2)
    assert after_one_step(patterns)[1] == pytest.approx(theory.q_speed(patterns), rel=0.1)


@pytest.mark.parametrize("time", [2.0, 60.0])
def test_the_gap_under_noise_against_turning_neurons(time: float):
    """Neurons that turn at random while every example pulls with 1/2, step by step."""
    patterns, noise, steps, neurons = Patterns(scale=2.0, lowest=0.5, separation=0.1), 2e-3, 60, 40_000
    rng, corners = np.random.default_rng(0), patterns.directions
    # only neurons near Q's kink matter: all start there, and enter or leave by turning
    angle = rng.uniform(-0.5, 0.5, neurons) + math.pi / 2
    share, grown = 2 * 1.0 / (2 * math.pi), np.zeros((neurons, 2))
    for _ in range(steps):
        active = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ corners.T > 0
        pull = 0.75 / 2 * (active * np.array([0.5, -0.25, -0.25])) @ corners
        grown += time / steps * pull
        angle = angle + rng.normal(0.0, math.sqrt(noise * time / steps), neurons)
        angle = (angle - math.pi / 2 + 0.5) % 1.0 - 0.5 + math.pi / 2
    active = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ corners.T > 0
    gaps = (active * (grown @ corners.T)) @ np.array([1.0, -0.5, -0.5])
    error = share * gaps.std() / math.sqrt(neurons)
    wanted = theory.q_gap(time, patterns, noise)
    assert abs(share * gaps.mean() - wanted) < 4 * error + 0.05 * wanted


@given(noise=st.floats(1e-6, 1.0), time=st.floats(1e-3, 1e5), separation=st.floats(0.01, 1.0))
def test_the_gap_lies_below_both_of_its_limits(noise: float, time: float, separation: float):
    patterns = Patterns(separation=separation)
    gap = theory.q_gap(time, patterns, noise)
    assert 0 < gap <= (1 + 1e-6) * min(theory.q_speed(patterns) * time, theory.q_ceiling(patterns, noise))


@pytest.mark.parametrize("separation", [0.02, 0.5])
def test_the_limits_of_the_gap(separation: float):
    patterns, short = Patterns(separation=separation, lowest=0.1), math.atan(separation) ** 2
    assert theory.q_gap(3.0, patterns, 0.0) == pytest.approx(3.0 * theory.q_speed(patterns), rel=1e-9)
    assert theory.q_gap(1e-6, patterns, short) == pytest.approx(1e-6 * theory.q_speed(patterns), rel=2e-3)
    assert theory.q_gap(1e6, patterns, short) == pytest.approx(theory.q_ceiling(patterns, short), rel=1e-4)
    assert theory.q_ceiling(patterns, 0.0) == math.inf and theory.q_gap(0.0, patterns, 0.1) == 0.0


def test_the_largest_learning_rate_is_where_the_curvature_says():
    patterns = Patterns(dimension=2, p_only=0.0, q_only=1.0, lowest=0.3, scale=2.5, separation=1e-3)
    x = theory.sample(patterns, 1000, torch.Generator().manual_seed(0)).x2
    v = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    active = (x @ v.T > 0).double()
    kernel = (x @ x.T) * (active @ active.T) / v.shape[0]
    curvature = torch.linalg.eigvalsh(kernel)[-1].item() / 4.0 / len(x)
    assert theory.largest_lr(patterns) == pytest.approx(2.0 / curvature, rel=0.1)


@given(classes=st.integers(2, 1000), q=st.floats(0, 1), slack=st.floats(0, 1))
def test_the_loss_to_anneal_at_is_that_of_chance_on_q(classes: int, q: float, slack: float):
    chance = torch.nn.functional.cross_entropy(torch.zeros(1, classes, dtype=torch.float64), torch.tensor([0])).item()
    assert theory.anneal_loss(slack, q, classes) == pytest.approx(slack + q * chance)


BAD: list[tuple[Any, str]] = [
    (lambda: Patterns(p_only=0.6, q_only=0.5), r"may add up to 1 at most, got 0\.6 \+ 0\.5"),
    (lambda: Patterns(p_only=-0.1), r"p_only must be in \[0, 1\], got -0\.1"),
    (lambda: Patterns(q_only=1.5), r"q_only must be in \[0, 1\], got 1\.5"),
    (lambda: Patterns(lowest=math.nan), r"lowest must be in \[0, 1\], got nan"),
    (lambda: Patterns(margin=-1.0), "margin must be a finite number >= 0, got -1"),
    (lambda: Patterns(scale=0.0), "scale must be > 0, got 0"),
    (lambda: Patterns(separation=math.inf), "separation must be a finite number >= 0, got inf"),
    (lambda: Patterns(dimension=1), "dimension must be a whole number >= 2, got 1"),
    (lambda: theory.paper_patterns(64, 1.0), r"kappa = sqrt\(d/N\) must lie in \(0, 1\), got 1\.0"),
    (lambda: drawn(0), "count must be a whole number >= 1, got 0"),
    (lambda: drawn(3, "p"), "kind must be one of p_only, q_only, both, got 'p'"),
    (lambda: theory.stationary_noise(weight_std=1, lr=0, weight_decay=0.1), "lr must be > 0, got 0"),
    (lambda: theory.stationary_noise(weight_std=-1, lr=1, weight_decay=0.1), "weight_std must be a finite number >= 0"),
    (lambda: theory.weight_std(3, initial_std=1, noise_std=1, lr=1, weight_decay=2.5), "must be at most 2.*got 2.5"),
    (lambda: theory.weight_std(-1, initial_std=1, noise_std=1, lr=1), "steps must be a whole number >= 0, got -1"),
    (lambda: theory.q_gap(-1.0, SOME, 0.1), "time must be a finite number >= 0, got -1"),
    (lambda: theory.q_ceiling(SOME, -0.1), "angular_noise must be a finite number >= 0"),
    (lambda: theory.anneal_loss(0.1, 1.2), r"q_only must be in \[0, 1\], got 1\.2"),
    (lambda: theory.anneal_loss(0.1, 0.2, classes=1), "classes must be a whole number >= 2, got 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()
