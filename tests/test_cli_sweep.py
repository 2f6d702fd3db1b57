"""`decaycast sweep`: planned and priced, trained once, resumed, exported; and one line for what cannot be."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.commands import Command, command
from tests.lab.clusters import require_cluster

from decaycast import cli, cli_sweep
from decaycast.core.experiment import Row, Run
from decaycast.lab.store import Store, load_export
from decaycast.lab.sweeps import Plan
from decaycast.lab.trial import train_run

TINY = ("--model", "mlp-8x1", "--train-size", "64", "--batch-size", "16", "--budget", "30")
GRID = (*TINY, "--lr", "0.01:0.1:log2", "--weight-decay", "1e-4,1e-3", "--seeds", "2")


@pytest.fixture
def decaycast(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    return command(monkeypatch, capfd, tmp_path, "sweep", columns=200)


def test_a_dry_run_prints_plan_and_price_and_trains_nothing(decaycast, tmp_path: Path):
    told = decaycast(*GRID, "--dry-run", "--workers", "2")
    assert told.code == 0 and list(tmp_path.iterdir()) == []
    assert "lr 0.01, 0.1 weight_decay 0.0001, 0.001 seeds 0, 1" in told.words
    assert re.search(r"price 8 of 8 runs to train, 8 full runs, about \d+ s with 2 workers$", told.words)
    answer = decaycast(*GRID, "--dry-run", "--on", "here", "--json").json
    assert answer["axes"] == {"lr": [0.01, 0.1], "weight_decay": [0.0001, 0.001]} and answer["seeds"] == [0, 1]
    assert (answer["runs"], answer["missing"], answer["fre"], answer["workers"]) == (8, 8, 8.0, 1)
    assert answer["expected_seconds"] > 0


def test_a_sweep_trains_what_is_missing_and_says_what_was_best(decaycast, tmp_path: Path):
    first = decaycast(*GRID, "--on", "here", "--export", "rows.csv")
    assert first.code == 0, first.err
    assert "8 of 8 runs to train, 8 full runs, about" in first.err
    assert "best of 4 settings" in first.out and "trained 8 runs in" in first.words
    with Store(tmp_path / "decaycast-out" / "sweep.sqlite") as store:
        rows = store.read()
    by_lr = {lr: [row.curve["validation_loss"][-1] for row in rows if row.run.config["lr"] == lr] for lr in (0.01, 0.1)}
    assert len(rows) == 8 and sum(by_lr[0.1]) < sum(by_lr[0.01])
    assert "lr weight_decay validation loss +- seeds failed 0.1 " in first.words
    with (tmp_path / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == [run.key for run in _plan().runs]
    wider = decaycast(
        *TINY, "--lr", "0.01,0.1,0.05", "--weight-decay", "1e-4,1e-3", "--seeds", "2", "--on", "here", "--json"
    )
    assert wider.code == 0 and wider.err == ""
    assert (wider.json["runs"], wider.json["trained"], wider.json["failed"], wider.json["fre"]) == (12, 4, 0, 4.0)
    best = wider.json["cells"][0]
    assert best["done"] == 2 and best["settings"].keys() == {"lr", "weight_decay"}
    assert [cell["mean"] for cell in wider.json["cells"]] == sorted(cell["mean"] for cell in wider.json["cells"])


def _plan() -> Plan:
    named = {
        "data": "digits",
        "train_size": "64",
        "model": "mlp-8x1",
        "optimizer": "sgd",
        "lr": "0.01,0.1",
        "momentum": "0.9",
    }
    named |= {"weight_decay": "1e-4,1e-3", "schedule": "cosine", "steps": "30", "batch_size": "16", "rule": "constant"}
    return cli_sweep._plan(named, [], "2")


def test_rows_are_those_of_decaycast_train(decaycast, monkeypatch, tmp_path: Path, capfd):
    arguments = [*TINY, "--lr", "0.1", "--weight-decay", "0.001", "--seed", "1", "--store", "rows.sqlite", "--json"]
    monkeypatch.setattr(sys, "argv", ["decaycast", "train", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    capfd.readouterr()
    told = decaycast(*GRID, "--on", "here", "--store", "rows.sqlite", "--json")
    assert told.json["trained"] == 7, "the run that train has made is not trained again"


def test_any_run_setting_can_be_varied(decaycast):
    told = decaycast(
        *TINY, "--vary", "points=5,6", "--vary", "pool=1", "--on", "here", "--json", "--metric", "accuracy"
    )
    assert told.code == 0 and told.json["metric"] == "validation_accuracy"
    assert sorted(cell["settings"]["points"] for cell in told.json["cells"]) == [5, 6]


def test_exports_by_ending(decaycast, tmp_path: Path):
    assert decaycast(*TINY, "--on", "here", "--export", "rows.jsonl.gz").code == 0
    (row,) = load_export(tmp_path / "rows.jsonl.gz")
    assert row.curve["step"][-1] == 30
    parquet = pytest.importorskip("pyarrow.parquet")
    assert decaycast(*TINY, "--on", "here", "--export", "rows.parquet").code == 0
    assert parquet.read_table(tmp_path / "rows.parquet")["last_step"].to_pylist() == [30]


def test_progress_says_done_failed_and_best():
    plan = _plan()
    runs = plan.runs[:4]
    with cli_sweep._Watch(runs, [1.0, float("nan"), 2.0, 3.0], plan, "validation_loss", quiet=True) as watch:
        assert watch.note() == "0 of 4 runs"
        watch.on_row(Row(run=runs[0], curve={"validation_loss": [3.0, 0.5]}))
        watch.on_row(Row(run=runs[1], status="failed", curve={"validation_loss": [0.1]}))
        watch.on_row(Row(run=runs[2], curve={"validation_loss": [0.7]}))
        assert watch.note() == "3 of 4 runs, 1 failed, best validation loss 0.5 (lr 0.01, weight decay 0.0001)"
        assert watch._progress.tasks[0].completed == 1 + 2 + 2 and watch._progress.tasks[0].total == 8
    with cli_sweep._Watch(runs, [1.0] * 4, plan, "validation_accuracy", quiet=True) as watch:
        for run, value in zip(runs, (0.5, 0.9, 0.7)):
            watch.on_row(Row(run=run, curve={"validation_accuracy": [value]}))
        assert "best validation accuracy 0.9 (lr 0.01, weight decay 0.001)" in watch.note()


def test_failed_runs_are_counted_and_a_sweep_without_any_result_exits_with_1(decaycast, monkeypatch):
    def fails(run: Run, **options: Any) -> Row:
        if run.config["lr"] == 0.1:
            raise FloatingPointError("loss is nan")
        return train_run(run, **options)

    monkeypatch.setattr(cli_sweep, "train_run", fails)
    some = decaycast(*GRID, "--on", "here")
    assert (
        some.code == 0
        and "failed 4 runs; their reasons are in the store, --retry-failed trains them again" in some.words
    )
    none = decaycast(*TINY, "--lr", "0.1", "--on", "here", "--store", "other.sqlite", "--json")
    assert none.code == 1 and none.json["failed"] == 1 and none.json["cells"][0]["mean"] is None
    monkeypatch.undo()


def test_a_pruned_sweep_says_what_it_has_stopped(decaycast, monkeypatch):
    def forecast(run: Run, **options: Any) -> Row:
        return Row(
            run=run, reason="trust: so it is", final={"weight_decay": 0.01, "low": 0.005, "high": 0.02, "cost": 0.25}
        )

    monkeypatch.setattr(cli_sweep, "train_forecast", forecast)
    grid = (*TINY, "--weight-decay", "1e-4:1:log5", "--seeds", "2", "--on", "here", "--prune", "--max-cost", "0.25")
    planned = decaycast(*grid, "--dry-run")
    assert "prune 1 forecasts, at most 0.25 full runs, decide which of these are trained" in planned.words
    told = decaycast(*grid)
    assert "8 of 10 runs are not trained to the end; 0.25 full runs spent" in told.err
    assert "pruned 2.25 of 10 full runs, 0.25 of them for the forecasts" in told.words
    again = decaycast(*grid, "--json").json
    assert (again["stopped"], again["trained"], again["forecast_fre"]) == (8, 0, 0.25)
    assert [cell["settings"] for cell in again["cells"]] == [{"weight_decay": 0.01}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "1:0:log5"), "lr '1:0:log5' ends below its start; write 0:1:lin5"),
        (("--lr", "0.1:1:log0"), "lr '0.1:1:log0' has no values"),
        (("--seeds", "0"), "0 seeds are no runs; give at least 1"),
        (("--weight-decay", ""), "weight_decay '' has an empty value"),
        (("--model", "mpl"), "unknown model 'mpl'"),
        (("--on", "rya"), "unknown place to train 'rya'; did you mean 'ray'?"),
        (("--on", "here", "--workers", "3"), "'here' trains one run at a time, got 3 workers"),
        (("--address", "host:1"), "an address is that of a Ray cluster, got 'host:1' with 'processes'"),
        (("--vary", "points"), "--vary is NAME=VALUES, as in points=30, got 'points'"),
        (("--vary", "lr=1"), "lr has an option of its own; write --lr 1"),
        (("--vary", "steps=100"), "steps has an option of its own; write --budget 100"),
        (("--vary", "pionts=1"), "unknown run setting 'pionts'; did you mean 'points'?"),
        (("--metric", "los"), "unknown metric 'los'; did you mean 'loss'?"),
        (("--export", "rows.xls"), "--export writes .csv, .parquet or .jsonl.gz, got 'rows.xls'"),
        (("--prune", "--max-cost", "2"), "max_cost must be in (0, 1] full-run equivalents, got 2.0"),
        (("--store", "file/rows.sqlite"), "cannot create the folder of store file/rows.sqlite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_one_line_and_trains_nothing(decaycast, tmp_path: Path, arguments, message):
    (tmp_path / "file").write_text("")
    ended = decaycast("--budget", "30", *arguments)
    assert ended.code == 2 and ended.out == ""
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_an_unreachable_cluster_is_one_line(decaycast, tmp_path: Path):
    pytest.importorskip("ray")
    began = time.monotonic()
    ended = decaycast(*TINY, "--on", "ray", "--address", "127.0.0.1:9")
    assert ended.code == 2 and time.monotonic() - began < 60
    assert "no Ray cluster answers at 127.0.0.1:9 within 5 s" in ended.err.splitlines()[-1]
    assert "start one there with `ray start --head --port 9`" in ended.err.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_same_command(tmp_path: Path):
    store = tmp_path / "rows.sqlite"
    command = [sys.executable, "-m", "decaycast", "sweep", *TINY, "--seeds", "40", "--vary", "points=40"]
    command += ["--store", str(store), "--json"]
    with subprocess.Popen([*command, "--on", "processes", "--workers", "2"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while _count(store) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    kept = _count(store)
    done = subprocess.run([*command, "--on", "here"], capture_output=True, text=True, timeout=240, check=True)
    told = json.loads(done.stdout)
    assert told["runs"] == 40 and told["failed"] == 0 and 40 - kept - 2 <= told["trained"] <= 40 - kept
    assert _count(store) == 40


def _count(store: Path) -> int:
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM rows").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["processes", "replicas", "ray"])
def test_every_place_trains_the_same_grid(decaycast, tmp_path: Path, place: str):
    if place == "ray":
        require_cluster()
    here = decaycast(*GRID, "--on", "here", "--json")
    there = decaycast(*GRID, "--on", place, "--workers", "2", "--store", "there.sqlite", "--json")
    assert there.code == 0, there.err
    assert there.err == "" or place == "ray"  # Ray may warn of a slow machine; what it says is not in the JSON
    assert [cell["settings"] for cell in there.json["cells"]] == [cell["settings"] for cell in here.json["cells"]]
    for one, other in zip(here.json["cells"], there.json["cells"]):
        assert other["done"] == 2 and other["mean"] == pytest.approx(one["mean"], rel=1e-4)
