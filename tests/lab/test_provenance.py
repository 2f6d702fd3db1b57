"""Provenance is complete inside a checkout and never fails outside one."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

import decaycast
from decaycast.lab import provenance as module


def test_every_entry_is_plain_text_about_this_process():
    entries = module.provenance()
    assert list(entries) == [
        "decaycast", "torch", "numpy", "python", "platform", "processor", "git", "device", "threads", "time"
    ]  # fmt: skip
    assert all(type(value) is str for value in entries.values())
    assert entries["decaycast"] == decaycast.__version__
    assert entries["torch"] == torch.__version__ and entries["threads"] == str(torch.get_num_threads())
    assert entries["device"] == "cpu" and module.provenance("meta")["device"] == "meta"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entries["time"])


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_is_that_of_a_tracked_file_only(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *settings, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    tracked, installed = tmp_path / "tracked.py", tmp_path / "installed.py"
    for file in (tracked, installed):
        file.write_text("")
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "one")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a git hook
    assert module._git_revision(installed) == ""
    revision = module._git_revision(tracked)
    assert re.fullmatch("[0-9a-f]{40}", revision)
    tracked.write_text("edited")
    assert module._git_revision(tracked) == revision + "-dirty"


def test_without_git_and_outside_a_checkout_the_revision_is_empty(tmp_path, monkeypatch):
    (tmp_path / "file.py").write_text("")
    assert module._git_revision(tmp_path / "file.py") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module._git_revision(tmp_path / "file.py") == ""


def test_an_uninstalled_package_has_an_empty_version():
    assert module._version("decaycast-is-not-this") == ""
    assert module._version("torch") != ""
