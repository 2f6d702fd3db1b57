"""AutoL2 on the clock of e-folds against the tuned constant and other schedules, under cosine and step learning rates.

    DECAYCAST_DATA=<data folder> python bench/schedules.py     # after bench/truth.py; hours on two cores, resumes

The tuned constant is chosen on validation accuracy: 11 weight decays half a decade apart on two seeds, the best two on five;
each seed is compared with the one that leads on the other four.
Nothing of AutoL2 is tuned here: it spends 1.3 e-folds everywhere. Every other schedule gets the same 1.3 e-folds, so that only
the shape differs; `bench/results/schedules.md` shows all, and what AutoL2 makes of other budgets.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar, jsonable
from decaycast.core.schedule import by_name, lr_by_name
from decaycast.lab.execute import processes
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store, load_export
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run
from forecast import forecast_row
from tasks import Task, task, tasks
from truth import RESULTS

EFOLDS = 1.3
GRID_SEEDS, SEEDS, RIVAL_SEEDS = (0, 1), (0, 1, 2, 3, 4), (0, 1)
FINALISTS = 2
RIVALS = {
    "constant, same e-folds": "constant",
    "cosine weight decay": "cosine",
    "decay to zero": "linear",
    "omega/t": "inverse_time",
    "AdamC form": "lr_proportional",
}
PROBED = "AutoL2, forecast's e-folds"
BUDGETS = (0.65, 2.6)
OF_THE_TRUTH = (
    "digits mlp adamw cosine",
    "mnist-512 mlp sgdm cosine",
    "mnist-5k cnn-bn adamw cosine",
    "fashion-5k cnn sgdm cosine",
    "cifar-5k cnn-bn sgdm cosine",
    "cifar-10k wrn adamw cosine",
)


def all_tasks() -> list[Task]:
    """Six tasks of the forecast's truth, and four with a step schedule or a transformer."""
    conv = {"batch_size": 32, "pool": 2, "points": 40}
    tiny = {"batch_size": 32, "pool": 4, "points": 40}
    text = {"batch_size": 8, "points": 40}
    return [task_ for task_ in tasks() if task_.name in OF_THE_TRUTH] + [
        _step("fashion-5k mlp sgdm step", "fashion_mnist", "mlp-128x3", lr=0.02, steps=2000, batch_size=64, pool=2),
        _step("fashion-5k cnn-bn adamw step", "fashion_mnist", "cnn-bn-8", lr=2e-3, steps=1000, **conv),
        _step("cifar-5k wrn sgdm step", "cifar10", "wrn-10-1", lr=0.05, steps=1000, **tiny),
        task(
            "shakespeare gpt adamw cosine",
            "shakespeare",
            400,
            "gpt-64x2",
            "adamw",
            "cosine",
            lr=3e-3,
            steps=800,
            **text,
        ),
    ]


def _step(name: str, data: str, model: str, **rest: Scalar) -> Task:
    return task(name, data, 5000, model, name.split()[2], "step_decay", **rest)


def rates(task: Task) -> np.ndarray:
    """Shrink per step and unit of weight decay."""
    gain = 1 / (1 - float(task.config["momentum"])) if task.config["optimizer"] == "sgd" else 1.0  # type: ignore[arg-type]
    return task.learning_rates() * gain


def rival(task: Task, rule: str, seed: int) -> Run:
    """The schedule `rule`, its first weight decay such that `EFOLDS` are spent."""
    lr_schedule = lr_by_name(str(task.config["schedule"]), task.steps)
    shape = by_name(rule, task.steps, lr_schedule=lr_schedule)
    spent = sum(rate * shape(step) for step, rate in enumerate(rates(task)))
    decay = float(f"{EFOLDS / spent:.6g}")
    extra = {} if rule == "constant" else {"rule": rule}
    return Run(config={**task.config, "weight_decay": decay, **extra}, seed=seed)


def ours(task: Task, seed: int, budget: float = EFOLDS) -> Run:
    """AutoL2 on the clock of e-folds."""
    return Run(config={**task.config, "rule": "autol2-efolds", "budget_efolds": budget}, seed=seed)


def paper(task: Task, seed: int) -> Run:
    """AutoL2 as in the paper, from 0.1."""
    return Run(config={**task.config, "weight_decay": 0.1, "rule": "autol2"}, seed=seed)


def probe(task: Task) -> Run:
    """The forecast, on validation accuracy and a seed of its own, whose e-folds AutoL2 can take for its budget."""
    return Run(config={"task": task.name, "metric": "accuracy"}, seed=100)


def train_probe(run: Run) -> Row:
    """Make the forecast that `probe` describes."""
    return forecast_row(run, next(task for task in all_tasks() if task.name == run.config["task"]))


def probed_runs(task: Task, store: Store) -> list[Run]:
    """AutoL2 with the forecast's budget; nothing where the forecast has not been made."""
    rows = store.rows_of([probe(task)])
    return [ours(task, seed, float(f"{rows[0].final['efolds']:.3g}")) for seed in SEEDS] if rows else []


def first_runs(task: Task) -> list[Run]:
    """What does not depend on other rows, the most needed first."""
    grid = [task.run(value, seed) for seed in GRID_SEEDS for value in (0.0, task.default, *task.grid)]
    return [
        *(ours(task, seed) for seed in SEEDS),
        *grid,
        *(task.run(task.default, seed) for seed in SEEDS if seed not in GRID_SEEDS),
        *(paper(task, seed) for seed in SEEDS),
        *(rival(task, rule, seed) for seed in RIVAL_SEEDS for rule in RIVALS.values()),
    ]


def budget_runs(task: Task) -> list[Run]:
    """How much the budget matters."""
    return [ours(task, seed, budget) for seed in RIVAL_SEEDS for budget in BUDGETS]


def best_accuracy(rows: Sequence[Row]) -> float:
    """Mean over seeds of the best validation accuracy; a failed run counts as 0."""
    return float(np.mean([max(row.curve["validation_accuracy"]) if row.status == "done" else 0.0 for row in rows]))


def finalists(task: Task, store: Store) -> list[float]:
    """The grid's best weight decays on the first seeds."""
    score = {value: best_accuracy(store.rows_of([task.run(value, seed) for seed in GRID_SEEDS])) for value in task.grid}
    return sorted(score, key=lambda value: -score[value])[:FINALISTS]


def finalist_runs(task: Task, store: Store) -> list[Run]:
    """All seeds of the constants that look best on the first ones."""
    return [task.run(value, seed) for value in finalists(task, store) for seed in SEEDS]


def test_accuracy(rows: Sequence[Row]) -> np.ndarray:
    """Per seed, in percent; a failed run has what guessing gives at worst, 0."""
    return np.array([100 * row.final.get("test_accuracy", 0.0) for row in rows])


def mean_curve(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and validation accuracy averaged over seeds."""
    done = [row for row in rows if row.status == "done"]
    return np.array(done[0].curve["step"]), np.mean([row.curve["validation_accuracy"] for row in done], axis=0)


def steps_ratio(mine: Sequence[Row], tuned: Sequence[Row]) -> float:
    """Steps until the seed-mean accuracy is at the tuned curve's best, over the tuned curve's own; infinite if never."""
    steps, curve = mean_curve(tuned)
    reached = np.flatnonzero(mean_curve(mine)[1] >= curve.max())
    return float(mean_curve(mine)[0][reached[0]] / steps[curve.argmax()]) if len(reached) else math.inf


def compare(task: Task, store: Store) -> dict:
    """One task: everybody's test accuracy and its difference to the tuned constant, seed by seed."""
    chosen = {value: store.rows_of([task.run(value, seed) for seed in SEEDS]) for value in finalists(task, store)}
    best = _leader(chosen, range(len(SEEDS)))
    # each seed is compared with the constant that leads on the others, so that no run helps to choose itself
    tuned = [chosen[_leader(chosen, set(range(len(SEEDS))) - {seed})][seed] for seed in range(len(SEEDS))]
    sides = {
        "AutoL2, e-folds": [ours(task, seed) for seed in SEEDS],
        PROBED: probed_runs(task, store),
        "AutoL2, paper": [paper(task, seed) for seed in SEEDS],
        "default constant": [task.run(task.default, seed) for seed in SEEDS],
        **{name: [rival(task, rule, seed) for seed in RIVAL_SEEDS] for name, rule in RIVALS.items()},
        **{f"AutoL2, {budget:g} e-folds": [ours(task, seed, budget) for seed in RIVAL_SEEDS] for budget in BUDGETS},
    }
    entries = {"tuned constant": entry(tuned, tuned)}
    for name, runs in sides.items():
        rows = store.rows_of(runs)
        if len(rows) == len(runs) > 0:
            entries[name] = entry(rows, tuned)
    entries["tuned constant"]["weight_decay"] = best
    if PROBED in entries:
        entries[PROBED]["budget"] = sides[PROBED][0].config["budget_efolds"]
    return {"task": task.name, "efolds_tuned": float(best * rates(task).sum()), "entries": entries}


def _leader(chosen: Mapping[float, Sequence[Row]], seeds: Collection[int]) -> float:
    return max(chosen, key=lambda value: best_accuracy([chosen[value][seed] for seed in seeds]))


def entry(rows: Sequence[Row], tuned: Sequence[Row]) -> dict:
    """Mean test accuracy and loss, the paired difference to the tuned constant with its standard error, and the steps."""
    gap = test_accuracy(rows) - test_accuracy(tuned)[: len(rows)]
    return {
        "seeds": len(rows),
        "test accuracy": float(test_accuracy(rows).mean()),
        "test loss": float(np.mean([row.final.get("test_loss", math.nan) for row in rows])),
        "difference": float(gap.mean()),
        "stderr": float(gap.std(ddof=1) / math.sqrt(len(gap))),
        # a mean over few seeds is noisier and so comes sooner to any level: the same seeds on both sides
        "steps ratio": steps_ratio(rows, tuned[: len(rows)]),
        "failed": sum(row.status == "failed" for row in rows),
    }


COLUMNS = (
    "tuned constant",
    "AutoL2, e-folds",
    PROBED,
    "AutoL2, paper",
    "default constant",
    *RIVALS,
    *(f"AutoL2, {budget:g} e-folds" for budget in BUDGETS),
)


def summary(results: list[dict]) -> list[dict]:
    """Per method: mean difference over tasks, tasks above the tuned constant, median ratio of steps."""
    rows = []
    for name in COLUMNS:
        mine = [result["entries"][name] for result in results if name in result["entries"]]
        if mine:
            gaps = np.array([entry["difference"] for entry in mine])
            ratio = float(np.median([entry["steps ratio"] for entry in mine]))
            rows.append(
                {
                    "who": name,
                    "tasks": len(mine),
                    "mean difference": float(gaps.mean()),
                    "stderr": float(math.sqrt(sum(entry["stderr"] ** 2 for entry in mine)) / len(mine)),
                    "above": int((gaps > 0).sum()),
                    "worst": float(gaps.min()),
                    "median steps ratio": ratio,
                    "reached": int(sum(math.isfinite(entry["steps ratio"]) for entry in mine)),
                }
            )
    return rows


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not"


def markdown(results: list[dict]) -> str:
    """The tables people read."""
    lines = [
        "# AutoL2 on the clock of e-folds, under learning-rate schedules",
        "",
        "Made by `DECAYCAST_DATA=<data folder> python bench/schedules.py` after `bench/truth.py`. What it is and why it",
        "should work: `docs/autol2-schedules.md`. Difference: test accuracy at the end of the run minus that of the tuned",
        f"constant, in points, seed by seed ({len(SEEDS)} seeds; {len(RIVAL_SEEDS)} for the other schedules and budgets). The",
        "constant is tuned on validation accuracy: 11 values on two seeds, the best two on five; each seed is compared with the",
        f"one that leads on the other four. All other schedules spend {EFOLDS} e-folds, like AutoL2; with the forecast's e-folds",
        "it costs 0.3 of a run more. Steps ratio: steps until the seed-mean validation accuracy is at the tuned",
        "constant's best, over the tuned constant's own steps to it; 'not' where that is never reached.",
        "",
        "## Over all tasks",
        "",
        "| who | tasks | mean difference | above the tuned constant | worst task | median steps ratio | reached |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in summary(results):
        lines.append(
            f"| {row['who']} | {row['tasks']} | {row['mean difference']:+.2f} +- {row['stderr']:.2f} | {row['above']} | "
            f"{row['worst']:+.2f} | {_ratio(row['median steps ratio'])} | {row['reached']} |"
        )
    lines += [
        "",
        "## Task by task",
        "",
        "| task | who | test accuracy | difference | test loss | steps ratio | failed |",
        "|-|-|-|-|-|-|-|",
    ]
    for result in results:
        tuned = result["entries"]["tuned constant"]
        for name in COLUMNS:
            entry = result["entries"].get(name)
            if entry:
                note = f" ({entry['budget']:.2g})" if "budget" in entry else ""
                if entry is tuned:
                    note = f" ({tuned['weight_decay']:.3g}, {result['efolds_tuned']:.2g} e-folds)"
                gap = f"{entry['difference']:+.2f} +- {entry['stderr']:.2f}"
                rest = f"{entry['test loss']:.3f} | {_ratio(entry['steps ratio'])} | {entry['failed'] or ''}"
                lines.append(f"| {result['task']} | {name}{note} | {entry['test accuracy']:.2f} | {gap} | {rest} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, compare, write the tables and the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="build/schedules.sqlite")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="tables from the rows there are")
    args = parser.parse_args()
    chosen = all_tasks()
    with Store(args.store) as store:
        for file in ("truth.jsonl.gz", "schedules.jsonl.gz"):
            if (RESULTS / file).exists():
                store.import_(RESULTS / file)
        if not args.no_training:
            sweep([probe(task) for task in chosen], store, train=train_probe, execute=processes(args.workers))
            for wanted in (
                lambda: [run for task in chosen for run in first_runs(task)],
                lambda: [run for task in chosen for run in finalist_runs(task, store)],
                lambda: [run for task in chosen for run in budget_runs(task)],
                lambda: [run for task in chosen for run in probed_runs(task, store)],
            ):
                sweep(wanted(), store, train=train_run, execute=processes(args.workers), on_row=_say)
        results = [compare(task, store) for task in chosen]
        _export(store, chosen)
    report = {"provenance": provenance(), "summary": summary(results), "results": results}
    (RESULTS / "schedules.json").write_text(json.dumps(jsonable(report), indent=1) + "\n")
    (RESULTS / "schedules.md").write_text(markdown(results))
    print(markdown(results))


def _say(row: Row) -> None:
    config = row.run.config
    print(
        config["data"], config["model"], config.get("rule", "constant"), row.status, f"{row.seconds:.1f} s", flush=True
    )


def _wanted(task: Task, store: Store) -> list[Run]:
    return [
        probe(task),
        *first_runs(task),
        *finalist_runs(task, store),
        *budget_runs(task),
        *probed_runs(task, store),
    ]


def _export(store: Store, chosen: Sequence[Task]) -> None:
    """The rows that are not in the truth's file already."""
    known = {row.run.key for row in load_export(RESULTS / "truth.jsonl.gz")}
    wanted = [run for task in chosen for run in _wanted(task, store)]
    with TemporaryDirectory() as folder, Store(Path(folder) / "rows.sqlite") as part:
        for row in store.rows_of({run.key: run for run in wanted if run.key not in known}.values()):
            part.append(row)
        part.export(RESULTS / "schedules.jsonl.gz")


if __name__ == "__main__":
    main()
