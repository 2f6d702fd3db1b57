"""The truth of the live tasks: a grid of weight decays, trained once, kept in a store, exported to the results folder.

    DECAYCAST_DATA=<data folder> python bench/truth.py [--store build/truth.sqlite] [--workers 2]

Interrupt it at will: the next call trains what is missing. About an hour on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import processes
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run
from tasks import FINALIST_SEEDS, Task, grid_runs, tasks

RESULTS = Path(__file__).parent / "results"


def objectives(row: Row) -> dict[str, float]:
    """The four validation objectives of a run, larger is worse: a failed run is infinitely bad."""
    names = ("loss, final", "loss, best", "error, final", "error, best")
    if row.status == "failed":
        return dict.fromkeys(names, float("inf"))
    loss, error = np.array(row.curve["validation_loss"]), 1 - np.array(row.curve["validation_accuracy"])
    return dict(zip(names, (loss[-1], loss.min(), error[-1], error.min()), strict=True))


def finalist_runs(task: Task, rows: Sequence[Row]) -> list[Run]:
    """More seeds for the default and for the weight decays that look best by final loss (two) or final error (one)."""
    chosen = [task.default]
    for objective, count in (("loss, final", 2), ("error, final", 1)):
        mean = {
            value: np.mean([objectives(row)[objective] for row in rows if row.run.config["weight_decay"] == value])
            for value in task.grid
        }
        chosen += sorted(mean, key=lambda value: mean[value])[:count]
    return [task.run(value, seed) for seed in FINALIST_SEEDS for value in dict.fromkeys(chosen)]


def main() -> None:
    """Train what is missing and export the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="build/truth.sqlite")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    Path(args.store).parent.mkdir(parents=True, exist_ok=True)
    execute = processes(args.workers)
    done = 0

    def report(row: Row) -> None:
        nonlocal done
        done += 1
        print(
            done,
            row.run.config["data"],
            row.run.config["model"],
            row.run.config["weight_decay"],
            row.status,
            f"{row.seconds:.1f} s",
            flush=True,
        )

    with Store(args.store) as store:
        wanted = [run for task in tasks() for run in grid_runs(task)]
        sweep(wanted, store, train=train_run, execute=execute, on_row=report)
        more = []
        for task in tasks():
            more += finalist_runs(task, store.rows_of(grid_runs(task)))
        sweep(more, store, train=train_run, execute=execute, on_row=report)
        store.export(RESULTS / "truth.jsonl.gz")


if __name__ == "__main__":
    main()
