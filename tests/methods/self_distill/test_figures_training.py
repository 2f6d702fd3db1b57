"""What the self-distillation figures train: the toy against other code, networks on flipped labels, regression sets."""

from __future__ import annotations

import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from decaycast.core.experiment import Row, Run
from decaycast.lab import data
from decaycast.methods.self_distill.diagnostic import does_it_help, network_kernel
from decaycast.methods.self_distill.figures import deep, regression, sets, toy
from decaycast.methods.self_distill.figures.forecast import Forecast
from decaycast.methods.self_distill.figures.noisy_labels import NoisyLabels

# the toy


def green(x: np.ndarray, modes: int = 20_000) -> np.ndarray:
    """The kernel by its eigenfunctions: sum over k of 2 sin(k pi x) sin(k pi t)/(k pi)^4."""
    k = np.arange(1, modes + 1) * np.pi
    waves = np.sin(np.outer(x, k)) / k**2
    return 2 * waves @ waves.T


def test_the_kernel_is_the_sum_over_its_eigenfunctions():
    x = np.array([0.05, 0.3, 0.5, 0.81])
    np.testing.assert_allclose(toy.spline_kernel(x, x), green(x), atol=1e-13)


def by_hand(x: np.ndarray, y: np.ndarray, eps: float, fits: int) -> tuple[list[float], int]:
    """Errors of the fits of one draw, by solving with every multiplier; and how many are not zero."""
    kernel, grid = toy.spline_kernel(x, x), np.linspace(0, 1, 101)
    errors, live, labels = [], 0, y
    for t in range(fits):
        values = np.zeros(101)
        if (labels**2).mean() > eps:

            def missed(log_shift: float, labels: np.ndarray = labels) -> float:
                shift = np.exp(log_shift)
                return float(((shift * np.linalg.solve(kernel + shift * np.eye(len(x)), labels)) ** 2).mean()) - eps

            shift = np.exp(brentq(missed, -60.0, 20.0, xtol=1e-13))
            dual = np.linalg.solve(kernel + shift * np.eye(len(x)), labels)
            values, labels, live = toy.spline_kernel(grid, x) @ dual, kernel @ dual, t + 1
        errors.append(float(((values - np.sin(2 * np.pi * grid)) ** 2).mean()))
        if live == t:
            labels = np.zeros_like(labels)
    return errors, live


@pytest.mark.parametrize("eps", [0.045, 0.2])
def test_a_run_of_the_toy_is_what_solving_by_hand_gives(eps: float):
    x = np.arange(1, 12) / 12
    labels = np.sin(2 * np.pi * x)[:, None] + np.random.default_rng(5).normal(0, 0.5, (11, 4))
    curve, final = toy.distilled(x, labels, eps)
    hand = [by_hand(x, y, eps, toy.FITS) for y in labels.T]
    errors = np.array([each[0] for each in hand])
    np.testing.assert_allclose(curve["error"], errors.mean(0), rtol=1e-6)
    np.testing.assert_allclose(curve["error_deviation"], errors.std(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(curve["gap"], (errors - errors[:, 1:2]).mean(0), atol=1e-8)
    live = [each[1] for each in hand]
    assert (final["live_mean"], final["live_min"], final["live_max"]) == (np.mean(live), min(live), max(live))
    np.testing.assert_allclose(curve["live"], [np.mean([n > t for n in live]) for t in range(toy.FITS)])
    assert final["first_is_best"] == (errors.argmin(1) == 0).mean()
    assert final["broken"] == 0
    assert curve["train_error"][0] == pytest.approx(eps)  # the first fit misses the labels by the tolerance


def test_a_broken_bound_is_counted():
    d = np.array([0.5, 1.0, 2.0])
    norms = np.array([[4.0], [2.0], [0.5]])  # falls by two: nothing can
    assert toy._bounds(d, norms, np.array([2]))["broken"] > 0
    slow = np.array([[4.0], [3.99], [3.3], [2.5], [1.5], [0.9]])  # hardly falls at first: a fit moves further than that
    assert toy._bounds(d, slow, np.array([5]))["broken"] == 1


def test_more_fits_than_can_be_are_counted():
    norms = np.array([[2.0], [1.6], [1.2], [0.9]])
    d = np.array([0.5, 1.0, 2.0])
    assert toy._bounds(d, norms, np.array([3]))["broken"] == 0
    assert toy._bounds(d, norms, np.array([4]))["broken"] == 1  # 2^2 - 1 = 3 are possible
    assert toy._bounds(d, norms, np.array([0]))["broken"] == 1  # 2 - 1 = 1 is certain


def test_long_runs_are_followed_to_their_end():
    z = np.random.default_rng(0).normal(size=(5, 3))
    live = toy.until_collapse(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), z, 1e-3)
    assert live.min() > 16


def test_runs_of_the_toy_differ_by_seed_only():
    figure = toy.Toy()
    one, two = (figure.train(run, None) for run in figure.runs("small")[:8:7])
    assert one.run.config == two.run.config and one.curve["error"] != two.curve["error"]
    again = figure.train(one.run, None)
    assert again.curve == one.curve and again.final == one.final


# networks


def test_flips_are_the_share_asked_for_and_always_change_the_label():
    labels = torch.arange(10).repeat(2000)
    found = deep.flipped(labels, 0.4, 10, seed=3)
    changed = found != labels
    assert float(changed.double().mean()) == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / 20_000))
    counts = torch.bincount((found - labels)[changed] % 10, minlength=10)
    assert counts[0] == 0 and float(counts[1:].double().std() / counts[1:].double().mean()) < 0.15
    assert torch.equal(found, deep.flipped(labels, 0.4, 10, seed=3))
    assert not torch.equal(found, deep.flipped(labels, 0.4, 10, seed=4))


def test_networks_come_from_their_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = (deep.network((3, 9, 9), 4, 2, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.randn(3, 3, 9, 9)
    assert torch.equal(one(x), two(x)) and not torch.equal(one(x), other(x))


def test_accuracy_on_flipped_labels_is_turned_back():
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.integers(0, 10, 200_000))
    said = torch.where(torch.from_numpy(rng.random(200_000)) < 0.7, truth, (truth + 1) % 10)
    seen = float((said == deep.flipped(truth, 0.4, 10, 1)).double().mean())
    assert deep._on_true_labels(seen, 0.4, 10) == pytest.approx(0.7, abs=0.01)
    found = does_it_help(np.eye(20) + 1, np.arange(20) % 2, rounds=2, shift=1.0)
    turned = deep._predicted("x", found, 0.4, 10)
    assert turned["x"][1] == pytest.approx(-found.changes[1] / (1 - 0.4 / 0.9))
    assert turned["x_low"][1] <= turned["x"][1] <= turned["x_high"][1]


SMALL: dict[str, Any] = {"train_size": 60, "validation_size": 60, "test_size": 100}


@pytest.mark.parametrize("figure", [NoisyLabels(), Forecast()], ids=lambda figure: figure.name)
def test_a_run_of_a_network_holds_what_its_panels_need(figure: Any):
    config = {**figure.runs("smoke")[0].config, "flips": 0.2, "epochs": 5, "rounds": 3}
    split = data.load("digits", **SMALL)
    row = figure.train(Run(config=config, seed=2), split)
    assert isinstance(row, Row) and {len(column) for column in row.curve.values()} == {3}
    labels = deep.flipped(split.train[1], 0.2, 10, 2)
    model = deep._trained(config, split.train[0], torch.eye(10)[labels], 2000)
    outputs = model(split.train[0])
    assert row.curve["train_accuracy"][0] == float((outputs.argmax(1) == labels).double().mean())
    assert row.curve["train_error"][0] == pytest.approx(float(((outputs - torch.eye(10)[labels]) ** 2).mean()))
    again = deep._trained(config, split.train[0], outputs, 2001)(split.test[0])
    assert row.curve["test_accuracy"][1] == pytest.approx(float((again.argmax(1) == split.test[1]).double().mean()))
    kernel = network_kernel(deep.network(split.shape, 10, config["channels"], 2000), split.train[0])
    expected = does_it_help(kernel, labels, rounds=3, tolerance=row.curve["train_error"][0])
    assert row.final["matched_ridge"] == pytest.approx(expected.shift, rel=1e-6)
    assert row.curve["matched"] == pytest.approx([-value / (1 - 0.2 / 0.9) for value in expected.changes])
    assert row.final["matched_accuracy"] == pytest.approx(
        deep._on_true_labels(1 - expected.errors[0], 0.2, 10), abs=1e-9
    )
    assert np.isfinite([*row.final.values()]).all()


def test_a_gpu_that_is_not_there_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = NoisyLabels().runs("paper")[0]
    with pytest.raises(ValueError, match="trains on a GPU, which torch does not find"):
        deep.train_rounds(None, run, None)


# regression sets


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("diabetes", (442, 10)),
        ("linnerud", (20, 3)),
        ("wine", (178, 12)),
        ("breast-cancer", (569, 9)),
        ("iris", (150, 3)),
        ("digits", (1797, 32)),
    ],
)
def test_sets_that_scikit_learn_ships(name: str, shape: tuple[int, int]):
    inputs, targets = sets.load(name)
    assert inputs.shape == shape and len(targets) == shape[0] and inputs.dtype == targets.dtype == np.float64
    assert np.isfinite(inputs).all() and np.isfinite(targets).all()
    flat = inputs.reshape(len(inputs), -1)
    columns = [column for column in targets.reshape(len(targets), -1).T if column.std() > 0]
    assert not any(
        (flat == column[:, None]).all(0).any() for column in columns
    )  # what is predicted is not among the inputs


def test_sets_of_the_data_folder_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DECAYCAST_DATA", str(tmp_path))
    folder = tmp_path / "tabular"
    folder.mkdir()
    for name in ("california", "adult"):
        with pytest.raises(ValueError, match=r"was not found: looked in .*tabular"):
            sets.SETS[name]()
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20640, 8)).astype(np.float32), rng.normal(size=20640).astype(np.float32)
    np.savez(folder / "california_housing.npz", X=x, y=y, names=np.array(["a"]))
    inputs, targets = sets.SETS["california"]()
    assert np.array_equal(inputs, x) and np.array_equal(targets, y)
    np.savez(folder / "california_housing.npz", X=x[:5], y=y)
    with pytest.raises(ValueError, match=re.escape("must hold X of shape (20640, 8)")):
        sets.SETS["california"]()
    person = (
        "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Own, White, Male, 2174, 7, 40, X, <=50K\n"
    )
    text = "age, workclass\n" + person * 32561
    (folder / "adult_train_32561.csv.xz").write_bytes(lzma.compress(text.encode()))
    inputs, targets = sets.SETS["adult"]()
    assert inputs.shape == (32561, 6) and inputs[0].tolist() == [77516, 13, 2174, 7, 40, 1] and targets[0] == 39
    (folder / "adult_train_32561.csv.xz").write_bytes(lzma.compress(person.encode()))
    with pytest.raises(ValueError, match="must hold 32,561 people of 15 columns, got 1"):
        sets.SETS["adult"]()
    monkeypatch.delenv("DECAYCAST_DATA")
    with pytest.raises(ValueError, match="no folder given"):
        sets.SETS["adult"]()


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match="unknown regression set 'irises'; did you mean 'iris'"):
        sets.load("irises")


def test_sets_need_scikit_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'decaycast[lab]'")):
        sets.SETS["iris"]()


def test_the_single_fit_is_kernel_ridge_with_the_smallest_gcv():
    inputs, targets = sets.load("iris")
    found = regression.compared((inputs, targets), 60, 50, seed=4)
    order = np.random.default_rng([4, 2]).permutation(150)
    one, two = order[:60], order[60:110]
    mean, deviation = inputs[one].mean(0), inputs[one].std(0)
    x, other = (inputs[one] - mean) / deviation, (inputs[two] - mean) / deviation
    y, wanted = ((targets[part] - targets[one].mean()) / targets[one].std() for part in (one, two))

    def gcv(gamma: float, alpha: float) -> tuple[float, float]:
        kernel = np.exp(-gamma * ((x[:, None] - x) ** 2).sum(-1))
        hat = np.linalg.solve(kernel + alpha * np.eye(60), kernel).T
        score = ((y - hat @ y) ** 2).mean() / (1 - np.trace(hat) / 60) ** 2
        across = np.exp(-gamma * ((other[:, None] - x) ** 2).sum(-1))
        return score, ((across @ np.linalg.solve(kernel + alpha * np.eye(60), y) - wanted) ** 2).mean()

    best, error = gcv(found["gamma"], found["ridge_alpha"])
    assert found["ridge_error"] == pytest.approx(error, rel=1e-6)
    for gamma in np.array(regression.GAMMAS) / 3:
        for factor in (0.1, 0.5, 1.0, 2.0, 10.0):
            assert gcv(float(gamma), factor * found["ridge_alpha"])[0] > best - 0.02 * best
    if found["rounds"] == 1:
        assert found["error"] == pytest.approx(found["ridge_error"])
    assert (found["train_samples"], found["test_samples"]) == (60, 50)


def test_small_sets_keep_a_quarter_to_test_on():
    found = regression.compared(sets.load("linnerud"), 300, 1000, seed=0)
    assert (found["train_samples"], found["test_samples"]) == (15, 5)


def test_constant_columns_do_no_harm():
    values = np.array([[1.0, 5.0], [3.0, 5.0]])
    one, two = regression._standardised(values, values + 1)
    np.testing.assert_allclose(one, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(two, [[0, 1], [2, 1]])
