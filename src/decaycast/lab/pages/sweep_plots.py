"""Pictures of a sweep: a map over its two longest axes, lines along the longest, and every run as a point."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from decaycast.core.experiment import Panel, Trace
from decaycast.lab.pages.plots import Plot, base_figure, panel_plot
from decaycast.lab.pages.sweep_grid import Axis, Grid, Setting
from decaycast.lab.pages.thinning import thin

MOST_FIELDS = 40_000  # of a map and all its views
MOST_RUNS = 100_000  # of the plot of every run and its table: more would not fit into the page
MOST_VIEWS = 12
MOST_LINES = 10
MOST_PLACES = 300  # of a line: with more, values are random and not swept
LEAST_FILLED = 0.25  # share of a map's fields with a result, below which it shows nothing
TAIL = 4.0  # results further from the best than so many times the 90 % quantile share the last colour


def sweep_plots(grid: Grid) -> list[Plot]:
    """The pictures that a sweep has data for."""
    if not any(math.isfinite(cell.mean) for cell in grid.cells):
        return []
    return [plot for plot in (_map(grid), _lines(grid), _every_run(grid)) if plot is not None]


# the map


def _map(grid: Grid) -> Plot | None:
    """Mean metric over two axes; with further ones the best over them, and a view for each of their combinations."""
    if len(grid.axes) < 2:
        return None
    across, down, *others = grid.axes
    fields = len(across.values) * len(down.values)
    filled = len({cell.codes[:2] for cell in grid.cells if math.isfinite(cell.mean)})
    if fields > MOST_FIELDS or filled < LEAST_FILLED * fields:
        return None
    shown: list[tuple[str, tuple[int, ...] | None]] = [("best of all", None)]
    combinations = list(product(*(range(len(axis.values)) for axis in others))) if others else []
    if len(combinations) <= MOST_VIEWS and (len(combinations) + 1) * fields <= MOST_FIELDS:
        shown += [(_named(others, codes), codes) for codes in combinations]
    maps = [_fields(grid.cells, across, down, codes) for _, codes in shown]
    low, high = _colour_range(maps[0], grid)
    figure = base_figure()
    figure.add_trace(_heat(maps[0], across, down, grid, low, high))
    figure.add_trace(_star(grid))
    for update, axis in ((figure.update_xaxes, across), (figure.update_yaxes, down)):
        update(type="category", title={"text": _safe(axis.label), "standoff": 12}, showgrid=False, nticks=14)
        update(categoryorder="array", categoryarray=[_safe(text) for text in axis.texts])
    figure.update_layout(height=min(620, max(300, 130 + 26 * len(down.values))))
    return Plot(
        title=f"{_words(grid.metric)} over {across.label} and {down.label}",
        caption=_map_caption(grid, others, (low, high), maps[0]),
        figure=figure,
        header=(*(axis.label for axis in grid.axes), grid.metric, "standard_error"),
        rows=tuple((*_values(grid.axes, cell.codes), cell.mean, cell.stderr) for cell in grid.cells[:MOST_FIELDS]),
        views=tuple(
            _view(label, codes, field, grid)
            for (label, codes), field in zip(shown, maps, strict=True)
            if len(shown) > 1
        ),
    )


def _fields(
    cells: Iterable[Setting], across: Axis, down: Axis, others: tuple[int, ...] | None
) -> list[list[float | None]]:
    """The mean of each field, None where there is none; the best one where several settings share a field."""
    field: list[list[float | None]] = [[None] * len(across.values) for _ in down.values]
    for cell in cells:  # the best come first
        x, y = cell.codes[:2]
        if field[y][x] is None and math.isfinite(cell.mean) and others in (None, cell.codes[2:]):
            field[y][x] = cell.mean
    return field


def _heat(
    field: list[list[float | None]], across: Axis, down: Axis, grid: Grid, low: float, high: float
) -> dict[str, Any]:
    lines = [f"{_safe(axis.label)} %{{{name}}}" for axis, name in ((across, "x"), (down, "y"))]
    return {
        "type": "heatmap",
        "x": [_safe(text) for text in across.texts],
        "y": [_safe(text) for text in down.texts],
        "z": field,
        "zmin": low,
        "zmax": high,
        "colorscale": "Viridis",
        "reversescale": not grid.higher_is_better,
        "colorbar": {"thickness": 12, "outlinewidth": 0},
        "hovertemplate": "<br>".join([*lines, f"{_safe(_words(grid.metric))} %{{z:.5g}}"]) + "<extra></extra>",
    }


def _star(grid: Grid) -> dict[str, Any]:
    x, y = (_safe(text) for text in _texts(grid.axes, grid.cells[0].codes)[:2])
    marker = {"symbol": "star", "size": 15, "color": "#fff", "line": {"color": "#000", "width": 1.5}}
    return {"type": "scatter", "x": [x], "y": [y], "mode": "markers", "marker": marker, "hoverinfo": "skip"}


def _view(label: str, codes: tuple[int, ...] | None, field: list[list[float | None]], grid: Grid) -> dict[str, Any]:
    best = grid.cells[0].codes
    x, y = ([_safe(text)] if codes in (None, best[2:]) else [] for text in _texts(grid.axes, best)[:2])
    return {"label": label, "x": [None, x], "y": [None, y], "z": [field, None]}


def _colour_range(field: list[list[float | None]], grid: Grid) -> tuple[float, float]:
    """From the best to the worst, or to the 90 % quantile where a few far off would leave the rest one colour."""
    values = np.array([value for line in field for value in line if value is not None])
    sign = -1.0 if grid.higher_is_better else 1.0
    away = np.sort(sign * values)
    best, tail, worst = away[0], float(np.quantile(away, 0.9)), away[-1]
    end = tail if worst - best > TAIL * (tail - best) > 0 else worst
    low, high = sorted((sign * best, sign * end))
    return float(low), float(high)


def _map_caption(
    grid: Grid, others: Sequence[Axis], colours: tuple[float, float], field: list[list[float | None]]
) -> str:
    parts = ["Bright is better; the star is the best. Empty fields have no finished run."]
    if others:
        parts.append(f"Best over {' and '.join(axis.label for axis in others)}, where no other view is chosen.")
    values = [value for line in field for value in line if value is not None]
    beyond = sum(not colours[0] <= value <= colours[1] for value in values)
    if beyond:
        parts.append(f"{beyond} settings are worse than the colours reach, and have the darkest.")
    return " ".join(parts)


# lines and points


def _lines(grid: Grid) -> Plot | None:
    """Means along the longest axis; a line for each value of the next, everything else as in the best setting."""
    if not grid.axes or not grid.axes[0].numeric or not 3 <= len(grid.axes[0].values) <= MOST_PLACES:
        return None
    along, *rest = grid.axes
    best = grid.cells[0].codes
    groups: dict[int, list[Setting]] = {}
    for cell in grid.cells:
        if math.isfinite(cell.mean) and cell.codes[2:] == best[2:]:
            groups.setdefault(cell.codes[1] if rest else 0, []).append(cell)
    kept = {sorted(groups)[i] for i in thin(len(groups), MOST_LINES)} | {best[1] if rest else 0}
    traces = [
        _line(f"{rest[0].label} {rest[0].texts[code]}" if rest else "mean over seeds", along, groups[code])
        for code in sorted(kept)
    ]
    traces = [trace for trace in traces if trace.x]
    if sum(len(trace.x) for trace in traces) < 3 * len(traces) or not traces:
        return None  # hardly any value was tried twice: nothing to join
    told = ["Means over seeds, with a band of one standard error."]
    if rest[1:]:
        told.append(f"Everything else as in the best setting: {_named(rest[1:], best[2:])}.")
    if len(groups) > len(kept):
        told.append(f"{len(kept)} of {len(groups)} lines are drawn.")
    return panel_plot(_panel(grid, along, traces, f"{_words(grid.metric)} along {along.label}", told))


def _line(name: str, along: Axis, cells: Iterable[Setting]) -> Trace:
    ordered = sorted((cell for cell in cells if _placed(along, cell.codes[0])), key=lambda cell: cell.codes[0])
    errors = [0.0 if math.isnan(cell.stderr) else cell.stderr for cell in ordered]
    return Trace(
        name=name,
        x=[float(along.values[cell.codes[0]]) for cell in ordered],  # type: ignore[arg-type]
        y=[cell.mean for cell in ordered],
        low=[cell.mean - error for cell, error in zip(ordered, errors, strict=True)],
        high=[cell.mean + error for cell, error in zip(ordered, errors, strict=True)],
        mode="lines+markers",
    )


def _every_run(grid: Grid) -> Plot | None:
    along = next((axis for axis in grid.axes if axis.numeric), None)
    seen = np.flatnonzero(np.isfinite(grid.values))
    if along is None:
        x, label = grid.seeds[seen], "seed"
    else:
        seen = seen[[_placed(along, code) for code in along.codes[seen].tolist()]]
        x, label = np.array(along.values, dtype=float)[along.codes[seen]], along.label
    if not len(seen):
        return None
    kept = thin(len(seen), MOST_RUNS)
    trace = Trace(name="run", x=x[kept].tolist(), y=grid.values[seen][kept].tolist(), mode="markers")
    told = [f"One point for each finished run, against {label}."]
    if len(kept) < len(seen):
        told.append(f"Of {len(seen):,} runs every so many is here.")
    return panel_plot(_panel(grid, along, [trace], "Every run", told))


def _panel(grid: Grid, along: Axis | None, traces: Sequence[Trace], title: str, told: list[str]) -> Panel:
    if along is not None and not all(_placed(along, code) for code in range(len(along.values))):
        told = [*told, f"{along.label} 0 has no place on this axis; it stands in the tables."]
    values = [value for trace in traces for value in trace.y]
    return Panel(
        title=title,
        x_label="seed" if along is None else along.label,
        y_label=grid.metric.replace("_", " "),
        traces=traces,
        x_log=along is not None and along.log,
        y_log=min(values) > 0 and max(values) > 30 * min(values),
        caption=" ".join(told),
    )


def _placed(axis: Axis, code: int) -> bool:
    return not axis.log or axis.values[code] > 0  # type: ignore[operator]


def _texts(axes: Sequence[Axis], codes: Sequence[int]) -> list[str]:
    return [axis.texts[code] for axis, code in zip(axes, codes, strict=True)]


def _values(axes: Sequence[Axis], codes: Sequence[int]) -> list[str | float]:
    return [
        float(axis.values[code]) if axis.numeric else axis.texts[code]  # type: ignore[arg-type]
        for axis, code in zip(axes, codes, strict=True)
    ]


def _named(axes: Sequence[Axis], codes: Sequence[int]) -> str:
    return ", ".join(f"{axis.label} {text}" for axis, text in zip(axes, _texts(axes, codes), strict=True))


def _words(metric: str) -> str:
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def _safe(text: str) -> str:
    """For plotly, which reads tags and %{...} in texts."""
    return html.escape(text, quote=False).replace("%{", "% {")
