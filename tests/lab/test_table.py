"""The table of a store says what its rows say, whoever has stored them; files hold what the table holds."""

from __future__ import annotations

import csv
import math
import sqlite3
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.old_stores import add_old_rows, make_old_store

from decaycast.core.experiment import Row, Run
from decaycast.lab.store import Store
from decaycast.lab.table import Table, TableError, numbered, pack, unpack

FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
CONFIGS = st.dictionaries(
    st.sampled_from(["lr", "steps", "rule", "model", "nesterov", "odd name, 1"]),
    FINITE | st.booleans() | st.none() | st.text(max_size=5),
)
ROWS = st.builds(
    lambda config, seed, final, curve, failed: Row(
        run=Run(config=config, seed=seed),
        status="failed" if failed else "done",
        reason="because" if failed else "",
        final=final,
        curve={"step": [1.0, 2.0], "train_loss": [0.5, curve]},
        seconds=1.5,
    ),
    CONFIGS,
    st.integers(0, 2**70),
    st.dictionaries(st.sampled_from(["test_loss", "lr"]), st.floats()),
    st.floats(),
    st.booleans(),
)


def same(found: object, given: object) -> bool:
    if given is None:
        return found is None or (isinstance(found, float) and math.isnan(found))
    if isinstance(given, (bool, str)):
        return found is given or found == given
    if isinstance(given, int) and abs(given) > 2**53:
        return found == str(given)  # a float64 cannot hold it
    return found == float(given) or (math.isnan(float(given)) and math.isnan(float(found)))  # type: ignore[arg-type]


def check(table: Table, rows: list[Row]) -> None:
    """The table beside the rows that `Store.read` gives: the slow route."""
    assert len(table) == len(rows)
    assert table["key"].tolist() == [row.run.key for row in rows]
    assert table["status"].tolist() == [row.status for row in rows]
    assert table["reason"].tolist() == [row.reason for row in rows]
    for place, row in enumerate(rows):
        assert same(table["seed"][place], row.run.seed) and table["seconds"][place] == row.seconds
        for name, value in row.run.config.items():
            assert same(table[name][place], value), (name, value)
        for name, value in row.final.items():
            assert same(table[name if name != "lr" or "final_lr" not in table.columns else "final_lr"][place], value)
        assert same(table["last_train_loss"][place], row.curve["train_loss"][-1])


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(rows=st.lists(ROWS, max_size=12))
def test_the_table_is_what_reading_the_rows_gives(tmp_path_factory, rows):
    with Store(tmp_path_factory.mktemp("table") / "rows.db") as store:
        assert store.extend(rows) >= len({row.run.key for row in rows})
        check(store.table(), store.read())


def test_an_empty_store_is_an_empty_table(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        table = store.table()
    assert len(table) == 0 and list(table.columns) == ["key", "status", "reason", "seed", "seconds"]
    with pytest.raises(KeyError, match="the table has no column 'lr'; it has key, status, reason, seed, seconds"):
        table["lr"]


def test_superseded_failures_are_left_out(tmp_path):
    run, other = Run(config={"lr": 0.1}), Run(config={"lr": 0.2})
    with Store(tmp_path / "rows.db") as store:
        for reason in ("first", "second"):
            store.append(Row(run=run, status="failed", reason=reason))
            store.append(Row(run=other, status="failed", reason=reason))
        store.append(Row(run=run, final={"test_loss": 0.5}))
        table = store.table()
    assert list(zip(table["status"], table["reason"], table["lr"])) == [("failed", "second", 0.2), ("done", "", 0.1)]
    assert math.isnan(table["test_loss"][0]) and table["test_loss"][1] == 0.5


def test_rows_of_an_older_decaycast_are_in_the_table_and_new_ones_beside_them(tmp_path):
    path = tmp_path / "rows.db"
    rows = [Row(run=Run(config={"lr": 0.1}, seed=seed), final={"test_loss": seed / 3}) for seed in range(3)]
    rows.append(Row(run=Run(config={"rule": "x"}), status="failed", reason="diverged"))
    make_old_store(path, rows, packed=False)
    new = Row(run=Run(config={"lr": "many", "width": 3}), curve={"step": [7.0]})
    with Store(path) as store:
        before = store.table()
        assert before["seed"].tolist() == [0, 1, 2, 0] and before["reason"].tolist() == ["", "", "", "diverged"]
        assert store.append(new)
        table = store.table()
        assert table["lr"].tolist() == [0.1, 0.1, 0.1, None, "many"]
        assert table["rule"].tolist() == [None, None, None, "x", None]
        np.testing.assert_array_equal(table["width"], [math.nan] * 4 + [3])
        np.testing.assert_array_equal(table["last_step"], [math.nan] * 4 + [7])
        assert [row.run.key for row in store.read()] == table["key"].tolist()
    db = sqlite3.connect(path)  # an older one that had the file open writes again: it knows of no packing
    add_old_rows(db, [Row(run=Run(config={"lr": 0.1}, seed=3), final={"test_loss": 1.0})])
    db.commit()
    db.close()
    with Store(path) as store:
        assert store.table()["key"].tolist() == [row.run.key for row in store.read()]
        np.testing.assert_array_equal(store.table()["test_loss"], [0, 1 / 3, 2 / 3, math.nan, math.nan, 1])


def test_extend_stores_all_rows_or_none_and_counts_the_new(tmp_path):
    rows = [Row(run=Run(config={}, seed=seed)) for seed in range(5)]
    with Store(tmp_path / "rows.db") as store:
        assert store.extend(rows[:3]) == 3
        assert store.extend(rows) == 2
        with pytest.raises(ValueError, match="columns of a curve must have one length"):
            store.extend([Row(run=Run(config={}, seed=9)), Row(run=Run(config={}, seed=8), curve={"a": [1], "b": []})])
        assert len(store.read()) == len(store.table()) == 5
        assert [row.run.seed for row in store.read(newest=2)] == [3, 4]
        assert [row.run.seed for row in store.read({"lr": None}, newest=2)] == [3, 4]


def test_numbers_of_numpy_are_numbers(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=Run(config={"lr": np.float64(0.5), "nesterov": True}), seconds=2))
        store.append(Row(run=Run(config={"lr": 0.25, "nesterov": 1}), seconds=2.5))
        table = store.table()
    assert table["lr"].tolist() == [0.5, 0.25] and table["seconds"].tolist() == [2, 2.5]
    assert table["nesterov"].tolist() == [True, 1.0] and table["nesterov"][0] is True


def test_packing_is_one_shape_for_rows_that_differ_in_numbers():
    rows = [Row(run=Run(config={"lr": lr, "model": "mlp"}, seed=3), seconds=lr) for lr in (0.5, 0.25)]
    packed = [pack(row) for row in rows]
    assert packed[0][0] == packed[1][0]
    assert packed[1][1][:10].hex() == rows[1].run.key
    assert np.frombuffer(packed[1][1][10:]).tolist() == [1.0, 3.0, 0.25, 0.25]
    table = unpack({packed[0][0]: numbered(2, packed[0][1]) + numbered(1, packed[1][1])}, {}, [])
    assert table["lr"].tolist() == [0.25, 0.5], "rows come by id"


# files

MIXED = [
    Row(run=Run(config={"lr": 0.1, "steps": 100, "note": 'a "quoted", one'}), final={"test_loss": 1 / 3}),
    Row(run=Run(config={"lr": 1e-5, "rule": "autol2"}, seed=2**60), status="failed", reason="lone \udcff"),
    Row(run=Run(config={"lr": 1.0, "rule": 4.5}), final={"test_loss": math.inf}),
]


@pytest.fixture
def mixed(tmp_path) -> Table:
    with Store(tmp_path / "rows.db") as store:
        store.extend(MIXED)
        return store.table()


def test_csv_has_every_column_and_nothing_for_what_is_missing(mixed, tmp_path):
    assert mixed.write(tmp_path / "new" / "rows.csv") == 3
    with (tmp_path / "new" / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["lr"] for row in rows] == ["0.1", "1e-05", "1"]
    assert [row["seed"] for row in rows] == ["0", str(2**60), "0"]
    assert [row["note"] for row in rows] == ['a "quoted", one', "", ""]
    assert [row["rule"] for row in rows] == ["", "autol2", "4.5"]
    assert [row["test_loss"] for row in rows] == [repr(1 / 3), "", "inf"]
    assert rows[1]["reason"] == r"lone \udcff"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.csv"]


def test_parquet_has_the_same_columns(mixed, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    mixed.write(tmp_path / "rows.parquet")
    read = parquet.read_table(tmp_path / "rows.parquet").to_pydict()
    assert list(read) == list(mixed.columns)
    assert read["lr"] == [0.1, 1e-5, 1.0] and read["rule"] == [None, "autol2", "4.5"]
    assert read["test_loss"] == [1 / 3, None, math.inf] and read["key"] == mixed["key"].tolist()
    assert read["reason"] == ["", r"lone \udcff", ""]


def test_parquet_makes_texts_of_a_column_with_several_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    mixed = Table(
        columns={"key": np.array(["a", "b", "c"], dtype=object), "x": np.array([True, None, 2.5], dtype=object)}
    )
    mixed.write(tmp_path / "rows.parquet")
    assert parquet.read_table(tmp_path / "rows.parquet").to_pydict()["x"] == ["True", None, "2.5"]


def test_files_that_cannot_be_written_are_named(mixed, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"a table is written as \.csv or \.parquet, got 'rows.txt'; choose such a name"
    ):
        mixed.write(tmp_path / "rows.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot write .*; the store is unchanged, choose another path"):
        mixed.write(tmp_path / "file" / "rows.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r"parquet files are written with pyarrow: pip install 'decaycast\[parquet\]'"
    ):
        mixed.write(tmp_path / "rows.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "rows.db"]
