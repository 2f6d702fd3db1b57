"""Ray: every run ends in one row, whatever is killed; what cannot be reached or does not fit is named within seconds.

The tests marked slow start a cluster of this machine and end it.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.lab.clusters import require_cluster
from tests.lab.killing import alive, children

from decaycast.core.experiment import Row, Run
from decaycast.lab import ray_cluster
from decaycast.lab.execute import processes
from decaycast.lab.ray_cluster import ClusterError, on_ray, require_answer
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep

ROOT = Path(__file__).resolve().parents[2]


def has_ray() -> bool:
    try:
        return bool(importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        return False


with_ray = pytest.mark.skipif(not has_ray(), reason="Ray is not installed (the extra 'ray')")


@pytest.fixture
def cluster() -> None:
    require_cluster()


def behave(run: Run) -> Row:
    """A training that does what its run says."""
    match run.config.get("does"):
        case "raise":
            raise ZeroDivisionError("loss over nothing")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hold a lambda":
            return Row(run=run, provenance={"name": lambda: None})  # type: ignore[dict-item]
        case "print":
            print("a worker prints")
        case "sleep":
            time.sleep(float(run.config.get("seconds", 60)))  # type: ignore[arg-type]
    return Row(run=run, final={"pid": float(os.getpid()), "seed": float(run.seed)})


def runs_of(*names: str, **config: float) -> list[Run]:
    return [Run(config={"does": name, **config}, seed=seed) for seed, name in enumerate(names)]


def workers_of_ray(of: int) -> list[int]:
    """Worker processes of the clusters that process `of` has started."""
    found, ahead = [], children(of)
    while ahead:
        process = ahead.pop()
        ahead += children(process)
        try:
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_work"):
                found.append(process)
        except OSError:
            pass
    return found


def descendants(of: int) -> set[int]:
    found = set(children(of))
    return found.union(*(descendants(child) for child in found))


# -- refusals, without a cluster


@with_ray
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("auto",),
            {},
            "the address of a Ray cluster is HOST:PORT, as `ray start --head` prints it .*, got 'auto'; leave",
        ),
        (("host:",), {}, "is HOST:PORT, .*, got 'host:'"),
        (("host:99999",), {}, "is HOST:PORT, .*, got 'host:99999'"),
        ((), {"workers": 0}, "workers must be at least 1, got 0"),
        ((), {"retries": -1}, "retries must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        on_ray(*arguments, **options)


@with_ray
def test_an_address_where_nothing_listens_fails_in_seconds_and_says_what_to_start():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, but not listening
        began = time.perf_counter()
        with pytest.raises(ClusterError) as refused:
            on_ray(f"127.0.0.1:{port}")(runs_of("work"), behave, print)
    assert time.perf_counter() - began < 10
    assert f"no Ray cluster answers at 127.0.0.1:{port} within 5 s (" in str(refused.value)
    assert f"start one there with `ray start --head --port {port}`, or leave the address out" in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens at .* is no Ray cluster; start one there with `ray start"),
        (b"", "what listens at .* is no Ray cluster"),
        (None, r"no Ray cluster answers at .* within 0\.2 s \(timed out\); start one there"),
    ],
)
def test_what_is_no_cluster_is_found_out(answer, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, over = server.getsockname()[1], threading.Event()
        thread = threading.Thread(target=_answer, args=(server, answer, over))
        thread.start()
        try:
            with pytest.raises(ClusterError, match=message):
                require_answer(f"ray://127.0.0.1:{port}", 0.2)
        finally:
            over.set()
            thread.join()


def test_a_grpc_server_is_an_answer(monkeypatch):
    settings = bytes(3) + b"\x04" + bytes(5)
    for tls in ("0", "1"):
        monkeypatch.setenv("RAY_USE_TLS", tls)
        with socket.create_server(("127.0.0.1", 0)) as server:
            over = threading.Event()
            thread = threading.Thread(target=_answer, args=(server, settings, over))
            thread.start()
            require_answer(f"127.0.0.1:{server.getsockname()[1]}", 2.0)
            over.set()
            thread.join()


def _answer(server: socket.socket, answer: bytes | None, over: threading.Event) -> None:
    connection, _ = server.accept()
    with connection:
        if answer is not None:
            with suppress(OSError):  # the other side may have what it wants and be gone
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
        over.wait(10)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"a Ray cluster needs Ray: pip install 'decaycast\[ray\]'"):
        on_ray()


def test_usage_statistics_stay_off(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError):
        on_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_versions_of_another_cluster_are_explained():
    theirs = RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9")
    text = ray_cluster._explain("host:1", theirs)
    assert text.startswith(
        "the cluster at host:1 runs other versions than this driver: Version mismatch: The cluster was"
    )
    assert text.endswith("Ray: 2.1 Python: 3.9; install the same on both")
    assert (
        ray_cluster._explain(None, OSError("no room")) == "a Ray cluster on this machine could not be started: no room"
    )
    assert ray_cluster._explain("host:1", OSError("x")) == "a Ray cluster at host:1 could not be joined: x"


def test_a_worker_with_other_versions_refuses(monkeypatch):
    mine = ray_cluster._versions()
    assert set(mine) == {"decaycast", "torch"} and "+" not in mine["torch"]
    with pytest.raises(
        ClusterError, match=r"a worker on .* has decaycast .*, torch .* and this driver decaycast 0\.0\.1, torch"
    ):
        ray_cluster._work(behave, {}, 0, {**mine, "decaycast": "0.0.1"})
    assert ray_cluster._work(behave, {"does": "work"}, 3, mine).final["seed"] == 3
    assert ray_cluster._work(behave, {"does": "raise"}, 3, mine).reason == "ZeroDivisionError: loss over nothing"
    assert ray_cluster._work(behave, {"does": "hold a lambda"}, 3, mine).reason.startswith("its row cannot be sent: ")


def test_what_ray_prints_goes_to_the_log_and_nothing_else_does(caplog):
    caplog.set_level(logging.INFO, ray_cluster.__name__)
    kept = io.StringIO()
    stream = ray_cluster._WithoutRay(kept)
    thread = threading.Thread(target=stream.write, args=("a worker died\n",), name="ray_listen_error_messages")
    thread.start()
    thread.join()
    stream.write("a row\n")
    stream.ending = threading.get_ident()
    stream.write("another worker died\n")
    assert kept.getvalue() == "a row\n" and caplog.messages == ["a worker died", "another worker died"]


@with_ray
def test_no_runs_start_no_cluster():
    began = time.perf_counter()
    on_ray()([], behave, print)
    assert time.perf_counter() - began < 1


# -- a cluster of this machine


@with_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_every_run_ends_in_one_row_and_the_cluster_ends(capfd):
    before, handler = descendants(os.getpid()), signal.getsignal(signal.SIGTERM)
    rows: list[Row] = []
    runs = runs_of("work", "raise", "hold a lambda", "die", "print", "work", "work")
    on_ray(workers=2, retries=1)(runs, behave, rows.append)
    by_seed = {row.run.seed: row for row in rows}
    assert len(rows) == len(runs) and [by_seed[run.seed].run for run in runs] == runs
    assert [by_seed[seed].status for seed in range(7)] == ["done", "failed", "failed", "failed", "done", "done", "done"]
    assert by_seed[1].reason == "ZeroDivisionError: loss over nothing"
    assert by_seed[2].reason.startswith("its row cannot be sent: ")
    assert by_seed[3].reason == "worker died (WorkerCrashedError), tried 2 times"
    assert capfd.readouterr().out == "", "what Ray says of dead workers is no output of ours"
    assert signal.getsignal(signal.SIGTERM) == handler
    deadline = time.monotonic() + 120
    while any(map(alive, descendants(os.getpid()) - before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, descendants(os.getpid()) - before))


@with_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_other_versions_on_the_workers_end_it_with_the_reason(monkeypatch):
    monkeypatch.setattr(ray_cluster, "_versions", lambda: {"decaycast": "0.0.1", "torch": "1.0"})
    with pytest.raises(
        ClusterError, match="has decaycast .*, torch .* and this driver decaycast 0.0.1, torch 1.0; install the"
    ):
        on_ray(workers=1)(runs_of("work"), behave, print)


@with_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_200_runs_with_a_worker_killed_every_few_seconds(tmp_path):
    runs, killed, over = runs_of(*["sleep"] * 200, seconds=0.1), [], threading.Event()
    new: list[Row] = []

    def kill() -> None:
        rng, before = random.Random(0), 0
        while not over.wait(rng.uniform(1, 3)):
            found = workers_of_ray(os.getpid())
            if found and len(new) > before:  # on a slow machine workers may need longer to start than they have to live
                before = len(new)
                killed.append(rng.choice(found))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with Store(tmp_path / "rows.db") as store:
            rows = sweep(runs, store, train=behave, execute=on_ray(workers=2), on_row=new.append)
            assert store._db.execute("SELECT count(*), count(DISTINCT key) FROM rows").fetchone() == (200, 200)
    finally:
        over.set()
        thread.join()
    assert [(row.status, row.final["seed"]) for row in rows] == [("done", float(seed)) for seed in range(200)]
    assert len(new) == 200 and len(killed) >= 2


DRIVER = """
import sys
from decaycast.lab.ray_cluster import on_ray
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from tests.lab.test_ray_cluster import behave, runs_of
with Store(sys.argv[1]) as store:
    sweep(runs_of(*["sleep"] * 40, seconds=0.2), store, train=behave, execute=on_ray(workers=2))
"""


@with_ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_killed_driver_takes_its_cluster_along_and_the_next_one_goes_on(tmp_path):
    path = tmp_path / "rows.db"
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while (kept := _rows(path)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    cluster = descendants(process.pid)
    process.kill()
    process.wait()
    with Store(path) as store:
        kept = len(store.read())
        new: list[Row] = []
        rows = sweep(
            runs_of(*["sleep"] * 40, seconds=0.2), store, train=behave, execute=processes(2), on_row=new.append
        )
        assert len(new) == 40 - kept and [row.status for row in rows] == ["done"] * 40
        assert store._db.execute("SELECT count(*), count(DISTINCT key) FROM rows").fetchone() == (40, 40)
    deadline = time.monotonic() + 240
    while any(map(alive, cluster)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, cluster)), "nothing of the cluster is left"


def _rows(path: Path) -> int:
    if not path.exists():
        return 0
    with Store(path) as store:
        return len(store.read())
