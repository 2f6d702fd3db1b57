"""The small residual network that the figures pre-train and fine-tune: batch norm after every convolution, as in ResNet-50.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning", CVPR 2016, section 4.2 (the nets for CIFAR-10), with 1x1 projections.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

_NAME = re.compile(r"resnet-(?P<depth>\d+)-(?P<width>\d+)")


class ResNet(nn.Module):
    """3x3 convolution, three stages of (depth - 2)/6 blocks with widths w, 2w, 4w, mean over positions, linear head `fc`.

    Args:
        channels: of the images.
        classes: outputs of the head.
        depth: 6n + 2, at least 8.
        width: w >= 1, channels of the first stage.

    Raises:
        ValueError: a depth or width that is no such network.

    >>> ResNet(3, 5, depth=8, width=4)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(self, channels: int, classes: int, *, depth: int, width: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1 or width < 1:
            raise ValueError(f"a residual network has depth 6n + 2 (8, 14, 20) and width >= 1, got {depth}, {width}")
        self.stem = _normed(channels, width, 3, 1)
        widths = [width, width, 2 * width, 4 * width]
        stages: list[nn.Module] = []
        for stage in range(3):
            for i in range(blocks):
                inputs = widths[stage] if i == 0 else widths[stage + 1]
                stages.append(_Block(inputs, widths[stage + 1], 2 if stage and i == 0 else 1))
        self.stages, self.fc = nn.Sequential(*stages), nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, classes) for images of shape (n, channels, height, width)."""
        return self.fc(self.stages(torch.relu(self.stem(x))).mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, added before the last ReLU; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _normed(inputs, outputs, 3, stride), _normed(outputs, outputs, 3, 1)
        changes = inputs != outputs or stride != 1
        self.shortcut = _normed(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def _normed(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def resnet(name: str, channels: int, classes: int, generator: torch.Generator) -> ResNet:
    """The network that a name such as ``resnet-8-16`` (depth, width) means, its weights N(0, 2/fan_in) from `generator`.

    Raises:
        ValueError: another name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown network {name!r}; names are resnet-DEPTH-WIDTH, for example resnet-8-16")
    model = ResNet(channels, classes, depth=int(match["depth"]), width=int(match["width"]))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / module.weight[0].numel()), generator=generator)
    new_head(model.fc, generator)
    return model


def new_head(head: nn.Linear, generator: torch.Generator) -> None:
    """Starts a head anew, in place, as the paper's code does: weights N(0, 0.01^2), biases 0."""
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
