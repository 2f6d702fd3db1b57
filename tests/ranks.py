"""Gloo ranks as processes of this machine: each runs a function of the test file and leaves its tensors in a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

RANKS = 2


def on_ranks(test_file: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Call ``run_rank(rank, folder)`` of `test_file` in `RANKS` processes; what each saved in ``folder/{rank}.pt``."""
    started = start(test_file, folder)
    ended = end(started)
    assert not any(process.returncode for process in started), "\n".join(ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def start(test_file: str, folder: Path) -> list[subprocess.Popen[str]]:
    """The processes, running."""
    # _exit: gloo's threads sometimes abort a process that ends while another still runs, after its work is done
    call = f"runpy.run_path({test_file!r})['run_rank'](%d, pathlib.Path({str(folder)!r}))"
    script = f"import os, runpy, pathlib; {call}; os._exit(0)"
    return [
        subprocess.Popen([sys.executable, "-c", script % rank], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]


def end(started: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    """Wait until they have ended by themselves; what each wrote on stderr. None is left running."""
    try:
        return [process.communicate(timeout=timeout)[1] for process in started]
    finally:
        for process in started:
            process.kill()


def text(words: str) -> torch.Tensor:
    """Words as a tensor, so that a rank can leave them in its file."""
    return torch.tensor([ord(letter) for letter in words])


def read(letters: torch.Tensor) -> str:
    """The words again."""
    return "".join(chr(code) for code in letters.tolist())
