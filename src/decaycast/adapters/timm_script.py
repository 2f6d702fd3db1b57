"""What a training script with timm needs around it: several schedulers in one, learning rates ahead, parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from decaycast.adapters import require
from decaycast.core.decay import check_keys
from decaycast.core.param_groups import decay_groups
from decaycast.core.schedule import check_multiplier, whole

require("timm", timm=">=1.0.20,<2")

from timm.optim import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler import Scheduler  # noqa: E402  # pyright: ignore[reportMissingImports]


class TimmSchedulers:
    """Several schedulers in the place of one: ``lr_scheduler = TimmSchedulers(lr_scheduler, TimmWeightDecay(optimizer, fn))``.

    Args:
        schedulers: at least one; None, which timm makes of ``--sched none``, is left out.

    Raises:
        ValueError: none is left.
    """

    def __init__(self, *schedulers: Any) -> None:
        self.schedulers = [scheduler for scheduler in schedulers if scheduler is not None]
        if not self.schedulers:
            raise ValueError("TimmSchedulers needs at least one scheduler, got none")

    def step(self, epoch: int, metric: Any = None) -> None:
        """All of them after an epoch."""
        for scheduler in self.schedulers:
            scheduler.step(epoch, metric)

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        """All of them after an update."""
        for scheduler in self.schedulers:
            scheduler.step_update(num_updates, metric)

    def state_dict(self) -> dict[str, Any]:
        """The state of each."""
        return {"schedulers": [scheduler.state_dict() for scheduler in self.schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the state is of other schedulers.
        """
        check_keys(state_dict, ("schedulers",), "TimmSchedulers")
        states = state_dict["schedulers"]
        if len(states) != len(self.schedulers):
            raise ValueError(f"the state is of {len(states)} schedulers, but there are {len(self.schedulers)}")
        for scheduler, state in zip(self.schedulers, states, strict=True):
            scheduler.load_state_dict(state)


def learning_rates(scheduler: Scheduler, updates: int, updates_per_epoch: int) -> np.ndarray:
    """Learning rate of each group at each update of a run under a scheduler of timm, which is left as it is.

    Args:
        scheduler: of the learning rate; not Plateau, which waits for a metric.
        updates: of the run, >= 1.
        updates_per_epoch: >= 1.

    Returns:
        Shape (updates, groups), with each group's ``lr_scale``.

    Raises:
        TypeError: not one of timm's schedulers.
        ValueError: Plateau; a scheduler of something else; a number out of range.
    """
    if not isinstance(scheduler, Scheduler):
        raise TypeError(f"expected a scheduler of timm, got {type(scheduler).__name__}")
    if isinstance(getattr(scheduler, "lr_scheduler", None), torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("PlateauLRScheduler waits for a metric, so its learning rates cannot be told in advance")
    if scheduler.param_group_field != "lr":
        raise ValueError(f"the scheduler is one of {scheduler.param_group_field!r}; give that of the learning rate")
    updates = whole("updates", updates, least=1)
    per_epoch = whole("updates_per_epoch", updates_per_epoch, least=1)
    times = np.arange(updates) // (per_epoch if scheduler.t_in_epochs else 1)
    first, *later = range(int(times[-1]) + 1)
    values = [scheduler._get_lr(first), *(scheduler._add_noise(scheduler._get_lr(t), t) for t in later)]
    scales = [float(group.get("lr_scale", 1.0)) for group in scheduler.optimizer.param_groups]
    return np.array(values, dtype=float)[times] * scales


def param_groups(
    model: torch.nn.Module,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    no_decay: Sequence[str] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups as timm makes them, without decay for what its rule misses: norms over images, tokens, positions, temperatures.

    For ``create_optimizer_v2(param_groups(model, 0.05), opt="adamw", lr=1e-3)``; `decaycast.core.param_groups` has the rules.

    Args:
        model: its ``no_weight_decay()`` is honoured, as timm does.
        weight_decay: of what decays, finite and >= 0, in the optimiser's own convention.
        layer_decay: factor of the learning rate from layer to layer (``lr_scale``), or None.
        no_decay: more names that should not decay, wildcards allowed.
        options: of timm's ``param_groups_weight_decay`` or ``param_groups_layer_decay`` (``fallback_list`` and so on).

    Returns:
        timm's groups with all their options; one of which only a part should decay is two.

    Raises:
        ValueError: weight_decay is out of range; nothing in the model is trained.
    """
    weight_decay = check_multiplier("weight_decay", weight_decay)
    spared = {
        id(p)
        for group in decay_groups(model, 1.0, no_decay=no_decay)
        if not group["weight_decay"]
        for p in group["params"]
    }
    make = (
        param_groups_weight_decay if layer_decay is None else partial(param_groups_layer_decay, layer_decay=layer_decay)
    )
    said = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    found = []
    for group in make(model, weight_decay=weight_decay, no_weight_decay_list=said, **options):
        kept = [p for p in group["params"] if id(p) not in spared]
        left = [p for p in group["params"] if id(p) in spared]
        if group["weight_decay"] and left:
            found += [{**group, "params": kept}, {**group, "params": left, "weight_decay": 0.0}]
        else:
            found.append(group)
    return [group for group in found if group["params"]]
