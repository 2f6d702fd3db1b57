"""Where runs are trained. Executors share one signature: `execute(runs, train, on_row)`.

`in_process` trains here, one run after the other, so that a debugger works. `processes(n)` trains in `n` processes with
one torch thread each: small networks gain nothing from more threads, and n runs at a time gain a factor of about n.

Every run given ends in exactly one row, also when training raises or its process is killed: then a failed row with
the reason. Only an interrupt (Ctrl-C) ends an executor early; rows handed to `on_row` before it are complete.
An executor that has several rows at once hands them over within `together(on_row)`, so that they are stored as one.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from decaycast.core.experiment import Row, Run
from decaycast.lab.provenance import provenance

Train = Callable[[Run], Row]
OnRow = Callable[[Row], None]
Execute = Callable[[Sequence[Run], Train, OnRow], None]

_log = logging.getLogger(__name__)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_READY = "ready"
_GRACE_SECONDS = 5.0  # between asking a worker to end and killing it


def together(on_row: OnRow) -> AbstractContextManager[object]:
    """A context in which rows may be collected and stored at its end in one transaction, where `on_row` can do that.

    A store waits for the disk once per transaction, some milliseconds: too long for each of a hundred small trainings.
    """
    collect: Callable[[], AbstractContextManager[object]] = getattr(on_row, "together", nullcontext)
    return collect()


def in_process(runs: Sequence[Run], train: Train, on_row: OnRow) -> None:
    """Train `runs` here in order and hand each row to `on_row`; an exception of `train` becomes a failed row."""
    for run in runs:
        on_row(attempt(train, run))


def processes(workers: int = 2) -> Execute:
    """An executor that trains in `workers` fresh processes (spawned, one torch thread each).

    They start once and get runs one by one; `on_row` is called in this process, in the order in which runs finish. A
    worker that dies leaves a failed row with its exit code and is replaced. All workers have ended on return, also
    after an exception of `on_row` or Ctrl-C. Scripts need the usual `if __name__ == "__main__":` guard.

    Raises:
        ValueError: `workers` is below 1.
        TypeError: on execution, `train` is not a function that another process can import.
        RuntimeError: on execution, a worker ends before its first run.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}; use in_process to train in this process")

    def execute(runs: Sequence[Run], train: Train, on_row: OnRow) -> None:
        """Train `runs` with `train` in the workers; `on_row` gets each row here."""
        _require_importable(train)
        pending = deque(runs)
        crew: list[_Worker] = []
        try:
            for _ in range(min(workers, len(pending))):
                crew.append(_Worker(train))
            while crew:
                _serve_next(crew, pending, train, on_row)
        finally:
            _end(crew)

    return execute


class _Worker:
    """A child process, the pipe to it, and the run it is training."""

    def __init__(self, train: Train) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, train), daemon=True)
        self.run: Run | None = None
        self.ready = False
        self.started = time.perf_counter()
        try:
            with _one_thread():
                self.process.start()
        except BaseException:
            self.connection.close()
            if self.process.pid is not None:  # interrupted just after the start: nobody else knows this child yet
                self.process.terminate()
                self.process.join()
            raise
        finally:
            theirs.close()  # so that the end of the process shows as the end of the pipe

    def give(self, run: Run) -> None:
        self.run, self.started = run, time.perf_counter()
        try:
            self.connection.send((dict(run.config), run.seed))
        except OSError:
            pass  # died while idle: reading from it reports the end

    def receive(self) -> Row | None:
        """The row it finished, or None after its first sign of life; a failed row when it died."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._obituary()
        self.ready = True
        run, self.run = self.run, None
        return None if run is None or message == _READY else message

    def _obituary(self) -> Row:
        self.process.join()
        code = self.process.exitcode
        if self.run is None or not self.ready:
            raise RuntimeError(
                f"a worker process ended with exit code {code} before its first run; its error stands above. In a "
                'script, start the work under `if __name__ == "__main__":`; use in_process to find the cause'
            )
        return failed_row(
            self.run, f"worker process died with {_describe_exit(code)}", time.perf_counter() - self.started
        )


def _serve_next(crew: list[_Worker], pending: deque[Run], train: Train, on_row: OnRow) -> None:
    """Wait until workers report; pass on their rows, give them the next run, replace the dead, dismiss the idle."""
    reporting = set(wait([worker.connection for worker in crew]))
    with together(on_row):
        for worker in [worker for worker in crew if worker.connection in reporting]:
            row = worker.receive()
            stays = worker.run is None and bool(pending)
            if stays:
                worker.give(pending.popleft())  # before on_row, so that it trains while the row is being stored
            if row is not None:
                on_row(row)
            if not stays:
                crew.remove(worker)
                _end([worker])
                if pending:
                    crew.append(_Worker(train))


def _end(crew: Sequence[_Worker]) -> None:
    for worker in crew:
        worker.connection.close()
        worker.process.terminate()
    for worker in crew:
        worker.process.join(_GRACE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


def _work(connection: Connection, train: Train) -> None:
    """The life of a worker: one run at a time until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    torch.set_num_threads(1)
    try:
        connection.send(_READY)
        while True:
            config, seed = connection.recv()
            run = Run(config=config, seed=seed)
            _send(connection, run, attempt(train, run))
    except (EOFError, OSError):
        return  # the parent is gone or done with us


def _send(connection: Connection, run: Run, row: Row) -> None:
    try:
        message = pickle.dumps(row)
    except Exception as error:  # pickling runs code of whatever the row holds
        message = pickle.dumps(failed_row(run, f"its row cannot be sent: {describe_error(error)}", row.seconds))
    connection.send_bytes(message)


def attempt(train: Train, run: Run) -> Row:
    """The row of `run`: what `train` returns, or a failed one with the reason where it raises or returns anything else."""
    started = time.perf_counter()
    try:
        row = train(run)
        if not isinstance(row, Row) or row.run.key != run.key:
            raise TypeError(f"train must return the Row of the run it got, got {row!r:.200}")
    except Exception as error:
        _log.info("run %s failed", run.key, exc_info=True)
        return failed_row(run, describe_error(error), time.perf_counter() - started)
    return row


def failed_row(run: Run, reason: str, seconds: float) -> Row:
    """The row of a run that has none of its own."""
    return Row(run=run, status="failed", reason=reason, seconds=seconds, provenance=provenance())


def describe_error(error: Exception) -> str:
    """An exception as rows name it."""
    return f"{type(error).__name__}: {error}"


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown signal"
    return f"exit code {code} ({name})"


def _require_importable(train: Train) -> None:
    try:
        pickle.dumps(train)
    except Exception as error:
        raise TypeError(
            "train must be a function at the top level of a module, or a functools.partial of one with arguments that "
            f"can be pickled, for worker processes to import it, got {train!r}; move it there or use in_process"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    # Thread pools read these once, when their library loads: they must be set before the child starts.
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
