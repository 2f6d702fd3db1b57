"""The paper's networks in the sizes that fit a machine: fully connected, convolutional with and without batch norm, WRN.

Names carry the size: ``mlp-256x3`` (width x hidden layers), ``cnn-16`` and ``cnn-bn-16`` (filters), ``wrn-10-1`` (depth,
widening; WRN-28-10 is ``wrn-28-10``), ``gpt-64x2`` (width x layers; a language model for text, with a start of its own).
Weights start as N(0, 2/fan_in), biases at zero (the paper's sigma_w^2 = 2, sigma_b = 0), drawn from the seed alone.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from decaycast.core.names import choose
from decaycast.lab.transformer import Transformer

PATTERNS = {
    "mlp": re.compile(r"mlp(?:-(?P<width>\d+)x(?P<depth>\d+))?"),
    "cnn": re.compile(r"cnn(?P<norm>-bn)?(?:-(?P<width>\d+))?"),
    "wrn": re.compile(r"wrn-(?P<depth>\d+)-(?P<width>\d+)"),
    "gpt": re.compile(r"gpt(?:-(?P<width>\d+)x(?P<depth>\d+))?"),
}
EXAMPLES = (
    "mlp",
    "mlp-256x3",
    "mlp-2048x3",
    "cnn",
    "cnn-16",
    "cnn-300",
    "cnn-bn",
    "cnn-bn-16",
    "wrn-10-1",
    "wrn-28-10",
    "gpt-64x2",
)


def build(name: str, shape: tuple[int, ...], classes: int, *, seed: int) -> nn.Module:
    """A freshly initialised network for samples of `shape` and `classes` outputs.

    `shape` is (channels, height, width) for images and (characters,) for text, whose classes are the alphabet.

    Raises:
        ValueError: unknown name, a WRN depth that is not 6n + 4, or a network for images on text and the other way round.
    """
    match = next((found for pattern in PATTERNS.values() if (found := pattern.fullmatch(name))), None)
    if match is None:
        choose(name, EXAMPLES, "model")
        raise AssertionError("unreachable: every example matches a pattern")
    size = {key: int(value) for key, value in match.groupdict().items() if value and value.isdigit()}
    if 0 in size.values() and not name.startswith("wrn"):
        raise ValueError(f"every size in a model's name must be at least 1, got {name!r}; for example {EXAMPLES[1]}")
    if name.startswith("gpt") != (len(shape) == 1):
        raise ValueError(f"{name} does not fit samples of shape {shape}: text needs gpt-64x2 or another size of it")
    if name.startswith("gpt"):
        return Transformer(shape[0], classes, width=size.get("width", 64), layers=size.get("depth", 2), seed=seed)
    if name.startswith("mlp"):
        model = mlp(math.prod(shape), classes, width=size.get("width", 256), depth=size.get("depth", 3))
    elif name.startswith("cnn"):
        model = cnn(shape, classes, filters=size.get("width", 16), batch_norm="-bn" in name)
    else:
        model = WideResNet(shape, classes, depth=size["depth"], widen=size["width"])
    initialise(model, seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """He-normal weights and zero biases for every linear and convolution layer, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            with torch.no_grad():
                module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def mlp(inputs: int, classes: int, *, width: int, depth: int) -> nn.Sequential:
    """Fully connected ReLU network with `depth` hidden layers (the paper's FC: width 2048, depth 3)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, classes))


def cnn(shape: tuple[int, ...], classes: int, *, filters: int, batch_norm: bool) -> nn.Sequential:
    """Two blocks of 3x3 convolutions (same, then valid padding) and max-pooling, dense 500, dense output.

    The paper's CNN has 300 filters; layer order as far as a public port tells it.
    """
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for _ in range(2):
        for padding in (1, 0):
            layers.append(nn.Conv2d(channels, filters, 3, padding=padding, bias=not batch_norm))
            layers += [nn.BatchNorm2d(filters), nn.ReLU()] if batch_norm else [nn.ReLU()]
            channels, side = filters, side - 2 * (1 - padding)
        layers.append(nn.MaxPool2d(2))
        side //= 2
    if side < 1:
        raise ValueError(f"images of side {shape[1]} are too small for this CNN, which needs at least 10; use an mlp")
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * side * side, 500), nn.ReLU(), nn.Linear(500, classes)
    )


class _Block(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv twice; a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        hidden = torch.relu(self.bn2(self.conv1(hidden)))
        return skip + self.conv2(hidden)


class WideResNet(nn.Module):
    """WRN-d-k (Zagoruyko & Komodakis 2016): 3x3 conv to 16, three stages of (d-4)/6 blocks, widths 16k, 32k, 64k."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, depth: int, widen: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or widen < 1:
            raise ValueError(
                f"a WRN's depth is 6n + 4 (10, 16, 22, 28, 40) and its widening >= 1, got {depth}, {widen}"
            )
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(shape[0], widths[0], 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        for stage in range(3):
            for i in range(blocks):
                inputs = widths[stage] if i == 0 else widths[stage + 1]
                stages.append(_Block(inputs, widths[stage + 1], 2 if stage and i == 0 else 1))
        self.stages = nn.Sequential(*stages)
        self.norm, self.head = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of shape (n, classes) for images (n, channels, height, width)."""
        hidden = torch.relu(self.norm(self.stages(self.stem(x))))
        return self.head(hidden.mean((2, 3)))
