"""Train what a store does not have yet, and read back all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import Execute, OnRow, Train, in_process
from decaycast.lab.store import Store


def sweep(
    runs: Sequence[Run],
    store: Store,
    *,
    train: Train | None = None,
    execute: Execute = in_process,
    retry_failed: bool = False,
    on_row: OnRow | None = None,
) -> list[Row]:
    """Train the runs that `store` lacks, store each row as it arrives, and return one row per entry of `runs`.

    Calling it again after an interrupt, a kill or a full disk trains only the rest. A run named twice is trained once.
    Failed runs count as trained unless `retry_failed`.

    Args:
        runs: What to train; the rows come back in this order.
        store: Where rows are kept.
        train: Turns a run into its row; by default `decaycast.lab.trial.train_run`.
        execute: Where to train: `in_process`, `processes(workers)`, or any other of `decaycast.lab.where`.
        retry_failed: Train runs again whose only rows are failed ones.
        on_row: Called with each new row once it is stored, for a progress display.
    """
    train_missing(runs, store, train=train, execute=execute, retry_failed=retry_failed, on_row=on_row)
    return store.rows_of(runs)


def train_missing(
    runs: Sequence[Run],
    store: Store,
    *,
    train: Train | None = None,
    execute: Execute = in_process,
    retry_failed: bool = False,
    on_row: OnRow | None = None,
) -> None:
    """`sweep` without reading the rows back, for sweeps too large to hold; `Store.table` reads their numbers."""
    if train is None:
        from decaycast.lab.trial import train_run as train

    execute(store.missing(runs, retry_failed=retry_failed), train, _Keeper(store, on_row))


class _Keeper:
    """Stores each row as it arrives, then shows it; rows that arrive `together` are stored at the end of that."""

    def __init__(self, store: Store, show: OnRow | None) -> None:
        self._store, self._show = store, show
        self._waiting: list[Row] | None = None

    def __call__(self, row: Row) -> None:
        if self._waiting is not None:
            self._waiting.append(row)
        else:
            self._keep([row])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collect rows and store them in one transaction, also when an error or Ctrl-C ends the collecting."""
        if self._waiting is not None:  # within another one, whose end stores these rows, too
            yield
            return
        self._waiting = []
        try:
            yield
        finally:
            rows, self._waiting = self._waiting, None
            self._keep(rows)

    def _keep(self, rows: Sequence[Row]) -> None:
        if rows:
            self._store.extend(rows)
        for row in rows:
            if self._show is not None:
                self._show(row)
