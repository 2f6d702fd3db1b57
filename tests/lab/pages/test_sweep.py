"""The page of a sweep: its best setting by two routes, its map and lines, and sweeps that are odd."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from tests.lab.pages import page_samples as samples
from tests.lab.test_report import Page, assert_loads_nothing

from decaycast.core.experiment import Row, Run
from decaycast.lab.pages import sweep as sweep_page
from decaycast.lab.pages import sweep_plots
from decaycast.lab.pages.sweep import write_sweep_page
from decaycast.lab.pages.sweep_grid import Grid, table_of
from decaycast.lab.store import Store

ROWS = samples.sweep_rows()
AXES = ("lr", "weight_decay", "optimizer")


def sweep(tmp_path, rows=ROWS, **options) -> Page:
    return Page(write_sweep_page(tmp_path / "sweep.html", rows, **options).read_text(encoding="utf-8"))


def grid(rows=ROWS, axes=AXES, metric="validation_loss") -> Grid:
    return Grid.of(table_of(rows), axes, metric)


def by_hand(rows=ROWS) -> dict[tuple, list[float]]:
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        values = groups.setdefault(tuple(row.run.config[name] for name in AXES), [])
        if row.status == "done":
            values.append(row.curve["validation_loss"][-1])
    return groups


def test_settings_are_means_over_seeds_with_their_standard_error():
    found, groups = grid(), by_hand()
    assert [axis.name for axis in found.axes] == ["lr", "weight_decay", "optimizer"]
    assert len(found.cells) == len(groups) == 40
    for cell in found.cells:
        values = groups[tuple(axis.values[code] for axis, code in zip(found.axes, cell.codes, strict=True))]
        assert cell.done == len(values) and cell.failed == 2 - len(values)
        if values:
            assert cell.mean == pytest.approx(statistics.mean(values))
            assert cell.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(2))
    means = [cell.mean for cell in found.cells if cell.done]
    assert means == sorted(means) and math.isnan(found.cells[-1].mean)
    assert found.cells[0].codes == (2, 2, 1)  # the middle rate, the last decay but one, sgd after adamw


def test_higher_is_better_unless_it_is_a_loss_or_an_error():
    assert grid(metric="validation_accuracy").higher_is_better
    assert grid(metric="validation_accuracy").cells[0].codes == grid().cells[0].codes
    assert not grid(metric="test_loss").higher_is_better
    worst = Grid.of(table_of(ROWS), AXES, "validation_loss", higher_is_better=True).cells[0]
    assert worst.mean == max(cell.mean for cell in grid().cells)


def test_a_setting_with_a_failed_run_comes_after_those_without():
    broken = [replace(row, status="failed", reason="x") if i == 0 else row for i, row in enumerate(ROWS)]
    cells = grid(broken).cells
    (cell,) = [cell for cell in cells if cell.failed == 1]
    assert cells.index(cell) == 40 - 3, "before the two without a result"
    infinite = [replace(row, curve={"validation_loss": (math.inf,)}) if i == 0 else row for i, row in enumerate(ROWS)]
    assert [cell.failed for cell in grid(infinite).cells].count(1) == 1


def test_the_page_tells_the_best_and_where_it_lies(tmp_path):
    page = sweep(tmp_path, settings={"model": "mlp", "data": "digits", "steps": 3000}, command=samples.COMMAND)
    for said in (
        "Sweep: mlp on digits",
        "80 runs, 40 settings",
        "Best validation loss, mean of 2 seeds 0.3005 standard error 0.0005",
        "lr 0.04 weight decay 0.001 optimizer sgd",
        "finished runs 76 4 failed",
        "5 lr × 4 weight decay × 2 optimizer",
        "lower is better",
        samples.COMMAND,
        "steps 3,000",
        "0123456789abcdef0123456789abcdef01234567-dirty",
    ):
        assert said in page.text, said
    assert "edge" not in page.text
    assert "one standard error of it" not in page.text


def test_an_answer_at_the_edge_or_among_equals_says_so(tmp_path):
    low = [row for row in ROWS if row.run.config["lr"] >= 0.04]  # type: ignore[operator]
    assert "The best lies at the edge of the swept lr: go on beyond it." in sweep(tmp_path, low).text
    by_decay = [replace(row, curve={"validation_loss": (row.run.config["weight_decay"],)}) for row in ROWS]
    assert grid(by_decay, AXES[1:2]).cells[0].codes == (0,) and grid(by_decay, AXES[1:2]).edges() == [], (
        "nothing is below 0"
    )
    noisy = [replace(row, curve={"validation_loss": (row.curve["validation_loss"][-1] + 0.03 * row.run.seed,)})
             for row in ROWS if row.status == "done"]  # fmt: skip
    found = grid(noisy)
    best_cell, *others = found.cells
    near = [cell for cell in others if cell.mean - best_cell.mean <= math.hypot(best_cell.stderr, cell.stderr)]
    assert found.near_best() == len(near) > 0
    assert f"{len(near)} other setting" in sweep(tmp_path, noisy).text


def test_the_map_has_a_view_of_the_best_and_of_each_optimiser(tmp_path):
    heat, lines, every = sweep(tmp_path).payloads
    assert [view["label"] for view in heat["views"]] == ["best of all", "optimizer adamw", "optimizer sgd"]
    field = heat["figure"]["data"][0]["z"]
    assert field == heat["views"][0]["z"][0]
    assert field[2][2] == pytest.approx(0.3005) and heat["views"][1]["z"][0][2][2] == pytest.approx(0.3205)
    assert field[3][4] is None, "both of its runs failed"
    assert heat["figure"]["data"][0]["x"] == ["0.01", "0.02", "0.04", "0.08", "0.16"]
    assert heat["figure"]["data"][0]["y"] == ["0", "0.0001", "0.001", "0.01"]
    star = heat["figure"]["data"][1]
    assert (star["x"], star["y"]) == ([heat["figure"]["data"][0]["x"][2]], [heat["figure"]["data"][0]["y"][2]])
    assert heat["views"][1]["x"][1] == [] and heat["views"][2]["x"][1] == star["x"]
    assert heat["figure"]["data"][0]["reversescale"] is True
    assert [trace["name"] for trace in lines["figure"]["data"] if trace["mode"] == "lines+markers"] == [
        f"weight decay {text}" for text in heat["figure"]["data"][0]["y"]]  # fmt: skip
    joined = [trace["x"] for trace in lines["figure"]["data"] if trace["mode"] == "lines+markers"]
    assert joined == [[0.01, 0.02, 0.04, 0.08, 0.16]] * 3 + [[0.01, 0.02, 0.04, 0.08]], "of one optimiser, in order"
    assert len(every["figure"]["data"][0]["x"]) == 76


def test_a_few_far_off_do_not_take_the_colours(tmp_path):
    rows = [replace(row, curve={"validation_loss": (1e6,)}) if i == 0 else row for i, row in enumerate(ROWS)]
    heat = sweep(tmp_path, [row for row in rows if row.run.config["optimizer"] == "sgd"]).payloads[0]
    assert heat["figure"]["data"][0]["zmax"] < 1
    assert "settings are worse than the colours reach" in sweep(tmp_path, rows[:20]).text


def test_random_values_make_no_map_and_no_lines(tmp_path):
    generator = np.random.default_rng(0)
    config = lambda: {"lr": float(generator.uniform(0.01, 1)), "weight_decay": float(generator.uniform(1e-5, 1))}  # noqa: E731
    rows = [Row(run=Run(config=config(), seed=i), curve={"validation_loss": (float(i),)}) for i in range(50)]
    page = sweep(tmp_path, rows)
    (every,) = page.payloads
    assert len(every["figure"]["data"][0]["x"]) == 50
    assert "50 lr × 50 weight decay" in page.text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "No run of this sweep has finished"),
        ([row for row in ROWS if row.status == "failed"], "the reasons stand in the table of its runs"),
        (ROWS[:1], "Best validation loss, mean of 1 seed"),
        ([replace(ROWS[0], run=replace(ROWS[0].run, seed=seed)) for seed in range(4)], "mean of 4 seeds"),
    ],
    ids=["none", "failed", "one", "seeds"],
)
def test_odd_sweeps_still_make_a_page(tmp_path, rows, said):
    page = sweep(tmp_path, rows)
    assert said in page.text
    assert_loads_nothing(page)


def test_a_table_of_the_store_makes_the_same_page_as_its_rows(tmp_path):
    with Store(tmp_path / "rows.sqlite") as store:
        store.extend(ROWS)
        table = store.table()
    ours = table_of(ROWS)
    assert sorted(ours.columns) == sorted(table.columns)
    first = sweep(tmp_path, ROWS, provenance={})
    second = sweep(tmp_path, table, axes=AXES, provenance={})
    assert first.text == second.text and first.payloads == second.payloads and first.listings == second.listings
    found = Grid.of(table, None, "validation_loss")
    assert {axis.name for axis in found.axes} == set(AXES), "the run settings that differ"


def test_every_run_is_listed_best_first(tmp_path, monkeypatch):
    (listing,) = sweep(tmp_path).listings
    names = [column["name"] for column in listing["columns"]]
    assert names == ["status", "lr", "weight decay", "optimizer", "seed", "validation loss", "test loss",
                     "validation accuracy", "seconds", "reason", "run"]  # fmt: skip
    losses = [float(row[5]) for row in listing["rows"] if row[5]]
    assert losses == sorted(losses) and len(losses) == 76
    assert [row[0] for row in listing["rows"][-4:]] == ["failed"] * 4
    monkeypatch.setattr(sweep_page, "MOST_ROWS", 20)
    page = sweep(tmp_path)
    rows = page.listings[0]["rows"]
    assert len(rows) == 20 and [row[0] for row in rows].count("failed") == 4
    assert "This page lists 20 of them; all are in the store." in page.text
    hardly = [row if i % 8 == 0 else replace(row, status="failed", reason="x") for i, row in enumerate(ROWS)]
    keys = [row[-1] for row in sweep(tmp_path, hardly).listings[0]["rows"]]
    assert len(keys) == len({*keys}) == 20, "each run once"


def test_hostile_settings_never_become_markup(tmp_path):
    clean = sweep(tmp_path, samples.sweep_rows(optimizers=("sgd", "adamw")), settings={"model": "m"})
    page = sweep(
        tmp_path,
        samples.sweep_rows(model=samples.EVIL, optimizers=("sgd", samples.EVIL)),
        settings={"model": samples.EVIL},
    )
    assert_loads_nothing(page)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in clean.elements]
    hostile = sweep(tmp_path, [replace(row, run=replace(row.run, config={**row.run.config, "%{x}<b>": str(i % 4)}))
                               for i, row in enumerate(ROWS)], axes=["%{x}<b>", "lr"])  # fmt: skip
    layout = hostile.payloads[0]["figure"]["layout"]
    assert layout["yaxis"]["title"]["text"] == "% {x}&lt;b&gt;"


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the sweep's rows have no setting 'lrr'; they have key, status"):
        sweep(tmp_path, axes=["lrr"])
    with pytest.raises(ValueError, match="the sweep's rows have no metric 'f1'; they have key, status"):
        sweep(tmp_path, metric="f1")
    assert not (tmp_path / "sweep.html").exists()


def test_values_that_look_alike_stay_apart():
    rows = [Row(run=Run(config={"lr": lr}), curve={"validation_loss": (1.0,)}) for lr in (0.12345, 0.123451, 0.2)]
    (axis,) = grid(rows, ["lr"]).axes
    assert axis.texts == ["0.12345", "0.123451", "0.2"]
    mixed = [Row(run=Run(config=config), final={"loss": 1.0}) for config in ({"p": "auto"}, {"p": 2}, {}, {"p": True})]
    (axis,) = Grid.of(table_of(mixed), ["p"], "loss").axes
    assert (axis.values, axis.numeric, axis.texts) == ((None, 2, True, "auto"), False, ["-", "2", "True", "auto"])


def test_many_lines_are_thinned_around_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "MOST_LINES", 2)
    lines = sweep(tmp_path).payloads[1]
    names = [trace["name"] for trace in lines["figure"]["data"] if trace["mode"] == "lines+markers"]
    assert names == ["weight decay 0", "weight decay 0.001", "weight decay 0.01"]
    assert "3 of 4 lines are drawn." in sweep(tmp_path).text


def test_of_very_many_runs_the_plot_has_every_so_many(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_plots, "MOST_RUNS", 10)
    page = sweep(tmp_path)
    every = page.payloads[2]["figure"]["data"][0]
    assert len(every["x"]) == 10 and every["y"][-1] == grid().values[np.isfinite(grid().values)][-1]
    assert "Of 76 runs every so many is here." in page.text
