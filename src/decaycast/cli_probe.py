"""`decaycast probe-lr`: which learning rates make a network memorise a planted shortcut before it learns the rest."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from decaycast.core.names import choose
from decaycast.lab.shortcuts import ProbeRequest, probe_rates
from decaycast.lab.trial import OPTIMIZERS
from decaycast.methods.large_lr.probe_report import ProbeReport

out = Console()
notes = Console(stderr=True)


def probe_lr(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="digits, mnist, fashion_mnist, cifar10, shakespeare, or your FILE.npz with X and y"
        ),
    ] = "digits",
    rates: Annotated[
        str, typer.Option(help="candidate learning rates, with commas [sgd: 0.1,0.005; adamw: 0.01,0.0003]")
    ] = "",
    small: Annotated[float | None, typer.Option(help="the rate that all anneal to [the smallest of --rates]")] = None,
    model: Annotated[
        str, typer.Option("--model", help="mlp-256x3, cnn-16, cnn-bn-16, wrn-10-1, gpt-64x2 (text)")
    ] = "mlp-256x3",
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw")] = "sgd",
    momentum: Annotated[float, typer.Option("--momentum", help="of sgd")] = 0.9,
    steps: Annotated[int, typer.Option("--steps", help="optimiser steps of each training")] = 1500,
    anneal_at: Annotated[int | None, typer.Option(help="first step at the small rate [half of them]")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 64,
    seeds: Annotated[
        int, typer.Option(help="networks per rate, with and without the shortcut; below 5 little is resolved")
    ] = 5,
    patch_size: Annotated[int | None, typer.Option(help="side of the patch in pixels [7/32 of the image]")] = None,
    difficulty: Annotated[
        float | None, typer.Option(help="separation of the patch, or switches of the key [tuned at the small rate]")
    ] = None,
    train_size: Annotated[
        int | None, typer.Option("--train-size", help="training samples [4,000, or all if fewer]")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="folder of the data files (or DECAYCAST_DATA)")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the page")] = Path("decaycast-out"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Plant a shortcut, train briefly at each rate, anneal all alike: which rates memorise it first?"""
    choose(optimizer, OPTIMIZERS, "optimizer")
    request = ProbeRequest(
        data=data,
        train_size=train_size,
        model=model,
        optimizer=optimizer,
        momentum=_momentum(momentum),
        rates=_rates(rates),
        small=small,
        steps=steps,
        anneal_at=anneal_at,
        batch_size=batch_size,
        seeds=seeds,
        patch_size=patch_size,
        difficulty=difficulty,
        data_dir=None if data_dir is None else str(data_dir),
        out=out_dir,
        command=shlex.join(["decaycast", *sys.argv[1:]]),
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True, disable=as_json) as progress:
        task = progress.add_task("reading data", total=None)

        def show(words: str, row: dict[str, float]) -> None:
            numbers = f"step {row['step']:.0f}, alone {row['alone_accuracy']:.2f}, clean {row['clean_accuracy']:.2f}"
            progress.update(task, description=f"{words}: {numbers}")

        report, page = probe_rates(request, on_row=show)
    if as_json:
        out.print_json(json.dumps({**report.to_dict(), "page": str(page)}))
    else:
        _print(report, page)


def _print(report: ProbeReport, page: Path) -> None:
    head, *_ = str(report).splitlines()
    table = Table(
        *report.HEAD, caption="percent right, on held-out data; costs and differences in points of clean accuracy"
    )
    for arm in report.arms:
        table.add_row(*report.cells(arm))
    _say(head)
    out.print(table)
    for arm in report.arms:
        _say(report.sentence(arm.lr))
    _say(f"page     {page}")


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--rates must be numbers with commas between them, such as 0.1,0.005, got {text!r}") from None


def _momentum(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"the momentum must be in [0, 1), got {value}")
    return value
