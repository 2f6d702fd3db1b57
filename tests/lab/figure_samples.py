"""Made-up figures that train in a moment: one by the lab's training, two by their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict

TINY = {"data": "digits", "train_size": 60, "model": "mlp-8x1", "batch_size": 20, "points": 3, "lr": 0.1}
STEPS: dict[Size, int] = {"smoke": 20, "small": 30, "paper": 40}


@dataclass(frozen=True)
class Sample:
    """Final losses of a few short trainings."""

    name: str = "one/losses"
    title: str = "Losses"
    claim: str = "Networks learn [most of the time] | if trained."
    source: str = "this test"
    decays: tuple[float, ...] = (0.0, 0.01)

    def runs(self, size: Size) -> list[Run]:
        """One run per weight decay."""
        return [Run(config={**TINY, "steps": STEPS[size], "weight_decay": decay}) for decay in self.decays]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Validation loss against the step."""
        traces = [Trace(name=row.run.key, x=row.curve["step"], y=row.curve["validation_loss"]) for row in rows]
        return [Panel(title="Loss", x_label="step", y_label="validation loss", traces=traces)] if rows else []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when every loss fell."""
        if not rows:
            return Verdict(outcome="not enough data", reason="no rows")
        fell = all(row.curve["validation_loss"][-1] < row.curve["validation_loss"][0] for row in rows)
        return Verdict(
            outcome="held" if fell else "not held", reason="the losses [of all]", numbers={"runs": len(rows)}
        )


@dataclass(frozen=True)
class OwnTraining(Sample):
    """A figure whose rows come from a training of its own, with columns of its own."""

    name: str = "two/own"
    seconds: float = float("nan")

    def runs(self, size: Size) -> list[Run]:
        """Two seeds."""
        config = {
            "data": "digits",
            "train_size": 50,
            "validation_size": 20,
            "test_size": 10,
            "task": "own",
            "size": size,
        }
        return [Run(config=config, seed=seed) for seed in (0, 1)]

    def train(self, run: Run, data: Any) -> Row:
        """The sizes of the data, as a row."""
        sizes = [len(part[1]) for part in (data.train, data.validation, data.test)]
        stated = {} if run.seed else {"device": "made up"}
        return Row(run=run, curve={"part": [0, 1, 2], "samples": sizes}, seconds=self.seconds, provenance=stated)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Nothing."""
        return []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when it has two rows."""
        return Verdict(outcome="held" if len(rows) == 2 else "not enough data", reason=f"{len(rows)} rows")


@dataclass(frozen=True)
class Careless(OwnTraining):
    """Returns something that is no row."""

    name: str = "two/careless"

    def train(self, run: Run, data: Any) -> Row:
        """No row."""
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class NeedsAll(Sample):
    """A figure that cannot cope with missing rows."""

    name: str = "one/needs-all"

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Compares the first two rows."""
        return Verdict(outcome="held", reason=f"{rows[0].run.key} before {rows[1].run.key}")


FIGURES = (Sample(), OwnTraining())
