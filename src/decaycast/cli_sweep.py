"""`decaycast sweep`: a grid of trainings on this machine's cores or on a cluster, planned and priced before it starts."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table as Printed

from decaycast.cli_lab import _duration
from decaycast.core.experiment import Row, Run, Scalar, jsonable
from decaycast.core.names import choose
from decaycast.lab.execute import Execute
from decaycast.lab.figures import export_rows
from decaycast.lab.pages.sweep import write_sweep_page
from decaycast.lab.promising import Choice, choose_runs, forecasts_for, train_forecast
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep, train_missing
from decaycast.lab.sweeps import Cell, Plan, Price, axis, full_runs, keep_rows, price_runs, seeds, summarise
from decaycast.lab.table import FORMATS, Table
from decaycast.lab.trial import DEFAULTS, train_run
from decaycast.lab.where import PLACES, cores, executor

out = Console()
notes = Console(stderr=True)
SHOWN = 5
METRICS = {"loss": "validation_loss", "accuracy": "validation_accuracy"}
_RANGES = "values: 0.1,0.2 or START:END:logN or START:END:linN"


def sweep_command(
    lr: Annotated[str | None, typer.Option("--lr", help=f"learning rates, {_RANGES} [sgd: 0.02, adamw: 0.001]")] = None,
    weight_decay: Annotated[str, typer.Option("--weight-decay", help="lambdas, written like --lr")] = "0.0005",
    seed: Annotated[str, typer.Option("--seeds", help="how many (5 is 0 to 4), or a list: 3,5,7")] = "1",
    momentum: Annotated[str, typer.Option("--momentum", help="of sgd")] = "0.9",
    data: Annotated[str, typer.Option("--data", help="digits, mnist, fashion_mnist, cifar10; several between commas")] = "digits",
    model: Annotated[str, typer.Option("--model", help="mlp-256x3, cnn-16, ...; several between commas")] = "mlp-256x3",
    optimizer: Annotated[str, typer.Option("--optimizer", help="sgd, adamw or both")] = "sgd",
    schedule: Annotated[str, typer.Option("--schedule", help="of the learning rate")] = "cosine",
    rule: Annotated[str, typer.Option("--rule", help="of the weight decay")] = "constant",
    budget: Annotated[str, typer.Option("--budget", "--steps", help="optimiser steps of a training")] = "3000",
    batch_size: Annotated[str, typer.Option("--batch-size")] = "64",
    train_size: Annotated[str | None, typer.Option("--train-size", help="training samples; default: all")] = None,
    vary: Annotated[list[str] | None, typer.Option("--vary", help="any other run setting: NAME=VALUES")] = None,
    on: Annotated[str, typer.Option("--on", help=f"where to train: {', '.join(PLACES)}")] = "processes",
    workers: Annotated[int | None, typer.Option("--workers", help="trainings at a time; default: one per core")] = None,
    address: Annotated[str | None, typer.Option("--address", help="HOST:PORT of a Ray cluster [one made here]")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="forecast first; train only the weight decays that may be best")] = False,
    max_cost: Annotated[float, typer.Option("--max-cost", help="of --prune: full runs to spend on each forecast")] = 0.3,
    metric: Annotated[str, typer.Option("--metric", help="what should be best: loss or accuracy")] = "loss",
    store: Annotated[Path, typer.Option("--store", help="where rows are kept")] = Path("decaycast-out/sweep.sqlite"),
    export: Annotated[Path | None, typer.Option("--export", help="also write the rows: .csv, .parquet or .jsonl.gz")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="folder of the data files (or DECAYCAST_DATA)")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="train failed runs again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print plan and price, train nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")] = False,
) -> None:  # fmt: skip
    """Train a grid of settings; the same command goes on where it was interrupted, and trains nothing twice."""
    named = {"data": data, "train_size": train_size, "model": model, "optimizer": optimizer, "lr": lr}
    named |= {"momentum": momentum, "weight_decay": weight_decay, "schedule": schedule, "steps": budget}
    named |= {"batch_size": batch_size, "rule": rule}
    plan = _plan(named, vary or [], seed)
    choose(metric, METRICS, "metric")
    _check_export(export)
    say = _nothing if as_json else _note
    job = _Job(
        plan=plan,
        execute=executor(on, workers=workers, address=address, note=say),
        workers=1 if on == "here" else workers or cores(),
        metric=METRICS[metric],
        max_cost=max_cost if prune else None,
        data_dir=None if data_dir is None else str(data_dir),
        retry_failed=retry_failed,
        quiet=as_json,
    )
    if dry_run:
        _print_plan(*job.priced(Store(store) if store.exists() else None), plan, job, as_json)
        return
    with Store(store) as opened:
        answer = job.run(opened)
        table = keep_rows(opened.table(), answer["runs"])
        cells = summarise(plan, answer["runs"], table, job.metric)
        page = _write_page(store.with_suffix(".html"), table, plan, job)
        if export is not None and export.name.endswith(".jsonl.gz"):
            export_rows(opened.rows_of(answer["runs"]), export)
        elif export is not None:
            table.write(export)
    answer = {
        **answer,
        "cells": cells,
        "page": page,
        "failed": int((table["status"] == "failed").sum()) if len(table) else 0,
    }
    _print_json(answer, plan, job, store) if as_json else _print_answer(answer, plan, job, store)
    if not any(cell.done for cell in cells):
        raise typer.Exit(1)


class _Job:
    """A planned sweep with everything it needs to run."""

    def __init__(
        self,
        *,
        plan: Plan,
        execute: Execute,
        workers: int,
        metric: str,
        max_cost: float | None,
        data_dir: str | None,
        retry_failed: bool,
        quiet: bool,
    ) -> None:
        self.plan, self.execute, self.workers, self.metric = plan, execute, workers, metric
        self.max_cost, self.data_dir, self.retry_failed, self.quiet = max_cost, data_dir, retry_failed, quiet
        self.forecasts = [] if max_cost is None else forecasts_for(plan.runs, max_cost=max_cost, metric=metric)

    def priced(self, store: Store | None) -> tuple[list[Run], Price]:
        """What is missing, and its price."""
        runs = self.plan.runs
        missing = runs if store is None else store.missing(runs, retry_failed=self.retry_failed)
        return missing, price_runs(missing, store, data_dir=self.data_dir)

    def run(self, store: Store) -> dict[str, Any]:
        """Train what is missing; the runs, how many were trained, and the choice where arms were stopped."""
        runs, choice = self.plan.runs, None
        if self.forecasts:
            choice = self._choose(store)
            runs = list(choice.kept)
        missing = store.missing(runs, retry_failed=self.retry_failed)
        price = price_runs(missing, store, data_dir=self.data_dir)
        if not self.quiet:
            _note(_sentence(len(runs), missing, price, self.workers))
        train = partial(train_run, data_dir=self.data_dir)
        with _Watch(missing, price.seconds, self.plan, self.metric, quiet=self.quiet) as watch:
            train_missing(
                missing, store, train=train, execute=self.execute, retry_failed=self.retry_failed, on_row=watch.on_row
            )
        return {"runs": runs, "trained": watch.ended, "price": price, "choice": choice, "seconds": watch.seconds}

    def _choose(self, store: Store) -> Choice:
        steps = len(self.forecasts)
        if not self.quiet:
            _note(f"{steps} forecasts of the best weight decay, each at most {self.max_cost:g} full runs")
        train = partial(train_forecast, data_dir=self.data_dir)
        rows = sweep(self.forecasts, store, train=train, execute=self.execute, retry_failed=True)
        choice = choose_runs(self.plan.runs, rows)
        if not self.quiet:
            stopped = f"{len(choice.stopped)} of {len(self.plan.runs)} runs are not trained to the end"
            _note(f"{stopped}; {choice.spent:.2f} full runs spent")
        return choice


class _Watch:
    """Progress in the terminal: runs done and failed, time left by what was paid for so far, and the best so far."""

    def __init__(self, runs: Sequence[Run], seconds: Sequence[float], plan: Plan, metric: str, *, quiet: bool) -> None:
        known = [value for value in seconds if math.isfinite(value)]
        usual = sum(known) / len(known) if known else 1.0
        self._weights = {
            run.key: value if math.isfinite(value) else usual for run, value in zip(runs, seconds, strict=True)
        }
        self._varied, self._metric = plan.varied, metric
        self._sign = 1.0 if metric.endswith("loss") else -1.0
        self._best: tuple[float, str] | None = None
        self.ended = self.failed = 0
        self._began = time.perf_counter()
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}", markup=False))
        self._progress = Progress(*columns, console=notes, transient=True, disable=quiet)
        self._task = self._progress.add_task("training", total=sum(self._weights.values()), note=self.note())

    def __enter__(self) -> _Watch:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @property
    def seconds(self) -> float:
        """Since the start, by a clock that never jumps."""
        return time.perf_counter() - self._began

    def on_row(self, row: Row) -> None:
        self.ended += 1
        self.failed += row.status == "failed"
        values = row.curve.get(self._metric, ())
        if row.status == "done" and len(values) and math.isfinite(values[-1]):
            found = self._sign * values[-1], f"{values[-1]:.4g} {_settings(row.run.config, self._varied)}".strip()
            self._best = min(self._best or found, found)
        self._progress.update(self._task, advance=self._weights[row.run.key], note=self.note())

    def note(self) -> str:
        """What stands beside the bar."""
        failed = f", {self.failed} failed" if self.failed else ""
        best = f", best {self._metric.replace('_', ' ')} {self._best[1]}" if self._best else ""
        return f"{self.ended} of {len(self._weights)} runs{failed}{best}"


def _plan(named: dict[str, str | None], vary: Sequence[str], seed: str) -> Plan:
    for text in vary:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--vary is NAME=VALUES, as in points=30, got {text!r}")
        choose(name, DEFAULTS, "run setting")
        if name in named and name != "train_size":
            option = {"steps": "budget"}.get(name, name).replace("_", "-")
            raise ValueError(f"{name} has an option of its own; write --{option} {values}")
        named = {**named, name: values}
    axes: dict[str, tuple[Scalar, ...]] = {name: axis(name, text) for name, text in named.items() if text is not None}
    return Plan(axes=axes, seeds=seeds(seed))


def _check_export(export: Path | None) -> None:
    if export is not None and not export.name.endswith((*FORMATS, ".jsonl.gz")):
        raise ValueError(f"--export writes .csv, .parquet or .jsonl.gz, got {export.name!r}; choose such a name")


def _print_plan(missing: Sequence[Run], price: Price, plan: Plan, job: _Job, as_json: bool) -> None:
    expected = price.wall_seconds(job.workers)
    if as_json:
        sizes = {name: list(plan.axes[name]) for name in plan.varied}
        numbers = {"runs": len(plan.runs), "missing": len(missing), "forecasts": len(job.forecasts), "fre": price.fre}
        answer = {
            **numbers,
            "axes": sizes,
            "seeds": list(plan.seeds),
            "workers": job.workers,
            "expected_seconds": expected,
        }
        out.print_json(json.dumps(jsonable(answer)))
        return
    for name in plan.varied:
        _say(name, ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in plan.axes[name]))
    _say("seeds", ", ".join(map(str, plan.seeds)))
    _say("price", _sentence(len(plan.runs), missing, price, job.workers))
    if job.forecasts:
        most = len(job.forecasts) * (job.max_cost or 0.0)
        _say(
            "prune", f"{len(job.forecasts)} forecasts, at most {most:.3g} full runs, decide which of these are trained"
        )


def _write_page(path: Path, table: Table, plan: Plan, job: _Job) -> Path:
    shared = {name: values[0] for name, values in plan.axes.items() if len(values) == 1}
    command = shlex.join(["decaycast", *sys.argv[1:]])
    options: dict[str, Any] = {"settings": shared, "command": command, "provenance": provenance()}
    return write_sweep_page(path, table, axes=plan.varied, metric=job.metric, **options)


def _print_json(answer: dict[str, Any], plan: Plan, job: _Job, store: Path) -> None:
    choice: Choice | None = answer["choice"]
    cells = [
        {
            "settings": dict(cell.settings),
            "mean": cell.mean,
            "stderr": cell.stderr,
            "done": cell.done,
            "failed": cell.failed,
        }
        for cell in answer["cells"]
    ]
    numbers = {name: answer[name] for name in ("trained", "failed", "seconds")}
    stopped = {} if choice is None else {"stopped": len(choice.stopped), "forecast_fre": choice.spent}
    told = {
        "runs": len(plan.runs),
        **numbers,
        **stopped,
        "fre": answer["price"].fre,
        "metric": job.metric,
        "store": str(store),
        "page": str(answer["page"]),
    }
    expected = answer["price"].wall_seconds(job.workers)
    out.print_json(json.dumps(jsonable({**told, "expected_seconds": expected, "cells": cells})))


def _print_answer(answer: dict[str, Any], plan: Plan, job: _Job, store: Path) -> None:
    cells: Sequence[Cell] = answer["cells"]
    what = job.metric.replace("_", " ")
    printed = Printed(*plan.varied, what, "+-", "seeds", "failed", title=f"best of {len(cells)} settings")
    for cell in cells[:SHOWN]:
        numbers = [
            f"{cell.mean:.4g}",
            "" if math.isnan(cell.stderr) else f"{cell.stderr:.2g}",
            str(cell.done),
            str(cell.failed),
        ]
        settings = [f"{value:g}" if isinstance(value, float) else str(value) for value in cell.settings.values()]
        printed.add_row(*map(escape, [*settings, *numbers]))
    out.print(printed)
    choice: Choice | None = answer["choice"]
    if choice is not None:
        total, paid = full_runs(plan.runs), full_runs(answer["runs"]) + choice.spent
        _say("pruned", f"{paid:.3g} of {total:.3g} full runs, {choice.spent:.2g} of them for the forecasts")
    if answer["failed"]:
        _say("failed", f"{answer['failed']} runs; their reasons are in the store, --retry-failed trains them again")
    there = len(answer["runs"]) - answer["trained"]
    _say(
        "trained",
        f"{answer['trained']} runs in {_duration(answer['seconds'])}" + (f"; {there} were there" if there else ""),
    )
    _say("page", str(answer["page"]))
    _say("store", f"{store}; the same command with --export sweep.csv writes its rows as a table")


def _sentence(planned: int, missing: Sequence[Run], price: Price, workers: int) -> str:
    text = f"{len(missing)} of {planned} runs to train, {price.fre:.3g} full runs"
    seconds = price.wall_seconds(workers)
    if missing and math.isfinite(seconds):
        text += f", about {_duration(seconds)} with {workers} worker{'s' * (workers > 1)}"
    return text + (f" ({price.unknown} of a kind without an estimate)" if price.unknown else "")


def _settings(config: Any, names: Sequence[str]) -> str:
    texts = [
        f"{name.replace('_', ' ')} {config[name]:.3g}"
        if isinstance(config.get(name), float)
        else f"{name} {config.get(name)}"
        for name in names
    ]
    return f"({', '.join(texts)})" if texts else ""


def _note(text: str) -> None:
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


def _nothing(text: str) -> None:
    pass


def _say(word: str, text: str) -> None:
    out.print(f"{word:<12} {text}", markup=False, highlight=False, soft_wrap=True)
