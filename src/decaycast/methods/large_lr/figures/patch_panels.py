"""Panels of the patch figures: accuracy over the training, and numbers seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from decaycast.core.experiment import Panel, Row, Trace
from decaycast.core.seeds import interval, mean_trace, number
from decaycast.methods.large_lr.figures.patch_runs import ARMS, SMALL
from decaycast.methods.large_lr.figures.patch_training import Found, finals, spared


def curve_panel(found: Found, rows: Sequence[Row], what: str) -> Panel:
    """Accuracy over the training on the patch "alone", or on "clean" images with the controls beside it."""
    traces = []
    for (arm, patch), of_seed in found.items():
        if what == "alone" and not patch:
            continue
        own = list(of_seed.values())
        columns = zip(*(row.curve[f"{what}_accuracy"] for row in own), strict=True)
        name = f"{arm}, {word(patch)}" if what == "clean" else arm
        traces.append(mean_trace(name, [float(step) for step in own[0].curve["step"]], [list(c) for c in columns]))
    words = "patch-only accuracy" if what == "alone" else "clean accuracy, validation images"
    return Panel(
        title="The patch alone" if what == "alone" else "Clean images",
        x_label="optimiser steps",
        y_label=words,
        traces=traces,
        caption=f"Mean over seeds, band: one standard error. {_setup(rows)}",
    )


def seeds_panel(found: Found, caption: str) -> Panel:
    """Patch-only accuracy before annealing, a point per seed and arm."""
    traces = []
    for arm in ARMS:
        values = finals(found, arm, "alone_before")
        if values:
            traces.append(Trace(name=arm, x=list(map(float, values)), y=list(values.values()), mode="markers"))
    return Panel(
        title="Just before annealing, seed by seed",
        x_label="seed",
        y_label="patch-only accuracy",
        traces=traces,
        caption=caption,
    )


def difference_panel(found: Found, arm: str) -> Panel:
    """What the patch costs the small rate beyond `arm`, seed by seed, with the mean and its interval."""
    values = spared(found, arm, SMALL)
    traces = []
    if values:
        traces.append(
            Trace(name="each seed", x=list(map(float, values)), y=[100 * v for v in values.values()], mode="markers")
        )
    if len(values) > 1:
        mean, ends = interval(list(values.values())), [float(min(values)), float(max(values))]
        band = [[100 * v] * 2 for v in (mean.mean, mean.low, mean.high)]
        traces.append(Trace(name="mean and 95 % interval", x=ends, y=band[0], low=band[1], high=band[2]))
    return Panel(
        title="Difference in differences",
        x_label="seed",
        y_label="points of clean accuracy",
        traces=traces,
        caption=f"What the patch takes from the small rate minus what it takes from {arm}: test images, at the end. Above 0: it "
        "takes more from the small rate.",
    )


def word(patch: bool) -> str:
    """How a training with the patch, or its control, is called."""
    return "with the patch" if patch else "without"


def _setup(rows: Iterable[Row]) -> str:
    """A caption's sentence on network, data and rates; nothing of no rows."""
    for row in rows:
        config = row.run.config
        return (
            f"{config['network']} on {number(row, 'train_size'):,.0f} images of {config['data']}; large rate "
            f"{number(row, 'lr'):g}, small rate {number(row, 'small_lr'):g}, all at the small one from step "
            f"{number(row, 'anneal_at'):,.0f} on; patch of {number(row, 'patch_size'):.0f} pixels a side, separation "
            f"{number(row, 'separation'):g}."
        )
    return ""
