"""Train what a store does not have yet, and read back all of it."""

from __future__ import annotations

from collections.abc import Sequence

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
        execute: Where to train: `in_process`, or `processes(workers)`.
        retry_failed: Train runs again whose only rows are failed ones.
        on_row: Called with each new row once it is stored, for a progress display.
    """
    if train is None:
        from decaycast.lab.trial import train_run as train

    def keep(row: Row) -> None:
        store.append(row)
        if on_row is not None:
            on_row(row)

    execute(store.missing(runs, retry_failed=retry_failed), train, keep)
    return store.rows_of(runs)
