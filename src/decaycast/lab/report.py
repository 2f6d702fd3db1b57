"""The page: one HTML file that needs nothing else, for a forecast, a figure or a list of figures. Nothing here trains.

plotly.js is written into the file, and a content security policy in its head forbids every request, so that a page
opened years later, offline or from a mail shows the same and tells nobody. All text is escaped by the template engine;
the only markup passed through is plotly.js and JSON in which "<" is an escape.
"""

from __future__ import annotations

import base64
import math
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaycast.core.experiment import Figure, Panel, Row, Scalar, Size
from decaycast.lab import plots
from decaycast.lab.figures import by_key
from decaycast.lab.findings import Finding, assess
from decaycast.lab.plots import Key, pretty

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError("the page is written with jinja2: pip install 'decaycast[lab]'") from error
from plotly.offline import get_plotlyjs

if TYPE_CHECKING:
    from decaycast.lab.verify import Verification
    from decaycast.methods.l2.forecast import Arm, Forecast
    from decaycast.methods.large_lr.probe_report import ProbeReport

TEMPLATE = "template.html"
INDEX = "index.html"
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#21918c"/>'
    '<path d="M6 6C8 20 14 25 27 26" fill="none" stroke="#fff" stroke-width="3.5" stroke-linecap="round"/></svg>'
)
VERDICTS = {
    "trust": "The arms separate clearly: use the number. A finer search would gain little.",
    "weak": "The measurements point this way but leave room: a sound start. Verify it before an expensive run.",
    "refuse": "The measurements do not support a forecast. The number shown is a fallback, and the reason says why.",
}
TONES = {"trust": "good", "weak": "middling", "refuse": "bad"}
OUTCOMES = {"held": "good", "not held": "bad", "not enough data": "middling"}
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
SIZE_NOTES = {
    "smoke": "seconds of training, enough to see that everything works, not to judge the claim",
    "small": "minutes on two cores",
    "paper": "the scale of the paper",
}


class ReportError(RuntimeError):
    """A page could not be written."""


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
        "settings": {name: _setting(value) for name, value in settings.items()},
        "provenance": dict(provenance),
    }
    return _write(path, page)


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
        "settings": {name: _setting(value) for name, value in settings.items()},
        "command": command,
        "provenance": dict(provenance),
    }
    return _write(path, page)


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
        "command": shlex.join(["decaycast", "lab", "run", figure.name, "--size", finding.size]),
        "provenance": _merged_provenance(finding.rows),
    }
    return _write(path, page)


def write_index_page(path: str | os.PathLike[str], findings: Sequence[Finding], size: Size) -> Path:
    """Write the table of several figures: claim, verdict, size, and links to their pages beside it.

    Args:
        path: the HTML file to write, in the folder below which the pages lie; replaced in one step.
        findings: what to list.
        size: the size they were judged at.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    counts = Counter(finding.verdict.outcome for finding in findings)
    page = {
        "kind": "index",
        "title": "Figures and verdicts",
        "subtitle": f"{len(findings)} figures, size {size}",
        "size": size,
        "size_note": SIZE_NOTES[size],
        "findings": findings,
        "tones": OUTCOMES,
        "counts": [(outcome, str(counts[outcome]), "") for outcome in OUTCOMES],
    }
    return _write(path, page)


def write_report(
    out: str | os.PathLike[str], figures: Sequence[Figure], rows: Iterable[Row], size: Size
) -> list[Finding]:
    """Write a page per figure, and an index of them, into a folder; never trains.

    Args:
        out: folder of the pages, made when missing; the page of "l2/name" is ``l2/name.html`` in it.
        figures: what to show.
        rows: from `Store.read`, `Store.rows_of` or `load_export`; rows that belong to none of them are passed over.
        size: the size to show.

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
    write_index_page(Path(out) / INDEX, findings, size)
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


def _setting(value: Scalar) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _merged_provenance(rows: Sequence[Row]) -> dict[str, str]:
    """Each key with its distinct values; a few are named, more are counted."""
    values: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for name, value in row.provenance.items():
            values[name][value] = None
    merged = {}
    for name, distinct in values.items():
        several = sorted(distinct)
        text = f"{several[0]} to {several[-1]}" if name == "time" and len(several) > 1 else ", ".join(several[:4])
        merged[name] = text + (f" and {len(several) - 4} more" if len(several) > 4 and name != "time" else "")
    return merged


def _write(path: str | os.PathLike[str], page: Mapping[str, Any]) -> Path:
    text = _render(page)
    path = Path(path)
    # In the same folder, so that the replacement is one step and a killed process leaves no half page.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    return path


def _render(page: Mapping[str, Any]) -> str:
    source = resources.files("decaycast.lab").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    icon = "data:image/svg+xml;base64," + base64.b64encode(ICON.encode()).decode()
    return environment.from_string(source).render(
        **page, icon=icon, plotly_js=Markup(get_plotlyjs()), payload=lambda plot: Markup(plot.payload)
    )
