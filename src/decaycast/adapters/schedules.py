"""The learning rates that a framework's scheduler will set over a run, found by stepping it through and putting it back."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch


def rates_ahead(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, every: int = 1) -> np.ndarray | None:
    """Learning rate of each group at each update of a run that begins now.

    Args:
        optimizer: the scheduler's; no update is made, and its groups come out as they were.
        scheduler: one of torch's, or with its ``step``, ``state_dict`` and ``load_state_dict``; None for constant rates.
        steps: updates of the run, >= 1.
        every: updates between steps of the scheduler: 1, or those of an epoch.

    Returns:
        Shape (steps, groups); None for a scheduler that waits for a metric (`ReduceLROnPlateau`).

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    >>> halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    >>> rates_ahead(optimizer, halving, steps=5, every=2)[:, 0].tolist()
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return None
    groups = optimizer.param_groups
    if scheduler is None:
        return np.tile([float(group["lr"]) for group in groups], (steps, 1))
    saved = [{name: _copy(value) for name, value in group.items() if name != "params"} for group in groups]
    state = scheduler.state_dict()
    rates = np.empty((steps, len(groups)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer step comes in between
            for step in range(steps):
                if step and step % every == 0:
                    scheduler.step()
                rates[step] = [float(group["lr"]) for group in groups]
    finally:
        scheduler.load_state_dict(state)
        for group, values in zip(groups, saved, strict=True):
            _put_back(group, values)
    return rates


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _put_back(group: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and isinstance(group[name], torch.Tensor):
            group[name].copy_(value)  # the tensor may be held by compiled code
        else:
            group[name] = value
