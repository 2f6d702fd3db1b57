"""Checkpoints: whole whatever happens while they are written, and harmless to read."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from decaycast.core import checkpoint
from decaycast.core.checkpoint import CheckpointError

STATE = {
    "step": 3,
    "weights": torch.arange(4.0),
    "rows": [{"loss": 0.25}],
    "hooks": [{"rule": {"decays": [1]}}],
    "name": "é",
}


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "state.pt"
    checkpoint.write(path, {"step": 1})
    checkpoint.write(str(path), STATE)
    found = checkpoint.read(path)
    assert torch.equal(found.pop("weights"), STATE["weights"])
    assert found == {name: value for name, value in STATE.items() if name != "weights"}
    assert [each.name for each in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_one(tmp_path: Path, moment: str):
    path = tmp_path / "state.pt"
    checkpoint.write(path, {"step": 1})
    script = (
        "import os, signal, torch\nfrom decaycast.core import checkpoint\n"
        f"checkpoint.os.{moment} = lambda *given: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"checkpoint.write({str(path)!r}, {{'step': 2, 'weights': torch.ones(10**5)}})"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == -signal.SIGKILL
    assert checkpoint.read(path) == {"step": 1}


def test_a_full_disk_leaves_the_old_one_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.pt"
    checkpoint.write(path, {"step": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write the checkpoint .*state\.pt: No space left on device; choose a folder"
    ):
        checkpoint.write(path, {"step": 2})
    assert checkpoint.read(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="cannot write the checkpoint .*: No such file or directory"):
        checkpoint.write(tmp_path / "no" / "state.pt", {})


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_read_runs_code(tmp_path: Path):
    path, trace = tmp_path / "state.pt", tmp_path / "trace"
    for harm in ({"step": Attack(trace)},):
        torch.save(harm, path)
        with pytest.raises(CheckpointError, match=r"state\.pt is no checkpoint, or a damaged one"):
            checkpoint.read(path)
        path.write_bytes(pickle.dumps(harm))
        with pytest.raises(CheckpointError, match=r"state\.pt is no checkpoint, or a damaged one"):
            checkpoint.read(path)
    assert not trace.exists()


def test_damage_is_said(tmp_path: Path):
    path = tmp_path / "state.pt"
    checkpoint.write(path, STATE)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged one .*; delete it to start anew"):
            checkpoint.read(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="holds a list and no checkpoint; choose another file"):
        checkpoint.read(path)
