"""The page of a comparison: verdict, table, gains with their intervals, and validation curves. Nothing here trains."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from decaycast.core.experiment import Panel, Row, Trace
from decaycast.core.seeds import mean_trace
from decaycast.lab.comparison.found import ArmFound, Comparison
from decaycast.lab.pages import plots
from decaycast.lab.pages.page import merged_provenance, setting, write_page
from decaycast.lab.pages.plots import Plot

TONES = {"better": "good", "none better": "bad", "no difference": "middling", "no verdict": "middling"}
MARKS = {
    "better": "✓ better than the baseline",
    "none better": "✕ none better",
    "no difference": "~ no difference",
    "no verdict": "~ no verdict",
}
READING = (
    "Every arm is one regulariser alone, with the settings that its name tells, and had the same budget of gradients: SAM, which "
    "takes two per step, made half the steps, and self-distillation shared them between teacher and student. Arms of one seed "
    "started from the same weights and saw the same batches, so differences are taken seed by seed. Label smoothing and SAM are "
    "yardsticks from outside.",
    "Gain: improvement on the baseline of the same seed, with Student's 95 % interval over seeds, each arm by itself. p: "
    "two-sided t test, corrected for all arms by Holm's procedure; the verdict goes by it. Time: seconds of training (of the "
    "processor, on a CPU) over those of the baseline of the same seed, the median; measuring is not in it.",
    "Nothing was tuned and nothing selected; test data were read once, at the end of each run. The intervals are about seeds on "
    "these test samples, and about one learning rate, schedule and budget. An arm that shows no difference here may do so "
    "elsewhere, or with other settings.",
)


def write_comparison_page(path: str | os.PathLike[str], found: Comparison, *, command: str) -> Path:
    """Write the page of one comparison.

    Args:
        path: the HTML file to write; missing folders are made, an existing file is replaced in one step.
        found: what was compared.
        command: the command line that makes this page again.

    Returns:
        The path written.

    Raises:
        ReportError: the file cannot be written.
    """
    page = {
        "kind": "probe",  # the layout of several verdicts, a table and plots
        "title": f"Which regulariser: {found.settings['model']} on {found.settings['data']}",
        "subtitle": f"{found.settings['steps']:,} gradients for each arm, {found.seeds} seeds",
        "verdicts": [{"tone": TONES[found.outcome], "mark": MARKS[found.outcome], "sentence": found.verdict}],
        "facts": _facts(found),
        "header": found.HEAD,
        "rows": [found.cells(arm) for arm in found.arms],
        "plots": comparison_plots(found),
        "reading": (*READING, *(f"{trouble}." for trouble in found.troubles())),
        "settings": {name: setting(value) for name, value in found.settings.items()},
        "command": command,
        "provenance": merged_provenance(found.rows),
    }
    return write_page(path, page)


def comparison_plots(found: Comparison) -> list[Plot]:
    """The gains of the arms with their intervals, and what validation said on the way; without an arm of two seeds, none."""
    return [plot for plot in (_gain_plot(found), _curve_plot(found)) if plot is not None]


def _facts(found: Comparison) -> list[tuple[str, str, str]]:
    rows = found.rows
    failed = sum(row.status == "failed" for row in rows)
    seconds = sum(row.seconds for row in rows if math.isfinite(row.seconds))
    return [
        ("baseline", found.baseline.title, "arms are compared with it seed by seed"),
        ("decided on", f"test {found.metric}", "read once, at the end"),
        ("not seen", found.blind_below, f"with {found.seeds} seeds and {len(found.compared)} comparisons"),
        ("trainings", f"{len(rows)}", f"{failed} failed; {seconds:,.0f} s in all"),
    ]


def _gain_plot(found: Comparison) -> Plot | None:
    arms = found.compared
    if not arms:
        return None
    scale = 100.0 if found.metric == "accuracy" else 1.0
    traces = [
        Trace(
            name=arm.title,
            x=[float(place)],
            y=[scale * arm.gain.mean],
            low=[scale * arm.gain.low],
            high=[scale * arm.gain.high],
            mode="markers",
        )
        for place, arm in enumerate(arms, start=1)
    ]
    unit = "points of test accuracy" if found.metric == "accuracy" else "fall of the test loss"
    plot = plots.panel_plot(
        Panel(
            title="Gain over the baseline",
            x_label="arm",
            y_label=unit,
            traces=traces,
            caption=f"Mean and 95 % interval over seeds, in pairs with {found.baseline.title!r}. Above 0: better.",
        )
    )
    names = [html.escape(arm.name, quote=False) for arm in arms]
    plot.figure.update_xaxes(tickmode="array", tickvals=[*range(1, len(arms) + 1)], ticktext=names, tickangle=-35)
    plot.figure.add_hline(y=0, line={"dash": "dot", "width": 1.5, "color": "rgb(128, 128, 128)"})
    return plot


def _curve_plot(found: Comparison) -> Plot | None:
    traces = [trace for arm in found.arms if (trace := _curve(arm, found.rows)) is not None]
    if not traces:
        return None
    return plots.panel_plot(
        Panel(
            title="Validation accuracy on the way",
            x_label="gradients spent",
            y_label="validation accuracy",
            traces=traces,
            caption="Mean over the seeds that finished, with a band of one standard error. It selects nothing.",
        )
    )


def _curve(arm: ArmFound, rows: Sequence[Row]) -> Trace | None:
    """Mean over finished seeds, which measured at the same steps."""
    curves: list[Mapping[str, Sequence[float]]] = [
        row.curve for row in rows if row.status == "done" and row.run.config["arm"] == arm.name
    ]
    if not curves:
        return None
    length = min(len(curve["gradients"]) for curve in curves)  # probes of a forecast may differ in what they spend
    values = np.array([curve["validation_accuracy"][-length:] for curve in curves])
    spent = np.mean([curve["gradients"][-length:] for curve in curves], axis=0)
    return mean_trace(arm.title, spent.tolist(), values.T.tolist())
