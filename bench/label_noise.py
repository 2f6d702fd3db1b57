"""What label noise costs: a training step with fresh noise on its targets, in units of the step without.

    python bench/label_noise.py            # about five minutes of one core
    python bench/label_noise.py --quick    # few rounds, to see that it runs

One torch thread, processor seconds. Steps with and without noise alternate, a few at a time and in changing order, on one
model with one optimiser; the table has the median of the rounds' ratios with its 95 % interval. What a few calls of torch and
numpy cost depends on what ran before them, so they are timed inside the step and not alone. "nothing" is the step against
itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from decaycast.lab.provenance import provenance
from decaycast.methods.label_noise.method import LabelNoise, TargetNoise
from machine import seconds

RESULTS = Path(__file__).parent / "results"
CLASSES, FLIP, SIGMA = 10, 0.2, 0.1
AIM = 1.02

Noise = Callable[[Tensor], Tensor]


def mlp() -> nn.Module:
    """26122 parameters: the digits network of the evidence."""
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, CLASSES))


def conv() -> nn.Module:
    """Two convolutions on 32 pixels."""
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2048, CLASSES))


# name -> model, shape of one input, batch, steps per round
STEPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "MLP, batch 32": (mlp, (64,), 32, 8),
    "MLP, batch 128": (mlp, (64,), 128, 8),
    "conv net, batch 32": (conv, (3, 32, 32), 32, 1),
}


def same(targets: Tensor) -> Tensor:
    """No noise."""
    return targets


def sides() -> dict[str, tuple[str, Noise]]:
    """Kind of noise -> the targets that it takes, and itself."""
    seeded = LabelNoise(FLIP, CLASSES, torch.Generator().manual_seed(1))
    return {
        "nothing": ("classes", same),
        "LabelNoise": ("classes", LabelNoise(FLIP, CLASSES)),
        "LabelNoise with a generator": ("classes", seeded),
        "LabelNoise of class probabilities": ("probabilities", LabelNoise(FLIP, CLASSES)),
        "TargetNoise": ("numbers", TargetNoise(SIGMA)),
    }


class Training:
    """One model with its optimiser and a batch."""

    def __init__(self, step: str) -> None:
        torch.manual_seed(0)
        build, shape, batch, self.count = STEPS[step]
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.inputs, labels = torch.randn(batch, *shape), torch.randint(CLASSES, (batch,))
        hot = functional.one_hot(labels, CLASSES).float()
        self.targets = {"classes": labels, "probabilities": hot, "numbers": hot}

    def run(self, kind: str, noise: Noise) -> None:
        """A round's steps."""
        loss_of = functional.mse_loss if kind == "numbers" else functional.cross_entropy
        targets = self.targets[kind]
        for _ in range(self.count):
            self.optimizer.zero_grad(set_to_none=True)
            loss_of(self.model(self.inputs), noise(targets)).backward()
            self.optimizer.step()


def measured(step: str, name: str, kind: str, noise: Noise, rounds: int) -> dict:
    """Ratio of the step with noise to the one without, over pairs of neighbouring rounds."""
    training = Training(step)
    plain, noisy = [], []
    for number in range(-5, rounds):
        order = [(plain, same), (noisy, noise)]
        for found, what in order if number % 2 else order[::-1]:
            took = seconds(lambda what=what: training.run(kind, what))
            if number >= 0:  # libraries set themselves up in the first ones
                found.append(took / training.count)
    ratios = sorted(b / a for a, b in zip(plain, noisy, strict=True))
    off = round(0.98 * rounds**0.5)  # ranks of the median's 95 % interval, by the sign test
    return {
        "step": step,
        "noise": name,
        "milliseconds": 1e3 * statistics.median(plain),
        "microseconds": 1e6 * statistics.median(b - a for a, b in zip(plain, noisy, strict=True)),
        "ratio": statistics.median(ratios),
        "interval": [ratios[max(0, rounds // 2 - off)], ratios[min(rounds - 1, rounds // 2 + off)]],
        "rounds": rounds,
    }


def lines_of(rows: list[dict]) -> list[str]:
    lines = [
        "# Label noise",
        "",
        "A training step (SGD with momentum) with fresh noise on its targets, in units of the same step without: median over",
        f"pairs of neighbouring rounds [95 % interval], one thread. Aim for `LabelNoise`: <= {AIM}.",
        "",
        "| step | ms | noise | adds, µs | step / step without |",
        "|-|-|-|-|-|",
    ]
    lines += [
        f"| {row['step']} | {row['milliseconds']:.2f} | {row['noise']} | {row['microseconds']:.0f} | {row['ratio']:.3f} "
        f"[{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] |"
        for row in rows
    ]
    return [*lines, "", "Versions and machine: `label_noise.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    rounds = 20 if parser.parse_args().quick else 600
    torch.set_num_threads(1)
    rows = [measured(step, name, *side, rounds) for step in STEPS for name, side in sides().items()]
    lines = lines_of(rows)
    if rounds > 20:
        (RESULTS / "label_noise.json").write_text(
            json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n"
        )
        (RESULTS / "label_noise.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
