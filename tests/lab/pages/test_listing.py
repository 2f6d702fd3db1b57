"""Runs as a searchable table: which columns it has, in which order its rows stand, and what it leaves out."""

from __future__ import annotations

import json
import math

from decaycast.core.experiment import Row, Run
from decaycast.lab.pages import listing
from decaycast.lab.pages.listing import cell, differing, groups_listing, runs_listing, seconds_text


def rows(count: int, **config: object) -> list[Row]:
    return [
        Row(run=Run(config={"lr": 0.1, "wd": 10.0**-i, **config}, seed=i), final={"loss": i / 3}) for i in range(count)
    ]  # type: ignore[dict-item]


def test_cells_are_short_texts():
    assert [cell(value) for value in (None, True, 3, 1 / 3, math.nan, "<b>", 1e-7)] == [
        "",
        "True",
        "3",
        "0.333333",
        "",
        "<b>",
        "1e-07",
    ]
    assert [seconds_text(value) for value in (math.nan, 0.01234, 99.94, 12345.6)] == ["", "0.0123", "99.9", "12346"]


def test_settings_that_differ_are_told_apart_by_type_and_by_being_there():
    runs = [Run(config={"a": 1, "b": 2, "d": None}), Run(config={"a": 1.0, "b": 2, "c": 5})]
    assert differing(runs) == ["a", "c"]


def test_numbers_and_words_are_sorted_as_such():
    found = runs_listing([*rows(2), *rows(1, wd="none")], "Runs")
    numeric = {column.name: column.numeric for column in found.columns}
    assert numeric == {"status": False, "seed": True, "wd": False, "loss": True, "seconds": True, "run": False}
    assert not any(column.name == "reason" for column in found.columns)


def test_a_filter_has_a_choice_and_not_too_many():
    found = runs_listing(rows(listing.MOST_OPTIONS + 1), "Runs")
    assert found.options == {}, "one status, and too many values of wd"
    few = runs_listing([*rows(3), Row(run=Run(config={"lr": 0.1}), status="failed", reason="late")], "Runs")
    assert {few.columns[i].name: values for i, values in few.options.items()} == {
        "status": ["done", "failed"], "wd": ["", "0.01", "0.1", "1"]
    }  # fmt: skip
    assert few.rows[0][:2] == ("failed", "late")


def test_many_runs_are_counted_and_some_are_listed(monkeypatch):
    monkeypatch.setattr(listing, "MOST_ROWS", 5)
    failed = Row(run=Run(config={}, seed=99), status="failed", reason="x")
    found = runs_listing([*rows(9), failed], "Runs")
    assert (found.total, len(found.rows), found.rows[0][0]) == (10, 5, "failed")
    groups = groups_listing({"one": rows(9), "two": [failed]}, {}, "Runs")
    assert (groups.total, len(groups.rows), groups.rows[0][0]) == (10, 5, "two")


def test_results_of_different_kinds_are_words():
    row = Row(run=Run(config={}), final={"a_b": 0.123456, "n": math.nan, **{f"c{i}": float(i) for i in range(5)}})
    (told,) = groups_listing({"one": [row]}, {"one": "one.html"}, "Runs").rows
    assert told == ("one", "done", "0", "", "a b 0.1235, c0 0, c1 1, c2 2 and 2 more", "", "")


def test_the_payload_closes_no_script():
    text = groups_listing({"</script>": rows(1)}, {}, "Runs").payload
    assert "<" not in text
    assert json.loads(text)["rows"][0][0] == "</script>"
