"""The GPU set, in its smoke sizes on the CPU: every piece runs, and what is stopped goes on where it was."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decaycast.lab import image_files, models

BENCH = Path(__file__).parents[1] / "bench"
FILES = ("gpu", "gpu_speed", "gpu_experiment", "gpu_networks")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def speed(gpu: Any) -> Any:
    return importlib.import_module("gpu_speed")


@pytest.fixture
def networks(gpu: Any) -> Any:
    return importlib.import_module("gpu_networks")


@pytest.fixture
def smoke(gpu: Any, tmp_path: Path) -> Callable[..., int]:
    return lambda *more: gpu.main(["--smoke", "--work", str(tmp_path), *more])


def state_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "smoke.json").read_text())


def test_the_whole_set_runs_in_smoke_sizes_and_only_once(
    gpu: Any,
    smoke: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert smoke("--minutes", "0") == 3 and not (tmp_path / "smoke.json").exists()
    assert smoke() == 0
    state = state_in(tmp_path)
    assert state["left"] == [] and state["provenance"]["device"] == "cpu"
    whats = " ".join(each["what"] for each in state["headlines"])
    for word in (
        "StochNorm2d",
        "FC",
        "CNN",
        "core.train + AutoL2",
        "matrix products",
        "AutoL2, 1.3 e-folds: test accuracy",
    ):
        assert word in whats
    assert all(math.isfinite(each["value"]) and each["value"] > 0 for each in state["headlines"])
    monkeypatch.setattr(gpu, "attempt", None)  # nothing is measured twice
    assert smoke() == 0 and smoke("--status") == 0
    assert "9 of 9 pieces done" in capsys.readouterr().out


def test_a_kill_loses_one_piece_at_most(
    gpu: Any, smoke: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []

    def attempt(piece: Any, deadline: float) -> dict[str, Any]:
        calls.append(piece.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"what": piece.name, "value": 1.0}

    monkeypatch.setattr(gpu, "attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        smoke()
    assert list(state_in(tmp_path)["pieces"]) == calls[:2] and len(state_in(tmp_path)["left"]) == 7
    assert smoke() == 0
    assert len(calls) == 10 and calls[2] == calls[3] and list(state_in(tmp_path)["pieces"]) == [*calls[:2], *calls[3:]]


def test_what_fails_is_said_and_tried_again_but_not_what_did_not_fit(
    gpu: Any, speed: Any, smoke: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(dtype: torch.dtype, sizes: Any, deadline: float) -> None:
        raise RuntimeError("no kernel")

    class Full:
        def __init__(self, *given: Any) -> None:
            raise torch.OutOfMemoryError("too much")

    for name in ("wrn_step", "experiment"):
        monkeypatch.setattr(gpu, name, lambda *given: {"what": "done", "value": 1.0})
    monkeypatch.setattr(gpu, "norms", fails)
    monkeypatch.setattr(speed, "ShuffledBatches", Full)
    assert smoke() == 0
    left = state_in(tmp_path)["left"]
    assert "stochnorm float32: RuntimeError: no kernel" in left and "3 replicas of the FC: out of memory" in left
    assert smoke("--status") == 3
    monkeypatch.setattr(gpu, "norms", lambda *given: {"what": "norm", "value": 2.0})
    assert smoke() == 0
    assert state_in(tmp_path)["left"] == [
        f"{count} replicas of the {kind}: out of memory" for kind in ("FC", "CNN") for count in (1, 3)
    ]


@pytest.mark.parametrize("decay", [1e-3, None])
def test_an_arm_that_pauses_ends_as_one_that_does_not(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: float | None
):
    generator = torch.Generator().manual_seed(0)
    part = (torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 10)
    whole = gpu.experiment(decay, gpu.SMOKE, tmp_path, (part, part, part), math.inf)
    assert len(whole["rows"]) == 2 and not list(tmp_path.iterdir())
    clock = itertools.count()
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    assert gpu.experiment(decay, gpu.SMOKE, tmp_path, (part, part, part), 1) is None
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    assert gpu.experiment(decay, gpu.SMOKE, tmp_path, (part, part, part), math.inf) == whole


def test_without_a_gpu_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "there is no CUDA device; --smoke shows on the CPU that everything runs" in capsys.readouterr().err


def test_results_of_other_sizes_are_not_mixed(gpu: Any, smoke: Callable[..., int], tmp_path: Path):
    state = {"provenance": {"device": "cpu"}, "sizes": {"batch": 7}, "pieces": {}}
    (tmp_path / "smoke.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit, match=r"smoke\.json holds results of other sizes or another device; move it away"):
        smoke()


def test_the_experiment_needs_its_data(gpu: Any, tmp_path: Path):
    piece = next(each for each in gpu.pieces(gpu.Sizes(), tmp_path, None) if each.name == "experiment AutoL2")
    assert "the experiment needs CIFAR-10: give --data-dir" in gpu.attempt(piece, 100.0)["failure"]
    piece = next(each for each in gpu.pieces(gpu.Sizes(), tmp_path, tmp_path) if each.name == "experiment 0.001")
    assert "FileNotFoundError" in gpu.attempt(piece, 100.0)["failure"]


def test_every_size_that_was_asked_for_is_a_piece(gpu: Any, tmp_path: Path):
    names = [piece.name for piece in gpu.pieces(gpu.Sizes(), tmp_path, None)]
    assert {"replicas FC 1", "replicas FC 64", "replicas CNN 256", "wrn step", "experiment AutoL2"} <= set(names)
    assert all(piece.seconds <= 480 for piece in gpu.pieces(gpu.Sizes(), tmp_path, None))


def test_ratios_are_taken_round_by_round(speed: Any):
    found = speed.spread([2.0, 4.0, 9.0], [1.0, 4.0, 3.0], 10.0)
    assert found["value"] == 20 and found["low"] == 10 and found["high"] == 30
    times = speed.Clock("cpu").by_turns({"a": lambda: None, "b": lambda: None}, 4)
    assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4}


def test_batches_and_their_changes_are_functions_of_the_step(speed: Any):
    augmented = importlib.import_module("gpu_experiment").augmented
    inputs, target = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    whole = augmented(speed.shuffled(inputs, target, 4, seed=1), 0)
    later = augmented(speed.shuffled(inputs, target, 4, seed=1, skip=5), 5)
    batches = [next(whole) for _ in range(8)]
    for x, y in batches[5:]:
        again = next(later)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(batches[0][0], inputs[batches[0][1]])


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("wrn-16-2", lambda nets: nets.wide_resnet(16, 2)),
        ("cnn-4", lambda nets: nets.convolutional(4)),
        ("mlp-32x3", lambda nets: nets.fully_connected(32, inputs=3072)),
    ],
)
def test_the_networks_are_those_of_the_lab(networks: Any, name: str, build: Callable[[Any], torch.nn.Module]):
    ours, theirs = build(networks), models.build(name, (3, 32, 32), 10, seed=0)
    shapes = [sorted(tuple(each.shape) for each in model.state_dict().values()) for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_operations_of_a_step(gpu: Any, speed: Any):
    sizes = gpu.Sizes(wrn=(10, 1), batch=4)
    assert speed.operations_of(sizes) == pytest.approx(2 * speed.operations_of(gpu.Sizes(wrn=(10, 1), batch=2)))
    # stem 3 -> 16 at 32 x 32, there and back to its weights; the rest is more
    assert speed.operations_of(sizes) > 4 * 2 * 2 * 32 * 32 * 27 * 16


@pytest.mark.slow
def test_the_images_are_those_of_the_lab(gpu: Any):
    folder = Path(os.environ.get("DECAYCAST_DATA", "")) / "cifar-10-batches-bin"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not here")
    (images, labels), (_, test_labels) = image_files.cifar(folder)
    train, validation, test = gpu.cifar10(folder.parent)
    assert (len(train[0]), len(validation[0]), len(test[0])) == (45_000, 5_000, 10_000)
    assert torch.equal(train[1], torch.from_numpy(labels[:45_000].astype("int64")))
    assert torch.equal(test[1], torch.from_numpy(test_labels.astype("int64")))
    pixels = torch.from_numpy(images[:45_000]).float()
    mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(train[0][:100], (pixels[:100] - mean) / deviation)


@pytest.mark.parametrize("name", FILES)
def test_it_needs_torch_numpy_core_and_methods_alone(name: str):
    for node in ast.walk(ast.parse((BENCH / f"{name}.py").read_text())):
        for module in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
            assert module.partition(".")[0] in {"torch", "numpy", *sys.stdlib_module_names}
        if isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.partition(".")[0]
            ours = node.module.startswith(("decaycast.core", "decaycast.methods"))
            assert ours or top in {"torch", "numpy", *FILES, *sys.stdlib_module_names}
