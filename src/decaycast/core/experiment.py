"""What a room declares about its evidence: runs, rows, figures and verdicts.

A *run* is a training described by plain values. A *row* is what came out of it, also when it failed. A *figure* names
the runs it needs, turns rows into panels of plain traces, and judges its own claim. Nothing here trains, stores or
draws: `decaycast.lab` does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

Scalar = str | int | float | bool | None
Size = Literal["smoke", "small", "paper"]
SIZES: tuple[Size, ...] = ("smoke", "small", "paper")
_encode = json.JSONEncoder(sort_keys=True, allow_nan=False).encode  # making one for every key takes as long as its work


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a flat mapping of plain values, and a seed. Equal descriptions (1 is not 1.0) have equal keys."""

    config: Mapping[str, Scalar]
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in self.config.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"run config {name!r} must be finite, got {value}; leave the entry out instead")
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise TypeError(f"run config {name!r} must be a plain value, got {type(value).__name__}")

    @cached_property
    def key(self) -> str:
        """20 hex digits that name this run in a store: a hash of its config and seed."""
        text = _encode({"config": dict(self.config), "seed": self.seed})
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came out of one run. A failed run is a row too, with its reason and the curve up to the failure."""

    run: Run
    status: Literal["done", "failed"] = "done"
    reason: str = ""
    curve: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Columns of `decaycast.core.measure.COLUMNS`, all of one length; a missing value is NaN."""
    final: Mapping[str, float] = field(default_factory=dict)
    """Numbers read once, at the end (test data among them)."""
    seconds: float = math.nan
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A figure's judgement of its own claim."""

    outcome: Literal["held", "not held", "not enough data"]
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One line or set of points; `low` and `high`, where given, bound it pointwise."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    mode: Literal["lines", "markers", "lines+markers"] = "lines"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes with its traces, and the sentence a reader needs under it."""

    title: str
    x_label: str
    y_label: str
    traces: Sequence[Trace]
    x_log: bool = False
    y_log: bool = False
    caption: str = ""


def jsonable(value: Any) -> Any:
    """`value` (dicts, sequences, plain values) as JSON can hold it: tuples become lists, numbers that are not finite None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Figure(Protocol):
    """A reproducible piece of evidence. Each room lists its figures in `FIGURES` of its `figures` module or package.

    A figure may also have ``train(run, data) -> Row``: its own way to train a run, in place of the lab's usual one. `data` has
    the parts `train`, `validation` and `test` (inputs, labels), `classes` and `shape`, as the run's config names them.
    """

    name: str
    title: str
    claim: str
    source: str

    def runs(self, size: Size) -> list[Run]:
        """The trainings this figure needs at `size`."""
        ...

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Panels from whatever rows exist; never trains."""
        ...

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Whether the claim holds in these rows."""
        ...
