"""Plain numbers to plotly figures, each with the table behind it. Nothing here reads files, trains or writes.

A `Plot` carries its figure without a theme: every trace has a light and a dark colour in ``meta``, and the page picks
one. Weight decays are coloured by their logarithm on viridis, which stays readable for colour-blind readers and in
print; other traces take the Okabe-Ito hues. Missing values stay gaps. Text that plotly would read as markup is escaped.
"""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

try:
    import plotly.graph_objects as graph
    from plotly.colors import sample_colorscale
except ImportError as error:
    raise ImportError("the page's plots are drawn with plotly: pip install 'decaycast[lab]'") from error

from decaycast.core.experiment import Panel, Trace
from decaycast.lab.pages.thinning import thin, thin_trace

if TYPE_CHECKING:
    from decaycast.lab.verify import Verification
    from decaycast.methods.l2.forecast import Forecast

Colours = tuple[str, str]  # for light and for dark paper, each "rgb(r, g, b)"
Cell = str | float

ACCENT = "rgb(213, 94, 0)"
ACCENT_FILL = "rgba(213, 94, 0, 0.14)"
GREY: Colours = ("rgb(110, 110, 110)", "rgb(170, 170, 170)")
HUES: tuple[Colours, ...] = (
    ("rgb(0, 114, 178)", "rgb(86, 180, 233)"),
    ("rgb(213, 94, 0)", "rgb(255, 140, 80)"),
    ("rgb(0, 140, 100)", "rgb(60, 205, 160)"),
    ("rgb(178, 90, 140)", "rgb(230, 160, 196)"),
    ("rgb(170, 115, 0)", "rgb(240, 200, 80)"),
    ("rgb(60, 60, 60)", "rgb(225, 225, 225)"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
CURVE_POINTS = 4000  # per plot, over all its arms: keeps a page of many long arms below its size limit
TABLE_ROWS = 300
PACKED_ROWS = 10_000  # longer tables are offered as gzip


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend: the group of traces it stands for, its label and its colours."""

    name: str
    label: str
    colours: Colours


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure, its legend and the table behind it. `views` are alternative x axes, the first one shown first."""

    title: str
    caption: str
    figure: graph.Figure
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    views: tuple[Mapping[str, Any], ...] = ()
    legend: tuple[Key, ...] = ()

    @property
    def payload(self) -> str:
        """JSON for a script element: "<" is written as an escape, so that no text in it can close the element."""
        figure = self.figure.to_json()
        views = json.dumps(self.views, allow_nan=False)
        return f'{{"figure":{figure},"views":{views}}}'.replace("<", "\\u003c")

    @property
    def packed(self) -> bool:
        """Whether the table is offered as gzip."""
        return len(self.rows) > PACKED_ROWS

    @property
    def csv_uri(self) -> str:
        """All rows as a CSV file in a data: address; long ones compressed, or they would fill the page."""
        out = io.StringIO()
        rows = ([_cell(value) for value in row] for row in self.rows)
        csv.writer(out, lineterminator="\n").writerows([self.header, *rows])
        if self.packed:
            packed = gzip.compress(out.getvalue().encode("utf-8", "backslashreplace"), mtime=0)
            return "data:application/gzip;base64," + base64.b64encode(packed).decode()
        return "data:text/csv;charset=utf-8," + quote(out.getvalue(), safe="/:+-.,_ ").replace(" ", "%20")

    @property
    def shown(self) -> list[list[str]]:
        """The rows as text, evenly thinned to what a reader can scroll through."""
        return [[_cell(value) or "-" for value in self.rows[i]] for i in thin(len(self.rows), TABLE_ROWS)]


class Scale:
    """Colours for weight decays by their logarithm; zero is grey."""

    def __init__(self, weight_decays: Sequence[float]) -> None:
        logs = [math.log(value) for value in weight_decays if 0 < value < math.inf]
        self.low, self.high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def colours(self, weight_decay: float) -> Colours:
        """Light and dark colour of `weight_decay`; the ends of viridis that vanish on the paper are left out."""
        if not 0 < weight_decay < math.inf:
            return GREY
        span = self.high - self.low
        at = min(1.0, max(0.0, (math.log(weight_decay) - self.low) / span if span else 0.5))
        light, dark = sample_colorscale("Viridis", [0.86 * at, 0.3 + 0.7 * at])
        return str(light), str(dark)


def pretty(value: float | None, digits: int = 3) -> str:
    """A number for people: 0.0123, 3.28×10⁻⁵, 20,000; "-" where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        mantissa = f"{float(mantissa):g}"
        return power if mantissa == "1" else f"{mantissa}×{power}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def arm_name(weight_decay: float) -> str:
    """How an arm is called in legends."""
    return f"λ = {pretty(weight_decay)}"


def curve_plots(forecast: Forecast, curves: Mapping[float, Mapping[str, Sequence[float]]], scale: Scale) -> list[Plot]:
    """Validation loss and accuracy of every arm, against steps and against e-folds where these are known.

    Without `curves` the one metric that the forecast itself read is drawn.
    """
    if not curves:
        curves = {arm.weight_decay: _arm_columns(forecast, arm) for arm in forecast.arms if arm.steps}
    metrics = dict.fromkeys(("validation_loss", "validation_accuracy", forecast.metric.replace(" ", "_")))
    plots = [_curve_plot(metric, curves, forecast, scale) for metric in metrics]
    return [plot for plot in plots if plot is not None]


def _arm_columns(forecast: Forecast, arm: Any) -> dict[str, Sequence[float]]:
    columns: dict[str, Sequence[float]] = {"step": arm.steps, forecast.metric.replace(" ", "_"): arm.values}
    if forecast.rate_per_decay is not None and forecast.budget_steps:
        # Exact for a constant learning rate only, so the page takes the measured column wherever there is one.
        per_step = forecast.rate_per_decay * arm.weight_decay / forecast.budget_steps
        columns["efolds"] = [per_step * step for step in arm.steps]
    return columns


def _curve_plot(metric: str, curves: Mapping[float, Any], forecast: Forecast, scale: Scale) -> Plot | None:
    arms = {decay: curves[decay] for decay in sorted(curves) if _any_finite(curves[decay].get(metric, ()))}
    if not arms:
        return None
    limit = max(2, CURVE_POINTS // len(arms))
    figure, by_step, by_efolds, rows, thinned = base_figure(), [], [], [], False
    for decay, columns in arms.items():
        keep = thin(len(columns[metric]), limit)
        thinned |= len(keep) < len(columns[metric])
        steps, values = ([float(columns[name][i]) for i in keep] for name in ("step", metric))
        efolds = [float(columns["efolds"][i]) if "efolds" in columns else math.nan for i in keep]
        by_step.append([_gap(step) for step in steps])
        # A log axis has no place for the start, where no e-fold is spent.
        by_efolds.append([value if 0 < value < math.inf else None for value in efolds])
        rows += [(decay, *numbers) for numbers in zip(steps, efolds, values, strict=True)]
        figure.add_trace(_line(arm_name(decay), str(decay), steps, values, scale.colours(decay)))
    label = metric.replace("_", " ")
    limits = _readable_range(arms, metric)
    figure.update_yaxes(title_text=html.escape(label, quote=False), range=limits)
    views = [{"label": "steps", "x": by_step, "xaxis": {"title": {"text": "optimiser steps"}, "type": "linear"}}]
    if any(value is not None for values in by_efolds for value in values):
        views.append(_efold_view(by_efolds, forecast))
    return Plot(
        title=label[:1].upper() + label[1:],
        caption=_curve_caption(metric, forecast, thinned, cut=limits is not None),
        figure=figure,
        header=("weight_decay", "step", "efolds", metric),
        rows=tuple(rows),
        views=tuple(views),
    )


def _efold_view(x: list[list[float | None]], forecast: Forecast) -> dict[str, Any]:
    view: dict[str, Any] = {"label": "e-folds", "x": x}
    view["xaxis"] = {"title": {"text": "e-folds of weight decay spent"}, "type": "log"}
    if forecast.efolds is not None and 0 < forecast.efolds < math.inf:
        view["shapes"], note = _marker_line(forecast.efolds, f"full run: {pretty(forecast.efolds)}")
        view["annotations"] = [note]
    return view


def _curve_caption(metric: str, forecast: Forecast, thinned: bool, *, cut: bool) -> str:
    ends = [arm.steps[-1] for arm in forecast.arms if arm.steps]
    parts = [f"The arms stop at step {max(ends):,.0f}; the full run has {forecast.budget_steps:,}."] if ends else []
    if metric.replace("_", " ") == forecast.metric.replace("_", " "):
        parts.append("The forecast is made from this metric.")
    if cut:
        parts.append("The steep beginning is cut off; double-click the plot for the whole range.")
    if thinned:
        parts.append("Long curves are drawn and listed with evenly spaced points left out.")
    return " ".join(parts)


def _readable_range(arms: Mapping[float, Any], metric: str) -> list[float] | None:
    """Limits of the y axis that leave out the first steep part and what explodes; None where little would be gained."""
    pairs = [zip(arm["step"], arm[metric], strict=True) for arm in arms.values()]
    curves = [[(step, value) for step, value in pair if math.isfinite(value)] for pair in pairs]
    begin = 0.1 * max(curve[-1][0] for curve in curves)
    late = [float(value) for curve in curves for step, value in curve if step >= begin]
    start = max(curve[0][1] for curve in curves)
    if 2 * sum(value < start for value in late) > len(late):  # a loss: above its start nothing is worth seeing
        late = [value for value in late if value <= start]
    everything = [value for curve in curves for _, value in curve]
    span = max(late) - min(late)
    if not 0 < span < 0.5 * (max(everything) - min(everything)):
        return None
    return [min(late) - 0.05 * span, max(late) + 0.05 * span]


def verification_plot(verification: Verification, forecast: Forecast, scale: Scale) -> Plot:
    """The grid of full trainings: mean and standard error per weight decay, beside what was forecast."""
    rows = tuple(zip(verification.weight_decays, verification.means, verification.stderrs, strict=True))
    positive = [row for row in rows if row[0] > 0]
    x, y, error = ([row[i] for row in positive] for i in range(3))
    pairs = [scale.colours(value) for value in x]
    markers = {"markersLight": [pair[0] for pair in pairs], "markersDark": [pair[1] for pair in pairs]}
    line = _line("mean", "grid", x, y, GREY, markers)
    line.update(
        mode="lines+markers",
        marker={"size": 10},
        error_y={"type": "data", "array": [_gap(value) for value in error], "thickness": 1.5, "width": 5},
        hovertemplate=f"λ = %{{x:.3g}}<br>%{{y:.4g}}<extra>{verification.seeds} seeds</extra>",
    )
    figure = base_figure()
    figure.add_trace(line)
    low, high = forecast.interval
    if 0 < low < high < math.inf:
        figure.add_vrect(x0=low, x1=high, fillcolor=ACCENT_FILL, line_width=0, layer="below")
    if 0 < forecast.weight_decay < math.inf:
        shapes, note = _marker_line(forecast.weight_decay, f"chosen: {pretty(forecast.weight_decay)}")
        figure.add_shape(shapes[0])
        figure.add_annotation(note)
    for _, mean, _ in (row for row in rows if row[0] == 0 and math.isfinite(row[1])):
        figure.add_hline(y=mean, line={"dash": "dot", "width": 1.5, "color": "rgb(128, 128, 128)"})
        figure.add_annotation(
            x=0, xref="paper", xanchor="left", y=mean, yanchor="bottom", text="λ = 0", showarrow=False
        )
    figure.update_xaxes(type="log", title_text="weight decay λ")
    figure.update_yaxes(title_text=html.escape(verification.metric.replace("_", " "), quote=False))
    return Plot(
        title="Full trainings around the answer",
        caption=f"Mean of {verification.seeds} seeds per weight decay, none of them used by the forecast; bars are "
        "standard errors. The shaded band is the forecast's interval.",
        figure=figure,
        header=("weight_decay", verification.metric, "standard_error"),
        rows=rows,
    )


def panel_plot(panel: Panel) -> Plot:
    """A panel of plain traces; bounds are shaded around lines and drawn as bars at loose markers.

    Of long traces some points are drawn, and the caption says so; the table has all.
    """
    figure, legend, rows, drawn = base_figure(), [], [], 0
    floor = _smallest_positive(panel) if panel.y_log else None
    for index, trace in enumerate(panel.traces):
        colours = _hue(index, len(panel.traces))
        group = f"trace {index}"
        legend.append(Key(name=group, label=trace.name, colours=colours))
        rows += [(trace.name, *map(float, row)) for row in zip(trace.x, trace.y, *_bounds(trace), strict=True)]
        trace = thin_trace(trace, len(panel.traces), logs=(panel.x_log, panel.y_log))
        drawn += len(trace.x)
        if trace.low is not None and trace.high is not None and trace.mode != "markers":
            figure.add_traces(_bands(trace, group, colours, floor))
        figure.add_trace(_panel_line(trace, group, colours, index))
    for update, label, log in (
        (figure.update_xaxes, panel.x_label, panel.x_log),
        (figure.update_yaxes, panel.y_label, panel.y_log),
    ):
        update(title_text=html.escape(label, quote=False), type="log" if log else "linear")
    fewer = f"Drawn: {drawn:,} of {len(rows):,} points, extremes among them." if drawn < len(rows) else ""
    return Plot(
        title=panel.title,
        caption=" ".join(filter(None, (panel.caption, fewer))),
        figure=figure,
        header=("trace", panel.x_label, panel.y_label, "low", "high"),
        rows=tuple(rows),
        legend=tuple(legend),
    )


def _panel_line(trace: Trace, group: str, colours: Colours, index: int) -> graph.Scatter:
    line = _line(trace.name, group, trace.x, trace.y, colours)
    line.update(mode=trace.mode, marker={"size": 8, "symbol": SYMBOLS[index % len(SYMBOLS)]})
    line.update(line={"dash": ("solid", "dash", "dot")[index // len(HUES) % 3]})
    if trace.mode == "markers" and trace.low is not None and trace.high is not None:
        up = [_gap(high - y) for high, y in zip(trace.high, trace.y, strict=True)]
        down = [_gap(y - low) for low, y in zip(trace.low, trace.y, strict=True)]
        line.update(error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5})
    return line


def _bands(trace: Trace, group: str, colours: Colours, floor: float | None) -> list[graph.Scatter]:
    """One closed outline per stretch without gaps: a band never bridges what was not measured."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for x, low, high in zip(trace.x, *_bounds(trace), strict=True):
        low = low if floor is None else max(low, floor)
        if all(map(math.isfinite, (x, low, high))) and (floor is None or high > 0):
            stretches[-1].append((x, low, high))
        elif stretches[-1]:
            stretches.append([])
    bands = []
    for stretch in filter(None, stretches):
        outline = [(x, high) for x, _, high in stretch] + [(x, low) for x, low, _ in reversed(stretch)]
        light, dark = (colour.replace("rgb(", "rgba(").replace(")", ", 0.18)") for colour in colours)
        fills = {"fillLight": light, "fillDark": dark}
        band = _line(trace.name, group, [x for x, _ in outline], [y for _, y in outline], colours, fills)
        band.update(fill="toself", line={"width": 0}, hoverinfo="skip", hovertemplate=None)
        bands.append(band)
    return bands


def _bounds(trace: Trace) -> list[Sequence[float]]:
    return [[math.nan] * len(trace.x) if bound is None else bound for bound in (trace.low, trace.high)]


def _smallest_positive(panel: Panel) -> float | None:
    values = [v for trace in panel.traces for v in (*trace.y, *_bounds(trace)[0]) if 0 < v < math.inf]
    return min(values, default=None)


def _hue(index: int, count: int) -> Colours:
    """Distinct hues for a few traces; for many, which are mostly a family in some order, the ordered scale."""
    if count <= len(HUES):
        return HUES[index]
    return Scale([1.0, math.e]).colours(math.exp(index / (count - 1)))


def base_figure() -> graph.Figure:
    """An empty figure with the axes and margins of all plots; colours of text and grid come from the page."""
    axis = {"exponentformat": "power", "automargin": True, "zeroline": False, "nticks": 7}
    return graph.Figure(
        layout={
            "template": {},
            "showlegend": False,
            "hovermode": "closest",
            "height": 340,
            "margin": {"l": 56, "r": 14, "t": 44, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def _line(
    name: str,
    group: str,
    x: Sequence[float],
    y: Sequence[float],
    colours: Colours,
    more_colours: Mapping[str, Any] | None = None,
) -> graph.Scatter:
    label = html.escape(name, quote=False)
    return graph.Scatter(
        name=label,
        legendgroup=group,
        x=[_gap(value) for value in x],
        y=[_gap(value) for value in y],
        mode="lines",
        connectgaps=False,
        line={"width": 2},
        meta={"light": colours[0], "dark": colours[1], **(more_colours or {})},
        hovertemplate=f"{label.replace('%{', '% {')}<br>%{{x:.5~g}}<br>%{{y:.4g}}<extra></extra>",
    )


def _marker_line(x: float, text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A vertical line at `x` on a log axis, and its note; plotly places shapes by value, notes by exponent."""
    line = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper"}
    shape = {**line, "line": {"color": ACCENT, "width": 2, "dash": "dash"}}
    note = {"x": math.log10(x), "y": 1, "yref": "paper", "yanchor": "bottom", "text": text, "showarrow": False}
    return [shape], {**note, "font": {"color": ACCENT}}


def _any_finite(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _gap(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if math.isfinite(value) else ""
