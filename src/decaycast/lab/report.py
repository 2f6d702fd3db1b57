"""The pages of forecasts, probes and figures, and the report of several figures. Nothing here trains.

What all pages share, and why each needs nothing else, stands in `decaycast.lab.pages.page`; templates are in its folder.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaycast.core.experiment import Figure, Panel, Row, Scalar, Size
from decaycast.lab.figures import by_key
from decaycast.lab.findings import Finding, assess
from decaycast.lab.pages import plots
from decaycast.lab.pages.index import SIZE_NOTES, write_index_page
from decaycast.lab.pages.listing import runs_listing
from decaycast.lab.pages.page import OUTCOMES, merged_provenance, setting, write_page
from decaycast.lab.pages.plots import Key, pretty
from decaycast.lab.table import Table

if TYPE_CHECKING:
    from decaycast.lab.verify import Verification
    from decaycast.methods.l2.forecast import Arm, Forecast
    from decaycast.methods.large_lr.probe_report import ProbeReport

INDEX = "index.html"
VERDICTS = {
    "trust": "The arms separate clearly: use the number. A finer search would gain little.",
    "weak": "The measurements point this way but leave room: a sound start. Verify it before an expensive run.",
    "refuse": "The measurements do not support a forecast. The number shown is a fallback, and the reason says why.",
}
TONES = {"trust": "good", "weak": "middling", "refuse": "bad"}
PROBE_MARKS = {
    "memorises shortcuts first": ("bad", "✕ memorises shortcuts first"),
    "does not": ("good", "✓ does not memorise shortcuts first"),
    "cannot tell": ("middling", "~ cannot tell"),
}
PROBE_READING = (
    "Alone: accuracy on the planted shortcut with nothing else to go by. High before annealing means that the network has "
    "memorised the shortcut while it still trained at the rate in question; the end is shown because every rate may pick it "
    "up after annealing. The control never sees a shortcut: on it alone it stays near chance.",
    "Costs: clean accuracy of the control minus that of the network with the shortcut, in points, at the end. Large rates often "
    "beat small ones without any shortcut, so the accuracies of two rates with the shortcut prove nothing. The difference in "
    "differences does: how much less the shortcut costs than at the small rate, with a 95 % interval over seeds. An interval "
    "with 0 in it is no result, either way.",
    "All numbers come from one brief training on held-out data. The planted shortcut is a stand-in: it shows in which order a "
    "network learns at a rate, not which shortcuts your data have.",
)


def write_forecast_page(
    path: str | os.PathLike[str],
    forecast: Forecast,
    *,
    curves: Mapping[float, Mapping[str, Sequence[float]]],
    verification: Verification | None,
    recipe: str,
    settings: Mapping[str, Scalar],
    command: str,
    provenance: Mapping[str, str],
) -> Path:
    """Write the page of one forecast.

    Args:
        path: the HTML file to write; missing folders are made, an existing file is replaced in one step.
        forecast: what was forecast, with its arms.
        curves: per weight decay the columns of `decaycast.core.measure.COLUMNS`, NaN where missing; may be empty.
        verification: the grid of full trainings around the answer, None when it was not run.
        recipe: lines of Python to copy.
        settings: the training that was forecast for.
        command: the command line that makes this page again.
        provenance: versions, hardware, revision, time.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    decays = [arm.weight_decay for arm in forecast.arms] + list(curves) + [forecast.weight_decay]
    scale = plots.Scale(decays + list(verification.weight_decays if verification else ()))
    names = [str(settings[name]) for name in ("model", "data") if settings.get(name) is not None]
    page = {
        "kind": "forecast",
        "title": f"Weight decay for {' on '.join(names) or 'your training'}",
        "subtitle": f"{forecast.budget_steps:,} optimiser steps",
        "forecast": forecast,
        "tone": TONES[forecast.verdict],
        "verdicts": VERDICTS,
        "number": pretty(forecast.weight_decay),
        "interval": _interval(forecast),
        "facts": _facts(forecast),
        "ruler": _ruler(forecast, scale),
        "arms": _arm_rows(forecast, curves),
        "legend": _arm_legend(forecast, curves, scale),
        "plots": plots.curve_plots(forecast, curves, scale),
        "check": plots.verification_plot(verification, forecast, scale) if verification else None,
        "check_facts": _check_facts(verification) if verification else [],
        "recipe": recipe,
        "command": command,
        "settings": {name: setting(value) for name, value in settings.items()},
        "provenance": dict(provenance),
    }
    return write_page(path, page)


def write_probe_page(
    path: str | os.PathLike[str],
    report: ProbeReport,
    *,
    panels: Sequence[Panel],
    settings: Mapping[str, Scalar],
    command: str,
    provenance: Mapping[str, str],
) -> Path:
    """Write the page of one probe for shortcuts.

    Args:
        path: the HTML file to write; missing folders are made, an existing file is replaced in one step.
        report: what the probe found.
        panels: its curves.
        settings: the trainings it was made of.
        command: the command line that makes this page again.
        provenance: versions, hardware, revision, time.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    names = [str(settings[name]) for name in ("model", "data") if settings.get(name) is not None]
    said = [(*PROBE_MARKS[report.standing(arm.lr)[0]], arm.lr, report.sentence(arm.lr)) for arm in report.arms]
    page = {
        "kind": "probe",
        "title": f"Which learning rates memorise shortcuts: {' on '.join(names) or 'your training'}",
        "subtitle": f"{report.what}, {report.difficulty}",
        "verdicts": [
            {"tone": tone, "mark": f"{pretty(lr)}: {mark}", "sentence": sentence} for tone, mark, lr, sentence in said
        ],
        "facts": _probe_facts(report),
        "header": report.HEAD,
        "rows": [report.cells(arm) for arm in report.arms],
        "plots": [plots.panel_plot(panel) for panel in panels],
        "reading": PROBE_READING,
        "settings": {name: setting(value) for name, value in settings.items()},
        "command": command,
        "provenance": dict(provenance),
    }
    return write_page(path, page)


def write_figure_page(path: str | os.PathLike[str], figure: Figure, rows: Sequence[Row], size: Size) -> Path:
    """Write the page of one figure: its claim, the verdict on it, its panels and what they were made from.

    Args:
        path: the HTML file to write; missing folders are made, an existing file is replaced in one step.
        figure: draws and judges `rows`.
        rows: whatever rows of `figure.runs(size)` exist, failed ones too.
        size: the size these rows have.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    return write_finding_page(path, assess(figure, rows, size))


def write_finding_page(path: str | os.PathLike[str], finding: Finding) -> Path:
    """`write_figure_page` for a figure that is judged already; same result and errors."""
    figure = finding.figure
    page = {
        "kind": "figure",
        "title": figure.title,
        "subtitle": figure.name,
        "claim": figure.claim,
        "source": figure.source,
        "size": finding.size,
        "size_note": SIZE_NOTES[finding.size],
        "verdict": finding.verdict,
        "tone": OUTCOMES[finding.verdict.outcome],
        "numbers": {name: pretty(value, 4) for name, value in finding.verdict.numbers.items()},
        "plots": [plots.panel_plot(panel) for panel in finding.panels],
        "finding": finding,
        "runs": runs_listing(finding.rows, f"Runs of {figure.name}") if finding.rows else None,
        "command": shlex.join(["decaycast", "lab", "run", figure.name, "--size", finding.size]),
        "provenance": merged_provenance(finding.rows),
    }
    return write_page(path, page)


def write_report(
    out: str | os.PathLike[str],
    figures: Sequence[Figure],
    rows: Iterable[Row],
    size: Size,
    *,
    table: Table | None = None,
) -> list[Finding]:
    """Write a page per figure, and an index of them, into a folder; never trains.

    Args:
        out: folder of the pages, made when missing; the page of "l2/name" is ``l2/name.html`` in it.
        figures: what to show.
        rows: from `Store.read`, `Store.rows_of` or `load_export`; rows that belong to none of them are passed over.
        size: the size to show.
        table: `Store.table()` of the whole store: its other runs are then listed on the index too.

    Returns:
        What was found, figure by figure.

    Raises:
        ValueError: a figure's name is not fit to be a file name.
        ReportError: a page cannot be written.
    """
    found = list(by_key(rows).values())
    findings = [assess(figure, found, size) for figure in figures]
    pages = [Path(out) / finding.page for finding in findings]  # all names are checked before anything is written
    for page, finding in zip(pages, findings, strict=True):
        write_finding_page(page, finding)
    write_index_page(Path(out) / INDEX, findings, size, table=table)
    return findings


def _interval(forecast: Forecast) -> str:
    return " to ".join("unknown" if math.isnan(bound) else pretty(bound) for bound in forecast.interval)


def _facts(forecast: Forecast) -> list[tuple[str, str, str]]:
    efolds = forecast.efolds
    known = efolds is not None and math.isfinite(efolds)
    tau = f"{pretty(1 / efolds)} of the run" if known and efolds else "-"
    missing = "needs the learning rate"
    direction = "higher is better" if forecast.higher_is_better else "lower is better"
    return [
        ("e-folds over the full run", pretty(efolds) if known else "-", "" if known else missing),
        ("relaxation time τ = 1/E", tau, "" if known else missing),
        ("cost of this forecast", f"{pretty(forecast.cost, 2)} full runs", "everything trained for it, counted"),
        ("decided on", forecast.metric.replace("_", " "), direction),
    ]


def _probe_facts(report: ProbeReport) -> list[tuple[str, str, str]]:
    return [
        ("annealed to", pretty(report.small), f"from step {report.anneal_at:,} of {report.steps:,}"),
        ("seeds per rate", str(report.seeds), "with the shortcut and without"),
        ("chance", f"{report.chance:.0%}", "guessing the commonest class"),
        ("networks trained", str(report.trainings), f"in {report.seconds:,.0f} s, the tuning's among them"),
    ]


def _check_facts(verification: Verification) -> list[tuple[str, str, str]]:
    metric = verification.metric.replace("_", " ")
    regret = f"{pretty(verification.regret)} ± {pretty(verification.regret_stderr, 2)}"
    return [
        ("regret", regret, f"{metric}, against the grid's best"),
        ("seeds per weight decay", str(verification.seeds), "fresh ones"),
        ("cost of the check", f"{pretty(verification.cost)} full runs", "not part of the forecast's cost"),
    ]


def _arm_rows(forecast: Forecast, curves: Mapping[float, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    rows = []
    for arm in sorted(forecast.arms, key=lambda arm: arm.weight_decay):
        columns = curves.get(arm.weight_decay, {})
        row = {"weight_decay": pretty(arm.weight_decay), "status": arm.status, "reason": arm.reason}
        row["steps"] = pretty(arm.steps[-1]) if arm.steps else "0"
        row["efolds"] = pretty(_last(columns.get("efolds", ())))
        row["last"] = pretty(_last(arm.values), 4)
        row["best"] = pretty(_best(arm, forecast.higher_is_better), 4)
        rows.append(row)
    return rows


def _last(values: Sequence[float]) -> float:
    return float(values[-1]) if len(values) else math.nan


def _best(arm: Arm, higher_is_better: bool) -> float:
    finite = [value for value in arm.values if math.isfinite(value)]
    return (max if higher_is_better else min)(finite) if finite else math.nan


def _arm_legend(
    forecast: Forecast, curves: Mapping[float, Mapping[str, Sequence[float]]], scale: plots.Scale
) -> list[dict[str, Any]]:
    failed = {arm.weight_decay for arm in forecast.arms if arm.status == "failed"}
    decays = sorted({*curves, *(arm.weight_decay for arm in forecast.arms)})
    keys = [Key(name=str(decay), label=plots.arm_name(decay), colours=scale.colours(decay)) for decay in decays]
    return [{"key": key, "failed": decay in failed} for key, decay in zip(keys, decays, strict=True)]


def _ruler(forecast: Forecast, scale: plots.Scale) -> dict[str, Any] | None:
    """Positions in percent on a logarithmic axis: where the arms, the interval and the answer lie."""
    arms = [arm for arm in forecast.arms if 0 < arm.weight_decay < math.inf]
    answer = (*forecast.interval, forecast.weight_decay)
    shown = [arm.weight_decay for arm in arms] + [value for value in answer if 0 < value < math.inf]
    if not shown or not 0 < forecast.weight_decay < math.inf:
        return None
    first, last = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    last = max(last, first + 1)

    def at(value: float) -> float:
        exponent = math.log10(value) if value > 0 else -math.inf
        return round(100 * (min(max(exponent, first), last) - first) / (last - first), 2)

    low, high = forecast.interval
    low, high = 0.0 if math.isnan(low) else low, math.inf if math.isnan(high) else high
    dots = [(arm.weight_decay, arm.status) for arm in arms]
    ticks = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
    return {
        "ticks": [(at(10.0**tick), pretty(10.0**tick)) for tick in ticks],
        "low": at(low),
        "width": round(max(at(high) - at(low), 0.0), 2),
        "answer": at(forecast.weight_decay),
        "dots": [(at(value), scale.colours(value), status, plots.arm_name(value)) for value, status in dots],
    }
