"""The forecast against other ways to pick a weight decay: live tasks and logged large runs, one table, JSON beside it.

    DECAYCAST_DATA=<data folder> python bench/truth.py        # the live tasks' truth, about an hour, resumes
    DECAYCAST_DATA=<data folder> python bench/forecast.py     # forecasts live (a minute or two), peers on the recorded runs

Headline: captured share = (default - picked)/(default - best of grid) of the final validation loss, averaged over the tasks
whose gap exceeds twice its standard error. Runs are compared with the default's of the same seed (same initial weights, same
batches). Methods that answer between grid points (the forecast, a fixed number of e-folds) have their answer trained in full on
the finalists' seeds; the searches answer on the grid. The best of the grid is chosen on the first two seeds
and scored on the other four; seeds are summed up by their median, because single runs collapse by themselves. The rule's
constants were looked at on these very tasks and logs: the numbers are in-sample.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import decaycast as dc
import peers
from decaycast.core.experiment import Row, Run, jsonable
from decaycast.core.measure import COLUMNS
from decaycast.lab.execute import in_process, processes
from decaycast.lab.forecasting import effective_rates
from decaycast.lab.probe import TrialProbe
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store, load_export
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run
from decaycast.methods.l2.forecast import PRIOR_EFOLDS
from tasks import FINALIST_SEEDS, GRID_SEEDS, Task, tasks
from truth import RESULTS, objectives

OBJECTIVE = "loss, final"
REPETITIONS = 30
LIVE_SEEDS = (100, 101)
MAX_COST = 0.3


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One task's grid of full runs; every objective is lower-is-better and compared with the default seed by seed."""

    task: Task
    rows: dict[float, list[Row]]
    middle: Callable = np.median  # over seeds
    picks: dict[float, list[Row]] = field(default_factory=dict)  # trained in full where a method answered off the grid

    def values(self, decay: float, objective: str) -> dict[int, float]:
        """Objective by seed at a trained weight decay; a failed run counts as far off (5)."""
        rows = self.rows.get(decay) or self.picks[decay]
        return {row.run.seed: min(objectives(row)[objective], 5.0) for row in rows}

    def worse(self, decay: float, objective: str = OBJECTIVE, seeds: tuple[int, ...] = FINALIST_SEEDS) -> np.ndarray:
        """How much worse than the default, seed by seed (same initial weights, same batches).

        On `seeds` where the weight decay was trained on them, otherwise (grid points that are no finalists) on the grid's.
        """
        mine, default = self.values(decay, objective), self.values(self.task.default, objective)
        chosen = [seed for seed in seeds if seed in mine and seed in default] or list(GRID_SEEDS)
        return np.array([mine[seed] - default[seed] for seed in chosen])

    def at(self, decay: float, objective: str = OBJECTIVE) -> float:
        """Mean of `worse` at any weight decay: measured where it was trained, otherwise interpolated in its logarithm."""
        for trained in (decay, _rounded(decay)):
            if trained in self.rows or trained in self.picks:
                return float(self.middle(self.worse(trained, objective)))
        grid = np.array([value for value in sorted(self.rows) if value > 0])
        return float(
            np.interp(math.log(decay), np.log(grid), [self.middle(self.worse(value, objective)) for value in grid])
        )

    def best(self, objective: str = OBJECTIVE) -> float:
        """The best finalist of the grid on the grid's seeds; it is scored on the others, so choosing does not flatter it."""
        finalists = [value for value in self.rows if value > 0 and len(self.rows[value]) > len(GRID_SEEDS)]
        return min(finalists, key=lambda value: float(self.middle(self.worse(value, objective, GRID_SEEDS))))

    def gap(self, objective: str = OBJECTIVE) -> tuple[float, float]:
        """What tuning gains over the default, and its standard error over the finalists' paired seeds."""
        gain = -self.worse(self.best(objective), objective)
        error = (
            float(gain.std(ddof=1) / math.sqrt(len(gain))) if self.best(objective) != self.task.default else math.inf
        )
        return float(self.middle(gain)), error

    def captured(self, decay: float, objective: str = OBJECTIVE) -> float:
        """(default - picked)/(default - best of grid)."""
        gap, _ = self.gap(objective)
        return -self.at(decay, objective) / gap if gap > 0 else math.nan

    def regret(self, decay: float, objective: str = OBJECTIVE) -> float:
        """(picked - best of grid)/(worst of grid - best of grid), the logged runs' unit: kind, since the worst is far off."""
        best = self.at(self.best(objective), objective)
        worst = max(self.at(value, objective) for value in self.task.grid)
        return (self.at(decay, objective) - best) / (worst - best)

    def test_points(self, decay: float) -> float:
        """Test accuracy gained over the default, in percentage points (paired and interpolated like the objective)."""

        def accuracy(value: float) -> dict[int, float]:
            return {
                row.run.seed: row.final.get("test_accuracy", 0.1) for row in self.rows.get(value) or self.picks[value]
            }

        default = accuracy(self.task.default)
        grid = [_rounded(decay)] if _rounded(decay) in self.picks else [v for v in sorted(self.rows) if v > 0]
        gains = [np.mean([a - default[s] for s, a in accuracy(value).items() if s in default]) for value in grid]
        return float(100 * np.interp(math.log(decay), np.log(grid), gains))

    def table(self) -> peers.Table:
        """The grid's validation loss curves for the peers."""
        grid = self.task.grid
        first = next(row for row in self.rows[self.task.default] if row.status == "done")
        at = np.array(first.curve["step"]) / self.task.steps
        seeds = min(len(self.rows[value]) for value in grid)
        losses = np.full((len(grid), seeds, len(at)), 5.0)
        for i, value in enumerate(grid):
            for s, row in enumerate(self.rows[value][:seeds]):
                curve = np.minimum(np.nan_to_num(row.curve["validation_loss"], nan=5.0), 5.0)
                losses[i, s, : len(curve)] = curve
        return peers.Table(decays=np.array(grid), losses=losses, at=at)


def load_truth() -> dict[str, Truth]:
    """The exported rows, by task."""
    rows = load_export(RESULTS / "truth.jsonl.gz")
    found = {}
    for task in tasks():
        mine: dict[float, list[Row]] = defaultdict(list)
        for row in rows:
            rest = {key: value for key, value in row.run.config.items() if key != "weight_decay"}
            if rest == task.config:
                mine[float(row.run.config["weight_decay"])].append(row)  # type: ignore[arg-type]
        found[task.name] = Truth(task=task, rows={key: sorted(v, key=lambda r: r.run.seed) for key, v in mine.items()})
    return found


def live_forecast(run: Run) -> Row:
    """One forecast on one task of the truth, as a row."""
    return forecast_row(run, next(task for task in tasks() if task.name == run.config["task"]))


def forecast_row(run: Run, task: Task) -> Row:
    """One forecast on `task`, packed as a row so that the sweep machinery keeps and resumes it."""
    metric = f"validation_{run.config['metric']}"
    found = dc.forecast(
        TrialProbe(task.config, seed=run.seed, metric=metric),
        task.steps,
        lr=effective_rates(task.config, None),
        higher_is_better=run.config["metric"] == "accuracy",
        max_cost=MAX_COST,
    )
    low, high = found.interval
    final = {
        "weight_decay": found.weight_decay,
        "low": low,
        "high": high,
        "cost": found.cost,
        "efolds": found.efolds or 0.0,
    }
    return Row(
        run=run,
        reason=f"{found.verdict}: {found.reason}",
        final=final,
        provenance=provenance(),
        curve={name: [] for name in COLUMNS},
    )


def retrain(truths: dict[str, Truth], forecasts: list[Row], store_path: str, workers: int) -> None:
    """Train the picks of the methods that answer between grid points in full, and add the rows to the truth.

    Straight lines between half-decade grid points would underrate them against searches that answer on the grid.
    """
    on_loss = [row for row in forecasts if row.run.config["metric"] == "loss"]
    picks = {(str(row.run.config["task"]), row.final["weight_decay"]) for row in on_loss}
    picks |= {(name, _at_efolds(truth.task, 1.5)) for name, truth in truths.items()}
    runs = [truths[name].task.run(_rounded(decay), seed) for name, decay in sorted(picks) for seed in FINALIST_SEEDS]
    with Store(store_path) as store:
        rows = sweep(
            runs, store, train=train_run, execute=processes(workers), on_row=lambda r: print(r.seconds, flush=True)
        )
        store.export(RESULTS / "picks.jsonl.gz")
    for (name, decay), position in zip(sorted(picks), range(0, len(rows), len(FINALIST_SEEDS)), strict=True):
        truths[name].picks[_rounded(decay)] = rows[position : position + len(FINALIST_SEEDS)]


def _rounded(decay: float) -> float:
    return float(f"{decay:.3g}")


def live(store_path: str, workers: int) -> list[Row]:
    """Forecasts of every task, trained for real on seeds outside the grid."""
    runs = [
        Run(config={"task": task.name, "metric": metric, "max_cost": MAX_COST, "rule_version": RULE_VERSION}, seed=seed)
        for metric in ("loss", "accuracy")
        for task in tasks()
        for seed in LIVE_SEEDS
    ]
    with Store(store_path) as store:
        return sweep(
            runs,
            store,
            train=live_forecast,
            execute=processes(workers) if workers > 1 else in_process,
            on_row=lambda row: print(row.run.config["task"], row.run.seed, row.reason[:70], flush=True),
        )


RULE_VERSION = 4  # raise when the decision rule changes: old forecasts are then made anew


def compare_live(truths: dict[str, Truth], rows: list[Row]) -> dict:
    """Captured share and cost per method over the tasks whose gap counts."""
    counted = [name for name, truth in truths.items() if truth.gap()[0] > 2 * truth.gap()[1]]
    picks = {row.run.config["task"]: [] for row in rows}
    for row in rows:
        if row.run.config["metric"] == "loss":
            picks[row.run.config["task"]].append(row)
    per_task = []
    for name, truth in truths.items():
        gap, error = truth.gap()
        for row in picks[name]:
            decay = row.final["weight_decay"]
            per_task.append(
                {
                    "task": name,
                    "seed": row.run.seed,
                    "counted": name in counted,
                    "gap": gap,
                    "gap_stderr": error,
                    "best": truth.best(),
                    "picked": decay,
                    "low": row.final["low"],
                    "high": row.final["high"],
                    "efolds": row.final["efolds"],
                    "verdict": row.reason.split(":")[0],
                    "cost": row.final["cost"],
                    "captured": truth.captured(decay),
                    "regret": truth.regret(decay),
                    "test_points": truth.test_points(decay),
                }
            )
    methods = {"decaycast forecast": [row for row in per_task if row["counted"]]}
    summary = {
        "decaycast forecast": _summary(
            [r["captured"] for r in methods["decaycast forecast"]],
            counted,
            np.mean([r["cost"] for r in per_task]),
            repeats=len(LIVE_SEEDS),
        )
    }
    tables = {name: truths[name].table() for name in counted}
    for label, search, cost in searches():
        shares = []
        for name in counted:
            repeats = REPETITIONS if label.startswith(("random", "optuna")) else tables[name].losses.shape[1]
            shares.append(np.mean([truths[name].captured(search(tables[name], cost, seed)) for seed in range(repeats)]))
        summary[label] = _summary(shares, counted, cost)
    for label, efolds in (
        ("always 1.5 e-folds", 1.5),
        (f"always {PRIOR_EFOLDS} e-folds (the prior alone)", PRIOR_EFOLDS),
    ):
        shares = [truths[name].captured(_at_efolds(truths[name].task, efolds)) for name in counted]
        summary[label] = _summary(shares, counted, 0.0)
    means = {name: replace(truth, middle=np.mean) for name, truth in truths.items()}
    rows_counted = methods["decaycast forecast"]
    summary["decaycast forecast, seed means instead of medians"] = _summary(
        [means[row["task"]].captured(row["picked"]) for row in rows_counted],
        counted,
        summary["decaycast forecast"]["cost"],
        repeats=len(LIVE_SEEDS),
    )
    summary["always the default"] = _summary([0.0 for _ in counted], counted, 0.0)
    return {
        "counted_tasks": counted,
        "methods": summary,
        "forecasts": per_task,
        "other_objectives": other_objectives(truths, rows),
    }


def other_objectives(truths: dict[str, Truth], rows: list[Row]) -> dict:
    """Captured share when the objective is another one: the forecast made on the loss or on the accuracy."""
    found = {}
    for objective in ("loss, final", "loss, best", "error, final", "error, best"):
        counted = [name for name, truth in truths.items() if truth.gap(objective)[0] > 2 * truth.gap(objective)[1]]
        for metric in ("loss", "accuracy"):
            shares = [
                truths[row.run.config["task"]].captured(row.final["weight_decay"], objective)
                for row in rows
                if row.run.config["metric"] == metric and row.run.config["task"] in counted
            ]
            found[f"{objective} | forecast on {metric}"] = {"tasks": len(counted), "captured": _mean(shares)}
    return found


def searches() -> list[tuple[str, peers.Search, float]]:
    """Every peer with its cost in full-run equivalents."""
    found: list[tuple[str, peers.Search, float]] = []
    for cost in (1.0, 3.0, 10.0):
        found += [
            (f"optuna TPE, {cost:.0f} FRE", peers.tpe, cost),
            (f"optuna Hyperband (ASHA), {cost:.0f} FRE", peers.asha, cost),
            (f"random search, {cost:.0f} FRE", peers.random_search, cost),
        ]
    return [
        *found,
        ("rank 5 arms at 10 %", peers.rank_prefix(0.1), 0.5),
        ("rank 5 arms at 25 %", peers.rank_prefix(0.25), 1.25),
    ]


def _at_efolds(task: Task, efolds: float) -> float:
    convention = "sgd" if task.config["optimizer"] == "sgd" else "decoupled"
    return dc.weight_decay_for(
        efolds=efolds,
        lr=task.learning_rates(),
        steps=task.steps,
        momentum=float(task.config["momentum"]),
        convention=convention,
    )  # type: ignore[arg-type]


def _summary(shares: list[float], counted: list[str], cost: float, repeats: int = 1) -> dict:
    by_task = np.array(shares).reshape(len(counted), -1).mean(1) if repeats > 1 else np.array(shares)
    error = float(by_task.std(ddof=1) / math.sqrt(len(by_task))) if len(by_task) > 1 else math.nan
    return {
        "captured": float(by_task.mean()),
        "stderr_over_tasks": error,
        "median": float(np.median(by_task)),
        "worst": float(by_task.min()),
        "cost": float(cost),
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def algoperf(path: Path, drop_dead: bool = True) -> dict:
    """Logged large trainings that differ in weight decay only: a probe reads prefixes and pays for them."""
    curves = _read_logs(path)
    rows = []
    for (workload, study), arms in sorted(curves.items()):
        if drop_dead:
            arms = _survivors(arms)
        budget = int(min(steps[-1] for steps, _ in arms.values()))
        best = {decay: values[steps <= budget].max() for decay, (steps, values) in arms.items()}
        worst, top = min(best.values()), max(best.values())
        for label, pick, cost, verdict in _pickers(arms, budget):
            regret = (top - best[pick]) / (top - worst) if top > worst else 0.0
            rows.append(
                {
                    "workload": workload,
                    "study": study,
                    "method": label,
                    "picked": pick,
                    "regret": regret,
                    "cost": cost,
                    "verdict": verdict,
                }
            )
    summary = {}
    for label in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == label]
        by_workload = {
            name: float(np.mean([row["regret"] for row in mine if row["workload"] == name]))
            for name in sorted({row["workload"] for row in mine})
        }
        summary[label] = {
            "regret": float(np.mean(list(by_workload.values()))),
            "cost": float(np.mean([r["cost"] for r in mine])),
            "by_workload": by_workload,
        }
    return {"methods": summary, "rows": rows}


def _survivors(arms: dict) -> dict:
    """Without the runs that died: ended in the first half of the longest, and worse than every run that went on.

    A run that ends early because it reached the target is no such run.
    """
    half = max(steps[-1] for steps, _ in arms.values()) / 2
    worst = min(values.max() for steps, values in arms.values() if steps[-1] >= half)
    return {
        decay: (steps, values) for decay, (steps, values) in arms.items() if steps[-1] >= half or values.max() >= worst
    }


def _pickers(arms: dict, budget: int) -> list[tuple[str, float, float, str]]:
    decays = sorted(arms)

    def probe(decay: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
        at, values = arms[min(decays, key=lambda value: abs(math.log(value / decay)))]
        return at[at <= steps], values[at <= steps]

    found = dc.forecast(probe, budget, candidates=decays, max_cost=MAX_COST)
    nearest = min(decays, key=lambda value: abs(math.log(value / found.weight_decay)))
    picked = [
        ("decaycast forecast", nearest, found.cost, found.verdict),
        ("two-arm crossing, 0.3 FRE", *_crossing(arms, budget), ""),
    ]
    for fraction in (0.05, 0.1, 0.25, 0.5):
        best = max(decays, key=lambda value: arms[value][1][arms[value][0] <= fraction * budget].max(initial=-np.inf))
        picked.append((f"rank all arms at {fraction:.0%}", best, len(decays) * fraction, ""))
    for value in (0.01, 0.03, 0.1):
        picked.append((f"always {value}", min(decays, key=lambda other: abs(math.log(other / value))), 0.0, ""))
    return picked


def _crossing(arms: dict, budget: int) -> tuple[float, float]:
    """The paper's idea with two arms and no care: where the largest falls behind the next, scaled by 1/t."""
    decays = sorted(arms)
    low, high = decays[-2], decays[-1]
    times = np.linspace(0, 0.15 * budget, 60)[1:]
    behind = np.interp(times, *arms[high]) < np.interp(times, *arms[low])
    crossing = times[behind.argmax()] if behind.any() else times[-1]
    target = math.sqrt(low * high) * crossing / budget
    return min(decays, key=lambda value: abs(math.log(value / target))), 0.3


def _read_logs(path: Path) -> dict:
    grouped = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            sign = -1.0 if row["metric_name"] == "wer" else 1.0
            point = (float(row["step"]), sign * float(row["validation_metric"]))
            grouped[row["workload"], int(row["study"])][float(row["weight_decay"])].append(point)
    return {
        key: {decay: tuple(np.array(sorted(points)).T) for decay, points in arms.items()}
        for key, arms in grouped.items()
    }


def verdicts(live_part: dict, logged: dict) -> dict:
    """Among forecasts to be trusted, how many have a regret above a quarter; and how many miss a quarter of the gain."""
    lived = [row for row in live_part["forecasts"] if row["counted"] and row["verdict"] == "trust"]
    read = [row for row in logged["rows"] if row["method"] == "decaycast forecast" and row["verdict"] == "trust"]
    return {
        "trusted": len(lived) + len(read),
        "live": len(lived),
        "logged": len(read),
        "regret_above_quarter": sum(bool(row["regret"] > 0.25) for row in lived + read),
        "live_missing_a_quarter_of_the_gain": sum(bool(1 - row["captured"] > 0.25) for row in lived),
    }


def markdown(result: dict) -> str:
    """The table people read."""
    lines = [
        "# Forecast benchmark",
        "",
        "Made by `DECAYCAST_DATA=<data folder> python bench/truth.py`, then `... python bench/forecast.py`.",
        "",
        f"Live tasks counted: {len(result['live']['counted_tasks'])} of {len(tasks())} (gap between default and best of grid "
        "above twice its standard error). The constants of the rule were looked at on these tasks and logs: in-sample numbers.",
        "Medians over seeds: single runs of one task (CNN without batch norm) collapse to chance by themselves, one of",
        "them at a forecast's answer and not at its neighbours'. The line with seed means shows what that does.",
        "Searches at 1 and 3 full runs often end on a weight decay that does not train at all, hence the negative means.",
        "",
        "| method | captured share of the tuning gain, mean over tasks | median | worst task | cost, full runs |",
        "|-|-|-|-|-|",
    ]
    for label, row in result["live"]["methods"].items():
        lines.append(
            f"| {label} | {row['captured']:.2f} +- {row['stderr_over_tasks']:.2f} | {row['median']:.2f} | {row['worst']:.2f} "
            f"| {row['cost']:.2f} |"
        )
    lines += [
        "",
        "| task | seed | gap in validation loss | best lambda | picked | e-folds | verdict | captured | test points |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for row in result["live"]["forecasts"]:
        mark = "" if row["counted"] else " (not counted)"
        lines.append(
            f"| {row['task']}{mark} | {row['seed']} | {row['gap']:.4f} +- {row['gap_stderr']:.4f} | {row['best']:.3g} | "
            f"{row['picked']:.3g} | {row['efolds']:.2f} | {row['verdict']} | {row['captured']:.2f} | {row['test_points']:+.2f} |"
        )
    lines += ["", "| objective and what the forecast looked at | tasks counted | captured |", "|-|-|-|"]
    for label, row in result["live"]["other_objectives"].items():
        share = "-" if row["captured"] is None else f"{row['captured']:.2f}"
        lines.append(f"| {label} | {row['tasks']} | {share} |")
    lines += [
        "",
        "Logged large runs (AlgoPerf v0.5 Schedule-Free Prodigy): regret = (best - picked)/(best - worst).",
        "",
        "| method | mean regret | cost, full runs | "
        + " | ".join(next(iter(result["logged"]["methods"].values()))["by_workload"])
        + " |",
        "|-|-|-|" + "-|" * len(next(iter(result["logged"]["methods"].values()))["by_workload"]),
    ]
    for label, row in result["logged"]["methods"].items():
        lines.append(
            f"| {label} | {row['regret']:.3f} | {row['cost']:.2f} | "
            + " | ".join(f"{v:.2f}" for v in row["by_workload"].values())
            + " |"
        )
    raw = result["logged_with_dead_runs"]["decaycast forecast"]["regret"]
    lines += [
        "",
        "A logged run that died (ended in the first half of the longest, worse than every run that went on) is no candidate; "
        f"left in, with the budget ending where it died, the forecast's mean regret is {raw:.3f}.",
    ]
    check = result["verdicts"]
    lines += [
        "",
        f"Trusted forecasts: {check['trusted']} ({check['live']} live, {check['logged']} logged). Regret above 0.25: "
        f"{check['regret_above_quarter']}. Of the live ones, {check['live_missing_a_quarter_of_the_gain']} missed more than a "
        "quarter of the tuning gain, which is the stricter measure: the worst arm, which regret is normalised by, is far off.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, compare, write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="build/forecasts.sqlite")
    parser.add_argument("--picks", default="build/picks.sqlite")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    Path(args.store).parent.mkdir(parents=True, exist_ok=True)
    truths = load_truth()
    forecasts = live(args.store, args.workers)
    retrain(truths, forecasts, args.picks, args.workers)
    live_part = compare_live(truths, forecasts)
    path = Path(os.environ["DECAYCAST_DATA"]) / "algoperf" / "weight_decay_runs.csv.gz"
    logged, logged_raw = algoperf(path), algoperf(path, drop_dead=False)["methods"]
    result = {
        "logged_with_dead_runs": logged_raw,
        "provenance": provenance(),
        "live": live_part,
        "logged": logged,
        "verdicts": verdicts(live_part, logged),
    }
    (RESULTS / "forecast.json").write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n")
    (RESULTS / "forecast.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
