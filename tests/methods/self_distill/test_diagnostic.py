"""does_it_help: leave-one-out through all rounds against n refits, known answers, networks, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from decaycast.methods.self_distill.diagnostic import does_it_help, network_kernel, tuned_shift


def rbf(x: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-width * (x[:, None] - x[None]) ** 2)


def refitted(kernel: np.ndarray, y: np.ndarray, shift: float, rounds: int, mix: float) -> np.ndarray:
    """Predictions at each point by all rounds on the others, shape (rounds, n, ...), by n times `rounds` solves."""
    found = np.empty((rounds, *y.shape))
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        matrix, labels = kernel[np.ix_(rest, rest)], y[rest]
        for t in range(rounds):
            dual = np.linalg.solve(matrix + shift * np.eye(len(matrix)), labels)
            found[t, i] = kernel[i, rest] @ dual
            labels = mix * y[rest] + (1 - mix) * (matrix @ dual)
    return found


def data(samples: int = 30, noise: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = np.sort(rng.random(samples))
    return rbf(x, 30.0), 1.0 + np.sin(6 * x) + rng.normal(0.0, noise, samples)


# numbers


@pytest.mark.parametrize("mix", [0.0, 0.3, -0.5])
def test_errors_are_those_of_refits_without_each_point(mix: float):
    kernel, y = data()
    found = does_it_help(kernel, y, rounds=4, mix=mix, shift=0.1)
    squares = (refitted(kernel, y, 0.1, 4, mix) - y) ** 2
    np.testing.assert_allclose(found.errors, squares.mean(1), rtol=1e-9)
    changes = squares - squares[0]
    np.testing.assert_allclose(found.changes, changes.mean(1), atol=1e-12)
    half = stats.norm.ppf(1 - 0.05 / 3 / 2) * stats.sem(changes[1:], axis=1)
    np.testing.assert_allclose(found.high[1:], changes[1:].mean(1) + half, rtol=1e-6)
    np.testing.assert_allclose(found.low[1:], changes[1:].mean(1) - half, rtol=1e-6)
    assert found.changes[0] == found.low[0] == found.high[0] == 0.0
    assert found.best_rounds == 1 + int(np.argmin(squares.mean(1)))
    assert found.shift == 0.1 and found.mix == mix and found.error == "squared error"


def test_classes_are_counted_as_refits_count_them():
    kernel, values = data(40)
    labels = (values > 1.0).astype(int) + (values > 1.6)
    one_hot = np.eye(3)[labels]
    wrong = refitted(kernel, one_hot, 0.2, 3, 0.0).argmax(-1) != labels
    for targets in (labels, torch.from_numpy(labels), labels.astype(np.uint8)):
        found = does_it_help(kernel, targets, rounds=3, shift=0.2)
        assert found.error == "error rate" and found.errors == pytest.approx(wrong.mean(1))
    as_floats = does_it_help(kernel, one_hot, rounds=3, shift=0.2, error="error rate")
    assert as_floats.errors == pytest.approx(wrong.mean(1))
    squares = ((refitted(kernel, one_hot, 0.2, 3, 0.0) - one_hot) ** 2).sum(-1).mean(1)
    assert does_it_help(kernel, one_hot, rounds=3, shift=0.2).errors == pytest.approx(squares)


def test_a_tuned_ridge_has_the_smallest_error_left_out():
    kernel, y = data()
    found = does_it_help(kernel, y, rounds=2)
    errors = [
        ((refitted(kernel, y, shift, 1, 0.0)[0] - y) ** 2).mean() for shift in found.shift * np.array([0.3, 1.0, 3.0])
    ]
    assert found.errors[0] == pytest.approx(errors[1]) and min(errors) == errors[1]


@pytest.mark.parametrize("outputs", [None, 3])
def test_a_tolerance_is_the_training_error_of_the_first_fit(outputs: int | None):
    kernel, y = data()
    targets = y if outputs is None else np.stack([y, 2 * y - 1, y**2], 1)
    found = does_it_help(kernel, targets, rounds=2, tolerance=0.25)
    fitted = kernel @ np.linalg.solve(kernel + found.shift * np.eye(len(y)), targets)
    assert ((fitted - targets) ** 2).mean() == pytest.approx(0.25, rel=1e-6)


def test_units_of_the_kernel_and_of_the_labels_do_not_matter():
    kernel, y = data()
    one = does_it_help(kernel, y)
    two = does_it_help(1e4 * kernel, 10 * y)
    assert two.shift == pytest.approx(1e4 * one.shift)
    np.testing.assert_allclose(two.changes, 100 * np.array(one.changes), rtol=1e-6, atol=1e-9)
    assert two.answer == one.answer


# answers


def answer_of(noise: float, shift: float, samples: int = 200, **options: Any) -> Any:
    x = np.linspace(0.0, 1.0, samples)
    labels = np.sin(6 * x) + np.random.default_rng(0).normal(0.0, 1.0, samples) * noise
    return does_it_help(rbf(x, 5000.0), labels, shift=shift, **options)


def test_yes_where_the_teacher_follows_noise_and_no_where_there_is_none():
    yes, no = answer_of(0.5, 0.1), answer_of(0.0, 0.5)
    assert yes.answer == "yes" and min(yes.high) < 0 and yes.reason.startswith("yes: ")
    assert no.answer == "no" and min(no.low[1:]) > 0 and no.best_rounds == 1 and no.reason.startswith("no: ")


def test_a_yes_tells_of_the_round_that_is_surest():
    x = np.linspace(0.0, 1.0, 200)
    labels = np.sin(6 * x) + np.random.default_rng(1).normal(0.0, 0.5, 200)
    found = does_it_help(rbf(x, 20000.0), labels, shift=0.1)
    surest = int(np.argmin(found.high))
    assert found.answer == "yes" and found.best_rounds != surest + 1
    assert (
        f"yes: {surest + 1} fits" in found.reason and f"to {found.high[surest] / found.errors[0]:+.1%})" in found.reason
    )


def test_cannot_tell_where_points_are_few_and_a_lower_bar_says_no():
    few = answer_of(0.5, 0.1, samples=70)
    assert few.answer == "cannot tell" and "more samples would decide" in few.reason
    assert answer_of(0.5, 0.1, samples=70, worth=10.0).answer == "no"
    assert answer_of(0.5, 0.1, level=1 - 1e-14).answer == "cannot tell"


def test_the_answer_yes_comes_true_on_fresh_labels():
    x = np.linspace(0.0, 1.0, 200)
    kernel, truth = rbf(x, 5000.0), np.sin(6 * x)
    d, v = np.linalg.eigh(kernel)
    for seed in range(5):
        noisy = truth + np.random.default_rng(seed).normal(0.0, 0.5, 200)
        found = does_it_help(kernel, noisy, shift=0.1)
        assert found.answer == "yes"
        errors = [((v @ ((d / (d + 0.1)) ** t * (v.T @ noisy)) - truth) ** 2).mean() for t in (1, found.best_rounds)]
        assert errors[1] < errors[0]


@pytest.mark.slow
def test_without_a_gain_yes_is_rare():
    """Labels that the tuned teacher already serves as well as rounds do: at most one in twenty may say yes."""
    x = np.linspace(0.0, 1.0, 100)
    kernel = rbf(x, 50.0) + 1e-9 * np.eye(100)
    d, v = np.linalg.eigh(kernel)
    noise = 0.3
    said = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = v @ (np.sqrt(np.maximum(d, 0.0)) * rng.normal(size=100))  # drawn from the kernel's own prior
        labels = truth + noise * rng.normal(size=100)
        said += (
            does_it_help(kernel, labels, shift=noise**2).answer == "yes"
        )  # ridge with the noise's variance: the best
    assert said <= 6


def test_a_teacher_without_errors_has_nothing_to_gain():
    kernel = np.ones((4, 4)) + 1e-3 * np.eye(4)
    found = does_it_help(kernel, np.array([[1.0, 0.0]] * 4), shift=1e-3, error="error rate")
    assert found.answer == "no" and found.errors[0] == 0.0 and found.best_rounds == 1


# networks


def test_the_kernel_of_a_network_serves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(30, 4)
    kernel = network_kernel(net, x)
    jacobian = []
    for row in x:
        for k in range(2):
            gradient = torch.autograd.grad(net(row)[k], list(net.parameters()))
            jacobian.append(torch.cat([each.flatten() for each in gradient]))
    stacked = torch.stack(jacobian).view(30, -1)  # both outputs' gradients in one row: their sum of products
    np.testing.assert_allclose(kernel, (stacked @ stacked.T).numpy(), rtol=1e-5)
    labels = (x[:, 0] > 0).long()
    assert does_it_help(torch.from_numpy(kernel), labels).error == "error rate"


def test_features_serve_as_a_kernel_of_low_rank():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5))
    labels = features @ np.ones(5) + rng.normal(0.0, 1.0, 60)
    kernel = features @ features.T
    found = does_it_help(kernel, labels, rounds=3, shift=2.0)
    squares = (refitted(kernel, labels, 2.0, 3, 0.0) - labels) ** 2
    np.testing.assert_allclose(found.errors, squares.mean(1), rtol=1e-7)


def test_the_tuned_ridge_of_pure_noise_is_large():
    kernel, _ = data(100)
    d, v = np.linalg.eigh(kernel)
    noise = np.random.default_rng(1).normal(size=100)
    d = np.maximum(d, 0.0)
    assert tuned_shift(d, v, v.T @ noise) > 100 * tuned_shift(d, v, v.T @ (kernel @ np.ones(100)))


# bad input


KERNEL, LABELS = data(10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": np.ones((3, 4))}, r"square matrix of at least 3 training inputs, got shape \(3, 4\)"),
        ({"kernel": np.eye(2)}, "at least 3 training inputs"),
        ({"kernel": np.full((10, 10), np.nan)}, "kernel holds NaN or infinite values"),
        ({"kernel": np.zeros((10, 10))}, "kernel is zero everywhere"),
        ({"kernel": KERNEL + np.triu(np.ones((10, 10)))}, "kernel is not symmetric"),
        ({"kernel": KERNEL - 5 * np.eye(10)}, "not positive semi-definite"),
        ({"targets": LABELS[:5]}, r"targets must be finite, of shape \(10,\) or \(10, outputs\)"),
        ({"targets": np.full(10, np.inf)}, "targets must be finite"),
        ({"targets": np.arange(10) - 1}, "classes 0, 1, ..., at least two, got -1 to 8"),
        ({"targets": np.zeros(10, dtype=int)}, "at least two, got 0 to 0"),
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"rounds": 0}, "rounds is the number of fits"),
        ({"mix": np.nan}, "mix must be finite"),
        ({"shift": 0.0}, "shift must be finite and > 0, got 0.0"),
        ({"tolerance": -1.0}, "tolerance must be finite and > 0, got -1.0"),
        ({"tolerance": 1e6}, "is met by predicting 0 everywhere"),
        ({"shift": 1.0, "tolerance": 1.0}, "shift and tolerance both say"),
        ({"worth": -0.1}, "worth must be finite and >= 0"),
        ({"level": 1.0}, "level must lie between 0 and 1"),
        ({"error": "error rate"}, "an error rate needs classes"),
        ({"error": "errors"}, "unknown error 'errors'; did you mean 'error rate'"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str):
    mine = {"kernel": KERNEL, "targets": LABELS, **change}
    with pytest.raises(ValueError, match=words):
        does_it_help(**mine)
