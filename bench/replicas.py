"""What batching runs gains: seconds of K runs trained one by one over those of the same runs as one batched program.

    python bench/replicas.py            # about ten minutes of one core
    python bench/replicas.py --quick    # few steps, nothing written

Whole runs through the executors, with everything that belongs to a run: building, batches, evaluations, test data, row. One
torch thread, processor seconds, both sides in turn; the ratio is the median of the rounds, with the lowest and the highest.
"measured" is what `decaycast.lab.replicas` finds out by itself beforehand, and "trains" what it makes of that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from decaycast.core.experiment import Row, Run
from decaycast.lab.execute import in_process
from decaycast.lab.provenance import provenance
from decaycast.lab.replicas import choose_batch, replicas
from decaycast.lab.trial import train_run
from machine import seconds

RESULTS = Path(__file__).parent / "results"
AIM = 2.5  # for widths up to 64

# model, batch size, replicas, further settings
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("mlp-32x2", 32, 24, {}),
    ("mlp-64x3", 32, 4, {}),
    ("mlp-64x3", 32, 24, {}),
    ("mlp-64x3", 32, 64, {}),
    ("mlp-64x3", 64, 24, {}),
    ("mlp-64x3", 128, 24, {}),
    ("mlp-64x3", 32, 24, {"optimizer": "adamw", "momentum": 0.0, "lr": 0.003}),
    ("mlp-64x3", 32, 24, {"rule": "autol2", "schedule": "cosine"}),
    ("mlp-256x3", 128, 12, {}),
]


def runs_of(model: str, batch_size: int, count: int, settings: dict[str, Any], steps: int) -> list[Run]:
    """Runs on digits that differ in learning rate, weight decay and seed."""
    base = {
        "data": "digits",
        "model": model,
        "batch_size": batch_size,
        "steps": steps,
        "momentum": 0.9,
        "lr": 0.02,
        **settings,
    }
    return [
        Run(config={**base, "lr": base["lr"] / (1 + k % 3), "weight_decay": 1e-3 * (1 + k % 4)}, seed=k)
        for k in range(count)
    ]


def worst_difference(separate: list[Row], batched: list[Row]) -> float:
    """Largest difference of any final validation loss."""
    found = {row.run.key: row.curve["validation_loss"][-1] for row in batched}
    return max(abs(found[row.run.key] - row.curve["validation_loss"][-1]) for row in separate)


def measured(case: tuple[str, int, int, dict[str, Any]], steps: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    model, batch_size, count, settings = case
    runs = runs_of(model, batch_size, count, settings, steps)
    one, all_at_once, ratios, worst = [], [], [], 0.0
    for number in range(rounds):
        separate: list[Row] = []
        batched: list[Row] = []
        sides = [
            (one, lambda rows=separate: in_process(runs, train_run, rows.append)),
            (all_at_once, lambda rows=batched: replicas(at_once=count)(runs, train_run, rows.append)),
        ]
        for found, work in sides if number % 2 else sides[::-1]:
            found.append(seconds(work))
        ratios.append(one[-1] / all_at_once[-1])
        worst = max(worst, worst_difference(separate, batched))
    choice = choose_batch(runs)
    return {
        "model": model,
        "batch_size": batch_size,
        "replicas": count,
        "settings": settings,
        "milliseconds_per_step": 1e3 * statistics.median(one) / count / steps,
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "measured": choice.ratio,
        "at_once": choice.at_once,
        "difference": worst,
        "steps": steps,
        "rounds": rounds,
    }


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """The table."""
    lines = [
        "# Replicas",
        "",
        "K runs on digits one by one, over the same runs as one batched program: processor seconds of whole runs, one thread,",
        f"median of rounds [lowest, highest]. Aim for widths up to 64: >= {AIM}. *measured* and *trains* are what the executor",
        "finds beforehand and does; *difference* is the largest between any two final validation losses.",
        "",
        "| network | batch | K | settings | ms per step and run | one by one / batched | measured | trains | difference |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for row in rows:
        named = [str(row["settings"][name]) for name in ("optimizer", "rule", "schedule") if name in row["settings"]]
        trains = "one by one" if row["at_once"] == 1 else f"{row['at_once']} at a time"
        low, high = row["range"]
        lines.append(
            f"| {row['model']} | {row['batch_size']} | {row['replicas']} | {', '.join(named) or 'sgd'} "
            f"| {row['milliseconds_per_step']:.2f} | {row['ratio']:.1f} [{low:.1f}, {high:.1f}] | {row['measured']:.1f} "
            f"| {trains} | {row['difference']:.0e} |"
        )
    return [*lines, "", "Versions and machine: `replicas.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    steps, rounds = (40, 1) if quick else (200, 3)
    measured(CASES[0], 20, 1)  # libraries set themselves up
    rows = []
    for case in CASES:
        rows.append(measured(case, steps, rounds))
        print(lines_of(rows)[-3], flush=True)
    lines = lines_of(rows)
    if not quick:
        (RESULTS / "replicas.json").write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
        (RESULTS / "replicas.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
