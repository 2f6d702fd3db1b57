"""The table of all benchmarks: from results as they are, those that are missing and those that cannot be read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
MACHINE = {"processor": "CPU X", "device": "cpu", "threads": "2", "torch": "2.13.0", "time": "2030-01-02T03:04:05Z"}


@pytest.fixture(scope="module")
def everything() -> Iterator[Any]:
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("all")
    finally:
        sys.path.remove(str(BENCH))


def test_the_committed_table_is_that_of_the_committed_results(everything: Any):
    found = (BENCH / "results" / "all.md").read_text(encoding="utf-8").splitlines()
    assert found == everything.table(), "make it again: python bench/all.py --table"
    assert not any("cannot be read" in line for line in found)


def test_the_readme_has_the_same_table(everything: Any):
    text = everything.README.read_text(encoding="utf-8")
    assert text == everything.in_readme(text, everything.table()), "make it again: python bench/all.py --table"
    assert text.count("(bench/results/stochnorm.md) | StochNorm2d / BatchNorm2d") == 5


def test_every_benchmark_is_listed(everything: Any):
    helpers = {"all", "headlines", "machine", "tasks", "peers", "plot", "gpu_networks", "gpu_speed", "gpu_experiment"}
    assert {path.stem for path in BENCH.glob("*.py")} - helpers == {bench.name for bench in everything.BENCHES}


def test_headlines_of_a_result(everything: Any, tmp_path: Path):
    lines = [
        {"what": "ours / theirs", "value": 1.25, "low": 1.0, "high": 1.5, "aim": "<= 1.3"},
        {"what": "speed", "value": 2.0, "aim": ">= 2.5"},
        {"what": "seconds", "value": 0.5, "high": 0.75},
    ]
    result = {"provenance": MACHINE, "headlines": lines, "left": ["256 replicas"]}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    (tmp_path / "gpu.md").write_text("# GPU")
    found = [line for line in everything.table(tmp_path) if line.startswith("| [gpu]")]
    assert found == [
        "| [gpu](gpu.md) | ours / theirs | 1.25 | 1 to 1.5 | <= 1.3 | yes | CPU X, 2 threads, torch 2.13.0, 2030-01-02 |",
        "| [gpu](gpu.md) | speed | 2 |  | >= 2.5 | no | CPU X, 2 threads, torch 2.13.0, 2030-01-02 |",
        "| [gpu](gpu.md) | seconds | 0.5 | to 0.75 |  |  | CPU X, 2 threads, torch 2.13.0, 2030-01-02 |",
        "| [gpu](gpu.md) | 256 replicas | not measured yet |  |  |  |  |",
    ]


def test_what_is_missing_or_damaged_is_a_line(everything: Any, tmp_path: Path):
    (tmp_path / "kernel.json").write_text('{"closed form": [')
    (tmp_path / "stochnorm.json").write_text("{}")
    (tmp_path / "newcomer.json").write_text("{}")
    lines = everything.table(tmp_path)
    text = "\n".join(lines)
    assert "| gpu | replicas, StochNorm, WRN-28-10 on a GPU | not measured yet |" in text
    assert "| kernel | cannot be read (JSONDecodeError" in text and "| stochnorm | cannot be read (KeyError" in text
    assert "| newcomer | newcomer: see its page |" in text
    assert all(line.count("|") == 8 for line in lines[5:])


def test_a_gpu_is_named_as_the_machine(everything: Any):
    assert everything._machine({**MACHINE, "device": "NVIDIA H"}) == "NVIDIA H, torch 2.13.0, 2030-01-02"
    assert everything._machine({**MACHINE, "threads": "1"}) == "CPU X, torch 2.13.0, 2030-01-02"


def test_what_cannot_run_here_is_left_out_with_its_reason(everything: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DECAYCAST_DATA", raising=False)
    monkeypatch.setattr(everything, "_has_cuda", lambda: False)
    by_name = {bench.name: bench for bench in everything.BENCHES}
    assert everything.run(by_name["truth"]) == "left out: DECAYCAST_DATA is not set"
    assert everything.run(by_name["gpu"]) == "left out: there is no CUDA device"
    odd = everything.Bench(name="odd", about="", minutes=1, needs=("no_such_package",))
    assert everything.run(odd) == "left out: no_such_package is not installed (bench/requirements*.txt)"


def test_a_benchmark_that_fails_is_said(everything: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "odd.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(everything, "HERE", tmp_path)
    assert everything.run(everything.Bench(name="odd", about="", minutes=1)) == "failed with exit code 7"


def test_the_gpu_set_is_called_until_nothing_is_left(everything: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = "import pathlib, sys\np = pathlib.Path(__file__).with_name('calls')\n"
    script += "p.open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    (tmp_path / "gpu.py").write_text(script + "raise SystemExit(0 if len(p.read_text().splitlines()) == 3 else 3)")
    monkeypatch.setattr(everything, "HERE", tmp_path)
    monkeypatch.setattr(everything, "_has_cuda", lambda: True)
    monkeypatch.setenv("DECAYCAST_DATA", "/somewhere")
    assert everything.run(everything.BENCHES[-1]) == ""
    assert (tmp_path / "calls").read_text() == "--data-dir /somewhere\n" * 3


def test_the_command_line():
    def call(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(BENCH / "all.py"), *options], capture_output=True, text=True, timeout=300
        )

    listed = call("--list")
    assert listed.returncode == 0 and "stochnorm" in listed.stdout and "about   8 min" in listed.stdout
    wrong = call("stochnrm")
    assert wrong.returncode == 2 and "no benchmark is called stochnrm; there are overhead, " in wrong.stderr
