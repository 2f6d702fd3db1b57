"""The README's picture from the committed results: what is captured at what cost, and one forecast against its truth.

python bench/plot.py        # needs matplotlib; writes docs/img/forecast.png
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

from forecast import load_truth
from truth import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN_TASK = "mnist-512 mlp sgd constant"
FAMILIES = {
    "optuna TPE": ("Optuna TPE", "#4477aa", "s"),
    "optuna Hyperband": ("Optuna Hyperband (ASHA)", "#66ccee", "D"),
    "random search": ("random search", "#888888", "v"),
    "rank 5 arms": ("rank 5 arms early", "#ccbb44", "^"),
}


def shares(axes, result: dict) -> None:
    """Captured share of the tuning gain against cost, one line per family of methods."""
    methods = result["live"]["methods"]
    for prefix, (label, colour, marker) in FAMILIES.items():
        points = sorted((row["cost"], row["captured"]) for name, row in methods.items() if name.startswith(prefix))
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    ours = methods["decaycast forecast"]
    axes.errorbar(
        ours["cost"], ours["captured"], ours["stderr_over_tasks"], fmt="o", color="#cc3311", markersize=9, capsize=3
    )
    axes.text(
        0.34, ours["captured"] + 0.06, f"decaycast forecast: {ours['captured']:.2f}", color="#cc3311", weight="bold"
    )
    prior = methods["always 1.5 e-folds"]["captured"]
    axes.axhline(prior, color="#cc3311", linestyle=":", linewidth=1)
    axes.text(
        1.6, prior - 0.03, f"always 1.5 e-folds: {prior:.2f}\n(costs nothing)", va="top", fontsize=8, color="#cc3311"
    )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.text(14, 0, "the default", va="bottom", ha="right", fontsize=8)
    lowest = min(row["captured"] for row in methods.values())
    axes.text(2.75, -0.94, f"down to {lowest:.1f} at one run", fontsize=8, color="#666666")
    tasks = len(result["live"]["counted_tasks"])
    axes.set(
        xscale="log",
        xlabel="cost in full training runs",
        ylabel="share of the tuning gain captured",
        xlim=(0.2, 15),
        ylim=(-1, 1.25),
        title=f"Validation loss, {tasks} real tasks",
    )
    axes.set_xticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def one_task(axes, result: dict) -> None:
    """The grid of one task with the forecast and its interval."""
    truth = load_truth()[SHOWN_TASK]
    row = next(row for row in result["live"]["forecasts"] if row["task"] == SHOWN_TASK)
    grid = np.array([value for value in sorted(truth.rows) if value > 0])
    means = [np.mean(list(truth.values(value, "loss, final").values())) for value in grid]
    axes.plot(grid, means, "o-", color="black", markersize=4, label="truth: full runs")
    axes.axvspan(row["low"], row["high"], color="#cc3311", alpha=0.15, label="forecast, 90 % interval")
    axes.axvline(row["picked"], color="#cc3311", label=f"forecast at {row['cost']:.1f} runs' cost")
    axes.axvline(truth.task.default, color="#4477aa", linestyle="--", label="usual default")
    axes.set(
        xscale="log",
        xlabel="weight decay",
        ylabel="final validation loss",
        title="MNIST-512, MLP, SGD",
        ylim=(min(means) - 0.02, min(means) + 0.35),
        xlim=(1e-5, 1),
    )
    axes.legend(loc="upper center", fontsize=8, frameon=False)


def main() -> None:
    """Draw both panels."""
    result = json.loads((RESULTS / "forecast.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=140)
    shares(axes[0], result)
    one_task(axes[1], result)
    figure.tight_layout()
    target = Path(__file__).parent.parent / "docs" / "img" / "forecast.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    print(target.name)


if __name__ == "__main__":
    main()
