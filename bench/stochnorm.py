"""What stochastic normalisation costs beside batch norm, and what the two branches of the paper's formula cost.

    python bench/stochnorm.py            # about six minutes of one core
    python bench/stochnorm.py --quick    # few rounds of small layers, to see that it runs

One torch thread; processor seconds; the sides alternate and the table has medians of the rounds' ratios to BatchNorm2d with
their quartiles. Layers: the five activation shapes of ResNet-50's stages, batch 16, forward and backward. Peak memory: each
side in a fresh process, growth of the resident peak over what was resident before the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from decaycast.lab.provenance import provenance
from decaycast.methods.stochnorm.method import StochNorm, StochNorm2d
from decaycast.methods.stochnorm.theory import along_channels
from machine import fresh, memory_bytes, seconds

RESULTS = Path(__file__).parent / "results"
SHAPES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))  # channels, height = width
BATCH = 16
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class TwoBranches(nn.BatchNorm2d):
    """The paper's formula as it stands: both branches normalised, then mixed; running statistics read before they move."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mask = along_channels(torch.rand(self.num_features) < 0.5, input).to(input.dtype)
        old = self.running_mean.clone(), self.running_var.clone()
        running = nn.functional.batch_norm(input, *old, self.weight, self.bias, False, 0.0, self.eps)
        batch = super().forward(input)
        return mask * batch + (1 - mask) * running


SIDES: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "StochNorm2d": StochNorm2d,
    "two branches": TwoBranches,
}


# layers


class Layer:
    """One layer with its input and the gradient of its output."""

    def __init__(self, side: str, channels: int, size: int, dtype: torch.dtype, layout: str) -> None:
        generator = torch.Generator().manual_seed(channels)
        self.norm = SIDES[side](channels)
        shape = (BATCH, channels, size, size)
        x, self.grad = (
            torch.randn(shape, generator=generator).to(dtype).to(memory_format=FORMATS[layout]) for _ in range(2)
        )
        self.x = (1.5 * x + 0.5).requires_grad_()

    def forward(self) -> None:
        self.x.grad = None
        self.output = self.norm(self.x)

    def backward(self) -> None:
        self.output.backward(self.grad)
        del self.output


def layers(dtype: torch.dtype, layout: str, shapes: tuple, rounds: int) -> list[dict]:
    """Seconds of all sides over all shapes, in alternating rounds; the first round is not counted."""
    built = {side: [Layer(side, *shape, dtype, layout) for shape in shapes] for side in SIDES}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side, found in times.items():
            pairs = [(seconds(layer.forward), seconds(layer.backward)) for layer in built[side]]
            found.append((sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)))
    rows = []
    for side, found in times.items():
        row: dict = {"dtype": str(dtype).removeprefix("torch."), "layout": layout, "side": side}
        row["milliseconds"] = 1e3 * statistics.median(sum(pair) for pair in found[1:])
        for what, part in {"both": sum, "forward": lambda pair: pair[0], "backward": lambda pair: pair[1]}.items():
            row[what] = quartiles([part(a) / part(b) for a, b in zip(found[1:], times["BatchNorm2d"][1:], strict=True)])
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Median, first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def child(side: str, layout: str) -> dict:
    """Growth of this process's resident peak over forward and backward of the first shape."""
    torch.set_num_threads(1)
    small, layer = (Layer(side, 64, size, torch.float32, layout) for size in (4, SHAPES[0][1]))
    small.forward()  # libraries set themselves up at the first call
    small.backward()
    before = memory_bytes("VmRSS")
    layer.forward()
    layer.backward()
    return {"peak_bytes": memory_bytes("VmHWM") - before}


# a network


class Block(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with their norms, added to the input or a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        changes = inputs != outputs or stride != 1
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(*projection) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.shortcut(x) + self.second(torch.relu(self.first(x))))


def resnet18(side: str) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 256, 512)
    stages = [
        Block(widths[i] if first else widths[i + 1], widths[i + 1], 2 if first and i else 1)
        for i in range(4)
        for first in (True, False)
    ]
    model = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))
    if side == "StochNorm2d":
        return StochNorm.convert(model, report=None)
    for module in model.modules() if side == "two branches" else ():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = TwoBranches
    return model


def training_step(layout: str, size: int, batch: int, rounds: int) -> list[dict]:
    """One optimiser step of ResNet-18, all sides in alternating rounds."""
    x = torch.randn(batch, 3, size, size).to(memory_format=FORMATS[layout])
    target, steps = torch.arange(batch) % 100, {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    for side in SIDES:
        model = resnet18(side).to(memory_format=FORMATS[layout])
        steps[side] = partial(step, model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side, found in times.items():
            found.append(seconds(steps[side]))
    base = times["BatchNorm2d"][1:]
    return [
        {
            "layout": layout,
            "side": side,
            "milliseconds": 1e3 * statistics.median(found[1:]),
            "both": quartiles([a / b for a, b in zip(found[1:], base, strict=True)]),
        }
        for side, found in times.items()
    ]


# the page


def lines_of(result: dict) -> list[str]:
    memory = {(row["layout"], row["side"]): row["peak_bytes"] for row in result["memory"]}

    def cell(found: list[float]) -> str:
        return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"

    lines = [
        "# Stochastic normalisation",
        "",
        f"Sum over the five ResNet-50 stage shapes, batch {BATCH}, one thread, in units of BatchNorm2d: median of the rounds",
        "[quartiles]. Aims for StochNorm2d: forward + backward <= 1.10 contiguous, <= 1.0 channels-last; peak memory <= 1.05.",
        "Peak memory: of one layer, 64 channels of 112 x 112, in a fresh process.",
        "",
        "| dtype | layout | layer | ms | forward + backward | forward | backward | peak memory |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for row in result["layers"]:
        peak = memory[row["layout"], row["side"]] / memory[row["layout"], "BatchNorm2d"]
        cells = " | ".join(cell(row[what]) for what in ("both", "forward", "backward"))
        peak_cell = f"{peak:.2f}" if row["dtype"] == "float32" else ""
        start = f"| {row['dtype']} | {row['layout']} | {row['side']} | {row['milliseconds']:.0f}"
        lines.append(f"{start} | {cells} | {peak_cell} |")
    lines += [
        "",
        f"Training step of ResNet-18 (SGD with momentum, {result['step']['size']} px, batch {result['step']['batch']}).",
        "",
        "| layout | norm | ms | step / step with BatchNorm2d |",
        "|-|-|-|-|",
    ]
    lines += [
        f"| {row['layout']} | {row['side']} | {row['milliseconds']:.0f} | {cell(row['both'])} |"
        for row in result["step"]["rows"]
    ]
    return [*lines, "", "Versions and machine: `stochnorm.json`."]


def main() -> None:
    """Measure, write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of small layers, nothing written")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "LAYOUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(*asked.child)))
        return
    torch.set_num_threads(1)
    shapes, rounds, size, batch = (SHAPES[-2:], 4, 32, 2) if asked.quick else (SHAPES, 40, 96, 16)
    result = {
        "provenance": provenance(),
        "layers": [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for layout in FORMATS
            for row in layers(dtype, layout, shapes, rounds)
        ],
        "memory": [
            {"layout": layout, "side": side, **fresh(__file__, side, layout)} for layout in FORMATS for side in SIDES
        ],
        "step": {
            "size": size,
            "batch": batch,
            "rows": [row for layout in FORMATS for row in training_step(layout, size, batch, rounds // 2)],
        },
    }
    lines = lines_of(result)
    if not asked.quick:
        (RESULTS / "stochnorm.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "stochnorm.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
