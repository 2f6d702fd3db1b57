"""The networks of `bench/gpu.py`, in plain torch, and CIFAR-10 from its published binary files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def fully_connected(width: int, depth: int = 3, inputs: int = 784) -> nn.Sequential:
    """The L2 paper's FC at width 2048: ReLU layers on 28 x 28 pixels, 10 classes."""
    sizes = [inputs, *[width] * depth]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return started(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10)))


def convolutional(filters: int, side: int = 32) -> nn.Sequential:
    """The L2 paper's CNN at 300 filters: twice (same, valid convolution, pooling), dense 500, 10 classes."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(2):
        for padding in (1, 0):
            layers += [nn.Conv2d(channels, filters, 3, padding=padding), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
        side = (side - 2) // 2
    return started(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * side**2, 500), nn.ReLU(), nn.Linear(500, 10))
    )


class Block(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice; a projection beside it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norms[0](x))
        beside = x if self.projection is None else self.projection(hidden)
        return beside + self.second(torch.relu(self.norms[1](self.first(hidden))))


def wide_resnet(depth: int, widen: int) -> nn.Sequential:
    """WRN-depth-widen (Zagoruyko & Komodakis 2016) for 3 x 32 x 32 pixels, 10 classes."""
    widths, blocks = (16, 16 * widen, 32 * widen, 64 * widen), (depth - 4) // 6
    stages = [
        Block(widths[stage] if i == 0 else widths[stage + 1], widths[stage + 1], 2 if stage and i == 0 else 1)
        for stage in range(3)
        for i in range(blocks)
    ]
    stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
    end = (nn.BatchNorm2d(widths[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[3], 10))
    return started(nn.Sequential(stem, *stages, *end))


def started(model: nn.Sequential) -> nn.Sequential:
    """With weights from N(0, 2/fan_in) and biases of zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / module.weight[0].numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


Images = tuple[Tensor, Tensor]


def cifar10(folder: Path) -> tuple[Images, Images, Images]:
    """Training (45,000), validation (the last 5,000 of the training file) and test images, standardised per channel.

    Raises:
        FileNotFoundError: no `cifar-10-batches-bin` in the folder.
    """
    files = [
        folder / "cifar-10-batches-bin" / name
        for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    ]
    rows = [np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files]
    train, test = np.concatenate(rows[:5]), rows[5]
    pixels, others = (torch.from_numpy(part[:, 1:].reshape(-1, 3, 32, 32)).float() for part in (train, test))
    mean, deviation = (getattr(pixels[:45_000], what)((0, 2, 3), keepdim=True) for what in ("mean", "std"))
    labels, wanted = (torch.from_numpy(part[:, 0].astype(np.int64)) for part in (train, test))
    pixels, others = ((part - mean) / deviation for part in (pixels, others))
    return (pixels[:45_000], labels[:45_000]), (pixels[45_000:], labels[45_000:]), (others, wanted)
