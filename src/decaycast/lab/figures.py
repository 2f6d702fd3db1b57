"""The figures of every room: found, priced and run.

A room lists its figures in `FIGURES` of its `figures` module or package; here they are discovered, never listed. `run_figures`
trains what a store lacks, each training once however many figures ask for it, and draws nothing. Judging is the matter
of `decaycast.lab.findings` and pages that of `decaycast.lab.report`; both start from rows and train nothing.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import math
import pkgutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import decaycast.methods
from decaycast.core.experiment import Figure, Row, Run, Size
from decaycast.core.names import choose
from decaycast.lab import data
from decaycast.lab.execute import Execute, OnRow, in_process, processes
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import DEFAULTS, train_run

_LONGEST_PATTERN = 100
_DATA_SETTINGS = ("data", "train_size", "validation_size", "test_size", "pool")
_WHAT_COSTS = ("data", "pool", "model", "optimizer", "batch_size")


def figures(rooms: ModuleType = decaycast.methods) -> list[Figure]:
    """Every figure of every room in the package `rooms`, by room and in the order of its `FIGURES`."""
    found: list[Figure] = []
    for room in pkgutil.iter_modules(rooms.__path__, f"{rooms.__name__}."):
        if room.ispkg and importlib.util.find_spec(f"{room.name}.figures") is not None:
            found += importlib.import_module(f"{room.name}.figures").FIGURES
    return found


def find_figure(name: str) -> Figure:
    """The figure called `name`.

    Raises:
        ValueError: there is none; the message offers the nearest name and lists all.
    """
    known = {figure.name: figure for figure in figures()}
    return known[choose(_short(name), known, "figure")]


def select(pattern: str) -> list[Figure]:
    """The figures that `pattern` names: one by its name, a room by its own ("l2" or "l2/..."), or any glob ("*/t*").

    Raises:
        ValueError: it names none; the message offers the nearest name and lists all.
    """
    known = figures()
    rooms = dict.fromkeys(figure.name.partition("/")[0] for figure in known)
    glob = _short(pattern)
    glob = f"{glob}/*" if glob in rooms else glob.removesuffix("...") + "*" if glob.endswith("/...") else glob
    chosen = [figure for figure in known if figure.name == pattern or fnmatch.fnmatchcase(figure.name, glob)]
    if not chosen:
        choose(pattern, [figure.name for figure in known], "figure")
    return chosen


def run_figure(
    figure: Figure,
    size: Size,
    store: Store,
    *,
    workers: int = 1,
    data_dir: str | None = None,
    retry_failed: bool = False,
    on_row: OnRow | None = None,
) -> list[Row]:
    """Train the runs of one figure that `store` lacks, and return its rows; arguments and errors as `run_figures`."""
    options: dict[str, Any] = {"workers": workers, "data_dir": data_dir, "retry_failed": retry_failed}
    return run_figures([figure], size, store, **options, on_row=on_row)[figure.name]


def run_figures(
    chosen: Sequence[Figure],
    size: Size,
    store: Store,
    *,
    workers: int = 1,
    execute: Execute | None = None,
    data_dir: str | None = None,
    retry_failed: bool = False,
    on_row: OnRow | None = None,
) -> dict[str, list[Row]]:
    """Train the runs of several figures that `store` lacks, a run that several of them need once.

    Calling it again after an interrupt or a kill goes on with the rest.

    Args:
        chosen: figures; one that has a `train` of its own is trained with that.
        size: "smoke", "small" or "paper".
        store: where rows are looked for and kept.
        workers: processes to train in; 1 trains in this one.
        execute: where to train instead, one of `decaycast.lab.where`.
        data_dir: folder of the data files; None for the environment variable ``DECAYCAST_DATA``.
        retry_failed: train runs again whose only rows are failed ones.
        on_row: called with each new row once it is stored.

    Returns:
        The rows of each figure by its name, in the order of its runs.

    Raises:
        ValueError: two figures train the same run in different ways; `workers` is below 1.
        DataError: data are neither in their folder nor to be fetched; nothing was trained.
        StoreError: a row cannot be stored.
    """
    train = partial(train_planned, own=_own_training(chosen, size), data_dir=data_dir)
    if execute is None:
        execute = in_process if workers == 1 else processes(workers)
    runs = runs_of(chosen, size)
    for settings in {_data_settings(run) for run in store.missing(runs, retry_failed=retry_failed)}:
        _load(settings, data_dir)  # data that are not there end it here, before they fail one run after the other
    sweep(runs, store, train=train, execute=execute, retry_failed=retry_failed, on_row=on_row)
    return {figure.name: store.rows_of(figure.runs(size)) for figure in chosen}


def train_planned(run: Run, *, own: Mapping[str, Figure], data_dir: str | None) -> Row:
    """Train `run` as its figure wants it; `own` holds, by the run's key, the figures that train by themselves.

    A figure's own `train` gets the run and the `Split` its config names. What it leaves open of its row, the seconds
    and the provenance, is filled in here.
    """
    figure = own.get(run.key)
    if figure is None:
        return train_run(run, data_dir=data_dir)
    began = time.perf_counter()
    row: Row = figure.train(run, _load(_data_settings(run), data_dir))  # type: ignore[attr-defined]
    if not isinstance(row, Row):
        return row  # the executor says what is wrong with it
    seconds = time.perf_counter() - began if math.isnan(row.seconds) else row.seconds
    return replace(row, seconds=seconds, provenance=row.provenance or provenance())


def runs_of(chosen: Iterable[Figure], size: Size) -> list[Run]:
    """The runs of several figures in order, each once."""
    return list({run.key: run for figure in chosen for run in figure.runs(size)}.values())


def price(runs: Sequence[Run], known: Iterable[Row]) -> list[float]:
    """Expected seconds of each run on one core, from finished rows of trainings like it; NaN where there is none.

    Alike are runs of one network, data set, optimiser and batch size: their seconds per optimiser step (the median) are
    taken to be equal.
    """
    rates: dict[tuple[Any, ...], list[float]] = {}
    for row in known:
        if row.status == "done" and math.isfinite(row.seconds):
            rates.setdefault(_kind(row.run), []).append(row.seconds / _steps(row.run))
    return [_steps(run) * statistics.median(rates.get(_kind(run), [math.nan])) for run in runs]


def by_key(rows: Iterable[Row]) -> dict[str, Row]:
    """One row per run, by its key: a finished one where there is any, else the last."""
    found: dict[str, Row] = {}
    for row in rows:
        if row.run.key not in found or found[row.run.key].status != "done":
            found[row.run.key] = row
    return found


def export_rows(rows: Iterable[Row], path: str | Path) -> int:
    """Write `rows` as `Store.export` does, one per run and finished ones first, and return their number.

    Raises:
        StoreError: the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "rows.sqlite") as store:
        for row in by_key(rows).values():
            store.append(row)
        return store.export(path)


def _own_training(chosen: Iterable[Figure], size: Size) -> dict[str, Figure]:
    """By the run's key the figures that train by themselves, checked to agree on runs they share."""
    trainers: dict[str, tuple[Figure, Callable[..., Row] | None]] = {}
    for figure in chosen:
        train = getattr(type(figure), "train", None)
        for run in figure.runs(size):
            first, theirs = trainers.setdefault(run.key, (figure, train))
            if theirs is not train:
                raise ValueError(
                    f"figures {first.name!r} and {figure.name!r} train the same run in different ways; give the runs of "
                    "one of them a config entry that tells them apart"
                )
    return {key: figure for key, (figure, train) in trainers.items() if train is not None}


def _data_settings(run: Run) -> tuple[Any, ...]:
    config = {**DEFAULTS, **run.config}
    return tuple(config[name] for name in _DATA_SETTINGS)


def _load(settings: tuple[Any, ...], data_dir: str | None) -> data.Split:
    named = dict(zip(_DATA_SETTINGS, settings, strict=True))
    return data.load(named.pop("data"), data_dir=data_dir, **named)


def _kind(run: Run) -> tuple[Any, ...]:
    config = {**DEFAULTS, **run.config}
    foreign = sorted(set(run.config) - set(DEFAULTS))  # of a figure's own training: what these mean is not known here
    return tuple(config[name] for name in _WHAT_COSTS) + tuple((name, run.config[name]) for name in foreign)


def _steps(run: Run) -> float:
    return float(run.config.get("stop") or run.config.get("steps") or 1)  # type: ignore[arg-type]


def _short(pattern: str) -> str:
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"a figure's name has at most {_LONGEST_PATTERN} characters, got {len(pattern)}")
    return pattern
