"""Does the forecast as a prior spare Optuna trials? TPE with and without it, on the recorded runs: nothing is trained.

    python bench/optuna_prior.py        # a few minutes on one core; writes results/optuna_prior.{json,md}

A study searches the weight decay of one live task of the forecast benchmark (`bench/tasks.py`). A trial's value is the final
validation loss of one recorded seed (its number picks which), between grid points interpolated in the logarithm. A study has
*reached the target* once its best trial so far captures 90 % of the tuning gain: (default - picked)/(default - best of grid),
medians over seeds, so a lucky seed that misleads the search does not count. All searches may use the grid's range, five decades.
The forecasts are those of results/forecast.json, two per task, each made on 0.3 full runs, which are charged: as 0.3 trials.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable

import numpy as np
import optuna

from decaycast.adapters.optuna import Prior, prior_from_forecast
from decaycast.core.experiment import jsonable
from decaycast.lab.provenance import provenance
from decaycast.lab.store import load_export
from decaycast.methods.l2.forecast import Forecast
from forecast import Truth, load_truth
from truth import RESULTS

TARGET = 0.9
TRIALS = 20
STUDIES = 10  # per forecast
SHOWN = (1, 2, 3, 5, 10, 20)
FORECASTS = 2  # per task


def prior_of(row: dict, truth: Truth) -> Prior:
    """The adapter's prior from a recorded forecast, within the grid's range."""
    found = Forecast(
        weight_decay=row["picked"],
        interval=(row["low"], row["high"]),
        verdict=row["verdict"],
        reason="recorded",
        efolds=row["efolds"],
        cost=row["cost"],
        budget_steps=truth.task.steps,
        metric="validation loss",
        higher_is_better=False,
        arms=(),
        rate_per_decay=None,
    )
    return prior_from_forecast(found, full_range=(truth.task.grid[0], truth.task.grid[-1]))


def objective_of(truth: Truth) -> Callable[[float, int], float]:
    """(weight decay, trial number) -> final loss of a recorded seed."""
    table = truth.table()
    logs = np.log(table.decays)
    return lambda decay, number: float(
        np.interp(math.log(decay), logs, table.losses[:, number % table.losses.shape[1], -1])
    )


def search(objective: Callable[[float, int], float], prior: Prior, sampler: optuna.samplers.BaseSampler) -> list[float]:
    """The best trial's weight decay after each trial."""
    study = optuna.create_study(sampler=sampler)
    if prior.enqueued is not None:
        study.enqueue_trial({"weight_decay": prior.enqueued})
    best = []
    for number in range(TRIALS):
        trial = study.ask()
        decay = trial.suggest_float("weight_decay", prior.low, prior.high, log=True)
        study.tell(trial, objective(decay, number))
        best.append(study.best_params["weight_decay"])
    return best


def arms(prior: Prior, full: Prior) -> dict[str, tuple[Prior, bool]]:
    """Each way to search: what it starts from, and whether it needed the forecast."""
    return {
        "TPE": (full, False),
        "TPE, forecast enqueued": (_replaced(full, enqueued=prior.enqueued), True),
        "TPE, narrower range": (_replaced(prior, enqueued=None), True),
        "TPE, both (`prior_from_forecast`)": (prior, True),
        "random search": (full, False),
    }


def _replaced(prior: Prior, enqueued: float | None) -> Prior:
    return Prior(low=prior.low, high=prior.high, enqueued=enqueued, reason=prior.reason)


def compare() -> list[dict]:
    """One row per study."""
    rows = []
    recorded = json.loads((RESULTS / "forecast.json").read_text())["live"]["forecasts"]
    truths = load_truth()
    for row in load_export(RESULTS / "picks.jsonl.gz"):  # the forecasts' answers, trained in full
        task = {key: value for key, value in row.run.config.items() if key != "weight_decay"}
        truth = next(truth for truth in truths.values() if truth.task.config == task)
        truth.picks.setdefault(float(row.run.config["weight_decay"]), []).append(row)  # type: ignore[arg-type]
    for found in recorded:
        if not found["counted"]:
            continue  # tuning gains nothing that can be measured there
        truth = truths[found["task"]]
        objective, prior = objective_of(truth), prior_of(found, truth)
        full = Prior(low=truth.task.grid[0], high=truth.task.grid[-1], enqueued=None, reason="")
        for label, (start, paid) in arms(prior, full).items():
            for repeat in range(STUDIES):
                seed = 1000 * found["seed"] + repeat
                random = label.startswith("random")
                sampler = optuna.samplers.RandomSampler(seed=seed) if random else optuna.samplers.TPESampler(seed=seed)
                shares = [truth.captured(decay) for decay in search(objective, start, sampler)]
                rows.append(
                    {
                        "task": found["task"],
                        "forecast_seed": found["seed"],
                        "verdict": found["verdict"],
                        "method": label,
                        "repeat": repeat,
                        "forecast_cost": found["cost"] if paid else 0.0,
                        "captured": shares,
                    }
                )
        print(found["task"], found["seed"], flush=True)
    return rows


def trials_to_target(shares: list[float], cost: float) -> float:
    """Trials, and the forecast's share of one, until the best trial so far captures the target; TRIALS + 1 if never."""
    reached = [number for number, share in enumerate(shares, start=1) if share >= TARGET]
    return (reached[0] if reached else TRIALS + 1) + cost


def summary(rows: list[dict]) -> dict:
    """Means over tasks, each the mean over its studies."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    found = {}
    for label in dict.fromkeys(row["method"] for row in rows):
        mine = {name: [row for row in rows if row["method"] == label and row["task"] == name] for name in names}
        by_task = {
            name: float(np.mean([trials_to_target(row["captured"], row["forecast_cost"]) for row in studies]))
            for name, studies in mine.items()
        }
        values = np.array(list(by_task.values()))
        never = [max(row["captured"]) < TARGET for studies in mine.values() for row in studies]
        found[label] = {
            "trials": float(values.mean()),
            "by_task": by_task,
            "never": float(np.mean(never)),
            "captured": {
                str(n): float(
                    np.mean([np.mean([row["captured"][n - 1] for row in studies]) for studies in mine.values()])
                )
                for n in SHOWN
            },
        }
    plain = np.array(list(found["TPE"]["by_task"].values()))
    for row in found.values():
        spared = plain - np.array(list(row["by_task"].values()))
        row["spared"] = float(spared.mean())
        row["spared_stderr"] = float(spared.std(ddof=1) / math.sqrt(len(spared)))
    return found


def markdown(result: dict, verdicts: dict) -> str:
    """The table people read."""
    methods = result
    tasks = list(methods["TPE"]["by_task"])
    ours = methods["TPE, both (`prior_from_forecast`)"]
    lines = [
        "# The forecast as a prior for Optuna",
        "",
        "Made by `python bench/optuna_prior.py` from recorded runs and recorded forecasts; its head says how.",
        "",
        f"{len(tasks)} tasks, {FORECASTS} forecasts each ({', '.join(f'{n} {v}' for v, n in verdicts.items())}), "
        f"{STUDIES} studies of {TRIALS} trials per forecast. Trials until the best one captures {TARGET:.0%} of the tuning "
        f"gain, the forecast's cost included; a study that never does counts as {TRIALS + 1}. Means over tasks; +- is their "
        "standard error, paired by task.",
        "The forecast's constants were looked at on these tasks; the widths of the ranges were set before this was run.",
        "",
        "| search | trials to target | fewer than TPE | never reach it | "
        + " | ".join(f"captured at {n}" for n in SHOWN)
        + " |",
        "|-|-|-|-|" + "-|" * len(SHOWN),
    ]
    for label, row in methods.items():
        shares = " | ".join(f"{row['captured'][str(n)]:.2f}" for n in SHOWN)
        spared = "-" if label == "TPE" else f"{row['spared']:+.1f} +- {row['spared_stderr']:.1f}"
        lines.append(f"| {label} | {row['trials']:.1f} | {spared} | {row['never']:.0%} | {shares} |")
    lines += [
        "",
        "Trials to target by task:",
        "",
        "| task | " + " | ".join(methods) + " |",
        "|-|" + "-|" * len(methods),
    ]
    for name in tasks:
        lines.append(f"| {name} | " + " | ".join(f"{row['by_task'][name]:.1f}" for row in methods.values()) + " |")
    slower = [name for name in tasks if ours["by_task"][name] > methods["TPE"]["by_task"][name]]
    lines += ["", f"Tasks on which the prior needs more trials than plain TPE: {', '.join(slower) or 'none'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Search, compare, write both files."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    rows = compare()
    result = summary(rows)
    firsts = {(row["task"], row["forecast_seed"]): row["verdict"] for row in rows}
    verdicts = {verdict: list(firsts.values()).count(verdict) for verdict in ("trust", "weak", "refuse")}
    text = markdown(result, verdicts)
    kept = {"provenance": provenance(), "methods": result, "verdicts": verdicts}
    (RESULTS / "optuna_prior.json").write_text(json.dumps(jsonable(kept), indent=1, allow_nan=False) + "\n")
    (RESULTS / "optuna_prior.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
