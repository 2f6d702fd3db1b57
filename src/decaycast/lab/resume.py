"""A run that survives its process: a checkpoint file, written while it trains, from which the same command goes on.

The first rank reads and writes the file, so that only its machine needs it; the state is right for every rank and for any
number of them. Resumed on as many ranks as before, a run gives what it would have given uninterrupted: to the bit on one
or two CPU ranks, with more ranks up to the order in which gradients are added. On another number of ranks the schedule, the
weight decay's rule and its memory, the optimiser, the curve and the order of the samples are the same, and the numbers agree
up to rounding; noise that each rank draws for itself (label noise) is then another draw.
"""

from __future__ import annotations

import time
from pathlib import Path

from decaycast.core import checkpoint, ranks
from decaycast.lab.trial import Trial


class Keeper:
    """Keeps one trial's state in a file.

    Args:
        path: the file; where it exists, the trial goes on from it.
        every_seconds: least time between two checkpoints, which are written after measurements; 0 for each of them.
        group: the ranks that train the trial together, or None.
    """

    def __init__(self, path: str | Path, *, every_seconds: float = 60.0, group: ranks.Group = None) -> None:
        if not every_seconds >= 0:
            raise ValueError(f"the time between checkpoints must be at least 0 seconds, got {every_seconds}")
        self.path, self.every_seconds, self.group = Path(path), every_seconds, group
        self._seconds_before = 0.0
        self._began = self._written = time.monotonic()

    def restore(self, trial: Trial) -> None:
        """Put the file's state into `trial`, if there is a file; on all ranks.

        Raises:
            CheckpointError: the file is damaged or another run's.
            OSError: it cannot be read.
            RuntimeError: that happened to the first rank.
        """
        data, error = b"", None
        if ranks.rank_in(self.group) == 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                data = self.path.read_bytes() if self.path.exists() else b""
            except OSError as found:
                error = found
        ranks.agree({}, self.group, error=error)
        data = ranks.from_first(data, self.group)
        if data:
            state = checkpoint.parse(data, self.path)
            if set(state) != {"trial", "seconds"}:
                raise checkpoint.CheckpointError(f"{self.path} is no checkpoint of a run; choose another file")
            trial.load_state_dict(state["trial"])
            self._seconds_before = float(state["seconds"])

    def note(self, trial: Trial) -> None:
        """Write the state of `trial` if it is time; call it after every measurement."""
        if time.monotonic() - self._written >= self.every_seconds:
            self.write(trial)

    def write(self, trial: Trial) -> None:
        """Write the state of `trial` now (the first rank does)."""
        if ranks.rank_in(self.group) == 0:
            checkpoint.write(self.path, {"trial": trial.state_dict(), "seconds": self.seconds})
        self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, that of earlier processes up to their last checkpoint included."""
        return self._seconds_before + time.monotonic() - self._began
