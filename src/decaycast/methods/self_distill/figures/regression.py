"""Rounds and mix chosen by themselves on real regression sets, against kernel ridge tuned by GCV.

A run is one set and one split: so many training samples, and of the rest at most so many to test on. Inputs and targets are
standardised with the training samples' means and deviations. The kernel is exp(-gamma*|x - x'|^2); gamma and the ridge of the
single fit are those of the smallest GCV on a grid, and distillation gets that gamma, and its ridge, rounds and mix from the same
criterion on the same grid of ridges. An error is the mean square on test samples, in units of the targets' variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import Interval, interval
from decaycast.methods.self_distill.figures.sets import SETS, load

GAMMAS = (0.03, 0.1, 0.3, 1.0, 3.0)  # over the number of features
NOT_ABOVE, SPLITS = 6, 20
Pairs = Mapping[str, Mapping[int, Row]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size: sets, samples to train and test on at most, splits."""

    sets: tuple[str, ...]
    train: int
    test: int
    splits: int


PLANS: dict[Size, Plan] = {
    "smoke": Plan(sets=("iris", "diabetes"), train=60, test=50, splits=2),
    "small": Plan(sets=tuple(SETS), train=300, test=1000, splits=SPLITS),
    "paper": Plan(sets=tuple(SETS), train=2000, test=5000, splits=50),
}


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Test error of the rounds that were chosen, over that of ridge."""

    name: str = "self_distill/regression"
    title: str = "Real regression sets: rounds against tuned ridge"
    claim: str = (
        'With rounds="auto" and mix="auto" the mean test error is not above that of kernel ridge tuned by GCV on at least 6 of '
        "8 real regression sets."
    )
    source: str = "our own check; Pareek, Du & Oh 2024 (arXiv 2407.04600) mix on other sets"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    def runs(self, size: Size) -> list[Run]:
        """Every set at every split."""
        plan = self.plans[size]
        return [_run(plan, name, seed) for seed in range(plan.splits) for name in plan.sets]

    def train(self, run: Run, data: object) -> Row:
        """Fit both on one split; `data` are not used, the set is read here."""
        config: dict[str, Any] = dict(run.config)
        return Row(run=run, final=compared(load(config["set"]), config["train"], config["test"], run.seed))

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Change of the test error by set, and what was chosen."""
        pairs = by_set(rows)
        return [_change_panel(pairs), _choice_panel(pairs)] if pairs else []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the mean over 20 splits of the error's relative change is 0 or below on 6 of 8 sets."""
        pairs = by_set(rows)
        if len(pairs) < len(SETS) or min(map(len, pairs.values())) < SPLITS:
            return Verdict(outcome="not enough data", reason=f"needs {len(SETS)} sets of {SPLITS} splits")
        changes = {name: interval(changes_of(of_split)) for name, of_split in pairs.items()}
        fine = [name for name, found in changes.items() if found.mean <= 0]
        told = ", ".join(f"{name} {_percent(found)}" for name, found in changes.items())
        below = [name for name, found in changes.items() if found.high < 0]
        above = [name for name, found in changes.items() if found.low > 0]
        lost = [name for name in changes if name not in fine]
        plain = float(np.mean([_finals(of_split, "rounds") == 1 for of_split in pairs.values()]))
        reason = (
            f"Not above on {len(fine)} of {len(pairs)} sets. Change of the test error: {told}. Clearly below: "
            f"{', '.join(below) or 'none'}; clearly above: {', '.join(above) or 'none'}; "
            f"mean above 0: {', '.join(lost) or 'none'}. One fit was chosen in {plain:.0%} of all splits: both are equal there"
        )
        numbers: dict[str, float] = {"sets not above": float(len(fine))}
        for name, found in changes.items():
            numbers |= found.numbers(name)
            numbers[f"{name}, share of splits distilled"] = float(np.mean(_finals(pairs[name], "rounds") > 1))
        return Verdict(outcome="held" if len(fine) >= NOT_ABOVE else "not held", reason=reason, numbers=numbers)


def compared(arrays: tuple[np.ndarray, np.ndarray], train: int, test: int, seed: int) -> dict[str, float]:
    """Errors of both on one split, with what was chosen.

    Args:
        arrays: inputs (n, features) and targets (n,) or (n, outputs).
        train: training samples at most; three quarters of a smaller set.
        test: test samples at most.
        seed: of the split.
    """
    from decaycast.methods.self_distill.estimator import KernelSelfDistillation  # loads scikit-learn

    inputs, targets = arrays
    order = np.random.default_rng([seed, 2]).permutation(len(inputs))
    count = min(train, 3 * len(inputs) // 4)
    chosen, held_out = order[:count], order[count : count + test]
    x, other = _standardised(inputs[chosen], inputs[held_out])
    y, wanted = _standardised(targets[chosen], targets[held_out])
    ridges: list[Any] = [KernelSelfDistillation(gamma=g / x.shape[1], alpha="auto").fit(x, y) for g in GAMMAS]
    at = int(np.argmin([each.choice_.plain_score for each in ridges]))
    ridge: Any = ridges[at]
    found: Any = KernelSelfDistillation(gamma=ridge.gamma, alpha=ridge.alpha_, rounds="auto", mix="auto").fit(x, y)
    return {
        "ridge_error": float(((ridge.predict(other) - wanted) ** 2).mean()),
        "error": float(((found.predict(other) - wanted) ** 2).mean()),
        "gamma": float(ridge.gamma),
        "ridge_alpha": float(ridge.alpha_),
        "alpha": float(found.alpha_),
        "rounds": float(found.rounds_),
        "mix": float(found.mix_),
        "predicted_gain": found.choice_.gain,
        "predicted_gain_stderr": found.choice_.gain_stderr,
        "train_samples": float(count),
        "test_samples": float(len(held_out)),
    }


def _standardised(values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by mean and deviation of the first; columns that are constant there only lose their mean."""
    mean, deviation = values.mean(0), values.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return (values - mean) / deviation, (others - mean) / deviation


def _run(plan: Plan, name: str, seed: int) -> Run:
    config: dict[str, Scalar] = {
        "experiment": "self_distill/regression",
        "data": "digits",  # not looked at; the lab wants a data set
        "set": name,
        "train": plan.train,
        "test": plan.test,
    }
    return Run(config=config, seed=seed)


def by_set(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """Finished rows by the name of their set, in the order of `SETS`, and in each by split."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.status == "done":
            found.setdefault(str(row.run.config["set"]), {})[row.run.seed] = row
    return {name: dict(sorted(found[name].items())) for name in SETS if name in found}


def changes_of(of_split: Mapping[int, Row]) -> list[float]:
    """Relative change of the test error in every split: below 0 is a gain."""
    return [row.final["error"] / row.final["ridge_error"] - 1.0 for row in of_split.values()]


def _finals(of_split: Mapping[int, Row], name: str) -> np.ndarray:
    return np.array([row.final[name] for row in of_split.values()])


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:+.1f}% ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _change_panel(pairs: Pairs) -> Panel:
    traces = []
    for number, (name, of_split) in enumerate(pairs.items(), start=1):
        changes = changes_of(of_split)
        found = interval(changes) if len(changes) > 1 else None
        traces.append(
            Trace(
                name=name,
                x=[float(number)],
                y=[float(np.mean(changes))],
                low=None if found is None else [found.low],
                high=None if found is None else [found.high],
                mode="markers",
            )
        )
    return Panel(
        title="Change of the test error by self-distillation",
        x_label="set, in the order of the legend",
        y_label="error over that of tuned ridge, minus 1",
        traces=traces,
        caption="Mean over splits with its 95 % interval. Below 0, self-distillation is better. It is exactly 0 in splits in "
        "which one fit was chosen.",
    )


def _choice_panel(pairs: Pairs) -> Panel:
    traces = [
        Trace(
            name=name,
            x=_finals(of_split, "rounds").tolist(),
            y=(1.0 - _finals(of_split, "mix")).tolist(),
            mode="markers",
        )
        for name, of_split in pairs.items()
    ]
    return Panel(
        title="What was chosen",
        x_label="fits",
        y_label="weight of the fit before in later labels, xi",
        traces=traces,
        caption="One mark per split. One fit is plain ridge, whatever the mix.",
    )
