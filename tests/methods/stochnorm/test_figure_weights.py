"""Weights from a file for the paper's size: what is read, what is refused, and that nothing in the file runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.methods.stochnorm.figure_plans import images, run_of

from decaycast.methods.stochnorm.figures import recipe, weights
from decaycast.methods.stochnorm.figures.images import generator_for
from decaycast.methods.stochnorm.figures.network import ResNet, resnet

FILLED = 0.5


def network(classes: int = 3, width: int = 8) -> ResNet:
    return resnet(f"resnet-8-{width}", 3, classes, generator_for("w", 0))


def filled(classes: int = 7) -> dict[str, torch.Tensor]:
    """The state of a network with another head, all of it one number."""
    return {name: torch.full_like(value, FILLED) for name, value in network(classes).state_dict().items()}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that stands for timm, whose resnet50 is a small network."""
    module = ModuleType("timm")

    def create_model(name: str, num_classes: int) -> ResNet:
        assert name == "resnet50"
        return ResNet(3, num_classes, depth=8, width=8)  # starts from torch's own generator, as timm's does

    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where DECAYCAST_WEIGHTS points to."""
    monkeypatch.setenv(weights.ENVIRONMENT, str(tmp_path / "weights.pth"))
    return tmp_path / "weights.pth"


@pytest.mark.usefixtures("timm")
def test_the_backbone_is_the_files_and_the_head_is_not(file: Path):
    torch.save(filled(), file)
    model = weights.resnet50(3, pretrained=True, seed=0)
    state = model.state_dict()
    assert state["fc.weight"].shape == (3, 32) and not (state["fc.weight"] == FILLED).any()
    assert all(
        (value == FILLED).all() for name, value in state.items() if "fc." not in name and value.dtype.is_floating_point
    )


@pytest.mark.usefixtures("timm")
def test_a_run_of_the_papers_size_starts_from_the_file(file: Path):
    torch.save(network(7).state_dict(), file)
    settings: dict[str, Any] = {"network": "resnet50", "source_classes": 0, "target_size": None, "steps": 2}
    row = recipe.train_arm(None, run_of("p = 0.5", **settings), images())
    assert row.final["images"] == 40 and row.final["gap_mean"] > 0
    file.unlink()
    assert "accuracy" in recipe.train_arm(None, run_of("scratch", **settings), images()).final  # needs no file


@pytest.mark.usefixtures("timm")
def test_from_scratch_all_comes_from_the_seed():
    before = torch.get_rng_state()
    first, again, other = (weights.resnet50(3, pretrained=False, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)  # type: ignore[index]


@pytest.mark.usefixtures("timm")
def test_without_a_file_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv(weights.ENVIRONMENT, raising=False)
    with pytest.raises(ValueError, match="set DECAYCAST_WEIGHTS to a file with the state dict of a ResNet-50"):
        weights.resnet50(3, pretrained=True, seed=0)
    for nowhere in (tmp_path / "none.pth", tmp_path):
        monkeypatch.setenv(weights.ENVIRONMENT, str(nowhere))
        with pytest.raises(ValueError, match="DECAYCAST_WEIGHTS names .*, which is no file; correct the path"):
            weights.resnet50(3, pretrained=True, seed=0)


def test_without_timm_the_command_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        weights.resnet50(3, pretrained=True, seed=0)


def test_older_files_without_counters_fit(file: Path):
    old = {name: value for name, value in filled().items() if not name.endswith("num_batches_tracked")}
    model = network()
    weights.load_backbone(model, old, file)
    assert (model.stem[0].weight == FILLED).all() and model.stem[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"1 missing \(stem\.0\.weight\); give the weights of the same architecture"),
        ("unknown", r"1 unknown \(layer4\.0\.bn1\.weight\)"),
        ("shape", r"1 of another shape \(stem\.0\.weight\)"),
        ("another", r"45 missing .*; 1 unknown \(classifier\.weight\)"),
    ],
)
def test_another_network_is_refused_and_nothing_is_loaded(file: Path, change: str, words: str):
    state = filled()
    if change in ("missing", "shape"):
        weight = state.pop("stem.0.weight")
        state |= {"stem.0.weight": weight[:2]} if change == "shape" else {}
    elif change == "unknown":
        state["layer4.0.bn1.weight"] = torch.ones(8)
    else:
        state = {"classifier.weight": torch.ones(8)}
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        weights.load_backbone(model, state, file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"stem": torch.ones(1)}, "epoch": 3}, "holds no state dict but model, epoch; save the model's"),
        ([1, 2], "holds no state dict but list"),
    ],
)
def test_what_is_no_state_dict_is_refused(file: Path, content: Any, words: str):
    torch.save(content, file)
    with pytest.raises(ValueError, match=words):
        weights.read_weights(file)


def test_a_damaged_file_is_refused(file: Path):
    for content, words in (
        (b"", "cannot be read as weights"),
        (b"no weights", "is damaged"),
        (b"PK\x03\x04", "cannot be"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{words}.*; fetch it again"):
            weights.read_weights(file)


class _Touch:
    """Unpickled as it asks to be, it would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_nothing_in_a_file_runs(file: Path, tmp_path: Path):
    torch.save({"stem.0.weight": _Touch(str(tmp_path / "ran"))}, file)
    with pytest.raises(ValueError, match="holds objects that would run code; .* save a model's state_dict"):
        weights.read_weights(file)
    assert not (tmp_path / "ran").exists()


# safetensors: its own exceptions, and a base install without it


class SafetensorError(Exception):
    """As safetensors names its own."""


SafetensorError.__module__ = "safetensors"


def test_safetensors_by_suffix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module, inner, path = ModuleType("safetensors"), ModuleType("safetensors.torch"), tmp_path / "w.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors", module)
    monkeypatch.setitem(sys.modules, "safetensors.torch", inner)
    inner.load_file = lambda given: {"fc.bias": torch.ones(2)} if given == path else {}  # type: ignore[attr-defined]
    assert torch.equal(weights.read_weights(path)["fc.bias"], torch.ones(2))

    def damaged(given: Path) -> Any:
        raise SafetensorError("header too small")

    inner.load_file = damaged  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"w\.safetensors cannot be read as safetensors \(header too small\); fetch it"
    ):
        weights.read_weights(path)

    def broken(given: Path) -> Any:
        raise KeyError("a bug of ours")

    inner.load_file = broken  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="a bug of ours"):
        weights.read_weights(path)


def test_without_safetensors_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        weights.read_weights(tmp_path / "w.safetensors")
