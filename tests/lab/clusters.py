"""Whether Ray by itself can start a cluster here, for the tests that need one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from decaycast.lab import ray_cluster

ALONE = (
    "import ray; ray.init('local', num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20); ray.shutdown()"
)


def require_cluster() -> None:
    """Skip where Ray is missing, or cannot start a cluster without a line of ours: no network interface, no shared memory."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra 'ray')")
    if problem := _problem():
        pytest.skip(f"Ray cannot start a cluster on this machine: {problem}")


@functools.cache
def _problem() -> str:
    environment = os.environ | ray_cluster._ENVIRONMENT
    command = [sys.executable, "-c", ALONE]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "it has taken three minutes"
    return (
        " ".join(ended.stderr.strip().splitlines()[-1:]) or f"exit code {ended.returncode}" if ended.returncode else ""
    )
