"""A probe over the lab's trials that remembers: what a store holds is not trained again."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.core.train import DivergedError
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.trial import Trial


class TrialProbe:
    """``probe(weight_decay, steps)`` for `decaycast.forecast`: trains, or continues, the described run at that decay.

    Every prefix becomes a row of the store (with ``stop``), so an interrupted forecast resumes from the finished ones.
    `curves` holds each arm's columns, for the page.
    """

    def __init__(
        self,
        config: Mapping[str, Scalar],
        *,
        seed: int = 0,
        metric: str = "validation_loss",
        store: Store | None = None,
        data_dir: str | None = None,
        on_row: Callable[[float, dict[str, float]], None] | None = None,
    ) -> None:
        self.config, self.seed, self.metric = dict(config), seed, metric
        self.store, self.data_dir, self.on_row = store, data_dir, on_row
        self.trials: dict[float, Trial] = {}
        self.curves: dict[float, Mapping[str, Sequence[float]]] = {}

    def __call__(self, weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
        """Steps and metric of the arm up to `steps`; a diverged arm ends in NaN."""
        run = Run(config={**self.config, "weight_decay": weight_decay, "stop": steps}, seed=self.seed)
        row = self._remembered(run) or self._train(run, weight_decay, steps)
        self.curves[weight_decay] = row.curve
        at, values = list(row.curve["step"]), list(row.curve[self.metric])
        if row.status == "failed":
            at, values = [*at, float(steps)], [*values, math.nan]
        return at, values

    def _remembered(self, run: Run) -> Row | None:
        if self.store is None or self.store.missing([run]):
            return None
        return self.store.rows_of([run])[0]

    def _train(self, run: Run, weight_decay: float, steps: int) -> Row:
        began, status, reason = time.perf_counter(), "done", ""
        trial = self.trials.get(weight_decay)
        if trial is None:
            trial = self.trials[weight_decay] = Trial(run, data_dir=self.data_dir)
        report = None if self.on_row is None else functools.partial(self.on_row, weight_decay)
        try:
            trial.advance(steps, report)
        except DivergedError as error:
            status, reason = "failed", f"DivergedError: {error}"
        row = Row(
            run=run,
            status=status,
            reason=reason,
            curve=trial.curve(),
            seconds=time.perf_counter() - began,
            provenance=provenance(),
        )
        if self.store is not None:
            self.store.append(row)
        return row
