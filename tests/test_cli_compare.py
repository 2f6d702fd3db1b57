"""`decaycast compare` as people and scripts use it: what it prints, its JSON, its page, own models, and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from tests.commands import Command, command, error_line

TINY = ("--train-size", "100", "--model", "mlp-8x1", "--batch-size", "32", "--budget", "20", "--seeds", "2")
NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def decaycast(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `decaycast compare ...` in a folder of its own, through the entry point."""
    return command(monkeypatch, capfd, tmp_path, "compare")


def test_it_prints_what_its_json_says_and_trains_nothing_twice(decaycast: Command):
    printed = decaycast(*TINY, "--arms", "label-smoothing, sam", "--out", "found")
    assert printed.code == 0, printed.err
    assert "trained  6 runs\n" in printed.out and "page     found/compare.html" in printed.out
    answer = decaycast(*TINY, "--arms", "label-smoothing,sam", "--out", "found", "--json")
    assert answer.code == 0 and answer.err == ""
    read = answer.json
    assert read["trained"] == 0 and [arm["arm"] for arm in read["arms"]] == ["none", "label-smoothing", "sam"]
    assert read["verdict"] in printed.out and f"verdict  {read['outcome']}" in printed.out
    lines = {line.split()[0]: line for line in printed.out.splitlines() if "x" in line and line.strip()}
    for arm in read["arms"]:
        assert f"{100 * arm['test_accuracy']:.2f}" in lines[arm["arm"]] and f"{arm['time']:.2f}x" in lines[arm["arm"]]
    assert read["settings"]["steps"] == 20 and read["seeds"] == 2
    assert "sam: SAM, radius 0.05 (yardstick)" in printed.out


def test_the_page_holds_the_verdict_and_the_command(decaycast: Command, tmp_path: Path):
    read = decaycast(*TINY, "--arms", "weight-decay", "--metric", "loss", "--json").json
    page = (tmp_path / "decaycast-out" / "compare.html").read_text(encoding="utf-8")
    for words in (
        read["verdict"].replace("'", "&#39;"),
        "decaycast compare --train-size 100",
        "mlp-8x1 on digits",
        "test loss",
    ):
        assert words in page
    assert "default-src 'none'" in page or "default-src &#39;none&#39;" in page


def test_a_model_and_samples_of_ones_own(decaycast: Command, tmp_path: Path):
    (tmp_path / "own_network.py").write_text(NETWORK)
    draws = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", X=draws.integers(0, 255, (60, 4, 4)).astype("uint8"), y=np.arange(60) % 3)
    own = ("--data", "mine.npz", "--model", "own_network:make", "--budget", "20", "--seeds", "3,5")
    read = decaycast(*own, "--arms", "stochnorm", "--baseline", "weight-decay", "--json").json
    assert [arm["arm"] for arm in read["arms"]] == ["weight-decay", "stochnorm"]
    assert sorted(read["arms"][1]["by_seed"]) == ["3", "5"] and read["settings"]["model"].startswith(
        "own_network:make#"
    )


def test_tables_of_ones_own_need_no_pixels(decaycast: Command, tmp_path: Path):
    (tmp_path / "table_network.py").write_text(NETWORK)
    draws = np.random.default_rng(0)
    np.savez(tmp_path / "table.npz", X=100 + 9 * draws.normal(size=(60, 16)), y=np.arange(60) % 3)
    own = ("--data", "table.npz", "--model", "table_network:make", "--budget", "20", "--seeds", "2")
    read = decaycast(*own, "--arms", "sam", "--json").json
    assert read["trained"] == 4 and not any(arm["failed"] for arm in read["arms"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def (", "importing 'bad_network_{}' failed (SyntaxError: invalid syntax"),
        ("1 / 0", "importing 'bad_network_{}' failed (ZeroDivisionError: division by zero); mend it first"),
        ("def make(width): ...", "bad_network_{}:make failed to make a model (TypeError: make() missing 1 required"),
        ("def make(): return 'mlp'", "bad_network_{}:make must make a torch.nn.Module, it made str"),
    ],
)
def test_what_is_wrong_with_a_model_of_ones_own_is_one_line(
    decaycast: Command, tmp_path: Path, source: str, message: str
):
    name = f"{len(source)}"  # a module is imported once
    (tmp_path / f"bad_network_{name}.py").write_text(source)
    ended = decaycast(*TINY, "--model", f"bad_network_{name}:make", "--arms", "sam")
    assert message.format(name) in error_line(ended)


@pytest.mark.slow
def test_workers_find_a_model_of_ones_own(decaycast: Command, tmp_path: Path):
    (tmp_path / "other_network.py").write_text(NETWORK.replace("16", "64").replace("8, 3", "8, 10"))
    own = ("--model", "other_network:make", "--budget", "20", "--seeds", "2", "--train-size", "100", "--workers", "2")
    read = decaycast(*own, "--arms", "stochnorm,sam", "--json").json
    assert read["trained"] == 6 and not any(arm["failed"] for arm in read["arms"])


def test_failures_are_in_the_table_and_the_exit_code(decaycast: Command):
    ended = decaycast(*TINY, "--arms", "weight-decay", "--lr", "1e30", "--momentum", "0")
    assert ended.code == 1
    assert (
        "verdict  no verdict" in ended.out
        and "none: 2 of 2 failed, DivergedError: the training loss is nan" in ended.out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1"), "give at least 2 seeds, better 5, got 1"),
        (("--arms", "samm"), "unknown arm 'samm'; did you mean 'sam'?"),
        (("--arms", "stochnorm"), "arm 'stochnorm' does not fit: the model has no batch norm"),
        (("--budget", "5"), "at least 20 optimiser steps, got 5"),
        (("--workers", "0"), "--workers must be at least 1, got 0"),
        (("--model", "cnn-bn-16"), "images of side 8 are too small for this CNN"),
        (("--model", "nowhere:make"), "cannot find the model 'nowhere:make'"),
        (("--out", "/dev/null/out"), "cannot create the folder of store /dev/null/out/compare.sqlite"),
        (("--data", "absent.npz"), "absent.npz cannot be read as an .npz file"),
        (("--metric", "f1"), "unknown metric 'f1'"),
    ],
)
def test_what_is_refused(decaycast: Command, arguments: tuple[str, ...], message: str):
    assert message in error_line(decaycast(*TINY, *arguments))
