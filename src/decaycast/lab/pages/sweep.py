"""The page of a sweep: its best setting, a map or lines over its axes, every run, and how to make it again.

Settings are compared by the mean over their seeds. The best of many is lucky as well as good: the page says how many settings
are within one standard error of it, and whether it lies at the edge of what was swept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Scalar
from decaycast.lab.pages.listing import MOST_ROWS, STATUS_TONES, Column, Listing, cell, seconds_text
from decaycast.lab.pages.page import merged_provenance, setting, write_page
from decaycast.lab.pages.plots import pretty
from decaycast.lab.pages.sweep_grid import Grid, table_of
from decaycast.lab.pages.sweep_plots import sweep_plots
from decaycast.lab.table import Table

TOP = 10
MEASURES = ("loss", "accuracy", "error")  # what a column is called that tells how good a run is
READING = (
    "A setting is one combination of the swept values; its number is the mean over its seeds that finished, with one standard "
    "error. A setting with failed runs comes after those without.",
    "The best of many settings owes part of its lead to luck. Settings within one standard error of the best are as good as far "
    "as these seeds can tell. Train the best again with fresh seeds, and read test data for that one alone.",
)


def write_sweep_page(
    path: str | os.PathLike[str],
    rows: Table | Iterable[Row],
    *,
    axes: Sequence[str] | None = None,
    metric: str = "validation_loss",
    higher_is_better: bool | None = None,
    settings: Mapping[str, Scalar] | None = None,
    command: str = "",
    provenance: Mapping[str, str] | None = None,
    title: str = "Sweep",
) -> Path:
    """Write the page of one sweep.

    Args:
        path: the HTML file to write; missing folders are made, an existing file is replaced in one step.
        rows: of the sweep, failed ones too: a table from `Store.table()`, or rows.
        axes: the settings in which runs differ; None: those of the run settings that have several values.
        metric: what should be best: a column of curves, whose last value counts, or a final number.
        higher_is_better: None: unless the metric is a loss or an error.
        settings: what all runs share.
        command: the command line that makes this page again.
        provenance: versions, hardware, revision, time; None: that of the rows, where they have any.
        title: of the page.

    Returns:
        The path written.

    Raises:
        ValueError: an unknown axis; finished rows without the metric.
        ReportError: the file cannot be written.
    """
    if not isinstance(rows, Table):
        rows = list(rows)
        provenance = merged_provenance(rows) if provenance is None else provenance
        axes = _varied(rows) if axes is None else axes
    table = rows if isinstance(rows, Table) else table_of(rows)
    grid = Grid.of(table, axes, metric, higher_is_better=higher_is_better)
    shared = {name: setting(value) for name, value in (settings or {}).items()}
    names = [shared[name] for name in ("model", "data") if name in shared]
    page = {
        "kind": "sweep",
        "title": f"{title}: {' on '.join(names)}" if names else title,
        "subtitle": f"{len(table):,} runs, {len(grid.cells):,} settings",
        "metric": metric.replace("_", " "),
        "best": _best(grid),
        "facts": _facts(grid, table),
        "plots": sweep_plots(grid),
        "top_header": (*(axis.label for axis in grid.axes), metric, "standard error", "seeds", "failed"),
        "top": _top(grid) if grid.axes else [],
        "runs": _listing(grid, table),
        "reading": READING,
        "settings": shared,
        "provenance": dict(provenance or {}),
        "command": command,
    }
    return write_page(path, page)


def _varied(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.run.config)
    return [name for name in names if len({repr(row.run.config.get(name)) for row in rows}) > 1]


def _best(grid: Grid) -> dict[str, Any] | None:
    if not grid.cells or math.isnan(grid.cells[0].mean):
        return None
    best = grid.cells[0]
    error = "" if math.isnan(best.stderr) else f"standard error {pretty(best.stderr, 2)}"
    notes = []
    near = grid.near_best()
    if near:
        what = "setting is" if near == 1 else "settings are"
        notes.append(f"{near:,} other {what} within one standard error of it.")
    for axis in grid.edges():
        notes.append(f"The best lies at the edge of the swept {axis.label}: go on beyond it.")
    named = {axis.label: axis.texts[code] for axis, code in zip(grid.axes, best.codes, strict=True)}
    number = pretty(best.mean, 4)
    return {"number": number, "error": error, "done": best.done, "settings": named, "notes": notes}


def _facts(grid: Grid, table: Table) -> list[tuple[str, str, str]]:
    failed = int((table["status"] == "failed").sum())
    seconds = float(np.nansum(table["seconds"]))
    spread = [cell.mean for cell in grid.cells if not math.isnan(cell.mean)]
    better = "higher is better" if grid.higher_is_better else "lower is better"
    return [
        ("finished runs", f"{len(table) - failed:,}", f"{failed:,} failed" if failed else "none failed"),
        ("settings", f"{len(grid.cells):,}", " × ".join(f"{len(axis.values)} {axis.label}" for axis in grid.axes)),
        ("median setting", pretty(float(np.median(spread)), 4) if spread else "-", better),
        ("trained", f"{seconds / 3600:,.1f} h" if seconds >= 7200 else f"{seconds:,.0f} s", "of all runs together"),
    ]


def _top(grid: Grid) -> list[list[str]]:
    return [
        [
            *(axis.texts[code] for axis, code in zip(grid.axes, cell.codes, strict=True)),
            pretty(cell.mean, 5),
            pretty(cell.stderr, 2),
            str(cell.done),
            str(cell.failed),
        ]
        for cell in grid.cells[:TOP]
    ]


def _listing(grid: Grid, table: Table) -> Listing:
    """Every run, the best first and failed ones last; of very many the best, and as many failed as there is room for."""
    sign = -1.0 if grid.higher_is_better else 1.0
    order = np.argsort(sign * grid.values, kind="stable")
    failed = np.flatnonzero(table["status"] == "failed")[: MOST_ROWS // 5]
    if len(order) > MOST_ROWS:
        order = order[~np.isin(order, failed)]
        order = np.concatenate([order[: MOST_ROWS - len(failed)], failed])
    chosen = table.take(order)
    axes = [axis.name for axis in grid.axes]
    metrics = [name for name in table.columns if any(word in name for word in MEASURES) and name not in axes]
    metrics = [name for name in dict.fromkeys((grid.column, *metrics)) if name in table.columns]
    reasons = any(chosen["reason"].tolist())
    columns = (
        Column(name="status", filtered=True, tones=STATUS_TONES),
        *(Column(name=axis.label, numeric=axis.numeric, filtered=True) for axis in grid.axes),
        Column(name="seed", numeric=True),
        *(Column(name=name.removeprefix("last_").replace("_", " "), numeric=True) for name in metrics),
        Column(name="seconds", numeric=True),
        *([Column(name="reason", wide=True)] if reasons else []),
        Column(name="run", screen_only=True),
    )
    names = ["status", *axes, "seed", *metrics, "seconds", *(["reason"] if reasons else []), "key"]
    texts = {"seconds": seconds_text}
    cells = zip(*([texts.get(name, _text)(value) for value in chosen[name].tolist()] for name in names), strict=True)
    return Listing(caption="Runs of the sweep", columns=columns, rows=tuple(cells), total=len(table))


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else cell(value)
