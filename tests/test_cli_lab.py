"""`decaycast lab` as people and scripts use it: list, run, report, their JSON, their errors and their exit codes."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from tests.commands import Command, command, error_line
from tests.lab.figure_samples import NeedsAll, OwnTraining, Sample

from decaycast import cli_lab
from decaycast.core.experiment import Row, Run
from decaycast.lab import figures as lab
from decaycast.lab.store import Store, load_export


@pytest.fixture
def decaycast(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `decaycast lab ...` in a folder of its own, on three made-up figures."""
    found = [Sample(), NeedsAll(decays=(0.01, 0.3)), OwnTraining()]
    monkeypatch.setattr(lab, "figures", lambda: found)
    monkeypatch.setattr(cli_lab, "figures", lambda: found)
    return command(monkeypatch, capfd, tmp_path, "lab")


SMOKE = ("--size", "smoke", "--workers", "1")


# -- list


def test_list_shows_claims_runs_and_what_the_store_has(decaycast: Command, tmp_path: Path):
    empty = decaycast("list", "--json")
    assert [item["name"] for item in empty.json] == ["one/losses", "one/needs-all", "two/own"]
    assert empty.json[0]["runs"] == {"smoke": 2, "small": 2, "paper": 2}
    assert empty.json[0]["done"] == {"smoke": 0, "small": 0, "paper": 0}
    assert not (tmp_path / "decaycast-out").exists(), "looking makes no store"
    decaycast("run", "one/losses", *SMOKE)
    printed = decaycast("list")
    assert printed.code == 0 and "finished runs of those needed, by size" in printed.out
    assert "Networks learn [most of the time] | if trained." in printed.words, "brackets are no markup"
    done = {item["name"]: item["done"]["smoke"] for item in decaycast("list", "--json").json}
    assert done == {"one/losses": 2, "one/needs-all": 1, "two/own": 0}, "a shared run counts for both"
    line = next(line for line in printed.out.splitlines() if "needs-all" in line)
    assert re.findall(r"\d+/\d+", line) == ["1/2", "0/2", "0/2"]


def test_list_takes_a_pattern(decaycast: Command):
    assert [item["name"] for item in decaycast("list", "two/...", "--json").json] == ["two/own"]


def test_a_program_without_figures_lists_none(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_lab, "figures", list)
    assert decaycast("list", "--json").json == []


def test_the_real_figures_are_listed(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert len(lab.select("l2")) >= 2


# -- run


def test_run_trains_what_is_missing_and_report_judges_it(decaycast: Command, tmp_path: Path):
    first = decaycast("run", "*", *SMOKE, "--store", "rows.sqlite")
    assert first.code == 0, first.err
    assert "5 of 5 runs to train (5 of them not seen before, so without an estimate)" in first.err
    assert "one/losses 2 0 one/needs-all 2 0 two/own 2 0" in first.words
    assert "next     decaycast lab report '*' --size smoke --store rows.sqlite" in first.out
    again = decaycast("run", "*", *SMOKE, "--store", "rows.sqlite", "--json")
    assert again.code == 0 and again.err == ""
    assert {key: again.json[key] for key in ("size", "runs", "trained", "failed", "expected_seconds")} == {
        "size": "smoke", "runs": 5, "trained": 0, "failed": 0, "expected_seconds": 0
    }  # fmt: skip
    assert again.json["done"] == {"one/losses": 2, "one/needs-all": 2, "two/own": 2}

    told = decaycast("report", "--size", "smoke", "--store", "rows.sqlite", "--out", "pages")
    assert told.code == 0 and told.err == "" and "pages    pages/index.html" in told.out
    assert "one/losses held the losses [of all] 2 of 2" in told.words
    pages = [
        tmp_path / "pages" / name for name in ("index.html", "one/losses.html", "one/needs-all.html", "two/own.html")
    ]
    assert all(page.is_file() for page in pages)
    assert "Networks learn [most of the time] | if trained." in pages[1].read_text(encoding="utf-8")


def test_run_prices_from_rows_of_another_size(decaycast: Command):
    decaycast("run", "one", *SMOKE)
    small = decaycast("run", "one", "--size", "small", "--workers", "1")
    assert re.search(r"3 of 3 runs to train, about \d+ s with 1 workers$", small.err.strip())


def test_the_price_is_shared_by_the_workers():
    nan = float("nan")
    assert cli_lab._plan(9, [100.0, 20.0, nan], 2) == (
        "3 of 9 runs to train, about 60 s with 2 workers (1 of them not seen before, so without an estimate)"
    )
    assert cli_lab._plan(9, [], 4) == "0 of 9 runs to train"


def test_durations_are_for_people():
    assert [cli_lab._duration(seconds) for seconds in (0.2, 119, 120, 7199, 7200, 3e5)] == [
        "0 s", "119 s", "2 min", "120 min", "2 h", "83 h"
    ]  # fmt: skip


def test_a_failed_training_exits_with_1_and_can_be_tried_again(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    trained: list[Run] = []

    def fails(run: Run, **options: Any) -> Row:
        trained.append(run)
        raise FloatingPointError("a loss [of nan]")

    with monkeypatch.context() as patch:
        patch.setattr(lab, "train_run", fails)
        ended = decaycast("run", "one", *SMOKE)
        assert ended.code == 1 and ended.words.count("FloatingPointError: a loss [of nan]") == 3
        assert "one/losses 0 2 one/needs-all 0 2" in ended.words
        kept = decaycast("run", "one", *SMOKE, "--json")
        assert kept.code == 1 and kept.json["failed"] == 3 and kept.json["trained"] == 0
    told = decaycast("report", "one/needs-all", "--size", "smoke", "--json")
    assert told.code == 0 and told.json["figures"][0]["failed"] == 2
    again = decaycast("run", "one", *SMOKE, "--retry-failed")
    assert again.code == 0 and len(trained) == 3
    assert "one/losses 2 0 one/needs-all 2 0" in again.words


def test_ctrl_c_is_130_and_the_next_call_goes_on(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    real, trained = lab.train_run, []

    def interrupted(run: Run, **options: Any) -> Row:
        if len(trained) == 1:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(run.key)
        return real(run, **options)

    monkeypatch.setattr(lab, "train_run", interrupted)
    ended = decaycast("run", "one", *SMOKE)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert "interrupted; finished runs are kept, and the same command goes on from them" in ended.err
    assert decaycast("run", "one", *SMOKE).code == 0
    assert len(trained) == 4 and len({*trained}) == 4, "each run once"


@pytest.mark.slow
def test_a_killed_run_keeps_its_rows_and_goes_on(tmp_path: Path):
    figure = next(figure for figure in lab.figures() if getattr(type(figure), "train", None) is None)
    store = tmp_path / "rows.sqlite"
    command = [sys.executable, "-m", "decaycast", "lab", "run", figure.name, "--size", "smoke", "--store", str(store)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while count_rows(store) < 1:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    kept = count_rows(store)
    done = subprocess.run(
        [*command, "--workers", "1", "--json"], capture_output=True, text=True, timeout=240, check=True
    )
    read = json.loads(done.stdout)
    assert read["failed"] == 0 and read["done"] == {figure.name: read["runs"]}
    assert read["trained"] <= read["runs"] - kept


def count_rows(store: Path) -> int:
    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as database:
            return database.execute("SELECT count(*) FROM rows").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


# -- report


def test_report_says_what_is_missing_and_trains_nothing(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    decaycast("run", "one/losses", *SMOKE)
    monkeypatch.setattr(lab, "train_run", lambda *arguments, **options: pytest.fail("report has trained"))
    told = decaycast("report", "*", "--size", "smoke")
    assert told.code == 0
    assert told.err.splitlines() == [
        "note: one/needs-all: 1 of 2 runs are missing; decaycast lab run one/needs-all --size smoke",
        "note: two/own: 2 of 2 runs are missing; decaycast lab run two/own --size smoke",
    ]
    assert "these 1 of 2 rows cannot be judged (IndexError: list index out of range)" in told.words
    answer = decaycast("report", "*", "--size", "smoke", "--json")
    assert answer.err == "" and [item["missing"] for item in answer.json["figures"]] == [0, 1, 2]
    assert answer.json["index"] == "decaycast-out/figures/index.html"
    assert answer.json["figures"][0]["page"] == "decaycast-out/figures/one/losses.html"


def test_rows_can_be_exported_and_reported_from_the_file(decaycast: Command, tmp_path: Path):
    decaycast("run", "one", *SMOKE, "--export", "all.jsonl.gz")
    assert len(load_export(tmp_path / "all.jsonl.gz")) == 3
    decaycast("report", "one/losses", "--size", "smoke", "--export", "some.jsonl.gz", "--out", "first")
    assert len(load_export(tmp_path / "some.jsonl.gz")) == 2
    (tmp_path / "decaycast-out" / "lab.sqlite").unlink()
    told = decaycast("report", "one/losses", "--size", "smoke", "--rows", "some.jsonl.gz", "--out", "second")
    assert told.code == 0 and "one/losses held the losses [of all] 2 of 2" in told.words
    pages = [(tmp_path / folder / "one" / "losses.html").read_bytes() for folder in ("first", "second")]
    assert len(pages[0]) == pytest.approx(len(pages[1]), rel=1e-3)


def test_the_markdown_table_is_all_that_is_printed(decaycast: Command):
    decaycast("run", "one/losses", *SMOKE)
    told = decaycast("report", "one", "--size", "smoke", "--markdown")
    assert told.out.startswith("| figure | claim | verdict | why | size | runs |\n| --- |")
    assert told.out.count("\n") == 4 and told.out.endswith("| smoke | 1 of 2 |\n")


# -- refusals


@pytest.mark.parametrize("verb", ["list", "run", "report"])
@pytest.mark.parametrize("pattern", ["one/loses", "../../etc/passwd", "[/bold]", "<script>", "\x1b[31m", "x" * 5000])
def test_patterns_that_name_nothing_are_one_line(decaycast: Command, tmp_path: Path, verb: str, pattern: str):
    line = error_line(decaycast(verb, pattern))
    assert "unknown figure" in line or "at most 100 characters" in line
    assert "\x1b" not in line
    assert ("did you mean 'one/losses'?" in line) == (pattern == "one/loses")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "there is no store decaycast-out/lab.sqlite; train with `decaycast lab run`, or name a store or --rows"),
        (["report", "--store", "no/where.sqlite"], "there is no store no/where.sqlite"),
        (["report", "--rows", "nothing.jsonl.gz"], "cannot read export nothing.jsonl.gz"),
        (["report", "--rows", "text"], "cannot read export text"),
        (["report", "--store", "text"], "text is not a decaycast store"),
        (["list", "--store", "text"], "text is not a decaycast store"),
        (["run", "one", "--store", "text/below.sqlite"], "cannot create the folder of store text/below.sqlite"),
        (["run", "one", "--workers", "0"], "workers must be at least 1, got 0"),
        (["report", "--markdown", "--json"], "--markdown and --json both say what to print; give one of them"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(decaycast: Command, tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "text").write_text("no database, no archive; " * 50)
    ended = decaycast(*arguments)
    assert ended.code == 2 and ended.out == ""
    assert message in ended.err.splitlines()[-1] and ended.err.splitlines()[-1].startswith("error: ")


def test_pages_that_cannot_be_written_are_one_line(decaycast: Command, tmp_path: Path):
    with Store(tmp_path / "rows.sqlite"):
        pass
    (tmp_path / "file").write_text("in the way")
    line = error_line(decaycast("report", "one/losses", "--store", "rows.sqlite", "--out", "file/below"))
    assert "ReportError: cannot write file/below/one/losses.html" in line


def test_help_names_the_verbs_and_a_wrong_size_is_refused(decaycast: Command):
    assert all(verb in decaycast("--help").out for verb in ("list", "run", "report"))
    ended = decaycast("run", "one", "--size", "huge")
    assert ended.code == 2 and "huge" in ended.err and "smoke" in ended.err
