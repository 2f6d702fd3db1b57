"""Networks of the escape figures, and the trace of the Gauss-Newton matrix that is measured on each.

"mlp-128x128" is a ReLU network with those hidden widths, whose trace is exact (`gauss_newton`). "resnet18-groupnorm" is the
paper's: first convolution 3x3 with stride 1, no pooling before the blocks, group norm of 32 channels a group; its trace is
an estimate by `core.trace` on some of the images.

Source: He, Zhang, Ren & Sun 2016 (ResNet-18); Damian, Ma & Lee 2021, section on experiments (the changes).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.trace import hessian_trace
from decaycast.methods.label_noise.figures import gauss_newton

RESNET = "resnet18-groupnorm"
CHANNELS_PER_GROUP = 32
TRACE_IMAGES, TRACE_BATCH, TRACE_ERROR = 1000, 250, 0.05
_MLP = re.compile(r"mlp(-\d+(x\d+)*)")


def build(name: str, shape: Sequence[int], classes: int, generator: torch.Generator) -> nn.Module:
    """A network for images of `shape` with weights from `generator` alone, as torch's layers start.

    Raises:
        ValueError: an unknown name.

    >>> sum(p.numel() for p in build("mlp-128x128", (1, 8, 8), 10, torch.Generator().manual_seed(0)).parameters())
    26122
    """
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from its own generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if name == RESNET:
            return ResNet18(shape[0], classes)
        if not _MLP.fullmatch(name):
            raise ValueError(f"a network is called {RESNET}, or mlp-128x128 by its hidden widths, got {name!r}")
        widths = [torch.Size(shape).numel(), *map(int, name.removeprefix("mlp-").split("x")), classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def trace(model: nn.Module, inputs: Tensor, loss_fn: Any) -> float:
    """The trace of the Gauss-Newton matrix: exact for an MLP, else estimated to 5 % on the first 1,000 images."""
    if not isinstance(model, ResNet18):
        return gauss_newton.trace(model, inputs)
    chosen = inputs[:TRACE_IMAGES]
    # labels do not matter to it
    batches = [
        (part, torch.zeros(len(part), dtype=torch.int64, device=part.device)) for part in chosen.split(TRACE_BATCH)
    ]
    probes = torch.Generator(inputs.device).manual_seed(0)
    return hessian_trace(model, loss_fn, batches, TRACE_ERROR, "ggn", probes).value


class ResNet18(nn.Module):
    """ResNet-18 for small images, with group norm (head of this file).

    Args:
        channels: of the images.
        classes: outputs.

    >>> ResNet18(3, 10)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem, blocks, inputs = _normed(channels, 64, 3, 1), [], 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width)."""
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = _normed(inputs, outputs, 3, stride), _normed(outputs, outputs, 3, 1)
        changes = inputs != outputs or stride != 1
        self.shortcut = _normed(inputs, outputs, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def _normed(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(outputs // CHANNELS_PER_GROUP, outputs))
