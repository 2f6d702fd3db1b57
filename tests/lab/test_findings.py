"""A figure is judged on the rows there are, says how many are missing, and its verdict fits into a table."""

from __future__ import annotations

import pytest
from tests.lab.figure_samples import NeedsAll, Sample

from decaycast.core.experiment import Row, Verdict
from decaycast.lab.findings import Finding, assess, verdict_table


def rows_of(figure: Sample, size="smoke") -> list[Row]:
    curve = {"step": [1, 2], "validation_loss": [2.0, 1.0]}
    return [Row(run=run, curve=curve) for run in figure.runs(size)]


def test_rows_of_other_runs_and_sizes_are_passed_over():
    figure = Sample()
    rows = rows_of(figure, "paper") + rows_of(figure)[::-1]
    found = assess(figure, rows, "smoke")
    assert [row.run for row in found.rows] == figure.runs("smoke")
    assert (found.planned, found.done, found.missing, found.failed) == (2, 2, 0, [])
    assert found.verdict.numbers == {"runs": 2} and len(found.panels[0].traces) == 2
    assert found.page == "one/losses.html"


def test_missing_and_failed_runs_are_counted():
    figure = Sample(decays=(0.0, 0.1, 0.2))
    rows = rows_of(figure)
    failed = Row(run=rows[1].run, status="failed", reason="nan", curve=rows[1].curve)
    found = assess(figure, [rows[0], failed], "smoke")
    assert (found.planned, found.done, found.missing, found.failed) == (3, 1, 1, [failed])
    said = found.to_dict()
    assert {key: said[key] for key in ("planned", "done", "failed", "missing", "outcome", "size", "name")} == {
        "planned": 3, "done": 1, "failed": 1, "missing": 1, "outcome": "held", "size": "smoke", "name": "one/losses"
    }  # fmt: skip


def test_a_finished_row_outweighs_a_failed_one_of_the_same_run():
    figure = Sample(decays=(0.1,))
    (row,) = rows_of(figure)
    failed = Row(run=row.run, status="failed", reason="nan", curve=row.curve)
    for order in ([failed, row], [row, failed]):
        assert assess(figure, order, "smoke").done == 1


def test_a_figure_that_cannot_cope_with_missing_rows_has_not_enough_data():
    figure = NeedsAll()
    rows = rows_of(figure)
    assert assess(figure, rows, "smoke").verdict.outcome == "held"
    found = assess(figure, rows[:1], "smoke")
    assert found.verdict.outcome == "not enough data" and found.panels == []
    assert found.verdict.reason == "these 1 of 2 rows cannot be judged (IndexError: list index out of range)"


def test_a_figure_that_fails_on_all_its_rows_is_an_error():
    figure = NeedsAll(decays=(0.1,))
    with pytest.raises(IndexError):
        assess(figure, rows_of(figure), "smoke")


def test_the_table_keeps_one_line_per_figure_whatever_its_words():
    verdict = Verdict(outcome="not held", reason="slope\n-0.5 | *t* ~ <b>")
    finding = Finding(figure=Sample(), size="small", rows=[], planned=4, verdict=verdict, panels=[])
    assert verdict_table([finding]) == (
        "| figure | claim | verdict | why | size | runs |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        r"| one/losses | Networks learn \[most of the time\] \| if trained. | not held | slope -0.5 \| \*t\* \~ \<b> "
        "| small | 0 of 4 |\n"
    )
