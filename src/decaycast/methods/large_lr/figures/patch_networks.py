"""Networks of the patch experiment: a small one with batch norm for two cores, and the paper's WRN for a GPU.

Every activation is a module of its own, so that noise can be put in front of it. Weights start as N(0, 2/fan_in), biases at 0.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

_SMALL = re.compile(r"conv-(?P<widths>\d+(-\d+)*)")
_WIDE = re.compile(r"wrn-(?P<depth>\d+)-(?P<widen>\d+)")


def network(name: str, channels: int, classes: int, generator: torch.Generator) -> nn.Module:
    """The network that a name means: ``conv-24-48-96`` (a convolution per width) or ``wrn-16-10`` (depth, widening).

    Raises:
        ValueError: another name, or a depth no WRN has.

    >>> network("conv-8-16", 3, 10, torch.Generator().manual_seed(0))(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 10])
    """
    if match := _SMALL.fullmatch(name):
        model: nn.Module = small_network(channels, classes, [int(width) for width in match["widths"].split("-")])
    elif match := _WIDE.fullmatch(name):
        model = WideResNet(channels, classes, depth=int(match["depth"]), widen=int(match["widen"]))
    else:
        raise ValueError(
            f"unknown network {name!r}; names are conv-WIDTH-WIDTH-... and wrn-DEPTH-WIDEN, for example wrn-16-10"
        )
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / module.weight[0].numel()), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def small_network(channels: int, classes: int, widths: list[int]) -> nn.Sequential:
    """3x3 convolutions with batch norm and ReLU, 2x2 max-pooling between them, mean over positions, linear head."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip([channels, *widths], widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], classes))


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko & Komodakis 2016): 3x3 convolution to 16, three stages of (d-4)/6 blocks, widths 16k, 32k, 64k.

    Args:
        channels: of the images.
        classes: outputs of the head.
        depth: 6n + 4, at least 10.
        widen: k >= 1.

    Raises:
        ValueError: a depth or widening that is no such network.
    """

    def __init__(self, channels: int, classes: int, *, depth: int, widen: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or widen < 1:
            raise ValueError(f"a WRN has depth 6n + 4 (10, 16, 22, 28) and widening >= 1, got {depth}, {widen}")
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for stage in range(3):
            for i in range(blocks):
                inputs = widths[stage] if i == 0 else widths[stage + 1]
                stages.append(_Block(inputs, widths[stage + 1], 2 if stage and i == 0 else 1))
        self.stages = nn.Sequential(*stages)
        self.norm, self.relu, self.head = nn.BatchNorm2d(widths[3]), nn.ReLU(), nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, classes) for images of shape (n, channels, height, width)."""
        return self.head(self.relu(self.norm(self.stages(self.stem(x)))).mean((2, 3)))


class _Block(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv twice; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu1(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        return skip + self.conv2(self.relu2(self.norm2(self.conv1(hidden))))
