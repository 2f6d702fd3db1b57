"""Each room's page of evidence shows what its committed rows say, and leaves no figure out; rooms are discovered."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from decaycast.core.experiment import Row
from decaycast.lab.figures import figures, select
from decaycast.lab.findings import assess, verdict_table
from decaycast.lab.store import load_export

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROOMS = sorted({figure.name.partition("/")[0] for figure in figures()})


@cache
def rows_of(room: str) -> list[Row]:
    return load_export(DOCS / "rows" / f"{room}.jsonl.gz")


def page_of(room: str) -> str:
    return (DOCS / f"{room.replace('_', '-')}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_of_the_page_is_what_the_rows_give(room: str):
    table = verdict_table([assess(figure, rows_of(room), "small") for figure in select(f"{room}/*")])
    assert table in page_of(room), f"the verdicts have changed; the page needs\n{table}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_row_belongs_to_a_figure(room: str):
    wanted = {run.key for figure in select(f"{room}/*") for run in figure.runs("small")}
    assert {row.run.key for row in rows_of(room)} <= wanted


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_not_held_is_explained(room: str):
    for figure in select(f"{room}/*"):
        if assess(figure, rows_of(room), "small").verdict.outcome != "held":
            assert f"**{figure.name}**" in page_of(room), f"say in the page of {room} why {figure.name} does not hold"


@pytest.mark.parametrize(
    ("room", "bench"),
    [
        ("stochnorm", "stochnorm"),
        ("label_noise", "label_noise"),
        ("label_noise", "curvature"),
        ("self_distill", "self_distill"),
        ("large_lr", "large_lr"),
    ],
)
def test_the_prices_of_a_page_are_those_of_its_bench(room: str, bench: str):
    measured = (DOCS.parent / "bench" / "results" / f"{bench}.md").read_text(encoding="utf-8")
    lines = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(lines) > 10 and [line for line in lines if line not in page_of(room)] == []
