"""A sweep whose drivers and workers are killed. A script, because each driver is forked from a process that has loaded all.

    python -m tests.lab.killing FOLDER SEED SCENARIO:KILLS ...

It prints one JSON object: for each scenario how many kills were made, how many results differ from the uninterrupted one,
and what else it has to tell. A sweep of eight tiny trainings takes a fraction of a second, so that many kills fit into a minute.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import decaycast.lab.provenance as provenance_module
from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import Execute, in_process, processes
from decaycast.lab.store import Store, StoreError
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run

CONFIG = {"model": "mlp-8x1", "train_size": 32, "batch_size": 8, "steps": 20, "points": 20}
RUNS = [Run(config={**CONFIG, "lr": lr}, seed=seed) for lr in (0.01, 0.1) for seed in range(4)]
FULL = 75  # exit code of a driver whose store refused a row


def drive(path: Path, execute: Execute = in_process, runs: list[Run] = RUNS) -> None:
    """One driver: what a killed sweep does again when it is started again."""
    with Store(path) as store:
        sweep(runs, store, train=train_run, execute=execute, retry_failed=True)


def result(path: Path) -> list[Any]:
    """All that training determines; seconds and provenance differ from one training to the next."""
    with Store(path) as store:
        rows = store.read()
    assert len({row.run.key for row in rows}) == len(rows), "a run counted twice"
    return sorted((row.run.key, row.status, row.reason, _plain(row)) for row in rows)


def _plain(row: Row) -> str:
    return json.dumps([dict(row.final), {name: list(column) for name, column in row.curve.items()}], sort_keys=True)


def fork(work: Callable[[], None]) -> int:
    """A child process that does `work`; its exit code is 0, FULL for a StoreError, 1 for anything else."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except StoreError as error:
        print(f"StoreError: {error}", file=sys.stderr)
        code = FULL
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def training(process: int) -> bool:
    """Whether this child of a driver is a worker (and not multiprocessing's tracker of resources)."""
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


# scenarios


def drivers(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 of a driver that trains by itself, at a random moment of its work."""
    began = time.monotonic()
    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    length, expected = time.monotonic() - began, result(folder / "whole.db")
    different, left = 0, []
    for number in range(kills):
        path = folder / f"{number}.db"
        child = fork(lambda path=path: drive(path))
        time.sleep(rng.uniform(0, length))
        os.kill(child, signal.SIGKILL)
        end(child)
        left.append(len(result(path)) if path.exists() else 0)
        assert end(fork(lambda path=path: drive(path))) == 0
        different += result(path) != expected
    return {"kills": kills, "different": different, "runs": len(expected), "rows_left": left}


def drivers_of_processes(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 of a driver with two workers; they end by themselves."""
    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    expected, different, orphans = result(folder / "whole.db"), 0, 0
    length = 3.0
    for number in range(kills):
        path, began = folder / f"{number}.db", time.monotonic()
        child = fork(lambda path=path: drive(path, processes(2)))
        if number:
            time.sleep(rng.uniform(0, length))
            workers = children(child)
            os.kill(child, signal.SIGKILL)
        else:
            workers = []  # the first one is let through, to know how long it takes
        end(child)
        length = length if number else time.monotonic() - began
        orphans += sum(_outlives(worker) for worker in workers)
        assert end(fork(lambda path=path: drive(path))) == 0
        different += result(path) != expected
    return {"kills": kills - 1, "different": different, "orphans": orphans}


def _outlives(worker: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive(worker)


def workers(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """kill -9 of workers, one after the other, until so many were hit; failed runs are trained again."""
    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    expected, hit = result(folder / "whole.db"), 0
    path = folder / "rows.db"
    while hit < kills:
        child = fork(lambda path=path: drive(path, processes(2)))
        while alive(child) and hit < kills:
            time.sleep(rng.uniform(0.05, 1.5))
            found = [worker for worker in children(child) if training(worker)]
            # a worker that dies before it has trained anything ends the sweep, since it would so for ever
            if found and Path(path).exists() and len(result(path)) > 0:
                os.kill(rng.choice(found), signal.SIGKILL)
                hit += 1
        end(child)
        if hit < kills:  # trained to the end: begin again with an empty store
            path = folder / f"rows{hit}-{time.monotonic_ns()}.db"
    assert end(fork(lambda: drive(path))) == 0
    return {"kills": hit, "different": int(result(path) != expected)}


def two_drivers(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Two drivers on one store, then one of them killed: every run counts once."""
    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    expected, different = result(folder / "whole.db"), 0
    for number in range(kills):
        path = folder / f"{number}.db"
        pair = [fork(lambda path=path: drive(path)) for _ in range(2)]
        if number % 2:
            time.sleep(rng.uniform(0, 0.3))
            os.kill(pair[0], signal.SIGKILL)
        codes = [end(child) for child in pair]
        different += codes[1] != 0 or result(path) != expected
    return {"kills": kills // 2, "different": different}


def size_limit(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """A file that may not grow any more: the driver ends with the reason, and the next one goes on."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        drive(path)

    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    expected, different, codes, left = result(folder / "whole.db"), 0, [], []
    whole = (folder / "whole.db").stat().st_size
    empty = folder / "empty.db"
    Store(empty).close()
    for number in range(kills):
        path, limit = folder / f"{number}.db", int(rng.uniform(empty.stat().st_size, whole))
        codes.append(end(fork(limited)))
        left.append(len(result(path)))
        assert end(fork(lambda path=path: drive(path))) == 0
        different += result(path) != expected
    return {"different": different, "codes": codes, "rows_left": left}


def full_disk(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """A file system of its own that is too small, then larger, then read-only; the caller has mounted it on `folder`."""

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    elsewhere = folder.parent
    assert end(fork(lambda: drive(elsewhere / "whole.db"))) == 0
    expected = result(elsewhere / "whole.db")
    path = folder / "rows.db"
    size, full, left = (elsewhere / "whole.db").stat().st_size, FULL, 0
    while full == FULL and not left:  # larger until some rows fit; each needs room for a journal while it is written
        size += 8192
        remount(f"size={size}")
        full = end(fork(lambda: drive(path)))
        left = len(result(path)) if full == FULL and path.exists() and path.stat().st_size else 0
    remount("size=20m")
    resumed = end(fork(lambda: drive(path)))
    different = int(result(path) != expected)
    remount("ro")
    more = [Run(config=CONFIG, seed=99)]
    refused = []
    for place in (path, folder / "new.db", folder / "new" / "a.db"):
        refused.append(end(fork(lambda place=place: drive(place, runs=more))))
    still = int(result(path) != expected)
    return {"codes": [full, resumed, *refused], "rows_left": left, "different": different + still}


def clock(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """A clock that jumps by up to a year either way whenever it is read."""
    assert end(fork(lambda: drive(folder / "whole.db"))) == 0
    expected, real, real_date = result(folder / "whole.db"), time.time, provenance_module.datetime

    class Jumping(real_date):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_date.fromtimestamp(time.time(), tz)

    def jumped() -> None:
        time.time = lambda: real() + rng.uniform(-3e7, 3e7)
        provenance_module.datetime = Jumping
        drive(folder / "rows.db")

    assert end(fork(jumped)) == 0
    with Store(folder / "rows.db") as store:
        rows = store.read()
    backwards = sum(a.provenance["time"] > b.provenance["time"] for a, b in zip(rows, rows[1:], strict=False))
    sane = all(0 <= row.seconds < 100 and math.isfinite(row.seconds) for row in rows)
    different = int(result(folder / "rows.db") != expected or [row.run for row in rows] != RUNS)
    return {"different": different, "backwards": backwards, "sane_seconds": sane}


SCENARIOS = (drivers, drivers_of_processes, workers, two_drivers, size_limit, full_disk, clock)


def main() -> None:
    """Run the scenarios named on the command line, each in a folder of its own."""
    folder, seed, *named = sys.argv[1:]
    torch.set_num_threads(1)
    train_run(RUNS[0])  # loads the data, which every child then has
    scenarios, told = {scenario.__name__: scenario for scenario in SCENARIOS}, {}
    for text in named:
        name, _, kills = text.partition(":")
        (Path(folder) / name).mkdir(exist_ok=True)
        told[name] = scenarios[name](Path(folder) / name, int(kills), random.Random(int(seed)))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
