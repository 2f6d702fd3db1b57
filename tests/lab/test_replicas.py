"""The executor `replicas`: the rows of separate runs, batches where they pay, and nothing lost where they fail."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from decaycast.core.experiment import Row, Run
from decaycast.core.replica_training import ReplicaTraining
from decaycast.lab import replicas as module
from decaycast.lab.execute import in_process
from decaycast.lab.figures import train_planned
from decaycast.lab.replicas import Choice, choose_batch, group_runs, replicas
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run

TINY: dict[str, Any] = {
    "data": "digits",
    "train_size": 200,
    "validation_size": 60,
    "test_size": 60,
    "model": "mlp-16x1",
    "lr": 0.05,
    "batch_size": 16,
    "steps": 150,
    "points": 6,
    "weight_decay": 0.01,
}


def tiny(seed: int = 0, **changes: Any) -> Run:
    return Run(config={**TINY, **changes}, seed=seed)


VARIED = [
    tiny(0),
    tiny(1, momentum=0.9, lr=0.01, schedule="cosine"),
    tiny(2, rule="autol2", weight_decay=0.1),
    tiny(3, rule="autol2", refractory=1.0, weight_decay=0.1),
    tiny(4, rule="autol2-efolds", weight_decay=0.0, budget_efolds=0.8),
    tiny(5, rule="linear", schedule="step_decay"),
    tiny(6, stop=40),
    tiny(6, stop=33, rule="lr_proportional", schedule="wsd"),
]
FAILING = [
    tiny(0, lr=1e30),  # diverges before the first look
    tiny(1, lr=30.0, weight_decay=5.0),
    tiny(2, lr=1e30, rule="autol2"),  # its rule refuses the loss first
]


def rows_by(execute: Any, runs: list[Run], train: Any = train_run) -> dict[str, Row]:
    rows: list[Row] = []
    execute(runs, train, rows.append)
    assert len(rows) == len(runs)
    return {row.run.key: row for row in rows}


def assert_same(found: Row, expected: Row, rtol: float = 1e-4) -> None:
    assert (found.run, found.status, found.reason) == (expected.run, expected.status, expected.reason)
    assert list(found.curve) == list(expected.curve) and list(found.final) == list(expected.final)
    for name, column in expected.curve.items():
        mine, theirs = (torch.tensor(values, dtype=torch.float64) for values in (found.curve[name], column))
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol / 10)
    for name, value in expected.final.items():
        assert found.final[name] == pytest.approx(value, rel=rtol, abs=rtol / 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rows_are_those_of_separate_runs(optimizer: str):
    rate = {"lr": 0.003} if optimizer == "adamw" else {}
    runs = [Run(config={**run.config, "optimizer": optimizer, **rate}, seed=run.seed) for run in VARIED]
    batched, separate = rows_by(replicas(at_once=8), runs), rows_by(in_process, runs)
    for key, row in separate.items():
        assert_same(batched[key], row)
        assert batched[key].provenance["batched"] == "8" and batched[key].seconds > 0
        assert set(batched[key].provenance) == {*row.provenance, "batched"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": "cnn-4", "data": "mnist", "pool": 2, "lr": 0.01},
        {"model": "cnn-bn-4", "data": "mnist", "pool": 2, "lr": 0.003, "steps": 60},
        {"model": "gpt-16x1", "data": "shakespeare", "lr": 0.1},
        {"model": "mlp-64x3", "steps": 400},
    ],
    ids=lambda changes: changes["model"],
)
def test_rows_of_other_networks(changes: dict[str, Any]):
    from decaycast.lab.data import DataError, load

    if "data" in changes and not os.environ.get("DECAYCAST_DATA"):
        pytest.skip("no data folder: set DECAYCAST_DATA")
    try:
        load(
            changes.get("data", "digits"), train_size=200, validation_size=60, test_size=60, pool=changes.get("pool", 1)
        )
    except DataError as error:
        pytest.skip(str(error))
    runs = [tiny(seed, **{"steps": 100, **changes}, momentum=0.5 * (seed % 2)) for seed in range(3)]
    batched, separate = rows_by(replicas(at_once=3), runs), rows_by(in_process, runs)
    for key, row in separate.items():
        # batch norm over 16 samples amplifies rounding: 1e-6 has grown to 1e-3 after 100 steps
        assert_same(batched[key], row, rtol=1e-2 if "bn" in changes["model"] else 1e-4)


def test_failing_runs_leave_the_rows_they_leave_alone_and_disturb_nobody():
    batched, separate = rows_by(replicas(at_once=8), FAILING + VARIED[:2]), rows_by(in_process, FAILING + VARIED[:2])
    reasons = [batched[run.key].reason.split(":")[0] for run in FAILING]
    assert reasons == ["DivergedError", "DivergedError", "ValueError"]
    for key, row in separate.items():
        assert_same(batched[key], row)
    undisturbed = rows_by(replicas(at_once=8), VARIED[:2])
    for run in VARIED[:2]:
        assert batched[run.key].curve == undisturbed[run.key].curve  # to the bit


def test_a_run_that_ends_with_an_infinite_test_loss_has_failed(monkeypatch):
    def broken(self: Any, part: str, trained: Any) -> tuple[list[float], list[float]]:
        return [math.inf if part == "test" else 1.0] * len(trained), [0.5] * len(trained)

    monkeypatch.setattr(module._Batch, "evaluate", broken)
    for row in rows_by(replicas(at_once=2), [tiny(0), tiny(1)]).values():
        assert row.reason == "the trained network's test loss is not finite: {'test_loss': inf, 'test_accuracy': 0.5}"
        assert row.status == "failed" and row.final["test_accuracy"] == 0.5 and row.curve["step"][-1] == 150


def test_runs_are_grouped_by_what_cannot_be_batched():
    foreign = tiny(9, unknown=1)
    wide = [tiny(0, model="mlp-32x1"), tiny(1, model="mlp-32x1", lr=1.0)]
    alone = tiny(0, batch_size=17)
    groups, others = group_runs([*VARIED, foreign, *wide, alone], train_run)
    assert others == [foreign, alone]
    assert [len(group) for _, group in groups] == [8, 2] and groups[1][1] == wide
    assert [run.config.get("stop") for run in groups[0][1]][-2:] == [40, 33]  # those of one batch end together


class Own:
    """A figure that trains by itself."""

    name = "own"

    def train(self, run: Run, split: Any) -> Row:
        return Row(run=run, final={"own": 1.0})


def test_only_the_labs_own_training_is_batched():
    runs = [tiny(seed) for seed in range(3)]

    def grouped(train: Any) -> list[dict[str, Any]]:
        return [options for options, _ in group_runs(runs, train)[0]]

    assert grouped(train_run) == [{}]
    assert grouped(partial(partial(train_run, data_dir="a"), device="cpu")) == [{"data_dir": "a", "device": "cpu"}]
    assert grouped(partial(train_planned, own={}, data_dir=None)) == [{"data_dir": None}]
    planned = partial(train_planned, own={runs[0].key: Own()}, data_dir=None)  # type: ignore[dict-item]
    groups, others = group_runs(runs, planned)
    assert others == runs[:1] and groups[0][1] == runs[1:]
    rows = rows_by(replicas(at_once=2), runs, planned)
    assert rows[runs[0].key].final == {"own": 1.0} and rows[runs[1].key].provenance["batched"] == "2"
    for other in (lambda run: Row(run=run), partial(train_run, on_row=print), partial(train_run, runs[0])):
        assert grouped(other) == []
    assert all(row.final == {} for row in rows_by(replicas(), runs, lambda run: Row(run=run)).values())


def pretend(monkeypatch: pytest.MonkeyPatch, separate: float, batched: dict[int, float]) -> list[int]:
    """Measurements without a clock: seconds per run by itself, and in a batch of so many."""
    tried: list[int] = []

    def measure(runs: list[Run], options: dict[str, Any]) -> float:
        tried.append(len(runs))
        return batched[len(runs)]

    monkeypatch.setattr(module, "_separate_seconds", lambda run, options: separate)
    monkeypatch.setattr(module, "_batched_seconds", measure)
    return tried


MANY = [tiny(seed) for seed in range(40)]


@pytest.mark.parametrize(
    ("separate", "batched", "workers", "choice", "tried"),
    [
        (100.0, {8: 40.0, 16: 25.0, 32: 24.5}, 1, Choice(at_once=16, ratio=4.0), [8, 16, 32]),
        (100.0, {8: 40.0, 16: 25.0, 32: 20.0, 40: 10.0}, 1, Choice(at_once=40, ratio=10.0), [8, 16, 32, 40]),
        (100.0, {8: 95.0, 16: 94.0}, 1, Choice(at_once=1, ratio=100 / 95), [8, 16]),
        (100.0, {8: 200.0, 16: 210.0}, 1, Choice(at_once=1, ratio=0.5), [8, 16]),
        (100.0, {8: 40.0, 16: 39.0}, 4, Choice(at_once=1, ratio=2.5), [8, 16]),
        (100.0, {8: 20.0, 16: 21.0}, 4, Choice(at_once=8, ratio=5.0), [8, 16]),
        (1e-9, {8: 0.5e-9}, 1, Choice(at_once=8, ratio=2.0), [8]),  # too short to measure more
    ],
)
def test_the_batch_that_measures_fastest_is_chosen_and_none_where_slower(
    monkeypatch, separate: float, batched: dict[int, float], workers: int, choice: Choice, tried: list[int]
):
    seen = pretend(monkeypatch, separate, batched)
    assert choose_batch(MANY, workers=workers) == choice
    assert seen == tried


def test_what_was_chosen_is_said_and_done(monkeypatch):
    pretend(monkeypatch, 1000.0, {2: 500.0, 3: 2000.0})
    runs = [tiny(seed) for seed in range(2)] + [tiny(seed, model="mlp-8x1") for seed in range(3)]
    said: list[str] = []
    rows = rows_by(replicas(note=said.append), runs)
    assert said == [
        "2 runs of mlp-16x1 on digits, batch size 16: 2 at a time, measured 2 times as fast as one by one",
        "3 runs of mlp-8x1 on digits, batch size 16: one by one (batched was measured 0.5 times as fast as one by one)",
    ]
    assert ["batched" in rows[run.key].provenance for run in runs] == [True, True, False, False, False]


@pytest.mark.parametrize(("count", "at_once", "sizes"), [(5, 2, {2, 1}), (24, 16, {12}), (7, 3, {3, 2}), (4, 9, {4})])
def test_batches_are_as_equal_as_they_can_be(count: int, at_once: int, sizes: set[int]):
    parts = module._evenly(MANY[:count], at_once)
    assert [run for part in parts for run in part] == MANY[:count]
    assert {len(part) for part in parts} == sizes and len(parts) == math.ceil(count / at_once)


def test_measuring_on_this_machine_ends_in_a_number():
    choice = choose_batch([tiny(seed) for seed in range(8)])
    assert choice.ratio > 0 and choice.at_once in (1, 8)
    assert (choice.at_once == 8) == (choice.ratio >= module.LEAST_GAIN)


def test_a_batch_that_fails_is_trained_one_by_one_without_doubles(monkeypatch):
    advance = ReplicaTraining.advance

    def fail_late(self: ReplicaTraining, stop: int | None = None) -> None:
        advance(self, stop)
        if self.step == 100:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(ReplicaTraining, "advance", fail_late)
    said: list[str] = []
    runs = [tiny(0, stop=40), tiny(1), tiny(2)]
    rows = rows_by(replicas(at_once=3, note=said.append), runs)
    assert (
        said[1] == "a batch of 3 runs failed (RuntimeError: out of memory); the unfinished ones are trained one by one"
    )
    assert all(row.status == "done" for row in rows.values())
    assert ["batched" in rows[run.key].provenance for run in runs] == [True, False, False]


def test_runs_that_cannot_start_get_the_rows_that_say_why():
    runs = [tiny(0), tiny(1), tiny(2, rule="autol"), tiny(3, schedule="cosin")]
    for execute in (replicas(at_once=4), replicas()):
        rows = rows_by(execute, runs)
        assert [rows[run.key].status for run in runs] == ["done", "done", "failed", "failed"]
        assert rows[runs[2].key].reason.startswith(
            "ValueError: unknown weight decay rule 'autol'; did you mean 'autol2'?"
        )
        assert rows[runs[3].key].reason.startswith("ValueError: unknown schedule 'cosin'")
    nowhere = [tiny(seed, model="mlp-16") for seed in range(2)]
    said: list[str] = []
    rows = rows_by(replicas(note=said.append), nowhere)
    assert {row.status for row in rows.values()} == {"failed"} and said == [
        "2 runs of mlp-16 on digits, batch size 16: one by one"
    ]


def test_an_interrupted_sweep_trains_the_unfinished_runs_again(tmp_path: Path, monkeypatch):
    runs = [tiny(0, stop=40), tiny(1), tiny(2)]
    advance = ReplicaTraining.advance

    def interrupted(self: ReplicaTraining, stop: int | None = None) -> None:
        if self.step >= 100:
            raise KeyboardInterrupt
        advance(self, stop)

    with Store(tmp_path / "rows.sqlite") as store:
        monkeypatch.setattr(ReplicaTraining, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(runs, store, execute=replicas(at_once=3))
        monkeypatch.setattr(ReplicaTraining, "advance", advance)
        assert store.missing(runs) == runs[1:]  # the one that had ended is stored, nothing of the others
        rows = sweep(runs, store, execute=replicas(at_once=3))
        assert [row.status for row in rows] == ["done"] * 3 and store.missing(runs) == []
    assert_same(rows[2], rows_by(in_process, runs[2:])[runs[2].key])


def test_an_error_of_the_store_is_not_taken_for_one_of_the_batch():
    def full(row: Row) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replicas(at_once=2)([tiny(0), tiny(1)], train_run, full)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0; leave it out to have it measured"):
        replicas(at_once=0)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        replicas(workers=0)


def test_one_at_a_time_is_one_by_one():
    rows = rows_by(replicas(at_once=1), [tiny(0), tiny(1)])
    assert all("batched" not in row.provenance for row in rows.values())
