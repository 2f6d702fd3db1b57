"""distill: the loop against the closed form of kernel ridge, deep networks, classes, and going on after a kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.methods.self_distill.distill import Distilled, distill
from decaycast.methods.self_distill.progress import Progress, fingerprint


def points(samples: int = 40, outputs: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (samples,) if outputs is None else (samples, outputs)
    return rng.normal(size=(samples, 3)), 2.0 + rng.normal(size=shape)


def gram(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.exp(-0.7 * ((x[:, None] - z[None]) ** 2).sum(-1))


class Ridge:
    """Kernel ridge as a fit, solved anew each time; counts its fits."""

    def __init__(self, shift: float) -> None:
        self.shift, self.fits = shift, 0

    def __call__(self, inputs: np.ndarray, targets: np.ndarray) -> Any:
        self.fits += 1
        dual = np.linalg.solve(gram(inputs, inputs) + self.shift * np.eye(len(inputs)), targets)
        return lambda x: gram(x, inputs) @ dual


def filtered(x: np.ndarray, y: np.ndarray, shift: float, weights: list[float]) -> np.ndarray:
    """The last fit's outputs by one spectral filter: S_k = h*(m_k + (1 - m_k)*S_{k-1}), S_0 = h."""
    d, v = np.linalg.eigh(gram(x, x))
    h = d / (d + shift)
    total = h
    for weight in weights:
        total = h * (weight + (1 - weight) * total)
    return v @ (total[:, None] * (v.T @ y.reshape(len(y), -1))).reshape(len(y), *y.shape[1:])


# the loop


@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("mix", [0.0, 0.3, -0.5, 1.7, (0.2, 0.0, 0.9, 1.4)])
def test_with_kernel_ridge_it_is_the_closed_form(mix: Any, outputs: int | None):
    x, y = points(outputs=outputs)
    done = distill(Ridge(0.2), x, y, 5, mix)
    weights = list(mix) if isinstance(mix, tuple) else [mix] * 4
    for rounds, found in enumerate(done.outputs):
        np.testing.assert_allclose(found, filtered(x, y, 0.2, weights[:rounds]), rtol=0, atol=1e-9)
    assert done.predict is not None
    np.testing.assert_allclose(done.predict(x), done.outputs[-1], rtol=0, atol=1e-12)


def test_pure_rounds_are_a_power_of_the_filter_and_shrink_to_nothing():
    x, y = points()
    d, v = np.linalg.eigh(gram(x, x))
    done = distill(Ridge(1.0), x, y, 60)
    np.testing.assert_allclose(done.outputs[9], v @ ((d / (d + 1.0)) ** 10 * (v.T @ y)), atol=1e-9)
    norms = [float(np.linalg.norm(each)) for each in done.outputs]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.5 * norms[0]


def test_labels_with_weight_one_are_plain_training_again():
    x, y = points()
    done = distill(Ridge(0.5), x, y, 4, 1.0)
    for found in done.outputs:
        np.testing.assert_array_equal(found, done.outputs[0])


@settings(max_examples=30, deadline=None)
@given(
    rounds=st.integers(1, 5),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    a=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_distilling_with_a_linear_fit_is_linear_in_the_labels(rounds: int, weights: list[float], a: float, seed: int):
    x, y = points(8, seed=seed)
    _, z = points(8, seed=seed + 100)
    mix = weights[: rounds - 1]
    one, two, both = (distill(Ridge(0.3), x, labels, rounds, mix).outputs[-1] for labels in (y, z, y + a * z))
    np.testing.assert_allclose(both, one + a * two, atol=1e-7)


def test_one_round_is_one_plain_fit():
    x, y = points()
    fit = Ridge(0.3)
    done = distill(fit, x, y, 1)
    assert fit.fits == 1 and len(done.outputs) == len(done.targets) == 1 and done.read_rounds == 0
    np.testing.assert_array_equal(done.outputs[0], Ridge(0.3)(x, y)(x))
    np.testing.assert_array_equal(done.targets[0], y)


def test_each_round_is_trained_on_the_mixed_outputs_of_the_last():
    x, y = points()
    seen: list[np.ndarray] = []

    def fit(inputs: np.ndarray, targets: np.ndarray) -> Any:
        seen.append(targets.copy())
        return Ridge(0.3)(inputs, targets)

    done = distill(fit, x, y, 3, (0.25, 0.5))
    np.testing.assert_array_equal(seen[0], y)
    np.testing.assert_allclose(seen[1], 0.25 * y + 0.75 * done.outputs[0], atol=1e-15)
    np.testing.assert_allclose(seen[2], 0.5 * y + 0.5 * done.outputs[1], atol=1e-15)
    for ours, theirs in zip(done.targets, seen, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_labels_stay_as_they_were_whatever_fit_does_to_its_own():
    x, y = points()
    before = y.copy()

    def fit(inputs: np.ndarray, targets: np.ndarray) -> Any:
        predict = Ridge(0.3)(inputs, targets)
        targets *= 0.0
        return predict

    distill(fit, x, y, 3, 0.5)
    np.testing.assert_array_equal(y, before)


def test_what_measure_says_is_kept_by_round():
    x, y = points()
    done = distill(Ridge(0.3), x, y, 3, measure=lambda predict: {"mse": float(((predict(x) - y) ** 2).mean())})
    expected = [float(((out - y) ** 2).mean()) for out in done.outputs]
    assert [each["mse"] for each in done.measured] == pytest.approx(expected)
    assert distill(Ridge(0.3), x, y, 2).measured == ({}, {})


def test_a_fit_gets_the_round_and_the_model_before_when_it_asks_for_them():
    asked: list[tuple[int, bool]] = []

    def fit(inputs: Any, targets: Any, *, round: int, previous: Any) -> Any:
        asked.append((round, previous is None))
        return lambda x: targets + (0.0 if previous is None else 1.0)

    distill(fit, None, np.array([1.0, 2.0]), 3)
    assert asked == [(0, True), (1, False), (2, False)]

    def other(inputs: Any, targets: Any, **settings: Any) -> Any:  # asks for nothing by name
        assert settings == {}
        return lambda x: targets

    distill(other, None, np.array([1.0, 2.0]), 2)


# tensors, networks, classes


def test_tensors_stay_tensors_of_their_dtype():
    x, y = (torch.from_numpy(each) for each in points())
    plain = distill(Ridge(0.2), x.numpy(), y.numpy(), 3, 0.4)

    def fit(inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        assert isinstance(targets, torch.Tensor) and not targets.requires_grad
        predict = Ridge(0.2)(inputs.numpy(), targets.double().numpy())
        return lambda z: torch.from_numpy(predict(z.numpy())).requires_grad_()

    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        done = distill(fit, x, y.to(dtype), 3, 0.4)
        assert {out.dtype for out in done.outputs} == {dtype}
        assert not any(out.requires_grad for out in done.outputs)
        np.testing.assert_allclose(done.outputs[-1].double().numpy(), plain.outputs[-1], atol=close)


def test_a_linear_network_trained_to_the_end_is_ridge():
    x, y = (torch.from_numpy(each) for each in points(outputs=2))
    shift = 0.5

    def fit(inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        model = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((model(inputs) - targets) ** 2).sum() + shift * (model.weight**2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return model

    torch.manual_seed(0)
    done = distill(fit, x, y, 3, 0.25)
    kernel = (x @ x.T).numpy()
    h = np.linalg.solve(kernel + shift * np.eye(len(x)), kernel).T
    total = h
    for _ in range(2):
        total = h @ (0.25 * np.eye(len(x)) + 0.75 * total)
    np.testing.assert_allclose(done.outputs[-1].numpy(), total @ y.numpy(), atol=1e-7)


@pytest.mark.parametrize("tensors", [False, True])
def test_classes_become_one_hot_and_logits_probabilities_at_a_temperature(tensors: bool):
    labels = np.array([0, 2, 1, 2])
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [0.5, 0.5, 0.0], [-400.0, 800.0, 1.0]])
    seen: list[np.ndarray] = []

    def fit(inputs: Any, targets: Any) -> Any:
        seen.append(np.asarray(targets, dtype=np.float64))
        return lambda x: torch.from_numpy(logits) if tensors else logits

    done = distill(fit, None, torch.from_numpy(labels) if tensors else labels, 3, (0.1, 0.0), temperature=4.0)
    assert isinstance(done.outputs[0], torch.Tensor if tensors else np.ndarray)
    np.testing.assert_array_equal(seen[0], np.eye(3)[labels])
    soft = torch.softmax(torch.from_numpy(logits) / 4.0, -1).numpy()
    np.testing.assert_allclose(seen[1], 0.1 * np.eye(3)[labels] + 0.9 * soft, atol=1e-6)
    np.testing.assert_allclose(seen[2], soft, atol=1e-6)
    np.testing.assert_allclose(np.asarray(done.outputs[0]), logits, rtol=1e-6)  # before the softmax


@pytest.mark.parametrize("labels", [np.array([True, False, True]), torch.tensor([1, 0, 1], dtype=torch.uint8)])
def test_booleans_and_small_integers_are_classes_too(labels: Any):
    done = distill(lambda inputs, targets: lambda x: targets, None, labels, 1)
    np.testing.assert_array_equal(np.asarray(done.targets[0]), [[0, 1], [1, 0], [0, 1]])


def test_one_hot_labels_may_come_as_whole_numbers():
    for labels in (np.eye(3, dtype=int), torch.eye(3).long()):
        done = distill(lambda inputs, targets: lambda x: 0.5 * targets, None, labels, 2)
        np.testing.assert_allclose(np.asarray(done.outputs[1]), 0.25 * np.eye(3))


# going on


SCRIPT = """
import os, signal, sys
import numpy as np
from decaycast.methods.self_distill.distill import distill

store, log, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
x = np.linspace(0, 1, 20)
y = np.sin(6 * x) + np.cos(40 * x)
kernel = np.exp(-9 * (x[:, None] - x[None]) ** 2)

def fit(inputs, targets, round):
    if round == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(log, "a") as file:
        file.write(f"{round} ")
    dual = np.linalg.solve(kernel + 0.1 * np.eye(20), targets)
    return lambda z: kernel @ dual

done = distill(fit, x, y, 4, 0.3, store=store, measure=lambda predict: {"first": predict(x)[0]})
np.savez(log + ".npz", last=done.outputs[-1], first=[each["first"] for each in done.measured], read=done.read_rounds)
"""


def run_script(folder: Path, kill_at: int) -> int:
    command = [sys.executable, "-c", SCRIPT, str(folder / "deep" / "rounds.npz"), str(folder / "log"), str(kill_at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, env=environment, check=False, timeout=120, capture_output=True).returncode


@pytest.mark.slow
def test_killed_in_any_round_it_goes_on_and_trains_no_round_twice(tmp_path: Path):
    assert (
        run_script(tmp_path / "whole", -1) != 0
    )  # no folder for its log: a plain failure, to see that this is noticed
    whole = tmp_path / "plain"
    whole.mkdir()
    assert run_script(whole, -1) == 0
    expected = np.load(whole / "log.npz")
    for kill_at in range(4):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        assert run_script(folder, kill_at) == -signal.SIGKILL
        assert run_script(folder, -1) == 0
        assert (folder / "log").read_text().split() == ["0", "1", "2", "3"]
        found = np.load(folder / "log.npz")
        assert int(found["read"]) == kill_at
        np.testing.assert_array_equal(found["last"], expected["last"])
        np.testing.assert_array_equal(found["first"], expected["first"])
        assert [path.name for path in (folder / "deep").iterdir()] == ["rounds.npz"]


class StopError(Exception):
    """Ends a fit."""


def stopping(at: int) -> tuple[Any, list[int]]:
    made: list[int] = []

    def fit(inputs: Any, targets: Any, round: int) -> Any:
        if round == at:
            raise StopError
        made.append(round)
        return Ridge(0.2)(inputs, targets)

    return fit, made


@pytest.mark.parametrize("stop_at", range(5))
def test_interrupted_in_any_round_it_ends_as_if_nothing_had_happened(tmp_path: Path, stop_at: int):
    x, y = points()
    expected, store = distill(Ridge(0.2), x, y, 5, (0.1, 0.2, 0.3, 0.4)), tmp_path / "rounds.npz"
    with pytest.raises(StopError):
        distill(stopping(stop_at)[0], x, y, 5, (0.1, 0.2, 0.3, 0.4), store=store)
    fit, made = stopping(-1)
    done = distill(fit, x, y, 5, (0.1, 0.2, 0.3, 0.4), store=store)
    assert made == list(range(stop_at, 5)) and done.read_rounds == stop_at
    for name in ("outputs", "targets"):
        for ours, theirs in zip(getattr(done, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_finished_file_trains_nothing_and_leaves_the_targets_of_the_last_fit(tmp_path: Path):
    x, y = points()
    first = distill(Ridge(0.2), x, y, 3, store=tmp_path / "a", measure=lambda predict: {"nan": np.nan})
    fit = Ridge(0.2)
    again = distill(fit, x, y, 3, store=tmp_path / "a")
    assert fit.fits == 0 and again.predict is None and again.read_rounds == 3
    assert np.isnan(again.measured[2]["nan"])
    np.testing.assert_array_equal(fit(x, again.targets[-1])(x), first.outputs[-1])


def test_more_rounds_may_be_asked_for_later_and_fewer_read(tmp_path: Path):
    x, y = points()
    distill(Ridge(0.2), x, y, 3, 0.5, store=tmp_path / "a")
    fit, made = stopping(-1)
    more = distill(fit, x, y, 5, (0.5, 0.5, 0.1, 0.2), store=tmp_path / "a")
    assert made == [3, 4]
    np.testing.assert_array_equal(more.outputs[-1], distill(Ridge(0.2), x, y, 5, (0.5, 0.5, 0.1, 0.2)).outputs[-1])
    fewer = distill(fit, x, y, 2, 0.5, store=tmp_path / "a")
    assert made == [3, 4] and len(fewer.outputs) == len(fewer.targets) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_come_back_from_a_file_as_they_were(tmp_path: Path, dtype: torch.dtype):
    labels = torch.tensor([[1.0, 0.3], [0.2, 0.7]]).to(dtype)

    def fit(inputs: Any, targets: torch.Tensor) -> Any:
        return lambda x: targets * 0.7

    wanted = distill(fit, labels, labels, 3, 0.1, store=tmp_path / "a").outputs
    again = distill(fit, labels, labels, 3, 0.1, store=tmp_path / "a")
    assert again.read_rounds == 3
    assert all(torch.equal(one, two) and one.dtype == dtype for one, two in zip(wanted, again.outputs, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": "other"}, "holds rounds of another distillation"),
        ({"inputs": "other"}, "holds rounds of another distillation"),
        ({"mix": 0.4}, "holds rounds with mix"),
        ({"rounds": 2, "mix": [0.4]}, "holds rounds with mix"),
    ],
)
def test_a_file_of_another_distillation_is_refused(tmp_path: Path, change: dict[str, Any], words: str):
    x, y = points()
    distill(Ridge(0.2), x, y, 3, 0.5, store=tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    mine: dict[str, Any] = {"inputs": x, "targets": y, "rounds": 3, "mix": 0.5}
    mine |= {name: mine[name] + 1e-12 if value == "other" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=words):
        distill(Ridge(0.2), **mine, store=tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


def test_another_temperature_is_refused(tmp_path: Path):
    labels = np.array([0, 1, 1])

    def fit(inputs: Any, targets: Any) -> Any:
        return lambda x: 3.0 * targets

    distill(fit, None, labels, 2, temperature=1.0, store=tmp_path / "a")
    for temperature in (None, 2.0):
        with pytest.raises(ValueError, match="holds rounds of another distillation"):
            distill(fit, None, labels, 2, temperature=temperature, store=tmp_path / "a")


def test_a_file_that_is_none_of_ours_or_broken_is_refused(tmp_path: Path):
    x, y = points()
    path = tmp_path / "a"
    distill(Ridge(0.2), x, y, 2, store=path)
    whole = path.read_bytes()
    objects = tmp_path / "objects"
    with objects.open("wb") as file:
        np.savez(file, outputs=np.array([{}], dtype=object))
    for content in (b"", b"some text", whole[: len(whole) // 2], objects.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as rounds of a distillation"):
            distill(Ridge(0.2), x, y, 2, store=path)
    mark = np.array(fingerprint(y, x, None))
    for outputs, measured in ((np.zeros((0, 40)), "[]"), (np.zeros((1, 40)), "[]"), (np.zeros((1, 7)), "[{}]")):
        with path.open("wb") as file:
            np.savez(file, fingerprint=mark, mix=np.zeros(0), outputs=outputs, measured=np.array(measured))
        with pytest.raises(ValueError, match="is damaged"):
            distill(Ridge(0.2), x, y, 2, store=path)


def test_a_write_that_fails_leaves_the_finished_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    x, y = points()
    progress = Progress(tmp_path / "a", fingerprint(y, x, None), [0.0])
    progress.write([y], [{}])
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        progress.write([y, y], [{}, {}])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(progress.read(y, 2)[0]) == 1


def test_objects_as_inputs_do_not_bind_the_file(tmp_path: Path):
    _, y = points()
    for inputs in (["a", "b"], np.array([object(), object()]), {"x": 1}):
        done = distill(lambda inputs, targets: lambda x: targets, inputs, y, 1, store=tmp_path / str(type(inputs)))
        assert done.read_rounds == 0
    again = distill(lambda i, t: lambda x: t, np.array([object(), object()]), y, 1, store=tmp_path / str(np.ndarray))
    assert again.read_rounds == 1


# bad input


def same(inputs: Any, targets: Any) -> Any:
    return lambda x: targets


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 0}, "rounds counts fits and must be a whole number >= 1, got 0"),
        ({"rounds": -1}, "rounds counts fits"),
        ({"rounds": 2.0}, "rounds counts fits"),
        ({"rounds": True}, "rounds counts fits"),
        ({"mix": [0.1, 0.2, 0.3]}, "one weight for each fit after the first, 2 for rounds=3, got 3"),
        ({"mix": float("nan")}, "mix must be finite"),
        ({"mix": [0.1, float("inf")]}, "mix must be finite"),
        ({"rounds": 1, "mix": float("nan")}, "mix must be finite"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"temperature": float("nan")}, "temperature must be finite and > 0"),
        ({"temperature": 1.0, "mix": 1.2, "targets": np.array([0, 1])}, r"with a temperature mix must lie in \[0, 1\]"),
        ({"temperature": 1.0}, "with a temperature targets must be classes"),
        ({"temperature": 1.0, "targets": np.array([[0.5, 0.6]])}, "with a temperature targets must be classes"),
        ({"temperature": 1.0, "targets": np.array([[-0.5, 1.5]])}, "with a temperature targets must be classes"),
        ({"targets": np.zeros((2, 2, 2))}, r"targets must have shape \(n,\) or \(n, outputs\)"),
        ({"targets": np.zeros(0)}, "targets must have shape"),
        ({"targets": np.zeros((3, 0))}, "targets must have shape"),
        ({"targets": np.array([1.0, np.nan])}, "targets hold NaN or infinite values"),
        ({"targets": torch.tensor([1.0, torch.inf])}, "targets hold NaN or infinite values"),
        ({"targets": np.array([1j])}, "targets must be real numbers or classes, got dtype complex128"),
        ({"targets": torch.tensor([1j])}, "targets must be real numbers or classes"),
        ({"targets": np.array(["a", "b"])}, "targets must be real numbers or classes"),
        ({"targets": np.array([0, -1])}, "classes 0, 1, ..., at least two of them, got -1 to 0"),
        ({"targets": torch.tensor([0, 0])}, "at least two of them, got 0 to 0; make them floats"),
        (
            {"fit": lambda inputs, targets: lambda x: targets[:, None]},
            r"round 0 predicts shape \(2, 1\) for targets of",
        ),
        ({"fit": lambda inputs, targets: lambda x: targets * np.nan}, "round 0 predicts NaN or infinite values"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str):
    mine = {"fit": same, "inputs": None, "targets": np.array([1.0, 2.0]), "rounds": 3, **change}
    with pytest.raises(ValueError, match=words):
        distill(**mine)


def test_what_has_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match="numpy array or a torch tensor, got list"):
        distill(same, None, [1.0, 2.0], 2)
    with pytest.raises(TypeError, match=re.escape("fit must return a function from inputs to outputs, got ndarray")):
        distill(lambda inputs, targets: targets, None, np.array([1.0]), 2)


def test_going_on_from_weights_cannot_be_resumed(tmp_path: Path):
    def fit(inputs: Any, targets: Any, previous: Any) -> Any:
        return lambda x: targets

    with pytest.raises(ValueError, match="store does not hold"):
        distill(fit, None, np.array([1.0]), 2, store=tmp_path / "a")
    assert isinstance(distill(fit, None, np.array([1.0]), 2), Distilled)


def test_a_fit_whose_signature_cannot_be_read_is_asked_for_nothing():
    class Opaque:
        __signature__ = "none"

        def __call__(self, inputs: Any, targets: Any) -> Any:
            return lambda x: targets

    assert len(distill(Opaque(), None, np.array([1.0]), 2).outputs) == 2
