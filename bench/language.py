"""A small language model, as people train it: what the audit, the forecast and AutoL2 make of its weight decay.

    DECAYCAST_DATA=<data folder> python bench/language.py     # about an hour on two cores; resumes
    DECAYCAST_DATA=<data folder> python bench/language.py --no-training   # the table from the rows there are

A decoder-only transformer of 1.3 million parameters on the characters of tiny Shakespeare, AdamW, under a cosine and under a
warmup-stable-decay learning rate. It sees a twentieth of the text a dozen times, so that it can overfit; where a text is read
once there is next to nothing for weight decay to do. All is judged by the loss at the end of the run, in nats per character.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence

from decaycast.core.experiment import Row, Run, jsonable
from decaycast.lab.audit import audit
from decaycast.lab.execute import processes
from decaycast.lab.models import build
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run
from forecast import forecast_row
from tasks import Task, task
from truth import RESULTS

MODEL, SCHEDULES = "gpt-160x4", ("cosine", "wsd")
GRID = (0.01, 1.0, 3.0, 10.0, 30.0)
SEEDS, PROBE_SEEDS = (0, 1), (100,)
ROWS = RESULTS / "language.jsonl.gz"


def tasks() -> list[Task]:
    """The training under each learning-rate schedule."""
    rest = {"lr": 1e-3, "steps": 300, "batch_size": 32, "points": 30}
    found = [
        task(f"shakespeare {MODEL} {name}", "shakespeare", 800, MODEL, "adamw", name, **rest) for name in SCHEDULES
    ]
    return [Task(name=each.name, config={**each.config, "test_size": 400}) for each in found]


def probe(task: Task, seed: int) -> Run:
    """The forecast of one seed."""
    return Run(config={"task": task.name, "metric": "loss"}, seed=seed)


def train_probe(run: Run) -> Row:
    """Make the forecast that `probe` describes."""
    return forecast_row(run, next(task for task in tasks() if task.name == run.config["task"]))


def autol2(task: Task, seed: int, budget: float = 1.3) -> Run:
    """AutoL2 on the clock of e-folds, with its usual budget or another."""
    return Run(config={**task.config, "rule": "autol2-efolds", "budget_efolds": budget}, seed=seed)


def probed(task: Task, store: Store, probe_seed: int) -> list[Run]:
    """AutoL2 with the forecast's e-folds; nothing where the forecast has not been made."""
    rows = store.rows_of([probe(task, probe_seed)])
    return [autol2(task, seed, float(f"{row.final['efolds']:.3g}")) for row in rows for seed in SEEDS]


def picked(task: Task, store: Store, probe_seed: int) -> list[Run]:
    """The forecast's weight decay trained in full; nothing where the forecast has not been made."""
    rows = store.rows_of([probe(task, probe_seed)])
    return [task.run(float(f"{row.final['weight_decay']:.3g}"), seed) for row in rows for seed in SEEDS]


def wanted(task: Task, store: Store) -> list[Run]:
    """All full trainings of a task."""
    fixed = [task.run(decay, seed) for decay in GRID for seed in SEEDS] + [autol2(task, seed) for seed in SEEDS]
    return fixed + [run for seed in PROBE_SEEDS for run in (*picked(task, store, seed), *probed(task, store, seed))]


def losses(rows: Sequence[Row], part: str) -> list[float]:
    """The loss of each seed at the end of the run."""
    return [row.curve["validation_loss"][-1] if part == "validation" else row.final["test_loss"] for row in rows]


def compare(task: Task, store: Store) -> dict:
    """Everybody's loss under one schedule, beside the best constant of the grid."""
    grid = {decay: store.rows_of([task.run(decay, seed) for seed in SEEDS]) for decay in GRID}
    means = {decay: statistics.mean(losses(rows, "validation")) for decay, rows in grid.items()}
    best, default = min(means, key=means.__getitem__), means[task.default]
    spent: Callable[[float], float] = lambda decay: decay * float(task.learning_rates().sum())  # noqa: E731

    def entry(who: str, rows: Sequence[Row], efolds: float, cost: float, **more: object) -> dict:
        gaps = [mine - theirs for mine, theirs in zip(losses(rows, "test"), losses(grid[best], "test"), strict=True)]
        loss = statistics.mean(losses(rows, "validation"))
        share = (default - loss) / (default - means[best])
        test = statistics.mean(losses(rows, "test"))
        return {
            "who": who,
            "efolds": efolds,
            "cost": cost,
            "validation loss": loss,
            "test loss": test,
            "test less tuned": gaps,
            "share": share,
            **more,
        }

    entries = [
        entry("tuned constant", grid[best], spent(best), float(len(GRID) * len(SEEDS)), weight_decay=best),
        entry("AdamW's default", grid[task.default], spent(task.default), 0.0, weight_decay=task.default),
    ]
    for seed in PROBE_SEEDS:
        (row,) = store.rows_of([probe(task, seed)])
        decay = row.final["weight_decay"]
        cost = row.final["cost"]
        told = {"weight_decay": decay, "interval": [row.final["low"], row.final["high"]], "said": row.reason}
        rows = store.rows_of(picked(task, store, seed))
        entries.append(entry(f"forecast, seed {seed}", rows, spent(decay), cost, **told))
        rows = store.rows_of(probed(task, store, seed))
        spending = float(rows[0].run.config["budget_efolds"])  # type: ignore[arg-type]
        entries.append(entry(f"AutoL2, forecast's e-folds, seed {seed}", rows, spending, cost))
    entries.append(entry("AutoL2, 1.3 e-folds", store.rows_of([autol2(task, seed) for seed in SEEDS]), 1.3, 0.0))
    told = audit(
        lr=task.learning_rates(), weight_decay=task.default, steps=task.steps, convention="decoupled"
    ).to_dict()
    return {
        "task": task.name,
        "grid": [{"weight_decay": decay, "efolds": spent(decay), "validation loss": means[decay]} for decay in GRID],
        "entries": entries,
        "audit of the default": told,
    }


def markdown(results: Sequence[dict], parameters: int) -> str:
    """The page people read."""
    lines = [
        "# A small language model",
        "",
        f"Made by `python bench/language.py`: {MODEL}, {parameters:,} parameters, tiny Shakespeare (800 windows of",
        "64 characters, 12 epochs, 300 steps of 32 windows), AdamW with rate 0.001. Losses are those at the end of the run,",
        f"in nats per character, means of {len(SEEDS)} seeds. *Share*: of the tuning gain in validation loss, 0 for AdamW's",
        f"default and 1 for the best of a grid of {len(GRID)} values; *test less tuned* is seed by seed; *cost* is in full runs.",
        "",
    ]
    for result in results:
        told = result["audit of the default"]
        lines += [
            f"## {result['task']}",
            "",
            f"Audit of AdamW's default: {told['efolds']:.2g} e-folds, {told['advice']}.",
            f"It would take {told['usual_weight_decay']:.3g} for 1.3 e-folds.",
            "",
            "| who | weight decay | e-folds | cost | validation loss | share | test loss | test less tuned |",
            "|-|-|-|-|-|-|-|-|",
        ]
        for each in result["entries"]:
            decay = f"{each['weight_decay']:.3g}" if "weight_decay" in each else "by itself"
            if "interval" in each:
                decay += f" [{each['interval'][0]:.2g}, {each['interval'][1]:.2g}]"
            gaps = ", ".join(f"{gap:+.3f}" for gap in each["test less tuned"])
            lines.append(
                f"| {each['who']} | {decay} | {each['efolds']:.2g} | {each['cost']:.2g} | {each['validation loss']:.3f} | "
                f"{each['share']:.2f} | {each['test loss']:.3f} | {gaps} |"
            )
        lines += ["", *(f"* {each['who']}: {each['said']}" for each in result["entries"] if "said" in each), ""]
        curve = ", ".join(f"{each['weight_decay']:g}: {each['validation loss']:.3f}" for each in result["grid"])
        lines += [f"The grid, weight decay and validation loss: {curve}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, compare, write the page and the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="build/language.sqlite")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="the table from the rows there are")
    args = parser.parse_args()
    with Store(args.store) as store:
        if ROWS.exists():
            store.import_(ROWS)
        if not args.no_training:
            place = processes(args.workers)
            probes = [probe(task, seed) for task in tasks() for seed in PROBE_SEEDS]
            sweep(probes, store, train=train_probe, execute=place, on_row=_say)
            sweep(
                [run for task in tasks() for run in wanted(task, store)],
                store,
                train=train_run,
                execute=place,
                on_row=_say,
            )
        results = [compare(task, store) for task in tasks()]
        store.export(ROWS)
    parameters = sum(p.numel() for p in build(MODEL, (64,), 65, seed=0).parameters())
    report = {"provenance": provenance(), "parameters": parameters, "results": results}
    (RESULTS / "language.json").write_text(json.dumps(jsonable(report), indent=1) + "\n")
    (RESULTS / "language.md").write_text(markdown(results, parameters))
    print(markdown(results, parameters))


def _say(row: Row) -> None:
    print(f"{row.seconds:.0f} s", row.status, row.reason, row.final, flush=True)


if __name__ == "__main__":
    main()
