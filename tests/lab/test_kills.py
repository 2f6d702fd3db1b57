"""Kill anything: after the next start, the result is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lab import killing

ROOT = Path(__file__).resolve().parents[2]


def play(folder: Path, *scenarios: str, seed: int = 0) -> dict[str, dict]:
    """What the scenarios tell, and under "stderr" what their drivers printed."""
    command = [sys.executable, "-m", "tests.lab.killing", str(folder), str(seed), *scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return play(tmp_path_factory.mktemp("kills"), "drivers:42", "two_drivers:6", "size_limit:4", "clock:0")


@pytest.fixture(scope="module")
def told_of_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return play(tmp_path_factory.mktemp("kills"), "drivers_of_processes:5", "workers:4")


@pytest.mark.slow
def test_42_drivers_killed_at_random_moments(told: dict[str, dict]):
    drivers = told["drivers"]
    assert (drivers["kills"], drivers["different"], drivers["runs"]) == (42, 0, 8)
    assert len(set(drivers["rows_left"])) >= 4, "they were killed at different moments"


@pytest.mark.slow
def test_4_drivers_of_worker_processes_killed_at_random_moments(told_of_processes: dict[str, dict]):
    assert told_of_processes["drivers_of_processes"] == {"kills": 4, "different": 0, "orphans": 0}


@pytest.mark.slow
def test_4_workers_killed_at_random_moments(told_of_processes: dict[str, dict]):
    assert told_of_processes["workers"] == {"kills": 4, "different": 0}


@pytest.mark.slow
def test_two_drivers_on_one_store(told: dict[str, dict]):
    assert told["two_drivers"] == {"kills": 3, "different": 0}


@pytest.mark.slow
def test_a_file_that_may_not_grow(told: dict[str, dict]):
    limited = told["size_limit"]
    assert limited["different"] == 0 and set(limited["codes"]) == {killing.FULL}
    assert all(0 <= left < len(killing.RUNS) for left in limited["rows_left"])
    assert "cannot be written or read (disk I/O error): the disk fails, is gone, or a quota or" in told["stderr"]


@pytest.mark.slow
def test_a_clock_that_jumps(told: dict[str, dict]):
    assert told["clock"]["different"] == 0 and told["clock"]["sane_seconds"]
    assert told["clock"]["backwards"] >= 1, "the clock did jump"


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(tmp_path: Path):
    disk = tmp_path / "full_disk"
    disk.mkdir()
    own = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*own, *mount], capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    script = 'mount -t tmpfs -o size=20m tmpfs "$1/full_disk" && exec "$2" -m tests.lab.killing "$1" 0 full_disk:0'
    command = [*own, "sh", "-c", script, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["full_disk"]
    assert told["codes"] == [killing.FULL, 0, killing.FULL, killing.FULL, killing.FULL] and told["different"] == 0
    assert 0 < told["rows_left"] < len(killing.RUNS)
    assert "is full; finished rows are safe, free some space and run again" in done.stderr
    assert "is read-only; make it and its folder writable or copy it elsewhere" in done.stderr
    assert "cannot open store" in done.stderr and "cannot create the folder of store" in done.stderr
