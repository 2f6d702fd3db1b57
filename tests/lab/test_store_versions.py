"""Files of an older decaycast are read and written; who decides stays the same however rows arrive and whoever writes."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.old_stores import add_old_rows, make_old_store

import decaycast.lab.store as store_module
from decaycast.core.experiment import Row, Run
from decaycast.lab.store import Store, StoreError

OLD_AND_NEW = pytest.mark.parametrize("packed", [False, True], ids=["not packed", "packed"])


def run_of(seed: int) -> Run:
    return Run(config={"model": "mlp", "lr": 0.1}, seed=seed)


def failed(seed: int, reason: str) -> Row:
    return Row(run=run_of(seed), status="failed", reason=reason, curve={"step": [1.0], "loss": [math.nan]})


def done(seed: int, seconds: float = 1.0) -> Row:
    return Row(
        run=run_of(seed),
        seconds=seconds,
        final={"test_loss": 1 / 3, "worst": -math.inf},
        curve={"step": [0, 5, 10], "loss": [0.123456789, math.nan, math.inf]},
        provenance={"git": "abc"},
    )


OLD = [failed(1, "first"), done(0), failed(1, "second"), failed(2, "once")]


def version(path: Path) -> int:
    db = sqlite3.connect(path)
    (number,) = db.execute("PRAGMA user_version").fetchone()
    db.close()
    return number


def stored_texts(path: Path, until: int) -> list[tuple[object, ...]]:
    db = sqlite3.connect(path)
    found = db.execute("SELECT * FROM rows WHERE id <= ? ORDER BY id", (until,)).fetchall()
    db.close()
    return found


# --- files of schema 1


@OLD_AND_NEW
def test_a_file_of_schema_1_is_read_and_not_touched(tmp_path, packed):
    path = tmp_path / "rows.db"
    make_old_store(path, OLD, packed=packed)
    before = path.read_bytes()
    with Store(path) as store, Store(tmp_path / "new.db") as new:
        assert new.extend(OLD) == 4
        assert repr(store.read()) == repr(new.read()), "repr: NaN is not equal to itself"
        assert [row.reason for row in store.read()] == ["", "second", "once"]
        assert repr(store.rows_of([run_of(2), run_of(0)])) == repr(new.rows_of([run_of(2), run_of(0)]))
        assert store.missing([run_of(seed) for seed in range(4)], retry_failed=True) == [
            run_of(1),
            run_of(2),
            run_of(3),
        ]
        assert store.table()["reason"].tolist() == new.table()["reason"].tolist() == ["", "second", "once"]
        store.export(tmp_path / "old.jsonl.gz")
        new.export(tmp_path / "new.jsonl.gz")
    assert (tmp_path / "old.jsonl.gz").read_bytes() == (tmp_path / "new.jsonl.gz").read_bytes()
    assert path.read_bytes() == before and version(path) == 1


@OLD_AND_NEW
def test_a_file_of_schema_1_takes_new_rows_and_keeps_its_own_as_they_are(tmp_path, packed):
    path = tmp_path / "rows.db"
    make_old_store(path, OLD, packed=packed)
    before = stored_texts(path, 4)
    with Store(path) as store, Store(path) as other:
        assert store.extend([done(0, 9.0), done(1, 7.0), failed(2, "twice"), done(3)]) == 3
        assert other.append(done(2, 8.0)) and not other.append(done(3, 5.0))
        rows = store.read()
        assert [(row.run.seed, row.status, row.seconds) for row in rows] == [
            (0, "done", 1.0), (1, "done", 7.0), (3, "done", 1.0), (2, "done", 8.0)
        ]  # fmt: skip
        assert repr(rows[0].curve) == repr(rows[2].curve) and rows[0].final == rows[2].final
        assert store.table()["key"].tolist() == [row.run.key for row in rows]
        assert store.table()["seconds"].tolist() == [1.0, 7.0, 1.0, 8.0]
        assert store.missing([run_of(seed) for seed in range(5)]) == [run_of(4)]
    assert version(path) == 2 and stored_texts(path, 4) == before


def test_an_older_decaycast_refuses_the_file_once_it_has_a_new_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.db"
    make_old_store(path, OLD, packed=True)
    with Store(path) as store:
        store.append(done(5))
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", 1)
    with pytest.raises(StoreError, match=r"rows\.db has schema 2 and this decaycast reads up to 1; update decaycast"):
        Store(path)


@OLD_AND_NEW
def test_the_schema_is_raised_with_the_rows_or_not_at_all(tmp_path, packed):
    path = tmp_path / "rows.db"
    make_old_store(path, OLD, packed=packed)
    with Store(path) as store:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="is full; finished rows are safe"):
            store.append(Row(run=run_of(9), curve={"loss": [0.1] * 9000}))
        assert version(path) == 1 and len(store.read()) == 3
        store._db.execute("PRAGMA max_page_count = 100000")
        assert store.append(done(9)) and version(path) == 2


def test_rows_that_an_older_decaycast_adds_to_a_file_it_had_open_are_read(tmp_path):
    path = tmp_path / "rows.db"
    make_old_store(path, OLD, packed=True)
    old = sqlite3.connect(path)
    with Store(path) as store:
        store.append(done(5))
        add_old_rows(old, [done(6), done(1)])
        old.commit()
        store.append(done(7))
        assert [row.run.seed for row in store.read()] == [0, 2, 5, 6, 1, 7]
        assert store.table()["seed"].tolist() == [0, 2, 5, 6, 1, 7]
    old.close()


def test_a_file_that_became_newer_while_open_takes_no_more_rows(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        store.append(done(0))
        newer = sqlite3.connect(tmp_path / "rows.db")
        newer.execute("PRAGMA user_version = 3")
        newer.close()
        with pytest.raises(StoreError, match="has schema 3 and this decaycast reads up to 2; update decaycast"):
            store.append(done(1))
        assert [row.run.seed for row in store.read()] == [0]


# --- who decides


def test_one_call_may_bring_several_rows_of_a_run(tmp_path):
    rows = [
        done(1),
        failed(1, "late"),
        done(0, 2.0),
        failed(2, "a"),
        done(1, 3.0),
        done(0, 4.0),
        failed(2, "b"),
        done(2, 5.0),
    ]
    with Store(tmp_path / "rows.db") as store:
        assert store.append(done(0))
        assert store.extend(rows) == 5, "all but the other finished rows of 0 and 1"
        assert [(row.run.seed, row.status, row.seconds) for row in store.read()] == [
            (0, "done", 1.0), (1, "done", 1.0), (2, "done", 5.0)
        ]  # fmt: skip
        assert store.table()["seconds"].tolist() == [1.0, 1.0, 5.0]
        counts = "SELECT (SELECT count(*) FROM rows), (SELECT count(*) FROM packed), (SELECT max(id) FROM rows)"
        assert store._db.execute(counts).fetchone() == (6, 6, 6), "every row is packed, and their numbers have no gaps"
        assert store.extend([]) == 0 and store.extend(rows[:1]) == 0


ROW = st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 99))
CALLS = st.lists(st.tuples(st.booleans(), st.lists(ROW, max_size=6)), max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(old=st.none() | st.lists(ROW, max_size=4), packed=st.booleans(), calls=CALLS)
def test_two_who_write_in_turn_leave_what_a_list_of_rows_says(tmp_path_factory, old, packed, calls):
    """Beside a list in memory: the first finished row of a run, else its newest failed one, in the order they were stored."""
    path, rows = tmp_path_factory.mktemp("turns") / "rows.db", []

    def add(batch: list[tuple[int, bool, int]]) -> list[Row]:
        fresh = []
        for seed, finished, number in batch:
            if not (finished and any(row.run.seed == seed and row.status == "done" for row in rows)):
                fresh.append(done(seed, float(number)) if finished else failed(seed, str(number)))
                rows.append(fresh[-1])
        return fresh

    if old is not None:
        make_old_store(path, add(old), packed=packed)
    with Store(path) as one, Store(path) as two:
        for first, batch in calls:
            given_rows = [
                done(seed, float(number)) if finished else failed(seed, str(number)) for seed, finished, number in batch
            ]
            assert (one if first else two).extend(given_rows) == len(add(batch))
        kept = [row for place, row in enumerate(rows) if decides(row, rows, place)]
        for store in (one, two):
            assert [(row.run, row.status, row.reason) for row in store.read()] == [
                (row.run, row.status, row.reason) for row in kept
            ]
            assert [row.seconds for row in store.read() if row.status == "done"] == [
                row.seconds for row in kept if row.status == "done"
            ]
            assert store.table()["key"].tolist() == [row.run.key for row in kept]
            assert store.table()["reason"].tolist() == [row.reason for row in kept]
            asked = store.rows_of(map(run_of, range(4)))
            assert sorted((row.run.seed, row.reason) for row in asked) == sorted(
                (row.run.seed, row.reason) for row in kept
            )


def decides(row: Row, rows: list[Row], place: int) -> bool:
    same = [other for other in rows if other.run == row.run]
    return row.status == "done" or (all(other.status == "failed" for other in same) and same[-1] is rows[place])


# --- what is read for an answer


def test_searches_for_keys_read_an_index_alone(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        store.extend([done(0), failed(1, "x")])
        asked: list[str] = []
        store._db.set_trace_callback(asked.append)
        store.missing([run_of(0)])
        store.missing([run_of(seed) for seed in range(store_module._FEW + 1)])
        store._db.set_trace_callback(None)
        assert len(asked) == 4
        for query in asked:
            (plan,) = store._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
            assert "COVERING INDEX" in plan[3], (query, plan)


def test_deciding_looks_up_the_runs_of_failed_rows_only(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        for query in (store_module._SELECT, store_module._FAILURES):
            plan = [step[3] for step in store._db.execute(f"EXPLAIN QUERY PLAN {query}")]
            assert sum(step.startswith("SCAN") for step in plan) == 1, plan
            assert sum("USING COVERING INDEX" in step and "key=?" in step for step in plan) == 2, plan
