"""`decaycast probe-lr` from request to page: read the data, build the lab's networks, probe, report."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decaycast.core.experiment import Panel, Scalar, Trace
from decaycast.lab import data, models
from decaycast.lab.image_files import DataError
from decaycast.lab.provenance import provenance
from decaycast.lab.report import write_probe_page
from decaycast.lab.trial import make_optimizer
from decaycast.methods.large_lr.patch import check_images
from decaycast.methods.large_lr.planted import Part
from decaycast.methods.large_lr.probe import OnRow, probe_shortcuts
from decaycast.methods.large_lr.probe_report import ProbeReport

PAGE = "probe-lr.html"
BRIEF = 4000  # samples to train on of a set that has more, unless told otherwise
_SMALL_SETS = ("digits", "flowers89")
USUAL_RATES = {"sgd": (0.1, 0.005), "adamw": (0.01, 0.0003)}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 1e-2}


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What `decaycast probe-lr` was asked; what is None is chosen as `probe_shortcuts` says."""

    data: str = "digits"
    train_size: int | None = None
    model: str = "mlp-256x3"
    optimizer: str = "sgd"
    momentum: float = 0.9
    rates: tuple[float, ...] = ()
    small: float | None = None
    steps: int = 1500
    anneal_at: int | None = None
    batch_size: int = 64
    seeds: int = 5
    patch_size: int | None = None
    difficulty: float | None = None
    data_dir: str | None = None
    out: Path = Path("decaycast-out")
    command: str = ""

    def settings(self) -> dict[str, Scalar]:
        """For the page: what was asked, plain values."""
        rates = ", ".join(f"{rate:g}" for rate in self.rates)
        own = {name: value for name, value in vars(self).items() if name not in ("rates", "data_dir", "out", "command")}
        return {**own, "rates": rates or "the usual ones"}


def probe_rates(request: ProbeRequest, *, on_row: OnRow | None = None) -> tuple[ProbeReport, Path]:
    """Probe the lab's network on the named data or the user's file, and write the page.

    Returns:
        The report, and the path of the page.

    Raises:
        ValueError: the data, a name or a number is refused; the message says what to do.
        ReportError: the page cannot be written.
    """
    train, held_out, classes = read_samples(request.data, request.train_size, request.data_dir)
    build = partial(_build, request.model, tuple(train[0].shape[1:]), classes)
    build(0)  # a name that fits no network, or not these data, is said before anything is trained
    usual = USUAL_RATES.get(request.optimizer, ())
    report = probe_shortcuts(
        build,
        train,
        request.rates or usual or (0.1, 0.005),
        held_out=held_out,
        small=request.small,
        steps=request.steps,
        anneal_at=request.anneal_at,
        batch_size=request.batch_size,
        seeds=request.seeds,
        make_optimizer=partial(_optimizer, request.optimizer, request.momentum),
        size=request.patch_size,
        difficulty=request.difficulty,
        on_row=on_row,
    )
    page = write_probe_page(
        request.out / PAGE,
        report,
        panels=probe_panels(report),
        settings=request.settings(),
        command=request.command,
        provenance=provenance(),
    )
    return report, page


def read_samples(name: str, train_size: int | None, data_dir: str | None) -> tuple[Part, Part | None, int]:
    """Training samples, held-out ones (None: to be split off) and the number of classes.

    Args:
        name: a data set of `decaycast.lab.data`, or a path that ends in ``.npz`` with arrays ``X`` and ``y``.
        train_size: training samples; None for all of a small set, and 4,000 of a large one.
        data_dir: folder of the data files.

    Raises:
        DataError: a file that is not there, damaged, or without such arrays.
        ValueError: an unknown data set.
    """
    if name.endswith(".npz"):
        samples, labels = read_npz(name)
        if train_size is not None:
            if not 1 <= train_size <= len(labels):
                raise DataError(f"{name} has {len(labels)} samples, but {train_size} were asked for; lower train_size")
            chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:train_size]
            samples, labels = samples[chosen], labels[chosen]
        return (samples, labels), None, int(labels.max()) + 1
    brief = train_size is None and name not in _SMALL_SETS
    split = data.load(name, data_dir=data_dir, train_size=BRIEF if brief else train_size)
    return split.train, split.validation, split.classes


def read_npz(path: str) -> tuple[Tensor, Tensor]:
    """A user's own samples: floating images made standard per channel, or token numbers, and labels of whole numbers.

    Images may be (n, height, width), (n, height, width, channels) with 1, 3 or 4 channels, or (n, channels, height, width).
    Integers of two dimensions are sequences of tokens. Objects in the file, which would run code, are refused.

    Raises:
        DataError: the file is not there, is no .npz, or lacks X or y.
        ValueError: X holds neither images nor tokens.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("X", "y") if name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as an .npz file ({error}); write one with numpy.savez(path, X=X, y=y)"
        ) from error
    missing = [name for name in ("X", "y") if name not in found]
    if missing:
        raise DataError(f"{path} has no array {' and no '.join(missing)}; write it with numpy.savez(path, X=X, y=y)")
    inputs, labels = found["X"], found["y"]
    if labels.dtype.kind not in "iu":
        raise DataError(f"y in {path} must hold class numbers, got {labels.dtype}; number the classes from 0")
    if inputs.dtype.kind not in "iuf" or not inputs.size:
        raise DataError(f"X in {path} must hold numbers, got {inputs.size} of {inputs.dtype}")
    if labels.ndim != 1 or inputs.ndim < 2:
        raise DataError(
            f"{path} must hold X with one sample a row and y with one class number a sample, got shapes {inputs.shape} and "
            f"{labels.shape}"
        )
    target = torch.from_numpy(labels.astype(np.int64))
    if inputs.ndim == 2 and inputs.dtype.kind in "iu":
        return torch.from_numpy(inputs.astype(np.int64)), target
    return _standardised(inputs), target


def _standardised(inputs: np.ndarray) -> Tensor:
    """Images (n, channels, height, width) with mean 0 and standard deviation 1 per channel."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        images = torch.from_numpy(inputs.astype(np.float32))
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] > 4:
        images = images.permute(0, 3, 1, 2).contiguous()
    check_images(images, 1)
    dims = (0, 2, 3)
    return (images - images.mean(dims, keepdim=True)) / images.std(dims, keepdim=True).clamp_min(1e-6)


def probe_panels(report: ProbeReport) -> list[Panel]:
    """The curves of a probe: accuracy on the shortcut alone, on clean samples, and the differences in differences."""
    arms = [arm for arm in report.arms if not arm.failed]
    if not arms:
        return []
    steps = [list(arm.curves["step"]) for arm in arms]
    alone = [
        Trace(name=f"{arm.lr:g}", x=x, y=arm.curves["alone"], mode="lines+markers")
        for arm, x in zip(arms, steps, strict=True)
    ]
    clean = [
        Trace(name=f"{arm.lr:g}, {words}", x=x, y=arm.curves[name], mode="lines+markers")
        for arm, x in zip(arms, steps, strict=True)
        for name, words in (("clean", "with shortcut"), ("control", "control"))
    ]
    shared = f"Mean of {report.seeds} seeds by rate; all are at {report.small:g} from step {report.anneal_at:,} on."
    panels = [
        Panel(
            title="The shortcut alone",
            x_label="optimiser steps",
            y_label="accuracy",
            traces=alone,
            caption=f"{shared} Chance is {report.chance:.0%}.",
        ),
        Panel(title="Clean samples", x_label="optimiser steps", y_label="accuracy", traces=clean, caption=shared),
    ]
    spared = [(arm.lr, report.spared(arm.lr)) for arm in arms if arm.lr != report.small]
    shown = [(lr, found) for lr, found in spared if math.isfinite(found.low)]
    return panels + ([_spared_panel(shown, report.small)] if shown else [])


def _spared_panel(shown: Sequence[tuple[float, Any]], small: float) -> Panel:
    trace = Trace(
        name="difference in differences",
        x=[lr for lr, _ in shown],
        y=[100 * found.mean for _, found in shown],
        low=[100 * found.low for _, found in shown],
        high=[100 * found.high for _, found in shown],
        mode="markers",
    )
    return Panel(
        title="How much less the shortcut costs",
        x_label="learning rate before annealing",
        y_label=f"points of clean accuracy, against {small:g}",
        traces=[trace],
        x_log=True,
        caption="95 % interval over seeds, in pairs. Above 0: the shortcut harms less than at the small rate.",
    )


def _build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    return models.build(name, shape, classes, seed=seed)


def _optimizer(name: str, momentum: float, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    config = {"optimizer": name, "lr": lr, "momentum": momentum, "weight_decay": WEIGHT_DECAY.get(name, 0.0)}
    return make_optimizer(config, parameters)
