"""Executors: every run ends in one row, whatever happens to it, and no process outlives the call."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from functools import partial
from multiprocessing import resource_tracker, spawn

import pytest
import torch

from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import _describe_exit, _require_importable, in_process, processes


def runs_of(*names: str) -> list[Run]:
    return [Run(config={"does": name}, seed=seed) for seed, name in enumerate(names)]


def behave(run: Run) -> Row:
    """A training that does what its run says."""
    match run.config["does"]:
        case "raise":
            raise ZeroDivisionError("loss over nothing")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hold a lambda":
            return Row(run=run, provenance={"name": lambda: None})  # type: ignore[dict-item]
        case "return nothing":
            return None  # type: ignore[return-value]
        case "return another's":
            return Row(run=Run(config={}))
        case "sleep":
            time.sleep(60)
    threads = {"torch": str(torch.get_num_threads()), "omp": os.environ.get("OMP_NUM_THREADS", "")}
    return Row(run=run, final={"pid": os.getpid()}, provenance=threads)


def test_in_process_trains_here_in_order_and_records_failures():
    rows: list[Row] = []
    runs = runs_of("work", "raise", "return nothing", "return another's", "work")
    in_process(runs, behave, rows.append)
    assert [row.run for row in rows] == runs
    assert [row.status for row in rows] == ["done", "failed", "failed", "failed", "done"]
    assert rows[0].final == {"pid": os.getpid()}
    assert rows[1].reason == "ZeroDivisionError: loss over nothing"
    assert rows[2].reason == "TypeError: train must return the Row of the run it got, got None"
    assert rows[3].reason.startswith("TypeError: train must return the Row of the run it got, got Row(")
    assert rows[1].provenance["torch"] == torch.__version__ and rows[1].seconds >= 0


def test_in_process_lets_an_interrupt_pass():
    rows: list[Row] = []

    def train(run: Run) -> Row:
        if run.seed == 1:
            raise KeyboardInterrupt
        return Row(run=run)

    with pytest.raises(KeyboardInterrupt):
        in_process(runs_of("a", "b", "c"), train, rows.append)
    assert [row.run.seed for row in rows] == [0]


def test_processes_end_every_run_in_one_row(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    rows: list[Row] = []
    threads: set[int] = set()
    runs = runs_of("die", "work", "raise", "hold a lambda", "return nothing", "work", "work", "work")

    def on_row(row: Row) -> None:
        rows.append(row)
        threads.add(threading.get_ident())

    processes(2)(runs, behave, on_row)
    by_seed = {row.run.seed: row for row in rows}
    assert len(rows) == len(runs) and by_seed.keys() == set(range(len(runs)))
    assert all(by_seed[run.seed].run == run for run in runs)
    assert by_seed[0].reason == "worker process died with exit code -9 (SIGKILL)"
    assert by_seed[2].reason == "ZeroDivisionError: loss over nothing"
    assert by_seed[3].reason.startswith("its row cannot be sent: ")
    assert by_seed[4].reason.startswith("TypeError: train must return the Row")
    done = [by_seed[seed] for seed in (1, 5, 6, 7)]
    assert {row.status for row in done} == {"done"}
    assert os.getpid() not in {row.final["pid"] for row in done}
    assert {(row.provenance["torch"], row.provenance["omp"]) for row in done} == {("1", "1")}
    assert threads == {threading.get_ident()}
    assert "OMP_NUM_THREADS" not in os.environ and os.environ["MKL_NUM_THREADS"] == "7"
    assert multiprocessing.active_children() == []


def test_ctrl_c_ends_the_workers_and_keeps_what_finished(request: pytest.FixtureRequest):
    rows: list[Row] = []
    # a process started in the background of a shell ignores the signal from birth
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_row(row: Row) -> None:
        rows.append(row)
        # Strikes while the parent waits for the two sleepers, as from a keyboard.
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        processes(2)(runs_of("work", "sleep", "sleep", "sleep"), behave, on_row)
    assert [(row.run.seed, row.status) for row in rows] == [(0, "done")]
    assert multiprocessing.active_children() == []
    assert time.perf_counter() - began < 40


def test_a_worker_that_cannot_start_is_an_error_and_not_a_row(monkeypatch):
    resource_tracker.ensure_running()  # it is started with the same executable
    executable = spawn.get_executable()
    rows: list[Row] = []
    try:
        spawn.set_executable(shutil.which("false") or "false")
        with pytest.raises(RuntimeError, match="a worker process ended with exit code 1 before its first run;"):
            processes(1)(runs_of("work"), behave, rows.append)
    finally:
        spawn.set_executable(executable)
    assert rows == [] and multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("code", "text"), [(3, "exit code 3"), (-15, "exit code -15 (SIGTERM)"), (-250, "exit code -250 (unknown signal)")]
)
def test_exit_codes_are_described(code, text):
    assert _describe_exit(code) == text


def test_a_partial_of_a_function_can_be_sent_and_one_of_a_closure_cannot():
    _require_importable(partial(behave, run=None))
    with pytest.raises(TypeError, match=r"or a functools.partial of one with arguments that can be pickled"):
        _require_importable(partial(behave, run=lambda: None))


def test_processes_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0; use in_process"):
        processes(0)
    with pytest.raises(TypeError, match="train must be a function at the top level of a module, or .*, got <function"):
        processes(1)(runs_of("work"), lambda run: Row(run=run), print)


def test_processes_start_nothing_for_no_runs():
    rows: list[Row] = []
    began = time.perf_counter()
    processes(2)([], behave, rows.append)
    assert rows == [] and time.perf_counter() - began < 0.5
