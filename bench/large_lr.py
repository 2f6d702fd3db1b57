"""What activation noise costs in a training step, and how long the two-layer experiment takes.

    python bench/large_lr.py            # about ten minutes of one core
    python bench/large_lr.py --quick    # few rounds, to see that it runs

One torch thread, processor seconds. Steps with and without noise alternate, in changing order, on two copies of one model; the
table has the median of the pairs' ratios with its 95 % interval. "nothing" is a second copy without noise: how far from 1 a
ratio can be by chance. The two-layer experiment is that of the evidence: five seeds, both algorithms, to training loss 0.03.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from decaycast.lab.provenance import provenance
from decaycast.methods.large_lr import two_layer
from decaycast.methods.large_lr.insert import insert_activation_noise
from machine import seconds

RESULTS = Path(__file__).parent / "results"
CLASSES, BATCH, STD = 10, 64, 0.4
AIM, AIM_SECONDS = 1.05, 60
SEEDS = range(100, 105)  # of none of the evidence
Model = Callable[[], nn.Module]


def conv(widths: tuple[int, ...], inplace: bool = False) -> nn.Module:
    """Convolutions with batch norm and ReLU, pooled in between and over the whole map at the end."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.MaxPool2d(2)] if index else []
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


class Functional(nn.Module):
    """The first of the networks, with its activations called as functions."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for layer in conv((24, 48, 96)).children() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
        self.convs, self.norms = nn.ModuleList(layers[::2]), nn.ModuleList(layers[1::2])
        self.head = nn.Linear(96, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores of images (n, 3, height, width)."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.relu(norm(conv(functional.max_pool2d(x, 2) if index else x)))
        return self.head(x.mean((2, 3)))


# name -> model, pixels
NETWORKS: dict[str, tuple[Model, int]] = {
    "3 convolutions (24-48-96), 16 pixels": (lambda: conv((24, 48, 96)), 16),
    "the same, activations in place": (lambda: conv((24, 48, 96), inplace=True), 16),
    "the same, activations as functions": (Functional, 16),
    "3 convolutions (32-64-128), 32 pixels": (lambda: conv((32, 64, 128)), 32),
}


def noisy(model: nn.Module, kind: str) -> nn.Module:
    """The model with one kind of noise, in place."""
    if kind == "nothing":
        return model
    generator = torch.Generator().manual_seed(1) if "generator" in kind else None
    return insert_activation_noise(model, STD, kind == "per element", generator, report=None)


KINDS = ("nothing", "one map", "one map, own generator", "per element")


class Training:
    """One model with its optimiser and a batch."""

    def __init__(self, model: nn.Module, pixels: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.inputs, self.labels = torch.randn(BATCH, 3, pixels, pixels), torch.randint(CLASSES, (BATCH,))

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(self.model(self.inputs), self.labels).backward()
        self.optimizer.step()


def cost(network: str, kind: str, rounds: int) -> dict:
    """Ratio of the step with noise to the one without, over neighbouring pairs."""
    torch.manual_seed(0)
    build, pixels = NETWORKS[network]
    plain = build()
    sides = [Training(plain, pixels), Training(noisy(copy.deepcopy(plain), kind), pixels)]
    found: list[list[float]] = [[], []]
    for number in range(-5, rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            took = seconds(sides[side].step)
            if number >= 0:  # libraries set themselves up in the first ones
                found[side].append(took)
    ratios = sorted(b / a for a, b in zip(*found, strict=True))
    off = round(0.98 * rounds**0.5)  # ranks of the median's 95 % interval, by the sign test
    return {
        "network": network,
        "noise": kind,
        "milliseconds": 1e3 * statistics.median(found[0]),
        "microseconds": 1e6 * statistics.median(b - a for a, b in zip(*found, strict=True)),
        "ratio": statistics.median(ratios),
        "interval": [ratios[max(0, rounds // 2 - off)], ratios[min(rounds - 1, rounds // 2 + off)]],
        "rounds": rounds,
    }


def experiment(algorithm: str, seeds: list[int], stop_loss: float) -> dict:
    """Processor seconds of one algorithm with all seeds side by side."""
    found: list[two_layer.Outcome] = []
    setting = two_layer.Setting(stop_loss=stop_loss)
    took = seconds(lambda: found.extend(two_layer.run(setting, seeds, algorithm)))
    errors = [each.last["p_only_test_error"] for each in found]
    steps = [each.last["step"] for each in found]
    reached = sum(each.reached for each in found)
    return {
        "algorithm": algorithm,
        "seeds": seeds,
        "train_loss": stop_loss,
        "reached": reached,
        "seconds": took,
        "steps": statistics.mean(steps),
        "p_only_error": statistics.mean(errors),
    }


def lines_of(costs: list[dict], runs: list[dict]) -> list[str]:
    total = sum(row["seconds"] for row in runs)
    lines = [
        "# Large learning rate",
        "",
        f"A training step (SGD with Nesterov momentum, batch {BATCH}) with activation noise of {STD} before every ReLU, in units",
        f"of the same step without: median over neighbouring pairs [95 % interval], one thread. Aim for one map: <= {AIM}.",
        "",
        "| network | ms | noise | adds, µs | step / step without |",
        "|-|-|-|-|-|",
    ]
    lines += [
        f"| {row['network']} | {row['milliseconds']:.2f} | {row['noise']} | {row['microseconds']:.0f} | {row['ratio']:.3f} "
        f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] |"
        for row in costs
    ]
    lines += [
        "",
        f"The two-layer experiment, {len(runs[0]['seeds'])} seeds side by side in one process, to training loss "
        f"{runs[0]['train_loss']:g}: {total:.0f} processor seconds for both. Aim: {AIM_SECONDS} seconds on two cores.",
        "",
        "| algorithm | processor seconds | steps per seed | reached | P-only test error |",
        "|-|-|-|-|-|",
    ]
    lines += [
        f"| {row['algorithm']} | {row['seconds']:.1f} | {row['steps']:,.0f} | {row['reached']} of {len(row['seeds'])} | "
        f"{row['p_only_error']:.1%} |"
        for row in runs
    ]
    return [*lines, "", "Versions and machine: `large_lr.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    costs = [cost(network, kind, 20 if quick else 300) for network in NETWORKS for kind in KINDS]
    stop_loss, seeds = (0.5, [100, 101]) if quick else (0.03, list(SEEDS))
    runs = [experiment(algorithm, seeds, stop_loss) for algorithm in ("L-S", "S")]
    lines = lines_of(costs, runs)
    if not quick:
        text = json.dumps({"provenance": provenance(), "steps": costs, "two_layer": runs}, indent=1)
        (RESULTS / "large_lr.json").write_text(text + "\n")
        (RESULTS / "large_lr.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
