"""What the tests of the layers share: six channels, a mask, buffers off their start."""

from __future__ import annotations

from typing import Any

import torch

MASK = torch.tensor([True, False, True, True, False, False])


def away_from_start(layer: Any, seed: int = 0) -> Any:
    """The layer with affine and running statistics off the origin and the unit."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", 0.5, 2), ("running_var", 0.3, 3)):
            getattr(layer, name).uniform_(low, high, generator=generator)
    return layer


def activations(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False, seed: int = 0) -> torch.Tensor:
    x = 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1
    x = x.to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return x.requires_grad_()
