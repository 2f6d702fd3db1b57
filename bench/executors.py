"""What the executors gain, what a sweep adds to its training, and how fast the store is.

    python bench/executors.py                    # about twenty minutes on an otherwise idle machine with two cores
    python bench/executors.py --quick            # smaller numbers, to see that it runs
    python bench/executors.py --only store       # one part: store, overhead or executors; the others keep their last numbers

Executors: the same 24 trainings of the L2 paper's fully connected network (three layers of 256) in one process, in two, and
on two workers of a Ray cluster of this machine; in alternating rounds, wall seconds. "With start" counts the starting of
processes and of the cluster, which are paid once; "training" is from the first row to the last, which is what a longer sweep
tends to. Two cores that share caches and clock are not twice one core: the limit is what two plain loops reach, each with half
of the trainings in a process of its own, without any executor, store or pipe.

Overhead: a thousand runs through `sweep` with rows of the usual size (60 measurements of 8 columns) and a training that takes
no time; seconds beside the seconds that a thousand of the trainings above take.

Store: wall seconds on this disk, waiting for it included; the million is appended by 10,000 rows whose keys are not known yet,
so computing them is part of it. Processor seconds are those of this process alone. The reference loop (a million additions
in Python, at the same moment) tells how fast the machine was just then.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from decaycast.core.experiment import Row, Run
from decaycast.core.measure import COLUMNS
from decaycast.lab.execute import Execute, in_process, processes
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.sweep import train_missing
from decaycast.lab.sweeps import Plan, price_runs, summarise
from decaycast.lab.trial import train_run

RESULTS = Path(__file__).parent / "results"
WORKERS = 2
LIMIT = "two plain loops (the limit)"
NETWORK = {
    "data": "digits",
    "model": "mlp-256x3",
    "optimizer": "sgd",
    "momentum": 0.9,
    "schedule": "cosine",
    "batch_size": 64,
}


def grid(count: int, steps: int) -> list[Run]:
    """`count` trainings that differ in weight decay and seed."""
    decays = [1e-5 * 10 ** (k / 2) for k in range(count // 2)]
    return [
        Run(config={**NETWORK, "steps": steps, "lr": 0.02, "weight_decay": decay}, seed=seed)
        for decay in decays
        for seed in (0, 1)
    ]


# executors


class Timed:
    """When the rows of a sweep arrived."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.at: list[float] = []

    def __call__(self, row: Row) -> None:
        if row.status != "done":
            raise RuntimeError(f"a training of the bench failed: {row.reason}")
        self.at.append(time.perf_counter() - self.began)

    def per_run(self) -> float:
        """Seconds per run once all workers are busy: from the first row to the last, over the rows between."""
        return (self.at[-1] - self.at[0]) / (len(self.at) - 1)


def time_executor(execute: Execute, runs: Sequence[Run], folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as place, Store(Path(place) / "rows.sqlite") as store:
        watch = Timed()
        train_missing(runs, store, train=train_run, execute=execute, on_row=watch)
        return {"with start": time.perf_counter() - watch.began, "training": watch.per_run() * len(runs)}


def sides() -> dict[str, Execute]:
    found: dict[str, Execute] = {"one process": in_process, "two processes": processes(WORKERS)}
    try:
        from decaycast.lab.ray_cluster import on_ray

        found["Ray, two workers"] = on_ray(workers=WORKERS)
    except ImportError:
        print("Ray is not installed: left out")
    return found


def time_limit(runs: Sequence[Run]) -> dict[str, float]:
    """Two plain loops that start together, each over half of `runs`."""
    context, began = multiprocessing.get_context("spawn"), time.perf_counter()
    ready, took = context.Barrier(WORKERS), context.Queue()
    loops = [context.Process(target=plain_loop, args=(runs[part::WORKERS], ready, took)) for part in range(WORKERS)]
    for loop in loops:
        loop.start()
    seconds = [took.get() for _ in loops]
    for loop in loops:
        loop.join()
    return {"with start": time.perf_counter() - began, "training": max(seconds)}


def plain_loop(runs: Sequence[Run], ready: Any, took: Any) -> None:
    """Train `runs` one after the other, on one thread."""
    torch.set_num_threads(1)
    train_run(grid(2, 20)[0])
    ready.wait()
    began = time.perf_counter()
    for run in runs:
        train_run(run)
    took.put(time.perf_counter() - began)


def bench_executors(folder: Path, quick: bool) -> dict[str, Any]:
    runs, rounds = (grid(4, 100), 1) if quick else (grid(24, 1000), 3)
    train_run(grid(2, 20)[0])  # the libraries and data of this process; workers load their own
    times: dict[str, list[dict[str, float]]] = {side: [] for side in (*sides(), LIMIT)}
    for number in range(rounds):
        for side, execute in sides().items():
            times[side].append(time_executor(execute, runs, folder))
            print(f"round {number + 1} of {rounds}: {side}: {times[side][-1]}", flush=True)
        times[LIMIT].append(time_limit(runs))
        print(f"round {number + 1} of {rounds}: {LIMIT}: {times[LIMIT][-1]}", flush=True)
    return {"runs": len(runs), "steps": runs[0].config["steps"], "seconds": times}


# overhead


def usual_row(run: Run, source: dict[str, str], points: int = 60) -> Row:
    """A row as a training leaves it, of numbers that need all their digits."""
    curve = {name: [math.sin(place + k + run.seed) for place in range(points)] for k, name in enumerate(COLUMNS)}
    final = {"test_loss": math.sin(run.seed), "test_accuracy": math.cos(run.seed)}
    return Row(run=run, curve=curve if points else {}, final=final, seconds=1.0, provenance=source)


def bench_overhead(folder: Path, quick: bool) -> dict[str, Any]:
    count, training = (100, grid(2, 100)) if quick else (1000, grid(2, 1000))
    train_run(training[0])
    per_run = statistics.median(train_run(training[0]).seconds for _ in range(1 if quick else 3))
    plan = Plan(
        axes={**{name: (value,) for name, value in NETWORK.items()}, "steps": (1000,), "lr": (0.02,)},
        seeds=tuple(range(count)),
    )
    source = provenance()
    rows = {run.key: usual_row(run, source) for run in plan.runs}
    plan = Plan(axes=plan.axes, seeds=plan.seeds)  # nothing of the first one is remembered
    with Store(folder / "overhead.sqlite") as store:
        began = time.perf_counter()
        missing = store.missing(plan.runs)
        price_runs(missing, store, probe=False)
        planned = time.perf_counter() - began
        train_missing(plan.runs, store, train=lambda run: rows[run.key], execute=in_process)
        stored = time.perf_counter() - began - planned
        summarise(plan, plan.runs, store.table())
        total = time.perf_counter() - began
    return {
        "runs": count,
        "planning": planned,
        "storing": stored,
        "reading": total - planned - stored,
        "training": per_run * count,
    }


# store


def reference() -> float:
    """Milliseconds of a million additions: how fast this core is at this moment."""
    began = time.perf_counter()
    sum(range(1_000_000))
    return 1e3 * (time.perf_counter() - began)


def bench_store(folder: Path, quick: bool) -> dict[str, Any]:
    source, found = provenance(), {}
    for points in (0, 10, 60):
        found[f"one by one, {points} measurements"] = rate(folder, points, 50 if quick else 300, 1, source)
        found[f"a thousand at once, {points} measurements"] = rate(
            folder, points, 1000 if quick else 20_000 // (1 + points // 10), 1000, source
        )
    found["ten thousand at once, 0 measurements"] = rate(folder, 0, 1000 if quick else 60_000, 10_000, source)
    count = 10_000 if quick else 1_000_000
    with Store(folder / "large.sqlite") as store:
        appending = processor = 0.0
        for start in range(0, count, 10_000):
            rows = [usual_row(sweep_run(seed), source, 0) for seed in range(start, start + 10_000)]
            processor -= time.process_time()
            appending += timed(lambda rows=rows: store.extend(rows))
            processor += time.process_time()
        last = timed(lambda: store.extend([usual_row(sweep_run(-1), source, 0)]))
        tables = []
        for _ in range(1 if quick else 5):
            speed = reference()
            tables.append({"seconds": timed(store.table), "reference ms": speed})
        missing = timed(lambda: store.missing([sweep_run(count)]))
    return {
        "appended": found, "rows": count, "append of all, rows/s": count / appending,
        "append of all, rows per processor second": count / processor, "one more row, s": last,
        "table": tables, "missing, s": missing, "bytes": (folder / "large.sqlite").stat().st_size,
    }  # fmt: skip


def sweep_run(number: int) -> Run:
    """One of a sweep over two settings and seeds."""
    config = {
        **NETWORK,
        "steps": 1000,
        "lr": 0.01 * (1 + number % 100),
        "weight_decay": 1e-5 * (1 + number // 100 % 100),
    }
    return Run(config=config, seed=number // 10_000)


def rate(folder: Path, points: int, count: int, at_once: int, source: dict[str, str]) -> dict[str, float]:
    """Rows per second; the keys of the runs are known, as they are when a sweep stores them."""
    rows = [usual_row(Run(config={**NETWORK, "lr": 0.01}, seed=seed), source, points) for seed in range(count)]
    for row in rows:
        row.run.key  # noqa: B018
    with tempfile.TemporaryDirectory(dir=folder) as place, Store(Path(place) / "rows.sqlite") as store:
        speed = reference()
        pieces = [rows[start : start + at_once] for start in range(0, count, at_once)]
        processor = time.process_time()
        seconds = timed(lambda: [store.extend(piece) for piece in pieces])
        processor = time.process_time() - processor
    return {"rows/s": count / seconds, "rows per processor second": count / processor, "reference ms": speed}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# the table


def table(result: dict[str, Any]) -> str:
    lines = ["# Executors, sweeps and the store", ""]
    if "executors" in result:
        lines += executor_lines(result["executors"])
    if "overhead" in result:
        lines += overhead_lines(result["overhead"])
    if "store" in result:
        lines += store_lines(result["store"])
    return "\n".join([*lines, "Versions and machine: `executors.json`.", ""])


def executor_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['runs']} trainings of mlp-256x3 on digits, {found['steps']} steps each; wall seconds, median of the rounds "
        "[least, most].",
        "Aims: two processes / one process >= 1.9; Ray within 10 % of the process executor. The limit is two plain",
        "loops without any executor, in the same rounds: what two cores of this machine are worth.", "",
        "| executor | with start | training | speed-up, training | speed-up, with start |", "|-|-|-|-|-|",
    ]  # fmt: skip
    rounds = found["seconds"]
    for side, times in rounds.items():
        cells = [spread([time[what] for time in times]) for what in ("with start", "training")]
        for what in ("training", "with start"):
            base = [time[what] for time in rounds["one process"]]
            cells.append(spread([one / time[what] for one, time in zip(base, times, strict=True)]))
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return [*lines, ""]


def overhead_lines(found: dict[str, Any]) -> list[str]:
    parts = [found[part] for part in ("planning", "storing", "reading")]
    total = sum(parts)
    cells = " | ".join(f"{seconds:.2f} s" for seconds in [*parts, total])
    return [
        f"What a sweep of {found['runs']} runs adds to {found['training']:.0f} s of training (one core). Aim: <= 2 %.",
        "",
        "| planning and price | storing row by row | reading and summary | all | share |",
        "|-|-|-|-|-|",
        f"| {cells} | {100 * total / found['training']:.2f} % |",
        "",
    ]


def store_lines(found: dict[str, Any]) -> list[str]:
    lines = ["The store. Aim: 20,000 rows/s.", ""]
    lines += ["| appended | rows/s | rows per processor second | reference loop |", "|-|-|-|-|"]
    for name, value in found["appended"].items():
        rows, processor, speed = (value[key] for key in ("rows/s", "rows per processor second", "reference ms"))
        lines.append(f"| {name} | {rows:,.0f} | {processor:,.0f} | {speed:.0f} ms |")
    seconds, speeds = ([value[key] for value in found["table"]] for key in ("seconds", "reference ms"))
    cells = [f"{found['append of all, rows/s']:,.0f} rows/s"]
    cells += [f"{found['append of all, rows per processor second']:,.0f}", f"{found['one more row, s'] * 1e3:.0f} ms"]
    cells += [f"{found['missing, s']:.2f} s", f"{spread(seconds)} s", f"{spread(speeds)} ms"]
    lines += ["", f"A store of {found['rows']:,} rows ({found['bytes'] / 1e6:,.0f} MB). Aim: read in <= 2 s.", ""]
    heads = ["appended in all", "rows per processor second", "one more row", "which runs are missing"]
    heads += ["all settings and last numbers", "reference loop"]
    return [*lines, f"| {' | '.join(heads)} |", "|-|-|-|-|-|-|", f"| {' | '.join(cells)} |", ""]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


PARTS = {"executors": bench_executors, "overhead": bench_overhead, "store": bench_store}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller numbers, and no file is written")
    parser.add_argument("--only", choices=PARTS, help="one part; the others keep their last numbers")
    options = parser.parse_args()
    target = RESULTS / "executors.json"
    result = json.loads(target.read_text()) if target.exists() and not options.quick else {}
    for name, work in PARTS.items():
        if options.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                result[name] = work(Path(folder), options.quick)
            result[name]["load"] = [round(value, 1) for value in os.getloadavg()]
    result["provenance"] = provenance()
    if options.quick:
        print(table(result))
        return
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
