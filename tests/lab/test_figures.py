"""Figures are discovered, selected, priced and run: each training once, by its figure's own function where it has one."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.figure_samples import TINY, Careless, NeedsAll, OwnTraining, Sample

import decaycast.methods
from decaycast.core.experiment import SIZES, Row, Run
from decaycast.lab import figures as lab
from decaycast.lab.data import DataError
from decaycast.lab.store import Store, StoreError, load_export

ROOMS = {
    "alpha/figures.py": "FIGURES = ('a1', 'a2')",
    "beta/figures/__init__.py": "from two_rooms.beta.figures.inner import ONE\nFIGURES = (ONE,)",
    "beta/figures/inner.py": "ONE = 'b1'",
    "gamma/theory.py": "",
    "figures.py": "FIGURES = ('no room',)",
}


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "rows.sqlite") as opened:
        yield opened


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch):
    found = [Sample(), NeedsAll(), OwnTraining(), Sample(name="alone")]
    monkeypatch.setattr(lab, "figures", lambda: found)
    return found


# discovery and selection


def test_rooms_are_searched_for_figures_in_modules_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in ("", "alpha", "beta", "gamma"):
        (tmp_path / "two_rooms" / folder).mkdir()
        (tmp_path / "two_rooms" / folder / "__init__.py").touch()
    for name, text in ROOMS.items():
        path = tmp_path / "two_rooms" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert lab.figures(importlib.import_module("two_rooms")) == ["a1", "a2", "b1"]


def test_the_rooms_of_the_package_have_figures_that_agree_on_shared_runs():
    found = lab.figures()
    assert {figure.name for figure in found} >= {
        figure.name for figure in importlib.import_module("decaycast.methods.l2.figures").FIGURES
    }
    assert lab.figures(decaycast.methods) == found
    for size in SIZES:
        runs = lab.runs_of(found, size)
        assert len({run.key for run in runs}) == len(runs)
        assert set(lab._own_training(found, size)) <= {run.key for run in runs}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("one/losses", ["one/losses"]),
        ("one", ["one/losses", "one/needs-all"]),
        ("one/...", ["one/losses", "one/needs-all"]),
        ("one/*", ["one/losses", "one/needs-all"]),
        ("*/[no]*", ["one/needs-all", "two/own"]),
        ("*", ["one/losses", "one/needs-all", "two/own", "alone"]),
        ("alone", ["alone"]),
    ],
)
def test_a_pattern_selects_by_name_room_or_glob(known, pattern: str, names: list[str]):
    assert [figure.name for figure in lab.select(pattern)] == names


@pytest.mark.parametrize(
    "pattern",
    ["", "three", "ONE", "one/", "on", "../one/losses", "one/losses\n", "[", "<script>", "[bold]", "\x00", "a" * 100],
)
def test_a_pattern_that_selects_nothing_is_refused(known, pattern: str):
    with pytest.raises(ValueError, match="unknown figure .*known: one/losses, one/needs-all, two/own, alone$"):
        lab.select(pattern)


def test_names_are_looked_up_with_an_offer(known):
    assert lab.find_figure("two/own") is known[2]
    with pytest.raises(ValueError, match="unknown figure 'one/loses'; did you mean 'one/losses'"):
        lab.find_figure("one/loses")
    for call in (lab.find_figure, lab.select):
        with pytest.raises(ValueError, match="a figure's name has at most 100 characters, got 5000"):
            call("*a" * 2500)


# running


def count_trainings(monkeypatch: pytest.MonkeyPatch, interrupt_at: int = -1) -> list[float]:
    """Lets `train_run` note what it trains; it is interrupted once, before training number `interrupt_at`."""
    trained: list[float] = []

    def train(run: Run, *, data_dir: str | None) -> Row:
        if len(trained) == interrupt_at and "interrupted" not in flags:
            flags.add("interrupted")
            raise KeyboardInterrupt
        trained.append(float(run.config["weight_decay"]))  # type: ignore[arg-type]
        return Row(run=run, seconds=2.0, provenance={"data": str(data_dir)})

    flags: set[str] = set()
    monkeypatch.setattr(lab, "train_run", train)
    return trained


def test_a_run_that_two_figures_need_is_trained_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    trained, seen = count_trainings(monkeypatch), []
    one, two = Sample(decays=(0.0, 0.1)), Sample(name="one/more", decays=(0.1, 0.2))
    rows = lab.run_figures([one, two], "smoke", store, data_dir="here", on_row=seen.append)
    assert trained == [0.0, 0.1, 0.2] == [row.run.config["weight_decay"] for row in seen]
    assert [row.run.config["weight_decay"] for row in rows["one/losses"]] == [0.0, 0.1]
    assert [row.run.config["weight_decay"] for row in rows["one/more"]] == [0.1, 0.2]
    assert {row.provenance["data"] for row in seen} == {"here"}
    assert lab.run_figure(two, "smoke", store) == rows["one/more"]
    assert len(trained) == 3
    lab.run_figure(two, "small", store)
    assert len(trained) == 5, "another size is another training"


def test_an_interrupted_run_goes_on_with_the_rest(store: Store, monkeypatch: pytest.MonkeyPatch):
    trained = count_trainings(monkeypatch, interrupt_at=2)
    figure = Sample(decays=(0.1, 0.2, 0.3, 0.4))
    with pytest.raises(KeyboardInterrupt):
        lab.run_figure(figure, "smoke", store)
    assert trained == [0.1, 0.2] == [row.run.config["weight_decay"] for row in store.read()]
    assert len(lab.run_figure(figure, "smoke", store)) == 4
    assert trained == [0.1, 0.2, 0.3, 0.4]


def test_failed_runs_are_trained_again_on_demand_only(store: Store, monkeypatch: pytest.MonkeyPatch):
    trained = count_trainings(monkeypatch)
    figure = Sample(decays=(0.1,))
    store.append(Row(run=figure.runs("smoke")[0], status="failed", reason="a power cut"))
    assert lab.run_figure(figure, "smoke", store)[0].reason == "a power cut" and trained == []
    assert lab.run_figure(figure, "smoke", store, retry_failed=True)[0].status == "done"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_figure_with_its_own_training_gets_its_data_and_the_rest_the_labs(store: Store, workers: int):
    rows = lab.run_figures([OwnTraining(), Sample()], "smoke", store, workers=workers)
    for row in rows["two/own"]:
        assert (row.status, row.reason) == ("done", "")
        assert list(row.curve["samples"]) == [50, 20, 10]
        assert 0 <= row.seconds < 60
    assert rows["two/own"][0].provenance == {"device": "made up"}, "what a figure states is kept"
    assert rows["two/own"][1].provenance["torch"]
    assert [row.status for row in rows["one/losses"]] == ["done", "done"]
    assert all("validation_loss" in row.curve and row.final for row in rows["one/losses"])


def test_seconds_that_a_figure_states_are_kept(store: Store):
    assert [row.seconds for row in lab.run_figure(OwnTraining(seconds=7.5), "smoke", store)] == [7.5, 7.5]


def test_a_training_that_returns_no_row_is_a_failed_row(store: Store):
    rows = lab.run_figure(Careless(), "smoke", store)
    assert [row.status for row in rows] == ["failed", "failed"]
    assert rows[0].reason == "TypeError: train must return the Row of the run it got, got None"


def test_figures_that_train_one_run_in_two_ways_are_refused(store: Store):
    with pytest.raises(ValueError, match="figures 'two/own' and 'two/careless' train the same run in different ways"):
        lab.run_figures([OwnTraining(), Careless()], "smoke", store)
    assert store.read() == []
    assert len(lab.run_figures([OwnTraining(), OwnTraining(name="two/again")], "smoke", store)) == 2


def test_data_that_are_not_there_end_it_before_anything_is_trained(store: Store, monkeypatch: pytest.MonkeyPatch):
    trained = count_trainings(monkeypatch)

    class Elsewhere(Sample):
        def runs(self, size):
            first, second = super().runs(size)
            return [first, replace(second, config={**second.config, "train_size": 10**6})]

    with pytest.raises(DataError, match="digits has 1400 samples"):
        lab.run_figure(Elsewhere(), "smoke", store)
    assert trained == [] and store.read() == []
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        lab.run_figure(Sample(), "smoke", store, workers=0)


# prices and exports


def run_of(**config) -> Run:
    return Run(config={**TINY, **config})


def test_a_price_is_the_median_time_per_step_of_trainings_like_it():
    seen = [
        Row(run=run_of(steps=steps, seed_like=0 * steps), seconds=steps * per_step)
        for steps, per_step in ((100, 0.01), (10, 0.02), (50, 0.5))
    ]
    seen.append(Row(run=run_of(steps=10, seed_like=0), status="failed", seconds=1e9))
    wanted = [
        run_of(steps=1000, seed_like=0, weight_decay=0.3, lr=3.0),
        run_of(steps=1000, stop=100, seed_like=0),
        run_of(steps=1000, seed_like=1),
        run_of(steps=1000),
        run_of(steps=1000, seed_like=0, model="mlp-9x9"),
        run_of(steps=1000, seed_like=0, batch_size=1),
    ]
    assert lab.price(wanted, seen) == pytest.approx([20.0, 2.0, *[math.nan] * 4], nan_ok=True)
    assert lab.price([], seen) == [] and math.isnan(lab.price(wanted[:1], [])[0])


def test_exported_rows_come_back_once_each_with_finished_ones_first(tmp_path: Path):
    one, two = (Run(config={"lr": 0.1}, seed=seed) for seed in (1, 2))
    rows = [
        Row(run=one, status="failed", reason="first"),
        Row(run=one, final={"x": 1.0}),
        Row(run=one, status="failed", reason="later"),
        Row(run=two, status="failed", reason="old"),
        Row(run=two, status="failed", reason="new"),
    ]
    assert lab.export_rows(rows, tmp_path / "new" / "rows.jsonl.gz") == 2
    back = {row.run.seed: row for row in load_export(tmp_path / "new" / "rows.jsonl.gz")}
    assert (back[1].status, back[1].final, back[2].reason) == ("done", {"x": 1.0}, "new")
    with pytest.raises(StoreError, match="cannot write export"):
        lab.export_rows(rows, tmp_path / "new" / "rows.jsonl.gz" / "below.jsonl.gz")
