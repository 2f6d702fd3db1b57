"""Evidence for the L2 room: the time to the best accuracy, and the best weight decay at a fixed budget.

Validation data stand in for the paper's test data throughout: nothing here is chosen on test data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict

SOURCE = "Lewkowycz & Gur-Ari 2020, sec. 2, fig. 2"
TOLERANCE = 0.005  # the paper's: time to come within half a percent of the best accuracy


def _base(size: Size) -> dict[str, Scalar]:
    if size == "paper":
        return {"data": "mnist", "train_size": 512, "model": "mlp-2048x3", "lr": 0.15, "batch_size": 512}
    model = "mlp-32x2" if size == "smoke" else "mlp-256x3"
    return {"data": "digits", "train_size": 512, "model": model, "lr": 0.15, "batch_size": 64}


def _rows_by_decay(rows: Sequence[Row]) -> dict[float, list[Row]]:
    found: dict[float, list[Row]] = {}
    for row in rows:
        if row.status == "done":
            found.setdefault(float(row.run.config["weight_decay"]), []).append(row)  # type: ignore[arg-type]
    return dict(sorted(found.items()))


def time_to_best(row: Row) -> float:
    """Optimiser steps until validation accuracy first comes within `TOLERANCE` of the run's best."""
    accuracy = np.array(row.curve["validation_accuracy"])
    return float(np.array(row.curve["step"])[np.argmax(accuracy >= accuracy.max() - TOLERANCE)])


@dataclass(frozen=True)
class TimeToBest:
    """t* against weight decay at fixed learning rate, each run as long as 2 e-folds."""

    name: str = "l2-time-to-best"
    title: str = "Time to best accuracy against weight decay"
    claim: str = "The time to the best accuracy is inverse to the weight decay: t* ~ c/(lr*lambda)."
    source: str = SOURCE
    efolds: float = 2.0

    def runs(self, size: Size) -> list[Run]:
        """One run per decay and seed, of efolds/(lr*lambda) steps."""
        decays = {"smoke": (0.1, 0.05, 0.025), "small": (0.1, 0.03, 0.01, 0.003, 0.001)}.get(
            size, tuple(np.logspace(0, -4, 9))
        )
        seeds = 2 if size == "smoke" else 3
        base = _base(size)
        return [
            Run(
                config={
                    **base,
                    "weight_decay": float(f"{decay:.6g}"),
                    "steps": math.ceil(self.efolds / (float(base["lr"]) * decay)),  # type: ignore[arg-type]
                    "points": 80,
                },
                seed=seed,
            )
            for decay in decays
            for seed in range(seeds)
        ]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """t* per decay with the 1/lambda line through its geometric mean, and accuracy against e-folds."""
        groups = _rows_by_decay(rows)
        if not groups:
            return []
        decays = list(groups)
        times = [[time_to_best(row) for row in group] for group in groups.values()]
        middle = [float(np.exp(np.mean(np.log(t)))) for t in times]
        constant = float(np.exp(np.mean(np.log(np.array(middle) * np.array(decays)))))
        measured = Trace(
            name="measured",
            x=decays,
            y=middle,
            low=[min(t) for t in times],
            high=[max(t) for t in times],
            mode="lines+markers",
        )
        law = Trace(name="c / weight decay", x=decays, y=[constant / decay for decay in decays])
        curves = [
            Trace(name=f"{decay:g}", x=list(group[0].curve["efolds"]), y=list(group[0].curve["validation_accuracy"]))
            for decay, group in groups.items()
        ]
        return [
            Panel(
                title="Time to best accuracy",
                x_label="weight decay",
                y_label="optimiser steps",
                traces=[measured, law],
                x_log=True,
                y_log=True,
                caption=f"Steps to within {TOLERANCE:.1%} of the best; band: range over seeds.",
            ),
            Panel(
                title="Accuracy on the decay clock",
                x_label="e-folds of decay spent",
                y_label="validation accuracy",
                traces=curves,
                x_log=True,
                caption="The same runs against e-folds, first seed: the curves fall together.",
            ),
        ]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Slope of log t* on log lambda, with its standard error over seeds: held when -1 is within 0.3 of it."""
        groups = {decay: group for decay, group in _rows_by_decay(rows).items() if len(group) >= 2}
        if len(groups) < 3:
            return Verdict(outcome="not enough data", reason="needs three weight decays with two seeds each")
        seeds = min(len(group) for group in groups.values())
        x = np.log(list(groups))
        slopes = [
            float(np.polyfit(x, [math.log(time_to_best(group[s])) for group in groups.values()], 1)[0])
            for s in range(seeds)
        ]
        slope, error = float(np.mean(slopes)), float(np.std(slopes, ddof=1) / math.sqrt(seeds))
        outcome = "held" if abs(slope + 1) <= 0.3 else "not held"
        return Verdict(
            outcome=outcome,
            reason=f"log-log slope {slope:.2f} +- {error:.2f}; the claim says -1",
            numbers={"slope": slope, "stderr": error},
        )


@dataclass(frozen=True)
class IntermediateOptimum:
    """Final validation loss at a fixed budget over a grid of weight decays."""

    name: str = "l2-intermediate-optimum"
    title: str = "Fixed budget: best at an intermediate weight decay"
    claim: str = "At a fixed budget the best weight decay lies between zero and the largest; it is not zero."
    source: str = SOURCE

    def runs(self, size: Size) -> list[Run]:
        """A grid over the decays at one budget, zero included."""
        decays = {"smoke": (0.0, 0.01, 0.3), "small": (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)}.get(
            size, (0.0, *np.logspace(-5, 0, 11))
        )
        steps = {"smoke": 600, "small": 3000}.get(size, 20_000)
        config = {**_base(size), "steps": steps}
        seeds = 2 if size == "smoke" else 3
        return [
            Run(config={**config, "weight_decay": float(f"{d:.6g}")}, seed=seed)
            for d in decays
            for seed in range(seeds)
        ]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Mean final validation loss and accuracy per decay, with the range over seeds."""
        groups = {decay: group for decay, group in _rows_by_decay(rows).items() if decay > 0}
        panels = []
        for column in ("validation_loss", "validation_accuracy") if groups else ():
            ends = [[row.curve[column][-1] for row in group] for group in groups.values()]
            trace = Trace(
                name="final",
                x=list(groups),
                y=[float(np.mean(e)) for e in ends],
                low=[min(e) for e in ends],
                high=[max(e) for e in ends],
                mode="lines+markers",
            )
            panels.append(
                Panel(
                    title=column.replace("_", " "),
                    x_label="weight decay",
                    y_label=column.replace("_", " "),
                    traces=[trace],
                    x_log=True,
                    caption="Band: range over seeds. Weight decay 0 is in the table of runs.",
                )
            )
        return panels

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the best decay beats both zero and the largest by more than two standard errors."""
        groups = {decay: group for decay, group in _rows_by_decay(rows).items() if len(group) >= 2}
        if len(groups) < 3 or 0.0 not in groups:
            return Verdict(outcome="not enough data", reason="needs zero and two more weight decays, two seeds each")
        ends = {decay: np.array([row.curve["validation_loss"][-1] for row in group]) for decay, group in groups.items()}
        best = min(ends, key=lambda decay: float(ends[decay].mean()))
        margins = {}
        for name, other in (("zero", 0.0), ("largest", max(ends))):
            error = math.sqrt(sum(float(e.var(ddof=1)) / len(e) for e in (ends[best], ends[other])))
            margins[name] = float(ends[other].mean() - ends[best].mean()) / max(error, 1e-12)
        held = best not in (0.0, max(ends)) and min(margins.values()) > 2
        reason = (
            f"best at {best:g}: better than zero by {margins['zero']:.1f} and than the largest by "
            f"{margins['largest']:.1f} standard errors"
        )
        return Verdict(outcome="held" if held else "not held", reason=reason, numbers={"best": best, **margins})


FIGURES = (TimeToBest(), IntermediateOptimum())
