"""Sweeps: a grid of trainings, planned and priced before it starts, and summed up from what a store has.

An axis is written as people write it: ``0.01:1:log5`` (five values from 0.01 to 1 with equal ratios), ``0:0.9:lin4`` (equal
steps), ``0.1,0.2``, or one value. Values are rounded to 6 significant digits, so that the same axis names the same runs on
every machine. Runs are those of `decaycast.lab.trial`; what a store has of them is not trained again.

A sweep is paid for in seconds of one core and in full-run equivalents (FRE): optimiser steps over those of its longest run.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.core.names import choose
from decaycast.core.schedule import LR_NAMES
from decaycast.core.train import DivergedError
from decaycast.lab.figures import price
from decaycast.lab.store import Store
from decaycast.lab.table import Table
from decaycast.lab.trial import DEFAULTS, OPTIMIZERS, RULES, Trial

MOST_RUNS = 1_000_000
USUAL_LR = {"sgd": 0.02, "adamw": 1e-3}
_DIGITS = 6
_RANGE = re.compile(r"(?P<start>[^:]+):(?P<end>[^:]+):(?P<kind>log|lin)(?P<count>\d+)")
_WHOLE = ("train_size", "validation_size", "test_size", "pool", "steps", "stop", "batch_size", "points")
_TEXTS = ("data", "model", "optimizer", "schedule", "rule")
_CHOICES = {"optimizer": OPTIMIZERS, "schedule": LR_NAMES, "rule": RULES}
_LEAST = {"weight_decay": 0.0, "momentum": 0.0, "steps": 10}  # what is not here has to be positive
_PROBES = 4  # kinds of training that are timed before a sweep; more have no estimate
_PROBE_SECONDS = 0.5
_KNOWN_ROWS = 300  # newest rows of a store that are asked for a price


def axis(name: str, text: str) -> tuple[Scalar, ...]:
    """The values that `text` names for the run setting `name`, each once and in order.

    Args:
        name: a setting of `decaycast.lab.trial.DEFAULTS`; it decides whether values are texts, whole numbers or numbers.
        text: values and ranges (START:END:logN, START:END:linN; both ends belong to it) between commas.

    Returns:
        At least one value.

    Raises:
        ValueError: an unknown setting; a malformed range; a value out of the setting's range.

    Example:
        >>> axis("lr", "0.01:1:log5")
        (0.01, 0.0316228, 0.1, 0.316228, 1.0)
        >>> axis("batch_size", "32,64:128:lin3")
        (32, 64, 96, 128)
    """
    choose(name, DEFAULTS, "run setting")
    pieces = [piece.strip() for piece in text.split(",")]
    if "" in pieces:
        raise ValueError(f"{name} {text!r} has an empty value; write values between commas, as in 0.1,0.2")
    if name in _TEXTS:
        known = _CHOICES.get(name)
        return tuple(dict.fromkeys(choose(piece, known, name) if known else piece for piece in pieces))
    values = [value for piece in pieces for value in (_range(name, piece) if ":" in piece else [_number(name, piece)])]
    return tuple(dict.fromkeys(_checked(name, value) for value in values))


def seeds(text: str) -> tuple[int, ...]:
    """Seeds from a count ("5" is 0 to 4) or a list ("3,5,7", also "7,").

    Raises:
        ValueError: no seed, or one that is not a whole number >= 0.

    Example:
        >>> seeds("3"), seeds("7,")
        ((0, 1, 2), (7,))
    """
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces or not all(piece.isdecimal() for piece in pieces):
        raise ValueError(f"seeds are a count, as in 5, or a list of whole numbers, as in 3,5,7; got {text!r}")
    if "," in text:
        return tuple(dict.fromkeys(map(int, pieces)))
    if not int(text):
        raise ValueError("0 seeds are no runs; give at least 1")
    if int(text) > MOST_RUNS:
        raise ValueError(f"a sweep has at most {MOST_RUNS:,} runs, got {text.strip()} seeds")
    return tuple(range(int(text)))


def _range(name: str, text: str) -> list[float]:
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{name} {text!r} is no range; write START:END:logN or START:END:linN with N values, as in 0.01:1:log5"
        )
    start, end, count = _number(name, found["start"]), _number(name, found["end"]), int(found["count"])
    log = found["kind"] == "log"
    if count < 2 or count > MOST_RUNS:
        least = "has no values" if count == 0 else "has two ends and one value" if count == 1 else "has too many values"
        raise ValueError(f"{name} {text!r} {least}; ask for 2 to {MOST_RUNS:,}, or write a value alone")
    if end < start:
        turned = f"{found['end']}:{found['start']}:{text.split(':')[2]}"
        if log and end <= 0:  # equal ratios need a positive start, so turning it round is not enough
            turned = f"{turned.replace('log', 'lin')}, or start from a positive number"
        raise ValueError(f"{name} {text!r} ends below its start; write {turned}")
    if log and start <= 0:
        raise ValueError(f"{name} {text!r} has equal ratios only from a positive start, got {start:g}; or use lin")
    inner = [i / (count - 1) for i in range(1, count - 1)]
    values = [start * (end / start) ** part if log else start + (end - start) * part for part in inner]
    rounded = [float(round(value)) if name in _WHOLE else float(f"{value:.{_DIGITS}g}") for value in values]
    return [start, *rounded, end]


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {text.strip()!r}")
    return value


def _checked(name: str, value: float) -> Scalar:
    least = _LEAST.get(name)
    if (value <= 0) if least is None else (value < least):
        raise ValueError(f"{name} must be {'> 0' if least is None else f'>= {least:g}'}, got {value:g}")
    if name == "momentum" and value >= 1:
        raise ValueError(f"momentum must be below 1, got {value:g}")
    if name not in _WHOLE:
        return value
    if value != round(value):
        raise ValueError(f"{name} must be a whole number, got {value:g}")
    return round(value)


# planning


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of trainings: the product of its axes, with each seed."""

    axes: Mapping[str, tuple[Scalar, ...]]
    """Run settings and their values; a setting with one value belongs to every run."""
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in self.axes:
            choose(name, DEFAULTS, "run setting")
        count = math.prod(map(len, self.axes.values())) * len(self.seeds)
        sizes = " x ".join(f"{len(values)} {name}" for name, values in self.axes.items() if len(values) > 1)
        if count == 0:
            raise ValueError("this sweep has no runs: give every axis at least one value, and at least one seed")
        if count > MOST_RUNS:
            raise ValueError(
                f"a sweep has at most {MOST_RUNS:,} runs, got {count:,} ({sizes} x {len(self.seeds)} seeds); sweep in parts"
            )

    @property
    def varied(self) -> tuple[str, ...]:
        """The settings in which runs differ."""
        return tuple(name for name, values in self.axes.items() if len(values) > 1)

    @cached_property
    def cells(self) -> list[dict[str, Scalar]]:
        """The configs, each once; the momentum of an optimiser that has none is 0."""
        found: dict[str, dict[str, Scalar]] = {}
        for values in product(*self.axes.values()):
            config: dict[str, Scalar] = dict(zip(self.axes, values, strict=True))
            optimizer = str(config.get("optimizer", DEFAULTS["optimizer"]))
            if optimizer != "sgd" and "momentum" in config:
                config["momentum"] = 0.0
            config.setdefault("lr", USUAL_LR[optimizer])
            found.setdefault(Run(config=config).key, config)
        return list(found.values())

    @cached_property
    def runs(self) -> list[Run]:
        """All trainings, one seed after the other, so that an interrupted sweep has the whole grid first."""
        return [Run(config=config, seed=seed) for seed in self.seeds for config in self.cells]


# pricing


@dataclass(frozen=True, kw_only=True)
class Price:
    """What runs are expected to cost: seconds of one core for each (NaN where unknown), and full-run equivalents in all."""

    seconds: tuple[float, ...]
    fre: float

    @property
    def unknown(self) -> int:
        """Runs without an estimate."""
        return sum(math.isnan(value) for value in self.seconds)

    def wall_seconds(self, workers: int) -> float:
        """Expected seconds with so many workers; runs without an estimate count as the average of the others."""
        known = [value for value in self.seconds if not math.isnan(value)]
        if not known:
            return math.nan if self.seconds else 0.0
        # no sweep is faster than its longest run
        return max(sum(known) / len(known) * len(self.seconds) / workers, max(known))


def price_runs(runs: Sequence[Run], store: Store | None, *, data_dir: str | None = None, probe: bool = True) -> Price:
    """The price of `runs` from the newest finished rows of `store`; with `probe`, kinds it does not know are timed.

    A probe trains half a second of a kind of training (network, data, optimiser, batch size) in this process and stores nothing.

    Raises:
        ValueError, DataError: a run that is timed cannot start (an unknown network, missing data): none like it would.
    """
    known = [] if store is None else store.read(newest=_KNOWN_ROWS)
    seconds = price(runs, known)
    for _ in range(_PROBES if probe else 0):
        unseen = next((run for run, value in zip(runs, seconds, strict=True) if math.isnan(value)), None)
        if unseen is None:
            break
        known.append(Row(run=unseen, seconds=time_run(unseen, data_dir=data_dir)))
        seconds = price(runs, known)
    return Price(seconds=tuple(seconds), fre=full_runs(runs))


def full_runs(runs: Iterable[Run]) -> float:
    """Full-run equivalents of `runs`: their steps over those of the longest."""
    steps = [int(run.config.get("stop") or run.config.get("steps") or DEFAULTS["steps"]) for run in runs]  # type: ignore[arg-type]
    return sum(steps) / max(steps) if steps else 0.0


def time_run(run: Run, *, data_dir: str | None = None, seconds: float = _PROBE_SECONDS) -> float:
    """Seconds that `run` would take here, from about so many `seconds` of it."""
    Trial(run, data_dir=data_dir)  # the first one in a process loads data and libraries, which the others find there
    began = time.perf_counter()
    trial = Trial(run, data_dir=data_dir)
    total = int(trial.config["stop"] or trial.config["steps"])
    measured = [step for step in trial.measure_at if step <= total]
    alive = _advance(trial, min(2, total))  # the first steps start up what later ones find running
    started = time.perf_counter() - began
    evaluation = _timed(lambda: trial._validate(trial.model))
    first, spent = trial.step, 0.0
    while alive and spent < seconds and trial.step < total:
        stop, before = min(total, 2 * trial.step), time.perf_counter()
        alive = _advance(trial, stop)
        spent += time.perf_counter() - before
    steps = max(1, trial.step - first)
    measurements = sum(first < step <= trial.step for step in trial.measure_at)
    per_step = max(spent - measurements * evaluation, 0.1 * spent) / steps
    return started + per_step * total + evaluation * (len(measured) + 1)  # + 1: the test data


def _advance(trial: Trial, stop: int) -> bool:
    """Whether training got to `stop`; one that diverges is priced by the steps it made, and says so in its row when it is run."""
    try:
        trial.advance(stop)
    except DivergedError:
        return False
    return True


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# summing up


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One config of a sweep over its seeds: mean of the validation metric at the end, and its standard error."""

    settings: Mapping[str, Scalar]
    """The settings in which runs differ."""
    mean: float
    stderr: float
    done: int
    failed: int
    keys: tuple[str, ...] = field(repr=False, default=())


def summarise(plan: Plan, runs: Iterable[Run], table: Table, metric: str = "validation_loss") -> list[Cell]:
    """The configs of `runs`, best first; those with failed runs come after those without, those without a result last.

    `metric` is "validation_loss" or "validation_accuracy". The standard error needs two finished seeds, else it is NaN.
    """
    places = {key: place for place, key in enumerate(table["key"].tolist())} if len(table) else {}
    column = table.columns.get(f"last_{metric}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(Run(config=run.config).key, []).append(run)
    cells = []
    for members in groups.values():
        found = [places[run.key] for run in members if run.key in places]
        done = [place for place in found if table["status"][place] == "done"]
        values = np.array([math.nan if column is None else float(column[place]) for place in done])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        cells.append(
            Cell(
                settings={name: members[0].config.get(name) for name in plan.varied},
                mean=float(values.mean()) if len(values) else math.nan,
                stderr=error,
                done=len(done),
                failed=len(found) - len(done),
                keys=tuple(run.key for run in members),
            )
        )
    sign = 1.0 if metric.endswith("loss") else -1.0
    return sorted(cells, key=lambda cell: (math.isnan(cell.mean), cell.failed > 0, sign * cell.mean))


def keep_rows(table: Table, runs: Iterable[Run]) -> Table:
    """The rows of `table` that belong to `runs`, in the order of the runs."""
    places = {key: place for place, key in enumerate(table["key"].tolist())}
    return table.take(np.array([places[run.key] for run in runs if run.key in places], dtype=int))
