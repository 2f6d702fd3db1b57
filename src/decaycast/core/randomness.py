"""The random state that a training draws from: global generators, and those of data loaders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators a DataLoader shuffles with; none where it uses the global one."""
    owners = (
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(item): item for item in found if isinstance(item, torch.Generator)}.values())


def randomness(generators: Sequence[torch.Generator] = ()) -> list[Any]:
    """State of torch's (CPU and CUDA), Python's and numpy's global generators, and of these."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    legacy = np.random.get_state()
    return [torch.get_rng_state(), cuda, random.getstate(), legacy, [item.get_state() for item in generators]]


def set_randomness(state: list[Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put back what `randomness` returned, for the same generators."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])
    for item, value in zip(generators, state[4], strict=True):
        item.set_state(value)
