"""docs/l2.md shows what the committed rows say, and no figure of the room is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from decaycast.core.experiment import Row
from decaycast.lab.figures import select
from decaycast.lab.findings import assess, verdict_table
from decaycast.lab.store import load_export

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "l2.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return load_export(ROOT / "docs" / "rows" / "l2.jsonl.gz")


def test_the_table_of_the_page_is_what_the_rows_give(rows: list[Row]):
    table = verdict_table([assess(figure, rows, "small") for figure in select("l2/*")])
    assert table in PAGE, f"the verdicts have changed; docs/l2.md needs\n{table}"


def test_every_row_belongs_to_a_figure(rows: list[Row]):
    wanted = {run.key for figure in select("l2/*") for run in figure.runs("small")}
    assert {row.run.key for row in rows} <= wanted


def test_what_is_not_held_is_explained(rows: list[Row]):
    for figure in select("l2/*"):
        if assess(figure, rows, "small").verdict.outcome != "held":
            assert f"**{figure.name}**" in PAGE, f"say in docs/l2.md why {figure.name} does not hold"
