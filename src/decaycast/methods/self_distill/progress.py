"""Finished rounds of a distillation on disk: one file, replaced whole after each round, so that a kill loses one at most.

Layout: numpy's npz without pickle. ``fingerprint`` (text: what the rounds belong to), ``mix`` (the weights that later rounds
had), ``measured`` (JSON: a list of mappings) and ``outputs`` of shape (rounds, n) or (rounds, n, outputs).
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "decaycast distillation 1"


def fingerprint(targets: Any, inputs: Any, temperature: float | None) -> str:
    """Text that differs when the labels, the inputs (if an array or a tensor) or the temperature do.

    >>> fingerprint(np.zeros(2), None, None) == fingerprint(np.zeros(2), None, 1.0)
    False
    """
    parts = [f"{FORMAT}, targets {_digest(targets)}", f"temperature {temperature}"]
    if isinstance(inputs, (np.ndarray, torch.Tensor)):
        parts.insert(1, f"inputs {_digest(inputs)}")
    return ", ".join(parts)


class Progress:
    """The file of one distillation.

    Args:
        path: of the file; its folder is made when the first round is written.
        belongs_to: `fingerprint` of what is distilled.
        weights: of the original labels, one for each fit after the first.
    """

    def __init__(self, path: str | os.PathLike[str], belongs_to: str, weights: Sequence[float]) -> None:
        self.path, self.belongs_to, self.weights = Path(path), belongs_to, list(weights)

    def read(self, like: Any, rounds: int) -> tuple[list[Any], list[dict[str, float]]]:
        """Outputs and measurements of the first `rounds` finished rounds, none where there is no file.

        Raises:
            ValueError: the file is none of ours or damaged, or belongs to other labels, inputs, mix or temperature.
        """
        if not self.path.exists():
            return [], []
        found = self._load()
        if found["fingerprint"] != self.belongs_to:
            raise ValueError(
                f"{self.path} holds rounds of another distillation (it has {found['fingerprint']!r}, this one is "
                f"{self.belongs_to!r}); name another file, or delete this one"
            )
        outputs = found["outputs"][:rounds]
        used = len(outputs) - 1
        if found["mix"][:used] != self.weights[:used]:
            raise ValueError(
                f"{self.path} holds rounds with mix {found['mix']}, but {self.weights} was asked for; name another file, or "
                "delete this one"
            )
        if outputs[0].shape != tuple(like.shape):
            raise ValueError(f"{self.path} is damaged: outputs of shape {outputs[0].shape}; delete it to start anew")
        back = [torch.from_numpy(each).to(like) if isinstance(like, torch.Tensor) else each for each in outputs]
        return back, found["measured"][:rounds]

    def write(self, outputs: Sequence[Any], measured: Sequence[Mapping[str, float]]) -> None:
        """Replace the file by one with these rounds; when this has returned they survive a kill and a power cut."""
        content: dict[str, Any] = {
            "fingerprint": np.array(self.belongs_to),
            "mix": np.array(self.weights[: len(outputs) - 1], dtype=np.float64),
            "measured": np.array(json.dumps([dict(each) for each in measured])),
            "outputs": np.stack([_array(each) for each in outputs]),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez(file, **content)  # no objects among these: nothing is pickled
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise

    def _load(self) -> dict[str, Any]:
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                outputs = list(file["outputs"])
                measured = [
                    {str(name): float(value) for name, value in each.items()}
                    for each in json.loads(str(file["measured"]))
                ]
                found = {"fingerprint": str(file["fingerprint"]), "mix": [float(weight) for weight in file["mix"]]}
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path} cannot be read as rounds of a distillation ({error}); name another file, or delete this one"
            ) from error
        if not outputs or len(measured) != len(outputs):
            raise ValueError(f"{self.path} is damaged: {len(outputs)} outputs; delete it to start anew")
        return {**found, "outputs": outputs, "measured": measured}


def _digest(values: Any) -> str:
    array = _array(values)
    if array.dtype.hasobject:
        return f"objects of shape {array.shape}"  # their bytes are addresses
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:20]


def _array(values: Any) -> np.ndarray:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    held = values.detach().cpu()
    return (held.float() if held.dtype == torch.bfloat16 else held).numpy()  # numpy has no bfloat16
