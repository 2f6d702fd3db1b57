"""Rows as columns of the database: every float comes back bit for bit, by whatever name; a row is the same text in any export."""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from decaycast.core.experiment import Row, Run
from decaycast.lab.codec import COLUMNS, from_columns, from_line, to_columns, to_line
from decaycast.lab.store import Store, load_export

ROOT = Path(__file__).resolve().parents[2]
NAMES = st.text(st.characters(), max_size=6)  # with quotes, line breaks, zeros, emoji
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES
HOSTILE = {'a"b\n': (-0.0, 5e-324), "\udcff.npz": (math.nan, -math.inf), "": (1e308, 2.0**53), "%s": (0.1, math.inf)}
ROWS = st.builds(
    Row,
    run=st.builds(Run, config=st.dictionaries(NAMES, SCALARS, max_size=4), seed=st.integers(-(2**80), 2**80)),
    status=st.sampled_from(["done", "failed"]),
    reason=NAMES,
    curve=st.integers(0, 3).flatmap(
        lambda length: st.dictionaries(NAMES, st.lists(st.floats(), min_size=length, max_size=length), max_size=4)
    ),
    final=st.dictionaries(NAMES, st.floats(), max_size=4),
    seconds=st.floats(),
    provenance=st.dictionaries(NAMES, NAMES, max_size=3),
)


def bits(columns: Mapping[str, Sequence[float]]) -> list[tuple[str, bytes]]:
    return [(name, struct.pack(f"<{len(column)}d", *column)) for name, column in columns.items()]


def check(back: Row, row: Row) -> None:
    assert back.run == row.run and back.run.key == row.run.key and type(back.run.seed) is int
    assert list(back.run.config) == list(row.run.config)
    assert [type(value) for value in back.run.config.values()] == [type(value) for value in row.run.config.values()]
    assert (back.status, back.reason, back.provenance) == (row.status, row.reason, row.provenance)
    assert back.seconds == row.seconds or (math.isnan(back.seconds) and math.isnan(row.seconds))
    assert bits(back.curve) == bits(row.curve)
    assert bits({"": tuple(back.final.values())}) == bits({"": tuple(row.final.values())})
    assert list(back.final) == list(row.final)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(ROWS)
@example(Row(run=Run(config={}, seed=-(2**90)), curve=HOSTILE, final={name: pair[0] for name, pair in HOSTILE.items()}))
@example(Row(run=Run(config={}), reason="lone \udcff", curve={"a": (), "b": ()}, provenance={"file": "\udcff"}))
def test_a_row_comes_back_from_its_columns_bit_for_bit(row):
    columns = to_columns(row)
    assert len(columns) == len(COLUMNS)
    check(from_columns(columns), row)


def test_numbers_of_any_kind_come_back_as_floats():
    column = [1, np.float32(0.5), np.float64(0.1), torch.tensor(0.25), True]
    row = Row(run=Run(config={}), curve={"a": column, "b": np.arange(5)}, final={"x": np.float32(2.5)}, seconds=3)  # type: ignore[arg-type]
    back = from_columns(to_columns(row))
    assert back.curve == {"a": (1.0, 0.5, 0.1, 0.25, 1.0), "b": (0.0, 1.0, 2.0, 3.0, 4.0)}
    assert back.final == {"x": 2.5} and back.seconds == 3
    assert {type(value) for values in back.curve.values() for value in values} == {float}


def test_a_blob_is_a_line_of_names_and_the_columns_one_after_the_other():
    columns = dict(zip(COLUMNS, to_columns(Row(run=Run(config={}), curve={"b": [1.0, 2.0], "a": [3.0, 4.0]}))))
    head, body = bytes(columns["curve"]).split(b"\n", 1)  # type: ignore[arg-type]
    assert json.loads(head) == ["b", "a"]
    np.testing.assert_array_equal(np.frombuffer(body, dtype="<f8"), [1.0, 2.0, 3.0, 4.0])
    assert columns["final"] == b"[]\n"


def test_a_provenance_is_never_taken_for_an_equal_one_that_is_not_the_same():
    for value in ("1", 1, True, 1.0, "1"):
        row = Row(run=Run(config={}), provenance={"threads": value})  # type: ignore[dict-item]
        back = from_columns(to_columns(row)).provenance["threads"]
        assert type(back) is type(value) and back == value


def test_columns_of_schema_1_are_read():
    texts = (
        "k",
        "failed",
        "7",
        '{"lr":0.5}',
        '"why"',
        '"inf"',
        '{"loss":null}',
        "{}",
        '{"step":[0,null,"-inf"],"x":[1,2,3]}',
    )
    row = from_columns(texts)
    assert (row.run, row.status, row.reason, row.seconds) == (
        Run(config={"lr": 0.5}, seed=7),
        "failed",
        "why",
        math.inf,
    )
    assert math.isnan(row.final["loss"]) and math.isnan(row.curve["step"][1])
    assert row.curve["step"][::2] == (0.0, -math.inf) and row.curve["x"] == (1.0, 2.0, 3.0)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ROWS)
def test_a_row_has_the_same_line_before_and_after_it_was_stored(row):
    line = to_line(row)
    assert to_line(from_columns(to_columns(row))) == line
    assert json.loads(to_line(from_line(line))) == json.loads(line)


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("docs/rows/*.jsonl.gz"), *ROOT.glob("bench/results/*.jsonl.gz")]),
    ids=lambda path: path.name,
)
def test_exports_of_this_project_are_read_and_written_again(path, tmp_path):
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        assert a.import_(path) == len(lines) - 1 == a.export(tmp_path / "a.jsonl.gz")
        again = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().splitlines()
        # Equal as values: a fraction that rounds to a whole number is 1.0 in a first export and 1 in all that follow.
        assert [json.loads(line) for line in again] == [json.loads(line) for line in lines]
        b.extend(reversed(load_export(tmp_path / "a.jsonl.gz")))
        b.export(tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
