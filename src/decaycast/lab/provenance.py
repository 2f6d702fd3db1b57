"""Where a row came from: versions, machine, threads, source revision, time. Never fails; what is unknown is empty."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import decaycast


def provenance(device: str | torch.device = "cpu") -> dict[str, str]:
    """Plain text about this process and `device`, ready for `Row.provenance`.

    Keys: decaycast, torch, numpy, python (versions), platform, processor, device, threads (of torch), git (revision of
    the source tree, with "-dirty" where it was edited; empty outside a checkout), time (UTC, ISO 8601, seconds).
    """
    return {
        **_constant(),
        "device": _device_name(torch.device(device)),
        "threads": str(torch.get_num_threads()),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@cache
def _constant() -> dict[str, str]:
    return {
        "decaycast": decaycast.__version__,
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "git": _git_revision(Path(__file__)),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _device_name(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return str(device)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine()


def _git_revision(file: Path) -> str:
    # Only a tracked file: an installation inside somebody's checkout must not report the revision of that checkout.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name):
        return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return ""


def _git(folder: Path, *arguments: str) -> str:
    # GIT_DIR and its kin are set inside git hooks and would point at another tree.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
