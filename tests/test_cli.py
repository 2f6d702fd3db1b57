"""The command line as people and scripts use it: every verb, its JSON, its errors and its exit codes."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from tests.commands import Command, command, error_line

from decaycast import cli
from decaycast.core.schedule import lr_by_name
from decaycast.core.timescale import efolds
from decaycast.lab import data
from decaycast.lab.store import Store
from decaycast.lab.trial import Trial

TINY = ("--train-size", "300", "--model", "mlp-16x1", "--batch-size", "32")


@pytest.fixture
def decaycast(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `decaycast ...` in a folder of its own, through the entry point."""
    return command(monkeypatch, capfd, tmp_path, columns=100)


def number(text: str, before: str) -> float:
    """The number that follows `before` in printed text."""
    found = re.search(re.escape(before) + r"\s*([-+.\de]+)", text)
    assert found, f"no number after {before!r} in {text!r}"
    return float(found[1])


def words(value: list[str] | str) -> str:
    """Names a case by its arguments."""
    return " ".join(value) if isinstance(value, list) else ""


# -- find


def test_find_prints_what_its_json_says(decaycast: Command, tmp_path: Path):
    command = ("find", "--budget", "200", "--lr", "0.05", *TINY, "--out", "found")
    printed = decaycast(*command)
    assert printed.code == 0, printed.err
    answer = decaycast(*command, "--json")
    assert answer.code == 0 and answer.err == ""
    read = answer.json
    assert number(printed.out, "weight decay ") == float(f"{read['weight_decay']:.3g}")
    assert number(printed.out, "90 % interval") == float(f"{read['interval'][0]:.2g}")
    assert number(printed.out, "e-folds") == float(f"{read['efolds']:.3g}")
    assert number(printed.out, "cost") == float(f"{read['cost']:.2f}") and 0.2 < read["cost"] <= 0.3
    assert f"verdict      {read['verdict']}: " in printed.out
    page = tmp_path / "found" / "forecast.html"
    assert read["page"] == "found/forecast.html" and "found/forecast.html" in printed.out and page.is_file()
    assert "decaycast find --budget 200" in page.read_text(encoding="utf-8")


def test_find_verifies_when_asked(decaycast: Command):
    command = ("find", "--budget", "40", "--lr", "0.05", "--momentum", "0", *TINY, "--verify", "--workers", "1")
    printed, answer = decaycast(*command), decaycast(*command, "--json", "--metric", "loss")
    check = answer.json["verification"]
    assert check["regret"] >= 0 and check["seeds"] == 2
    assert number(printed.out, "regret") == pytest.approx(check["regret"], rel=1e-3, abs=1e-9)
    assert f"best of {len(check['weight_decays'])} weight decays" in " ".join(printed.out.split())


def test_find_may_look_at_accuracy_with_adamw(decaycast: Command):
    answer = decaycast("find", "--budget", "40", "--optimizer", "adamw", "--metric", "accuracy", *TINY, "--json")
    assert answer.json["metric"] == "validation accuracy" and answer.json["higher_is_better"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0"], "the learning rate must be a finite number > 0, got 0.0"),
        (["--lr", "-0.1"], "the learning rate must be a finite number > 0, got -0.1"),
        (["--lr", "nan"], "the learning rate must be a finite number > 0, got nan"),
        (["--lr", "inf"], "the learning rate must be a finite number > 0, got inf"),
        (["--budget", "0"], "the budget must be a whole number of at least 10 optimiser steps, got 0"),
        (["--budget", "-5"], "the budget must be a whole number of at least 10 optimiser steps, got -5"),
        (["--max-cost", "0"], "--max-cost must be in (0, 1] full-run equivalents, got 0.0"),
        (["--max-cost", "nan"], "--max-cost must be in (0, 1] full-run equivalents, got nan"),
        (["--max-cost", "2"], "--max-cost must be in (0, 1] full-run equivalents, got 2.0"),
        (["--momentum", "1"], "the momentum must be in [0, 1), got 1.0"),
        (["--momentum", "nan"], "the momentum must be in [0, 1), got nan"),
        (["--batch-size", "0"], "the batch size must be a whole number >= 1, got 0"),
        (["--train-size", "0"], "train_size must be at least 1, got 0"),
        (["--train-size", "5000"], "digits has 1400 samples to train and validate on"),
        (["--data", "digts"], "unknown data set 'digts'; did you mean 'digits'?"),
        (["--model", "mpl-256x3"], "unknown model 'mpl-256x3'; did you mean 'mlp-256x3'?"),
        (["--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'?"),
        (["--schedule", "cosin"], "unknown schedule 'cosin'; did you mean 'cosine'?"),
    ],
    ids=words,
)
def test_find_refuses_in_one_line(decaycast: Command, tmp_path: Path, arguments: list[str], message: str):
    line = error_line(decaycast("find", "--out", "out", *arguments))
    assert message in line and line.startswith(("error: ValueError: ", "error: DataError: "))
    assert not (tmp_path / "out" / "forecast.html").exists()


def test_find_names_data_that_are_not_there(decaycast: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(name: str, folder: object) -> None:
        raise data.DataError(f"{name} was not found; {data._advice(name, folder)}")  # type: ignore[arg-type]

    monkeypatch.setattr(data, "_download", offline)
    line = error_line(decaycast("find", "--data", "mnist", "--data-dir", "nowhere", "--out", "out"))
    assert "mnist was not found" in line and "nowhere" in line


def test_find_names_an_output_folder_it_cannot_write(decaycast: Command, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    line = error_line(decaycast("find", "--out", "file/below"))
    assert "cannot make the output folder file/below" in line and "choose one you can write to (--out)" in line
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "rows.sqlite").write_bytes(b"not a database at all" * 100)
    line = error_line(decaycast("find", "--out", "taken"))
    assert line.startswith("error: StoreError: ") and "is not a decaycast store" in line


def test_ctrl_c_is_130_and_the_next_call_goes_on(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    command = ("find", "--budget", "200", "--lr", "0.05", *TINY, "--out", "found")
    advance, calls = Trial.advance, []

    def interrupted(self: Trial, *arguments: Any) -> None:
        calls.append(self.config["weight_decay"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        advance(self, *arguments)

    monkeypatch.setattr(Trial, "advance", interrupted)
    ended = decaycast(*command)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert "interrupted; finished runs are kept, and the same command goes on from them" in ended.err
    first = calls[:2]
    calls.clear()
    calls.extend([0.0] * 3)
    assert decaycast(*command).code == 0
    assert calls[3] not in first, "what was finished is not trained again"


# -- train


@pytest.mark.parametrize("rule", ["constant", "cosine", "autol2"])
def test_train_prints_what_its_json_says(decaycast: Command, tmp_path: Path, rule: str):
    command = ("train", "--budget", "60", "--lr", "0.05", "--weight-decay", "0.02", "--rule", rule, *TINY)
    printed, answer = decaycast(*command, "--store", "rows.sqlite"), decaycast(*command, "--json")
    assert printed.code == answer.code == 0 and answer.err == ""
    read = answer.json
    assert read["status"] == "done" and read["step"] == 60 and 0 <= read["test_accuracy"] <= 1
    for name in ("efolds", "validation loss", "test accuracy", "weight decay"):
        cells = re.search(rf"│ {name}\s*│\s*(\S+)\s*│", printed.out)
        assert cells and float(cells[1]) == float(f"{read[name.replace(' ', '_')]:.5g}")
    if rule == "constant":
        shape = lr_by_name("cosine", 60)
        spent = efolds(lr=lambda step: 0.05 * shape(step), weight_decay=0.02, steps=60, momentum=0.9)
        assert read["efolds"] == pytest.approx(spent)
    with Store(tmp_path / "rows.sqlite") as store:
        (row,) = store.read()
    assert row.run.config["rule"] == rule and row.final["test_loss"] == read["test_loss"]


def test_a_training_that_diverges_exits_with_1_and_keeps_its_row(decaycast: Command, tmp_path: Path):
    command = ("train", "--budget", "100", "--lr", "0.5", "--weight-decay", "200", *TINY)
    ended = decaycast(*command, "--json", "--store", "rows.sqlite")
    assert ended.code == 1 and ended.json["status"] == "failed" and "DivergedError" in ended.json["reason"]
    with Store(tmp_path / "rows.sqlite") as store:
        assert [row.status for row in store.read()] == ["failed"]
    printed = decaycast(*command)
    assert printed.code == 1 and "failed: DivergedError: the training loss is" in " ".join(printed.out.split())


def test_no_decay_at_all_can_be_trained(decaycast: Command):
    ended = decaycast("train", "--budget", "20", "--weight-decay", "0", *TINY, "--json")
    assert ended.code == 0 and ended.json["efolds"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight-decay", "-1"], "the weight decay must be a finite number >= 0, got -1.0"),
        (["--weight-decay", "nan"], "the weight decay must be a finite number >= 0, got nan"),
        (["--lr", "0"], "the learning rate must be a finite number > 0, got 0.0"),
        (["--steps", "-3"], "the budget must be a whole number of at least 10 optimiser steps, got -3"),
        (["--rule", "autol"], "unknown weight decay rule 'autol'; did you mean 'autol2'?"),
        (["--rule", "autol2", "--weight-decay", "0"], "must be a positive number between 1e-50 and 1e50, got 0"),
        (["--store", "file/rows.sqlite"], "cannot create the folder of store file/rows.sqlite"),
    ],
    ids=words,
)
def test_train_refuses_in_one_line(decaycast: Command, tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "file").write_text("in the way")
    assert message in error_line(decaycast("train", "--budget", "20", *TINY, *arguments))


def test_ctrl_c_in_training_is_130(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_run", interrupted)
    ended = decaycast("train", *TINY)
    assert ended.code == 130 and "Traceback" not in ended.err


# -- audit and data


def test_audit_prints_what_its_json_says(decaycast: Command):
    command = ("audit", "--lr", "0.1", "--weight-decay", "5e-4", "--steps", "10000", "--momentum", "0.9")
    printed, answer = decaycast(*command), decaycast(*command, "--json")
    assert printed.code == answer.code == 0
    assert answer.json["efolds"] == pytest.approx(5.0) and answer.json["parameters"] == []
    assert printed.out.startswith("5 e-folds of decay over 10000 steps; relaxation time 0.2 of the run")
    text = " ".join(printed.out.split())
    assert answer.json["advice"] in text
    assert number(text, "zero-cost guess: weight decay") == float(f"{answer.json['usual_weight_decay']:.3g}")


def test_audit_follows_schedule_optimizer_and_convention(decaycast: Command):
    recipe = ("audit", "--lr", "0.001", "--weight-decay", "0.1", "--steps", "10000", "--json")
    assert decaycast(*recipe, "--optimizer", "adamw").json["efolds"] == pytest.approx(1.0)
    assert decaycast(*recipe, "--optimizer", "adamw", "--schedule", "cosine").json["efolds"] == pytest.approx(
        0.5, rel=1e-3
    )
    assert decaycast(*recipe, "--convention", "relative").json["efolds"] == pytest.approx(1000.0)


def test_audit_lists_parameters(decaycast: Command):
    command = ("audit", "--lr", "0.1", "--weight-decay", "5e-4", "--steps", "1000", "--model", "cnn-bn-4")
    printed, answer = decaycast(*command), decaycast(*command, "--json")
    rows = answer.json["parameters"]
    assert {row["kind"] for row in rows} == {"weight", "bias", "normalisation"}
    assert all(row["name"] in printed.out for row in rows) and {row["weight_decay"] for row in rows} == {5e-4}


def test_audit_lists_the_parameters_of_a_language_model(decaycast: Command):
    command = ("audit", "--lr", "1e-3", "--weight-decay", "0.1", "--steps", "1000", "--model", "gpt-64x1", "--json")
    names = {row["name"] for row in decaycast(*command).json["parameters"]}
    assert {"characters.weight", "layers.0.attend.weight", "head.weight"} <= names


def test_audit_prints_what_the_rules_say_and_where_they_disagree(decaycast: Command):
    command = shlex.split(
        "audit --lr 6e-4 --weight-decay 0.1 --steps 20000 --optimizer adamw --schedule linear "
        "--batch-size 512 --sequence-length 1024 --parameters 124e6 --new-steps 40000"
    )
    printed, answer = decaycast(*command), decaycast(*command, "--json")
    assert printed.code == answer.code == 0, printed.err
    said = {item["rule"]: item for item in answer.json["rules"]}
    for rule in ("L2 paper", "Power Lines", "equal e-folds", "equal tau in epochs", "normalised decay", "nanochat"):
        row = re.search(rf"│ {rule}\s*│[^│]*│ (\S+)\s*│ (\S+)\s*│ (\S+)\s*│", printed.out)
        assert row and float(row[1]) == float(f"{said[rule]['weight_decay']:.3g}")
        assert float(row[2]) == float(f"{said[rule]['times_yours']:.3g}")
        assert float(row[3]) == float(f"{said[rule]['efolds']:.3g}")
    text = " ".join(printed.out.split())
    assert all(" ".join(line.split()) in text for line in answer.json["disagreements"])
    assert len(answer.json["disagreements"]) == 2
    assert number(text, "batch") == float(f"{answer.json['batch']['tokens']:.3g}")


def test_audit_says_which_fact_a_silent_rule_misses(decaycast: Command):
    text = " ".join(decaycast("audit", "--lr", "0.1", "--weight-decay", "5e-4", "--steps", "1000").out.split())
    assert "Power Lines: no answer, fitted for AdamW's decoupled decay; this recipe's is 'sgd'" in text
    assert "equal e-folds: no answer, needs the run to carry the weight decay to: --new-steps" in text


def test_audit_reads_a_trainers_arguments(decaycast: Command, tmp_path: Path):
    values = {"learning_rate": 1e-3, "weight_decay": 0.1, "optim": "adamw_torch", "lr_scheduler_type": "constant",
              "num_train_epochs": 2, "per_device_train_batch_size": 10, "max_steps": -1}  # fmt: skip
    (tmp_path / "args [bold].json").write_text(json.dumps(values))
    command = ("audit", "--config", "args [bold].json")
    line = error_line(decaycast(*command))
    assert "lacks the steps of its 2 epochs: --samples (per epoch), or --steps" in line
    printed = decaycast(*command, "--samples", "5000", "--world-size", "2")
    answer = decaycast(*command, "--samples", "5000", "--world-size", "2", "--json")
    assert answer.json["efolds"] == pytest.approx(0.05) and answer.json["recipe"]["steps"] == 500
    assert answer.json["tau_epochs"] == pytest.approx(40)
    assert "Hugging Face arguments args [bold].json: lr 0.001, weight decay 0.1 (decoupled), constant lr" in printed.out
    assert "(40 epochs at the peak lr)" in printed.out
    noted = decaycast(*command, "--steps", "500", "--lr", "0.002", "--model", "cnn-bn-4")
    assert "note: one device is assumed; give --world-size" in noted.out and "0.1 e-folds" in noted.out
    assert "normalisation" in noted.out


def test_audit_reads_timms_arguments_and_refuses_coupled_adam(decaycast: Command, tmp_path: Path):
    text = "opt: {}\nlr: 0.1\nweight_decay: 0.01\nepochs: 4\nsched: none\nbatch_size: 10\nmomentum: 0.5\n"
    (tmp_path / "args.yaml").write_text(text.format("momentum"))
    answer = decaycast("audit", "--config", "args.yaml", "--samples", "1005", "--json")
    assert answer.json["efolds"] == pytest.approx(400 * 0.1 * 0.01 / 0.5)
    (tmp_path / "args.yaml").write_text(text.format("adam"))
    line = error_line(decaycast("audit", "--config", "args.yaml", "--samples", "1005"))
    assert "adam couples weight decay into an adaptive step" in line
    changed = decaycast("audit", "--config", "args.yaml", "--samples", "1005", "--optimizer", "adamw", "--json")
    assert changed.json["efolds"] == pytest.approx(0.4)


def test_audit_does_not_open_pickles_or_what_is_not_there(decaycast: Command, tmp_path: Path):
    (tmp_path / "training_args.bin").write_bytes(b"PK\x03\x04")
    assert "training_args.bin is a pickle (torch.save); it is not read" in error_line(
        decaycast("audit", "--config", "training_args.bin")
    )
    assert "FileNotFoundError" in error_line(decaycast("audit", "--config", "nothing.json"))


def test_audit_of_no_decay_or_hardly_a_step_is_no_error(decaycast: Command):
    ended = decaycast("audit", "--lr", "0.1", "--weight-decay", "0", "--steps", "5", "--momentum", "0.9")
    assert ended.code == 0 and "0 e-folds" in ended.out and "relaxation time infinite" in ended.out
    assert "zero-cost guess" not in ended.out, "heavy ball cannot shrink weights by 1.3 e-folds in 5 steps"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0"], "the learning rate is zero at every step"),
        (["--lr", "nan"], "lr must be finite and >= 0 at every step, got nan"),
        (["--lr", "-1"], "lr must be finite and >= 0 at every step, got -1.0"),
        (["--weight-decay", "-1"], "weight_decay must be finite and >= 0, got -1.0"),
        (["--steps", "0"], "must be a whole number >= 1, got 0"),
        (["--momentum", "1.5"], "momentum must be in [0, 1), got 1.5"),
        (["--convention", "decoupld"], "unknown convention 'decoupld'; did you mean 'decoupled'?"),
        (["--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'?"),
        (["--schedule", "constnt"], "unknown schedule 'constnt'; did you mean 'constant'?"),
        (["--model", "wnr-10-1"], "unknown model 'wnr-10-1'; did you mean 'wrn-10-1'?"),
        (["--parameters", "-5"], "--parameters must be a finite number > 0, got -5.0"),
        (["--batch-size", "0"], "--batch-size must be a whole number >= 1, got 0"),
    ],
    ids=words,
)
def test_audit_refuses_in_one_line(decaycast: Command, arguments: list[str], message: str):
    usual = ("--lr", "0.1", "--weight-decay", "5e-4", "--steps", "1000")
    assert message in error_line(decaycast("audit", *usual, *arguments))


def test_data_says_what_is_there_and_what_to_do(decaycast: Command, tmp_path: Path):
    printed, answer = decaycast("data", "--data-dir", "nowhere"), decaycast("data", "--data-dir", "nowhere", "--json")
    assert printed.code == answer.code == 0
    status = {item["name"]: item["status"] for item in answer.json}
    assert status == {"digits": "embedded"} | dict.fromkeys(
        ("mnist", "fashion_mnist", "cifar10", "flowers89", "shakespeare"), "missing"
    )
    assert all(name in printed.out for name in status) and printed.out.count("missing") == 5
    assert all(item["advice"] for item in answer.json if item["status"] == "missing")


# -- the program itself


def test_help_names_every_verb(decaycast: Command):
    ended = decaycast("--help")
    assert ended.code == 0 and all(verb in ended.out for verb in ("find", "train", "audit", "data"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["fnd"], "fnd"), (["find", "--bugdet", "9"], "--bugdet"), (["find", "--lr", "abc"], "--lr")],
)
def test_words_that_are_no_command_exit_with_2(decaycast: Command, arguments: list[str], named: str):
    ended = decaycast(*arguments)
    assert ended.code == 2 and named in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("missing", ["typer", "rich.console"])
def test_without_its_libraries_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=r"the command line needs typer and rich .* pip install 'decaycast\[lab\]'"):
        runpy.run_path(cli.__file__)


def test_an_error_stays_one_line_however_long(decaycast: Command, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: Any, **settings: Any) -> None:
        raise RuntimeError("first [bold]\n" + "word " * 200)

    monkeypatch.setattr(cli, "train_run", fails)
    line = error_line(decaycast("train", *TINY))
    assert "first [bold] word word" in line and line.count("word") == 200


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["decaycast", "audit", "--lr", "0.1", "--weight-decay", "5e-4", "--steps", "100", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("decaycast", run_name="__main__")
    assert not ended.value.code and json.loads(capsys.readouterr().out)["efolds"] == pytest.approx(0.005)


def test_autol2_starts_at_the_papers_value_unless_told_otherwise(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train_run", lambda run, **_: seen.append(run) or pytest.skip("enough seen"))
    for arguments, start in (("--rule autol2", 0.1), ("--rule autol2 --weight-decay 0.3", 0.3), ("", 5e-4)):
        monkeypatch.setattr(sys, "argv", ["decaycast", "train", *arguments.split()])
        with pytest.raises(pytest.skip.Exception):
            cli.main()
        assert seen[-1].config["weight_decay"] == start


# AutoL2 on the clock of e-folds


def test_train_spends_the_budget_it_is_given(decaycast: Command):
    rule = ("--rule", "autol2-efolds", "--budget-efolds", "0.5")
    numbers = decaycast("train", *TINY, "--budget", "60", *rule, "--json").json
    assert numbers["efolds"] == pytest.approx(0.5, rel=1e-6)
    assert numbers["weight_decay"] == pytest.approx(0.0, abs=1e-6)


def test_a_budget_for_another_rule_is_refused(decaycast: Command):
    ended = decaycast("train", *TINY, "--budget", "60", "--budget-efolds", "0.5")
    assert ended.code == 2
    assert "--budget-efolds belongs to --rule autol2-efolds, got --rule constant" in ended.err


@pytest.mark.parametrize(("rule", "shown"), [("autol2", True), ("autol2-efolds", False)])
def test_who_takes_the_papers_rule_under_a_falling_rate_hears_of_the_other(decaycast: Command, rule: str, shown: bool):
    ended = decaycast("train", *TINY, "--budget", "30", "--rule", rule, "--schedule", "cosine")
    assert ended.code == 0
    assert ("Try --rule autol2-efolds" in " ".join(ended.err.split())) is shown
