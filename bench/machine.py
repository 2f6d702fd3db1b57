"""Time and memory of a piece of work, as the benchmarks read them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process, which others on the machine disturb little."""
    began = time.process_time()
    work()
    return time.process_time() - began


def memory_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process; ru_maxrss would count the parent's peak, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def fresh(script: str, *arguments: str) -> dict:
    """What `script --child arguments...` prints as JSON, in a process of its own."""
    command = [sys.executable, script, "--child", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
