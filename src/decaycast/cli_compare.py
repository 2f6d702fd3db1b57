"""`decaycast compare`: which regulariser helps this network on these data, with the same budget for each."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from decaycast.core.experiment import Row, Run
from decaycast.lab.compare import compare
from decaycast.lab.comparison.arms import ARMS
from decaycast.lab.comparison.found import Comparison
from decaycast.lab.comparison.page import write_comparison_page
from decaycast.lab.execute import in_process, processes
from decaycast.lab.shortcuts import read_npz
from decaycast.lab.sweeps import seeds as read_seeds

out = Console()
notes = Console(stderr=True)
PAGE, STORE = "compare.html", "compare.sqlite"
COLOURS = {"better": "green", "none better": "red", "no difference": "yellow", "no verdict": "yellow"}


def compare_command(
    data: Annotated[
        str,
        typer.Option(
            "--data", help="digits, mnist, fashion_mnist, cifar10, shakespeare, or your FILE.npz with X and y"
        ),
    ] = "digits",
    model: Annotated[
        str, typer.Option("--model", help="mlp-256x3, cnn-bn-16, ..., or your own factory as package.module:function")
    ] = "mlp-256x3",
    budget: Annotated[
        int, typer.Option("--budget", "--steps", help="gradients of one batch that each arm may spend")
    ] = 1500,
    seeds: Annotated[str, typer.Option("--seeds", help="how many (5 is 0 to 4), or a list: 3,5,7")] = "5",
    arms: Annotated[
        str | None, typer.Option("--arms", help=f"names between commas: {', '.join(ARMS)} [all that fit but forecast]")
    ] = None,
    baseline: Annotated[str, typer.Option("--baseline", help="the arm to compare with")] = "none",
    metric: Annotated[
        str, typer.Option("--metric", help="what decides, on the test data: accuracy or loss")
    ] = "accuracy",
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd or adamw")] = "sgd",
    lr: Annotated[float | None, typer.Option("--lr", help="learning rate [sgd: 0.02, adamw: 0.001]")] = None,
    momentum: Annotated[float, typer.Option("--momentum", help="of sgd")] = 0.9,
    schedule: Annotated[str, typer.Option("--schedule", help="of the learning rate")] = "cosine",
    batch_size: Annotated[int, typer.Option("--batch-size")] = 64,
    train_size: Annotated[int | None, typer.Option("--train-size", help="training samples; default: all")] = None,
    workers: Annotated[int, typer.Option("--workers", help="trainings at a time, each in a process of its own")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="train failed runs again")] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="folder of the data files (or DECAYCAST_DATA)")
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for the page and the store")] = Path("decaycast-out"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:
    """Train every regulariser with the same budget over the same seeds; say which differ from none, if any."""
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if ":" in model:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; worker processes are given the same path
    own = data.endswith(".npz")
    with _Watch(quiet=as_json) as watch:
        found = compare(
            model,
            _samples(data) if own else data,
            None if arms is None else [name.strip() for name in arms.split(",") if name.strip()],
            budget_steps=budget,
            seeds=read_seeds(seeds),
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            schedule=schedule,
            batch_size=batch_size,
            baseline=baseline,
            metric=metric,
            train_size=train_size,
            standardise=own,
            store=out_dir / STORE,
            execute=in_process if workers == 1 else processes(workers),
            retry_failed=retry_failed,
            data_dir=None if data_dir is None else str(data_dir),
            on_row=watch.on_row,
            on_plan=watch.on_plan,
        )
    page = write_comparison_page(out_dir / PAGE, found, command=shlex.join(["decaycast", *sys.argv[1:]]))
    if as_json:
        out.print_json(json.dumps({**found.to_dict(), "page": str(page), "trained": watch.ended}))
    else:
        _print(found, page, watch.ended)
    if found.outcome == "no verdict":
        raise typer.Exit(1)


def _samples(path: str) -> tuple[Any, Any]:
    """Tables, numbers of shape (n, features) with a fraction, as they are; images and tokens as `read_npz` gives them."""
    with suppress(OSError, ValueError, KeyError, AttributeError, BadZipFile), np.load(path, allow_pickle=False) as file:
        inputs, labels = file["X"], file["y"]
        if not inputs.ndim or not labels.ndim or (inputs.ndim == 2 and inputs.dtype.kind == "f"):
            return inputs, labels  # `compare` refuses what are no samples
    return read_npz(path)


class _Watch:
    """Progress in the terminal: runs done and failed, and what the last one reached."""

    def __init__(self, *, quiet: bool) -> None:
        self.ended = self.failed = 0
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}", markup=False))
        self._progress = Progress(*columns, console=notes, transient=True, disable=quiet)
        self._task = self._progress.add_task("comparing", total=None, note="")

    def __enter__(self) -> _Watch:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_plan(self, runs: Sequence[Run]) -> None:
        self._progress.update(self._task, total=len(runs))

    def on_row(self, row: Row) -> None:
        self.ended += 1
        self.failed += row.status == "failed"
        accuracy = row.final.get("validation_accuracy", math.nan)
        failed = f", {self.failed} failed" if self.failed else ""
        note = f"{row.run.config['arm']}, seed {row.run.seed}: validation {accuracy:.3f}{failed}"
        self._progress.update(self._task, advance=1, note=note)


def _print(found: Comparison, page: Path, trained: int) -> None:
    settings = found.settings
    _say(f"{settings['model']} on {settings['data']}, {settings['steps']:,} gradients each, {found.seeds} seeds\n")
    for line in [*found.lines(), "", *found.notes(), ""]:
        _say(line)
    out.print(f"verdict  [bold {COLOURS[found.outcome]}]{found.outcome}[/]")
    _say(found.verdict)
    there = len(found.rows) - trained
    _say(f"trained  {trained} runs" + (f"; {there} were there" if there else ""))
    _say(f"page     {page}")


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
