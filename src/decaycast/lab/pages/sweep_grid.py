"""The runs of a sweep as settings on axes: which values each axis has, and the mean of every setting over its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from decaycast.core.experiment import Row, Scalar
from decaycast.lab.pages.listing import cell
from decaycast.lab.pages.plots import pretty
from decaycast.lab.table import Table
from decaycast.lab.trial import DEFAULTS

HEAD = ("key", "status", "reason", "seed", "seconds")
WORSE_WHEN_HIGH = ("loss", "error")


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """A setting in which runs differ. `values` rise where they are numbers; a setting that a run lacks is None, and first."""

    name: str
    values: tuple[Scalar, ...]
    codes: np.ndarray = field(repr=False)
    """For each run the place of its value in `values`."""

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace("_", " ")

    @cached_property
    def numeric(self) -> bool:
        """Whether all its values are numbers."""
        return all(map(_number, self.values))

    @cached_property
    def texts(self) -> list[str]:
        """Its values for people, each of them once."""
        short = [pretty(value, 4) if _number(value) else cell(value) or "-" for value in self.values]
        exact = [repr(value) if _number(value) else text for value, text in zip(self.values, short, strict=True)]
        return short if len({*short}) == len(short) else exact

    @cached_property
    def log(self) -> bool:
        """Whether its values ask for a logarithmic axis: numbers >= 0, the positive ones over more than a factor of 20."""
        numbers = [value for value in self.values if _number(value)]
        positive = [value for value in numbers if value > 0]
        ratio = max(positive) / min(positive) if positive else 0.0
        return self.numeric and min(numbers) >= 0 and ratio > 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A combination of values: their places on the axes, and what its seeds gave."""

    codes: tuple[int, ...]
    mean: float
    stderr: float
    done: int
    failed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """A sweep: `axes` with the longest numeric one first, and the metric of every run (NaN where it did not finish)."""

    axes: tuple[Axis, ...]
    values: np.ndarray
    done: np.ndarray
    seeds: np.ndarray
    metric: str
    column: str
    higher_is_better: bool

    @classmethod
    def of(
        cls,
        table: Table,
        axes: Sequence[str] | None,
        metric: str,
        *,
        higher_is_better: bool | None = None,
    ) -> Grid:
        """The grid of a table.

        Args:
            table: of the runs.
            axes: settings in which they differ; None for those of `decaycast.lab.trial.DEFAULTS` with several values.
            metric: a column of curves, whose last value counts, or a final number.
            higher_is_better: None: unless the metric is a loss or an error.

        Raises:
            ValueError: an axis that no row has; finished rows without the metric.
        """
        names = [name for name in DEFAULTS if name in table.columns] if axes is None else list(dict.fromkeys(axes))
        unknown = [name for name in names if name not in table.columns]
        if unknown and len(table):
            raise ValueError(f"the sweep's rows have no setting {unknown[0]!r}; they have {', '.join(table.columns)}")
        found = [_axis(name, table[name]) for name in names if name not in unknown]
        found = [axis for axis in found if len(axis.values) > 1]
        done = table["status"] == "done"
        column = next((name for name in (f"last_{metric}", metric) if name in table.columns), metric)
        if column in table.columns:
            values = np.where(done, np.array(table[column], dtype=float), math.nan)
        elif done.any():
            raise ValueError(f"the sweep's rows have no metric {metric!r}; they have {', '.join(table.columns)}")
        else:
            values = np.full(len(table), math.nan)
        if higher_is_better is None:
            higher_is_better = not any(word in metric for word in WORSE_WHEN_HIGH)
        return cls(
            axes=tuple(sorted(found, key=lambda axis: (not axis.numeric, -len(axis.values)))),
            values=values,
            done=done,
            seeds=np.array(table["seed"], dtype=float),
            metric=metric,
            column=column,
            higher_is_better=higher_is_better,
        )

    @cached_property
    def cells(self) -> list[Setting]:
        """The settings, the best first; those with failed runs after those without, those without a result last."""
        if not len(self.values):
            return []
        codes = np.stack([axis.codes for axis in self.axes] or [np.zeros(len(self.values), dtype=int)], axis=1)
        rows, place = np.unique(codes, axis=0, return_inverse=True)
        place = place.reshape(-1)
        known = np.isfinite(self.values)
        count = np.bincount(place[known], minlength=len(rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.bincount(place[known], self.values[known], minlength=len(rows)) / count
            away = (self.values - mean[place])[known] ** 2
            stderr = np.sqrt(np.bincount(place[known], away, minlength=len(rows)) / (count - 1) / count)
        stderr[count < 2] = math.nan
        # a run that "finished" with a loss that is no number has failed for whoever looks for the best
        failed = np.bincount(place[~known], minlength=len(rows))
        sign = -1.0 if self.higher_is_better else 1.0
        order = np.lexsort((sign * mean, failed > 0, np.isnan(mean)))
        named = rows[:, : len(self.axes)].tolist()
        return [
            Setting(
                codes=tuple(named[i]),
                mean=float(mean[i]),
                stderr=float(stderr[i]),
                done=int(count[i]),
                failed=int(failed[i]),
            )
            for i in order.tolist()
        ]

    def near_best(self) -> int:
        """How many other settings have a mean within one standard error (of both) of the best."""
        best, *others = self.cells
        if math.isnan(best.stderr):
            return 0
        return sum(
            other.failed == 0 and abs(other.mean - best.mean) <= math.hypot(best.stderr, other.stderr)
            for other in others
        )

    def edges(self) -> list[Axis]:
        """Axes of at least 3 numbers on which the best is the first or the last; 0 is no edge, since nothing is below it."""
        ends = []
        for axis, code in zip(self.axes, self.cells[0].codes, strict=True):
            if axis.numeric and len(axis.values) >= 3:
                low = code == 0 and axis.values[0] != 0
                ends += [axis] if low or code == len(axis.values) - 1 else []
        return ends


def table_of(rows: Iterable[Row]) -> Table:
    """`rows` as a table with the columns that `Store.table` would give them."""
    rows = list(rows)
    heads = [(row.run.key, row.status, row.reason, row.run.seed, row.seconds) for row in rows]
    columns = {name: _column([head[i] for head in heads]) for i, name in enumerate(HEAD)}
    sections = [
        ("config", [row.run.config for row in rows]),
        ("final", [row.final for row in rows]),
        ("last", [{f"last_{name}": column[-1] for name, column in row.curve.items() if len(column)} for row in rows]),
    ]
    for section, records in sections:
        for name in dict.fromkeys(name for record in records for name in record):
            plain = name
            while plain in columns:
                plain = f"{section}_{plain}"
            columns[plain] = _column([record.get(name) for record in records])
    return Table(columns=columns)


def _column(values: list[Any]) -> np.ndarray:
    """Numbers as float64 with NaN for what is missing; anything else as it is."""
    if all(value is None or _number(value) for value in values):
        return np.array([math.nan if value is None else float(value) for value in values])
    return np.array(values, dtype=object)


def _axis(name: str, column: np.ndarray) -> Axis:
    """The distinct values of a column in order, and the place of each run's among them."""
    plain = [_plain(value) for value in column.tolist()]
    values = sorted(dict.fromkeys(plain), key=_rank)
    places = {value: place for place, value in enumerate(values)}
    return Axis(name=name, values=tuple(values), codes=np.array([places[value] for value in plain], dtype=int))


def _plain(value: Any) -> Scalar:
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rank(value: Scalar) -> tuple[int, float, str]:
    if _number(value):
        return (1, float(value), "")
    return (0 if value is None else 2, 0.0, str(value))
