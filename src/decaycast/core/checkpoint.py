"""Checkpoints that a kill at any moment leaves whole: written beside, flushed to disk, then put in place of the old one.

A checkpoint holds tensors and plain values (numbers, words, lists, mappings) and is read without running code
(``torch.load(weights_only=True)``).
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of another training."""


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`; whoever reads it, or is killed here, finds the old file whole or the new one.

    Raises:
        OSError: the file cannot be written (folder missing, disk full); what was there before stays.
    """
    path, buffer = Path(path), io.BytesIO()
    torch.save(state, buffer)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        words = (
            f"cannot write the checkpoint {path}: {error.strerror}; choose a folder with room (an older one is kept)"
        )
        raise type(error)(error.errno, words) from error
    _flush_folder(path.parent)


def parse(data: bytes, source: str | Path) -> dict[str, Any]:
    """The state in the bytes of a checkpoint; tensors come to the CPU.

    Raises:
        CheckpointError: bytes that are no checkpoint, or that hold more than tensors and plain values; names `source`.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage does to a zip archive: torch documents no kind
        reason = str(error).partition("\n")[0][:120]
        raise CheckpointError(
            f"{source} is no checkpoint, or a damaged one ({type(error).__name__}: {reason}); delete it to start anew"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{source} holds a {type(state).__name__} and no checkpoint; choose another file")
    return state


def read(path: str | Path) -> dict[str, Any]:
    """The state in the file `path`; raises as `parse`, or OSError where the file cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/state.pt", {"step": 3, "weights": torch.ones(2)})
    ...     read(f"{folder}/state.pt")["step"]
    3
    """
    return parse(Path(path).read_bytes(), path)


def _flush_folder(folder: Path) -> None:
    """The new name must outlive a power cut, too; not every system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
