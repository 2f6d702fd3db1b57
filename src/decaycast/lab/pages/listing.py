"""Runs as one searchable table of a page: a row for each, text in every cell. Nothing here reads files or writes.

The page holds the cells as JSON and shows some of them; searching, filtering and sorting happen in the browser. The first
`FIRST` rows are also written out, for readers without scripts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from decaycast.core.experiment import Row, Run

FIRST = 100
MOST_ROWS = 5000
MOST_OPTIONS = 60  # more than these and a filter is no list to choose from: then the search box has to do
SHORT = 4  # final numbers told where runs of many figures stand in one table
STATUS_TONES = {"failed": "bad"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a listing: its name, whether its cells are numbers, and how they look."""

    name: str
    numeric: bool = False
    wide: bool = False
    """Holds sentences, which may break into lines."""
    filtered: bool = False
    """Readers choose among its values."""
    screen_only: bool = False
    """Is left out on paper."""
    links: Mapping[str, str] = field(default_factory=dict)
    """By the text of a cell, where it leads."""
    tones: Mapping[str, str] = field(default_factory=dict)
    """By the text of a cell, its class in the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A searchable table. `total` is how many rows there are; `rows` has at most `MOST_ROWS` of them."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    total: int

    @property
    def first(self) -> tuple[tuple[str, ...], ...]:
        """The rows that are written out."""
        return self.rows[:FIRST]

    @cached_property
    def options(self) -> dict[int, list[str]]:
        """By the index of a filtered column, its values in order; columns with one value or too many are left out."""
        found = {i: sorted({row[i] for row in self.rows}) for i, column in enumerate(self.columns) if column.filtered}
        return {i: values for i, values in found.items() if 1 < len(values) <= MOST_OPTIONS}

    @property
    def payload(self) -> str:
        """JSON for a script element: "<" is written as an escape, so that no text in it can close the element."""
        columns = [
            {
                "name": column.name,
                "numeric": column.numeric,
                "wide": column.wide,
                "screen_only": column.screen_only,
                "links": dict(column.links),
                "tones": dict(column.tones),
            }
            for column in self.columns
        ]
        text = json.dumps({"first": FIRST, "columns": columns, "rows": self.rows}, separators=(",", ":"))
        return text.replace("<", "\\u003c")


def cell(value: Any) -> str:
    """A plain value as the text of a cell; nothing where there is no value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if not math.isnan(value) else ""


def seconds_text(value: float) -> str:
    """Seconds with the digits that matter; nothing where they are unknown."""
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which `runs` differ, in the order in which they are met."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [name for name in names if len({repr(run.config.get(name)) for run in runs}) > 1]


def runs_listing(rows: Sequence[Row], caption: str) -> Listing:
    """Runs of one kind: status, seed, the settings in which they differ, their last numbers. Failed ones come first."""
    ordered = sorted(rows, key=lambda row: row.status == "done")[:MOST_ROWS]
    settings = differing([row.run for row in rows])
    finals = list(dict.fromkeys(name for row in rows for name in row.final))
    columns = [
        Column(name="status", filtered=True, tones=STATUS_TONES),
        *([Column(name="reason", wide=True)] if any(row.reason for row in rows) else []),
        Column(name="seed", numeric=True),
        *(Column(name=_words(name), numeric=_numeric(ordered, name), filtered=True) for name in settings),
        *(Column(name=_words(name), numeric=True) for name in finals),
        Column(name="seconds", numeric=True),
        Column(name="run", screen_only=True),
    ]
    cells = []
    for row in ordered:
        reason = [row.reason] if any(column.name == "reason" for column in columns[:2]) else []
        values = [row.run.config.get(name) for name in settings] + [row.final.get(name) for name in finals]
        cells.append((row.status, *reason, *map(cell, [row.run.seed, *values, seconds_text(row.seconds)]), row.run.key))
    return Listing(caption=caption, columns=tuple(columns), rows=tuple(cells), total=len(rows))


def groups_listing(groups: Mapping[str, Sequence[Row]], pages: Mapping[str, str], caption: str) -> Listing:
    """Runs of several kinds in one table: settings and numbers are words there, since kinds have few columns in common.

    Args:
        groups: rows by the name of what needs them.
        pages: by such a name the page that tells more.
        caption: of the table.
    """
    cells = []
    for name, rows in groups.items():
        settings = differing([row.run for row in rows])
        for row in rows:
            told = ", ".join(f"{_words(key)} {cell(row.run.config[key])}" for key in settings if key in row.run.config)
            cells.append(
                (name, row.status, str(row.run.seed), told, _results(row), seconds_text(row.seconds), row.reason)
            )
    cells.sort(key=lambda row: row[1] != "failed")
    columns = (
        Column(name="figure", filtered=True, links={name: f"{page}#runs" for name, page in pages.items()}),
        Column(name="status", filtered=True, tones=STATUS_TONES),
        Column(name="seed", numeric=True),
        Column(name="settings that differ", wide=True),
        Column(name="final numbers", wide=True),
        Column(name="seconds", numeric=True),
        Column(name="reason", wide=True),
    )
    return Listing(caption=caption, columns=columns, rows=tuple(cells[:MOST_ROWS]), total=len(cells))


def _results(row: Row) -> str:
    told = [f"{_words(name)} {value:.4g}" for name, value in row.final.items() if not math.isnan(value)]
    more = len(told) - SHORT
    return ", ".join(told[:SHORT]) + (f" and {more} more" if more > 0 else "")


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row.run.config.get(name) for row in rows]
    return all(isinstance(value, (int, float, type(None))) and not isinstance(value, bool) for value in values)


def _words(name: str) -> str:
    return name.replace("_", " ")
