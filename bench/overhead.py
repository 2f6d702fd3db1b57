"""What decaycast costs: the loop, AutoL2, the import, and what two processes gain. Ratios within one run.

    python bench/overhead.py        # about five minutes on an otherwise idle machine with two cores

Each comparison alternates the two sides in short rounds and reports the median of the rounds' ratios with their quartiles:
the speed of a shared machine drifts, the ratio of neighbouring rounds hardly does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional

from decaycast.core.experiment import Run
from decaycast.core.hook import Hook
from decaycast.core.train import train
from decaycast.lab.execute import in_process, processes
from decaycast.lab.provenance import provenance
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep
from decaycast.lab.trial import train_run
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook

RESULTS = Path(__file__).parent / "results"
STEPS, ROUNDS = 60, 40


class Bench:
    """A 784-512-512-512-10 MLP at batch 128, trained on by one of three loops."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = (784, 512, 512, 512, 10)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.model = torch.nn.Sequential(*[m for layer in layers[:-1] for m in (layer, torch.nn.ReLU())], layers[-1])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, weight_decay=1e-4)
        self.batches = [(torch.randn(128, 784), torch.randint(10, (128,))) for _ in range(16)]
        self.step = 0
        self.hook = AutoL2Hook(start=1e-4)
        self.scheduler = AutoL2(self.optimizer, start=1e-4)

    def bare(self) -> None:
        """The loop everybody writes."""
        self.model.train()
        for i in range(STEPS):
            inputs, target = self.batches[i % 16]
            loss = functional.cross_entropy(self.model(inputs), target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if i % 25 == 0:  # both loops look at the loss as often
                loss.item()

    def ours(self, hooks: tuple[Hook, ...] = ()) -> None:
        """The same steps through `decaycast.core.train`."""
        endless = (self.batches[i % 16] for i in range(STEPS))
        train(
            self.model,
            endless,
            functional.cross_entropy,
            self.optimizer,
            start=self.step,
            stop=self.step + STEPS,
            hooks=hooks,
        )
        self.step += STEPS

    def autol2(self) -> None:
        """Our loop with AutoL2 measuring every ten steps."""
        self.ours((self.hook,))

    def bare_autol2(self) -> None:
        """The loop everybody writes, with AutoL2 in it as its documentation says: loss and error when due."""
        self.model.train()
        for i in range(STEPS):
            inputs, target = self.batches[i % 16]
            output = self.model(inputs)
            loss = functional.cross_entropy(output, target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            due = self.scheduler.due
            self.scheduler.step(
                loss=loss.detach() if due else None,
                error=(output.argmax(1) != target).float().mean() if due else None,
            )
            self.optimizer.step()
            if i % 25 == 0:
                loss.item()


def ratio(first: Callable[[], None], second: Callable[[], None], rounds: int = ROUNDS) -> dict[str, float]:
    """Time of `first` over time of `second`, in alternating rounds (the order alternates too)."""
    first(), second()
    ratios = []
    for i in range(rounds):
        order = (first, second) if i % 2 else (second, first)
        spent = {}
        for side in order:
            began = time.perf_counter()
            side()
            spent[side] = time.perf_counter() - began
        ratios.append(spent[first] / spent[second])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_low": low, "quartile_high": high, "rounds": rounds}


def import_seconds(rounds: int = 11) -> dict[str, float]:
    """Seconds that `import decaycast` takes beyond `import torch`, in fresh interpreters."""
    program = "import time, torch; t = time.perf_counter(); import decaycast; print(time.perf_counter() - t)"
    spent = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    return {"median": statistics.median(spent), "worst": max(spent), "rounds": rounds}


def two_processes() -> dict[str, float]:
    """A 12-run grid in this process against two worker processes, torch on one thread each."""
    torch.set_num_threads(1)
    runs = [
        Run(
            config={
                "data": "digits",
                "train_size": 512,
                "model": "mlp-256x3",
                "steps": 3000,
                "weight_decay": wd,
                "points": 10,
            },
            seed=seed,
        )
        for seed in range(2)
        for wd in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    ]
    spent = {}
    for name, execute in (("one process", in_process), ("two processes", processes(2))):
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "rows.sqlite") as store:
            began = time.perf_counter()
            sweep(runs, store, train=train_run, execute=execute)
            spent[name] = time.perf_counter() - began
    return {**spent, "speed_up": spent["one process"] / spent["two processes"]}


def main() -> None:
    """Measure, write JSON and a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    bench = Bench()
    result = {
        "provenance": provenance(),
        "core.train / bare loop": ratio(bench.ours, bench.bare),
        "bare loop + AutoL2 / bare loop": ratio(bench.bare_autol2, bench.bare),
        "core.train + AutoL2 / bare loop": ratio(bench.autol2, bench.bare),
        "bare / bare (noise)": ratio(bench.bare, lambda: bench.bare()),
        "import decaycast after torch, s": import_seconds(),
        "12-run grid": two_processes(),
    }
    lines = [
        "# Overhead",
        "",
        "784-512-512-512-10 MLP, batch 128; medians of alternating rounds [quartiles].",
        "",
        "| what | value | aim |",
        "|-|-|-|",
    ]
    for name, aim in (
        ("core.train / bare loop", "<= 1.05"),
        ("bare loop + AutoL2 / bare loop", "<= 1.02"),
        ("core.train + AutoL2 / bare loop", ""),
        ("bare / bare (noise)", "1"),
    ):
        r = result[name]
        lines.append(f"| {name} | {r['median']:.3f} [{r['quartile_low']:.3f}, {r['quartile_high']:.3f}] | {aim} |")
    lines.append(
        f"| import decaycast after torch | {result['import decaycast after torch, s']['median']:.3f} s | <= 0.15 s |"
    )
    lines.append(f"| 12-run grid, one process / two processes | {result['12-run grid']['speed_up']:.2f} | >= 1.8 |")
    (RESULTS / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "overhead.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
