"""A probe over the lab's trials: it continues arms, remembers rows, and turns divergence into data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from decaycast.lab import probe as probing
from decaycast.lab.probe import TrialProbe
from decaycast.lab.store import Store
from decaycast.lab.trial import Trial

CONFIG: dict[str, Any] = {
    "data": "digits",
    "train_size": 300,
    "validation_size": 100,
    "model": "mlp-16x1",
    "lr": 0.1,
    "batch_size": 32,
    "steps": 400,
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Weight decays of the trials that were built, in order."""
    decays: list[float] = []

    class Counting(Trial):
        def __init__(self, run: Any, **settings: Any) -> None:
            decays.append(run.config["weight_decay"])
            super().__init__(run, **settings)

    monkeypatch.setattr(probing, "Trial", Counting)
    return decays


def test_arms_are_continued_and_curves_kept(built: list[float]):
    probe = TrialProbe(CONFIG, seed=3)
    short, _ = probe(0.01, 20)
    probe(0.1, 20)
    steps, values = probe(0.01, 50)
    assert built == [0.01, 0.1], "going on needs no new trial"
    assert short[-1] == 20.0 and steps[-1] == 50.0
    assert list(probe.curves) == [0.01, 0.1] and probe.curves[0.01]["validation_loss"] == values
    assert (steps, values) == TrialProbe(CONFIG, seed=3)(0.01, 50), "pausing leaves no trace"
    assert values != TrialProbe(CONFIG, seed=4)(0.01, 50)[1]


def test_accuracy_is_another_column():
    probe = TrialProbe(CONFIG, metric="validation_accuracy")
    _, values = probe(0.01, 30)
    assert values == probe.curves[0.01]["validation_accuracy"] and all(0 <= value <= 1 for value in values)


def test_a_second_probe_over_the_same_store_trains_nothing(tmp_path: Path, built: list[float]):
    asked = [(0.01, 20), (0.1, 20), (0.01, 45)]
    with Store(tmp_path / "rows.sqlite") as store:
        first = TrialProbe(CONFIG, store=store)
        answers = [first(*question) for question in asked]
        assert built == [0.01, 0.1] and len(store.read()) == 3
        second = TrialProbe(CONFIG, store=store)
        assert [second(*question) for question in asked] == answers
        assert built == [0.01, 0.1] and len(store.read()) == 3
        assert list(second.curves[0.01]["step"]) == first.curves[0.01]["step"]
    # as after an interrupt: the arm starts again, with the same numbers
    with Store(tmp_path / "rows.sqlite") as store:
        third = TrialProbe(CONFIG, store=store)
        longer = third(0.1, 45)
    assert built == [0.01, 0.1, 0.1]
    assert longer == TrialProbe(CONFIG)(0.1, 45)


def test_another_seed_or_setting_is_not_remembered(tmp_path: Path, built: list[float]):
    with Store(tmp_path / "rows.sqlite") as store:
        TrialProbe(CONFIG, store=store)(0.01, 10)
        TrialProbe(CONFIG, store=store, seed=1)(0.01, 10)
        TrialProbe({**CONFIG, "lr": 0.2}, store=store)(0.01, 10)
        assert len(built) == 3 and len(store.read()) == 3


def test_a_diverged_arm_is_a_failed_row_and_ends_in_nan(tmp_path: Path, built: list[float]):
    with Store(tmp_path / "rows.sqlite") as store:
        probe = TrialProbe({**CONFIG, "lr": 0.5}, store=store)
        steps, values = probe(200.0, 100)
        assert steps[-1] == 100.0 and math.isnan(values[-1])
        assert all(math.isfinite(value) for value in probe.curves[200.0]["train_loss"])
        (row,) = store.read()
        assert row.status == "failed" and row.reason.startswith("DivergedError: the training loss is ")
        assert len(steps) == len(row.curve["step"]) + 1
        again = TrialProbe({**CONFIG, "lr": 0.5}, store=store)(200.0, 100)
        assert again[0] == steps and math.isnan(again[1][-1]) and built == [200.0]


def test_progress_is_reported_per_arm():
    rows: list[tuple[float, float]] = []
    TrialProbe(CONFIG, on_row=lambda decay, row: rows.append((decay, row["step"])))(0.01, 20)
    assert {decay for decay, _ in rows} == {0.01} and rows[-1][1] == 20.0 and len(rows) > 3
