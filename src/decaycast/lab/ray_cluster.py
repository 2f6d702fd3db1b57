"""The executor `on_ray`: runs as tasks of a Ray cluster, one on this machine by default.

Ray moves a task to another worker when the worker dies, up to `retries` times; what a dead worker had not finished is trained
again from its beginning. The driver alone writes to the store. A driver that dies takes its unfinished tasks with it, and the
next one asks the store what is missing. So each run has one row at the end, whatever was killed.

Nothing is reported to anybody (Ray's usage statistics are switched off) and no dashboard is started. Rows travel between
processes of the cluster as Ray sends objects, which is pickle: a cluster is trusted with what its driver may do.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO, cast

import torch

from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import Execute, OnRow, Train, attempt, describe_error, failed_row, together
from decaycast.lab.provenance import provenance

RETRIES = 3
USUAL_PORT = 6379
_COMPARED = ("decaycast", "torch")  # versions in which workers and driver must agree; Ray compares Python's and its own
_OBJECT_BYTES = 80 * 2**20  # Ray's least; rows are small, and /dev/shm of a container often is, too
_AHEAD = 2  # tasks in flight per core: one trains, the next is at hand; a cluster that grows needs to see some waiting
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # a gRPC client's first words
_SETTINGS_FRAME = 4
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; without it every start warns
    "RAY_memory_monitor_refresh_ms": "0",  # it kills tasks for what other programs use, and again on every retry
}
_log = logging.getLogger(__name__)


class ClusterError(RuntimeError):
    """No cluster can be reached, or its workers do not fit this driver; the message names what to do."""


def on_ray(
    address: str | None = None, *, workers: int | None = None, retries: int = RETRIES, connect_seconds: float = 5.0
) -> Execute:
    """An executor that trains on a Ray cluster, one core and one torch thread per run.

    Without `address` a cluster is started on this machine and ended on return, also after an error or Ctrl-C. A program that
    has called `ray.init` itself keeps its cluster, and that one is used.

    Args:
        address: HOST:PORT of a running cluster (``ray start --head`` prints it), or ray://HOST:PORT of its client server.
        workers: trainings at a time; None for as many as the cluster has cores.
        retries: how often a run is tried again whose worker died; then it has a failed row.
        connect_seconds: how long to wait for `address`.

    Raises:
        ValueError: an address without a port; `workers` below 1 or `retries` below 0.
        ImportError: Ray is not installed.
        ClusterError: on execution, nothing answers at `address`, or versions there are others than here.

    Source: retries and their limits, Ray's documentation on task fault tolerance.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}")
    if address is not None:
        _host_and_port(address)
    ray = _import_ray()

    def execute(runs: Sequence[Run], train: Train, on_row: OnRow) -> None:
        """Train `runs` with `train` as tasks; `on_row` gets each row here."""
        if not runs:
            return
        with _connected(ray, address, workers, connect_seconds):
            _serve(ray, runs, train, on_row, workers, retries)

    return execute


def _import_ray() -> Any:
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})  # read by its import
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ImportError("a Ray cluster needs Ray: pip install 'decaycast[ray]'") from error
    return ray


# reaching a cluster


@contextmanager
def _connected(ray: Any, address: str | None, workers: int | None, connect_seconds: float) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    stream = _WithoutRay(sys.stdout)
    with _as_it_was(), redirect_stdout(cast(TextIO, stream)):
        _join(ray, address, workers, connect_seconds, quiet)
        try:
            yield
        finally:
            stream.ending = threading.get_ident()  # what is left is printed by the thread that ends the cluster
            ray.shutdown()


def _join(ray: Any, address: str | None, workers: int | None, connect_seconds: float, quiet: dict[str, Any]) -> None:
    try:
        if address is None:
            ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=_OBJECT_BYTES, **quiet)
        else:
            require_answer(address, connect_seconds)
            ray.init(address, **quiet)
    except (RuntimeError, ConnectionError, OSError) as error:
        if isinstance(error, ClusterError):
            raise
        raise ClusterError(_explain(address, error)) from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


class _WithoutRay:
    """Standard output, except for what Ray prints of every worker that died: that goes to the log."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.ending: int | None = None
        """The thread that is in Ray's shutdown."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        thread = threading.current_thread()
        if thread.name.startswith("ray_") or thread.ident == self.ending:
            _log.info("%s", text.rstrip())
            return len(text)
        return self._stream.write(text)


def require_answer(address: str, seconds: float) -> None:
    """Return when a gRPC server, as Ray's are, answers at `address` within `seconds`.

    Ray itself waits for minutes where nothing listens, and longer where something else does.

    Raises:
        ClusterError: nothing listens there, or something that does not speak gRPC.
    """
    host, port = _host_and_port(address)
    remedy = (
        f"start one there with `ray start --head --port {port}`, or leave the address out to use this machine alone"
    )
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # encrypted: its first words cannot be read here
            connection.settimeout(seconds)
            connection.sendall(_PREFACE)
            header = connection.recv(9)
    except OSError as error:
        reason = str(error) or type(error).__name__
        raise ClusterError(f"no Ray cluster answers at {address} within {seconds:g} s ({reason}); {remedy}") from error
    if len(header) < 4 or header[3] != _SETTINGS_FRAME:
        raise ClusterError(f"what listens at {address} is no Ray cluster; {remedy}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"the address of a Ray cluster is HOST:PORT, as `ray start --head` prints it (usually port {USUAL_PORT}), got "
            f"{address!r}; leave it out to use a cluster of this machine alone"
        )
    return host.strip("[]"), int(port)


def _explain(address: str | None, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return f"the cluster at {address} runs other versions than this driver: {text}; install the same on both"
    where = "on this machine could not be started" if address is None else f"at {address} could not be joined"
    return f"a Ray cluster {where}: {text}"


# training on it


def _serve(ray: Any, runs: Sequence[Run], train: Train, on_row: OnRow, workers: int | None, retries: int) -> None:
    """Keep the cluster busy until every run has its row."""
    work = ray.remote(num_cpus=1, max_retries=retries, retry_exceptions=False)(_work)
    versions, sent = _versions(), ray.put(train)
    pending: deque[Run] = deque(runs)
    flying: dict[Any, tuple[Run, float]] = {}
    try:
        while pending or flying:
            room = (workers or _cores(ray)) * _AHEAD - len(flying)
            for _ in range(min(len(pending), room)):
                run = pending.popleft()
                flying[work.remote(sent, dict(run.config), run.seed, versions)] = run, time.perf_counter()
            first, _ = ray.wait(list(flying), num_returns=1)
            ended, _ = ray.wait(list(flying), num_returns=len(flying), timeout=0)
            with together(on_row):
                for task in {*first, *ended}:
                    run, began = flying.pop(task)
                    on_row(_landed(ray, task, run, began, retries))
    finally:
        for task in flying:
            with suppress(ray.exceptions.RayError):
                ray.cancel(task, force=True)


def _cores(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _landed(ray: Any, task: Any, run: Run, began: float, retries: int) -> Row:
    """The row of an ended task."""
    try:
        row = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        # `_work` records the errors of a training; what else it raises concerns every run
        cause = error.cause if isinstance(error.cause, ClusterError) else None
        text = str(cause) if cause else f"a worker of the cluster cannot train: {' '.join(str(error).split())[-500:]}"
        raise ClusterError(text) from error
    except ray.exceptions.RayError as error:
        times = f"{retries + 1} times" if retries else "once"
        reason = f"worker died ({type(error).__name__}), tried {times}"
        return failed_row(run, reason, time.perf_counter() - began)
    return row


def _work(train: Train, config: dict[str, Any], seed: int, versions: dict[str, str]) -> Row:
    """One run on a worker of the cluster."""
    theirs = _versions()
    if theirs != versions:
        raise ClusterError(_mismatch(versions, theirs))
    torch.set_num_threads(1)
    return _sendable(attempt(train, Run(config=config, seed=seed)))


def _sendable(row: Row) -> Row:
    try:
        pickle.dumps(row)
    except Exception as error:  # pickling runs code of whatever the row holds
        return failed_row(row.run, f"its row cannot be sent: {describe_error(error)}", row.seconds)
    return row


def _versions() -> dict[str, str]:
    here = provenance()
    return {name: here[name].partition("+")[0] for name in _COMPARED}  # builds (+cpu, +cu128) of one version may mix


def _mismatch(driver: dict[str, str], worker: dict[str, str]) -> str:
    listed: Callable[[dict[str, str]], str] = lambda versions: ", ".join(f"{k} {v}" for k, v in versions.items())  # noqa: E731
    return (
        f"a worker on {socket.gethostname()} has {listed(worker)} and this driver {listed(driver)}; install the same versions "
        "on every machine of the cluster"
    )
