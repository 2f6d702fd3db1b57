"""A sweep trains what is missing, once, and survives interrupts."""

from __future__ import annotations

import pytest

from decaycast.core.experiment import Row, Run
from decaycast.lab import trial
from decaycast.lab.store import Store, StoreError
from decaycast.lab.sweep import sweep


class Trainer:
    """Counts what it trains; interrupts or fails at given seeds, once each."""

    def __init__(self, *, interrupt: int | None = None, fail: int | None = None) -> None:
        self.trained: list[int] = []
        self.interrupt, self.fail = interrupt, fail

    def __call__(self, run: Run) -> Row:
        if run.seed == self.interrupt:
            self.interrupt = None
            raise KeyboardInterrupt
        self.trained.append(run.seed)
        if run.seed == self.fail:
            self.fail = None
            raise FloatingPointError("loss is nan")
        return Row(run=run, final={"seed": run.seed})


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "rows.db") as store:
        yield store


RUNS = [Run(config={"model": "mlp"}, seed=seed) for seed in range(5)]


def test_duplicates_are_trained_once_and_rows_follow_the_request(store):
    train, new = Trainer(), []
    asked = [RUNS[3], RUNS[1], RUNS[3], RUNS[0]]
    rows = sweep(asked, store, train=train, on_row=new.append)
    assert train.trained == [3, 1, 0] == [row.run.seed for row in new]
    assert [row.run for row in rows] == asked
    again = sweep(RUNS[:4], store, train=train, on_row=new.append)
    assert train.trained == [3, 1, 0, 2] and [row.final["seed"] for row in again] == [0, 1, 2, 3]
    assert len(new) == 4


def test_an_interrupted_sweep_resumes_with_the_rest(tmp_path):
    train = Trainer(interrupt=3)
    with Store(tmp_path / "rows.db") as store, pytest.raises(KeyboardInterrupt):
        sweep(RUNS, store, train=train)
    with Store(tmp_path / "rows.db") as store:
        assert [row.run.seed for row in store.read()] == [0, 1, 2]
        rows = sweep(RUNS, store, train=train)
    assert train.trained == [0, 1, 2, 3, 4]
    assert [row.status for row in rows] == ["done"] * 5


def test_failed_runs_stay_unless_retried(store):
    train = Trainer(fail=2)
    rows = sweep(RUNS, store, train=train)
    assert [row.status for row in rows] == ["done", "done", "failed", "done", "done"]
    assert rows[2].reason == "FloatingPointError: loss is nan"
    sweep(RUNS, store, train=train)
    assert train.trained == [0, 1, 2, 3, 4]
    rows = sweep(RUNS, store, train=train, retry_failed=True)
    assert train.trained == [0, 1, 2, 3, 4, 2] and rows[2].status == "done"


def test_a_row_is_stored_before_it_is_shown(store):
    def on_row(row: Row) -> None:
        assert [kept.run for kept in store.read()][-1] == row.run
        raise RuntimeError("display broke")

    with pytest.raises(RuntimeError, match="display broke"):
        sweep(RUNS, store, train=Trainer(), on_row=on_row)
    assert [row.run.seed for row in store.read()] == [0]


def test_a_full_disk_ends_the_sweep_and_the_next_one_goes_on(store):
    def train(run: Run) -> Row:
        return Row(run=run, curve={"train_loss": [1 / 3] * 800})

    store.append(train(RUNS[0]))
    store._db.execute(f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count').fetchone()[0] + 6}")
    with pytest.raises(StoreError, match="is full; finished rows are safe"):
        sweep(RUNS, store, train=train)
    kept = len(store.read())
    assert 1 <= kept < 5
    store._db.execute("PRAGMA max_page_count = 100000")
    assert len(sweep(RUNS, store, train=train)) == 5


def test_the_default_training_is_the_labs(store, monkeypatch):
    train = Trainer()
    monkeypatch.setattr(trial, "train_run", train)
    sweep(RUNS[:2], store)
    assert train.trained == [0, 1]
