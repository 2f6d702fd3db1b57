"""The store: what goes in comes out, nothing acknowledged is lost, and every bad file is named."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import decaycast.lab.store as store_module
from decaycast.core.experiment import Row, Run
from decaycast.lab.schema import SCHEMA_VERSION
from decaycast.lab.store import EXPORT_VERSION, Store, StoreError, load_export

# The bare package stands in for decaycast/__init__.py, which would load torch: seconds that a store does not need.
WRITER = """
import sys, types
package = sys.modules["decaycast"] = types.ModuleType("decaycast")
package.__path__ = sys.argv[5:]
from decaycast.core.experiment import Row, Run
from decaycast.lab.store import Store
path, name, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Store(path) as store:
    for seed in range(first, last):
        row = Row(run=Run(config={"model": "mlp"}, seed=seed), reason=name, curve={"step": list(range(50))})
        print(seed, store.append(row), flush=True)
"""


def run_of(lr: float = 0.1, seed: int = 0, **config) -> Run:
    return Run(config={"model": "mlp", "lr": lr, **config}, seed=seed)


def start_writer(path: Path, name: str, first: int, last: int) -> subprocess.Popen[str]:
    package = str(Path(store_module.__file__).parents[1])
    command = [sys.executable, "-c", WRITER, str(path), name, str(first), str(last), package]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def overwrite_header(path: Path, pragma: str) -> None:
    db = sqlite3.connect(path)
    db.execute(pragma)
    db.commit()
    db.close()


# --- round trip


def test_a_row_comes_back_whole(tmp_path):
    row = Row(
        run=run_of(seed=2**70, rule=None, nesterov=True, batch_size=128),
        status="failed",
        reason="loss is not finite at step 3 of \udcff.npz",
        curve={"step": [0, 1, 3], "train_loss": [2.25, math.nan, math.inf]},
        final={"test_loss": -math.inf, "test_accuracy": 0.1234567891234567},
        seconds=1.5,
        provenance={"torch": "2.13.0", "git": ""},
    )
    with Store(tmp_path / "new" / "folder" / "rows.db") as store:
        assert store.append(row) is True
    with Store(tmp_path / "new" / "folder" / "rows.db") as store:
        (back,) = store.read()
    assert back.run == row.run and back.run.key == row.run.key
    assert (back.status, back.reason, back.seconds) == ("failed", row.reason, 1.5)
    assert back.curve["step"] == (0, 1, 3)
    assert back.curve["train_loss"][0] == 2.25 and math.isnan(back.curve["train_loss"][1])
    assert back.curve["train_loss"][2] == math.inf
    assert back.final == row.final and back.provenance == row.provenance


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("long") / "rows.db") as store:
        yield store


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 4).flatmap(lambda n: st.dictionaries(st.text(), st.lists(st.floats(), min_size=n, max_size=n))))
def test_curves_round_trip_with_missing_and_infinite_values(long_store, curve):
    run = run_of(seed=len(long_store.read()))
    long_store.append(Row(run=run, curve=curve))
    (back,) = long_store.rows_of([run])
    assert back.curve.keys() == curve.keys()
    for name, column in curve.items():
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(back.curve[name], column, strict=True))


def test_ragged_curves_are_refused_and_not_stored(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        with pytest.raises(ValueError, match="columns of a curve must have one length, got {'step': 2, 'lr': 1}"):
            store.append(Row(run=run_of(), curve={"step": [0, 1], "lr": [0.1]}))
        assert store.read() == []


# --- which row decides


def test_the_first_finished_row_stays(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        assert store.append(Row(run=run_of(), seconds=1.0)) is True
        assert store.append(Row(run=run_of(), seconds=2.0)) is False
        assert store.append(Row(run=run_of(), status="failed", reason="later")) is True
        assert [(row.status, row.seconds) for row in store.read()] == [("done", 1.0)]


def test_a_failed_row_is_replaced_by_a_newer_one_and_by_a_finished_one(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        for reason in ("first", "second"):
            store.append(Row(run=run_of(), status="failed", reason=reason))
        assert [row.reason for row in store.read()] == ["second"]
        store.append(Row(run=run_of(), seconds=3.0))
        assert [(row.status, row.seconds) for row in store.read()] == [("done", 3.0)]


@pytest.mark.parametrize("statement", ["UPDATE rows SET status = 'failed'", "DELETE FROM rows"])
def test_the_file_itself_refuses_changes(tmp_path, statement):
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=run_of()))
    db = sqlite3.connect(tmp_path / "rows.db")
    with pytest.raises(sqlite3.IntegrityError, match="rows are append-only"):
        db.execute(statement)
    db.close()


def test_missing_keeps_order_drops_duplicates_and_knows_failures(tmp_path):
    done, failed, new, other = (run_of(lr) for lr in (0.1, 0.2, 0.3, 0.4))
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=done))
        store.append(Row(run=failed, status="failed", reason="diverged"))
        asked = [other, new, done, failed, new, other]
        assert store.missing(asked) == [other, new]
        assert store.missing(asked, retry_failed=True) == [other, new, failed]


def test_read_filters_by_config_and_rows_of_follows_the_request(tmp_path):
    runs = [run_of(0.1), run_of(0.2), run_of(0.2, rule="autol2")]
    with Store(tmp_path / "rows.db") as store:
        for run in runs:
            store.append(Row(run=run))
        assert [row.run for row in store.read({"lr": 0.2})] == runs[1:]
        assert [row.run for row in store.read({"lr": 0.2, "rule": None})] == [runs[1]]
        assert store.read({"lr": 0.2, "model": "cnn"}) == []
        asked = [runs[2], run_of(9.0), runs[0], runs[2]]
        assert [row.run for row in store.rows_of(asked)] == [runs[2], runs[0], runs[2]]


# --- kill, concurrency, disk full


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    writer = start_writer(tmp_path / "rows.db", "a", 0, 10**6)
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline() for _ in range(25)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.readlines()
    writer.wait()
    writer.stdout.close()
    seeds = [int(line.split()[0]) for line in acknowledged if line.endswith("True\n")]
    with Store(tmp_path / "rows.db") as store:
        stored = [row.run.seed for row in store.read()]
        assert len(seeds) >= 25 and stored[: len(seeds)] == seeds
        assert len(stored) <= len(seeds) + 1  # at most the row whose acknowledgement was cut off
        assert store.append(Row(run=run_of(seed=-1)))


def test_two_writers_share_a_new_file(tmp_path):
    writers = [start_writer(tmp_path / "rows.db", "a", 0, 30), start_writer(tmp_path / "rows.db", "b", 15, 45)]
    answers = [writer.communicate()[0].split("\n")[:-1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    with Store(tmp_path / "rows.db") as store:
        rows = store.read()
    assert sorted(row.run.seed for row in rows) == list(range(45))
    for name, lines in zip("ab", answers, strict=True):  # who was told True is who wrote the row
        assert sorted(row.run.seed for row in rows if row.reason == name) == [
            int(line.split()[0]) for line in lines if line.endswith("True")
        ]


def test_a_full_disk_keeps_finished_rows(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=run_of(0.1)))
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then answers as it does on a full disk
        big = Row(run=run_of(0.2), curve={"train_loss": [1 / 3] * 5000})
        with pytest.raises(StoreError, match=r"the disk of store .*rows\.db is full; finished rows are safe, free"):
            store.append(big)
        assert [row.run for row in store.read()] == [run_of(0.1)]
        store._db.execute("PRAGMA max_page_count = 100000")
        assert store.append(big) is True


# --- bad files


def make_directory(path: Path) -> None:
    path.mkdir()


def make_foreign(path: Path) -> None:
    overwrite_header(path, "CREATE TABLE cookies (name TEXT)")


def make_newer(path: Path) -> None:
    Store(path).close()
    overwrite_header(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("hello"), r"is not a decaycast store \(not a SQLite database\); choose another"),
        (lambda path: path.write_bytes(b"\x80" * 9000), r"is not a decaycast store \(not a SQLite database\)"),
        (make_foreign, "is the database of another program, not a store; choose another path"),
        (make_newer, "has schema 3 and this decaycast reads up to 2; update decaycast"),
        (make_directory, "cannot open store .*; choose a file in a folder you can write to"),
    ],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path, make, message):
    path = tmp_path / "rows.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError, match=message):
        Store(path)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create the folder of store .*: .*; choose a folder you can write to"):
        Store(tmp_path / "file" / "rows.db")


def test_any_other_database_error_is_passed_on_with_the_path(tmp_path, monkeypatch):
    def connect(*arguments, **settings):
        raise sqlite3.OperationalError("something new")

    monkeypatch.setattr(store_module.sqlite3, "connect", connect)
    with pytest.raises(StoreError, match=r"store .*rows\.db failed: something new; rows stored before this are safe"):
        Store(tmp_path / "rows.db")


def test_a_locked_store_says_so_after_waiting(tmp_path):
    with Store(tmp_path / "rows.db", wait_seconds=0.05) as store:
        other = sqlite3.connect(tmp_path / "rows.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"was locked by another process for 0\.05 s; try again later"):
            store.append(Row(run=run_of()))
        other.execute("ROLLBACK")
        other.close()
        assert store.append(Row(run=run_of()))


def test_a_read_only_store_still_reads(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=run_of()))
        store._db.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match="is read-only; make it and its folder writable or copy it elsewhere"):
            store.append(Row(run=run_of(0.2)))
        assert len(store.read()) == 1


def test_a_damaged_store_is_refused(tmp_path):
    path = tmp_path / "rows.db"
    with Store(path) as store:
        for seed in range(12):
            store.append(Row(run=run_of(seed=seed), curve={"step": range(200)}))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)  # all but the first page
    path.write_bytes(content)
    with Store(path) as store, pytest.raises(StoreError, match="is damaged .*; restore it from a copy or import an"):
        store.read()


# --- export and import


def fill(store: Store) -> None:
    store.append(Row(run=run_of(0.3), curve={"step": [1234567], "train_loss": [0.123456789]}, final={"loss": 1 / 3}))
    store.append(Row(run=run_of(0.2), status="failed", reason="diverged", curve={"step": [math.nan]}))
    store.append(Row(run=run_of(0.1), curve={"train_loss": [-math.inf]}))


def test_export_is_deterministic_sorted_and_rounds_fractions_of_curves_only(tmp_path):
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        fill(a)
        assert a.export(tmp_path / "out" / "a.jsonl.gz") == 3
        for row in reversed(a.read()):
            b.append(row)
        b.export(tmp_path / "b.jsonl.gz")
    assert (tmp_path / "out" / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert os.listdir(tmp_path / "out") == ["a.jsonl.gz"]
    rows = load_export(tmp_path / "b.jsonl.gz")
    assert [row.run.key for row in rows] == sorted(run_of(lr).key for lr in (0.1, 0.2, 0.3))
    by_lr = {row.run.config["lr"]: row for row in rows}
    assert by_lr[0.3].curve == {"step": (1234567,), "train_loss": (0.123457,)}
    assert by_lr[0.3].final == {"loss": 1 / 3}
    assert by_lr[0.1].curve["train_loss"] == (-math.inf,)
    assert math.isnan(by_lr[0.2].curve["step"][0]) and by_lr[0.2].reason == "diverged"


def test_import_adds_what_is_new_once_and_never_displaces_a_finished_row(tmp_path):
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        fill(a)
        a.export(tmp_path / "rows.jsonl.gz")
        b.append(Row(run=run_of(0.1), seconds=7.0))
        b.append(Row(run=run_of(0.3), status="failed", reason="out of memory"))
        assert b.import_(tmp_path / "rows.jsonl.gz") == 2
        assert b.import_(tmp_path / "rows.jsonl.gz") == 0
        rows = {row.run.config["lr"]: row for row in b.read()}
    assert rows[0.1].seconds == 7.0
    assert rows[0.2].status == "failed"
    assert rows[0.3].status == "done"


def test_an_import_that_fails_half_way_adds_nothing(tmp_path):
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        for seed in range(40):
            a.append(Row(run=run_of(seed=seed), curve={"step": range(500)}))
        a.export(tmp_path / "rows.jsonl.gz")
        pages = b._db.execute("PRAGMA page_count").fetchone()[0]
        b._db.execute(f"PRAGMA max_page_count = {pages + 8}")
        with pytest.raises(StoreError, match="is full; finished rows are safe"):
            b.import_(tmp_path / "rows.jsonl.gz")
        assert b.read() == []
        b._db.execute("PRAGMA max_page_count = 100000")
        assert b.import_(tmp_path / "rows.jsonl.gz") == 40


def test_an_export_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Store(tmp_path / "rows.db") as store:
        with pytest.raises(StoreError, match="cannot write export .*; the store is unchanged, choose another path"):
            store.export(tmp_path / "file" / "rows.jsonl.gz")
        (tmp_path / "taken").mkdir()
        with pytest.raises(StoreError, match="cannot write export"):
            store.export(tmp_path / "taken")
    assert sorted(os.listdir(tmp_path)) == ["file", "rows.db", "taken"]  # no half-written file is left


def zipped(*lines: object) -> bytes:
    return gzip.compress("\n".join(json.dumps(line) for line in lines).encode())


HEADER = {"decaycast": "rows", "version": EXPORT_VERSION}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read export .*; fetch or export it again"),
        (b"plain text", "cannot read export .*gzip"),
        (zipped(HEADER, {"key": "a" * 500})[:-12], "cannot read export"),
        (zipped(HEADER)[:12] + b"\xff\xff" + zipped(HEADER)[14:], "cannot read export"),
        (gzip.compress(b""), "is not an export of decaycast rows; write one with Store.export"),
        (zipped([1]), "is not an export of decaycast rows"),
        (zipped({"decaycast": "rows"}), "is not an export of decaycast rows"),
        (zipped({"decaycast": "rows", "version": 2}), "has schema 2 and this decaycast reads up to 1"),
        (zipped(HEADER, {"key": "a"}), "damaged row in .*, line 2: 'config'; fetch or export the file again"),
        (zipped(HEADER, 3), "damaged row in .*, line 2"),
    ],
)
def test_bad_exports_are_refused(tmp_path, content, message):
    path = tmp_path / "rows.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        load_export(path)


def test_an_export_whose_row_was_edited_is_refused(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        fill(store)
        store.export(tmp_path / "rows.jsonl.gz")
        text = gzip.decompress((tmp_path / "rows.jsonl.gz").read_bytes()).replace(b'"lr":0.3', b'"lr":0.7')
        (tmp_path / "edited.jsonl.gz").write_bytes(gzip.compress(text))
        with pytest.raises(StoreError, match="damaged row in .*: its key or status does not fit its contents"):
            store.import_(tmp_path / "edited.jsonl.gz")
