"""timm: weight-decay schedules and AutoL2 with the face of its learning-rate schedulers.

Conventions. ``step_update(n)`` follows the n-th update, as timm's training loop calls it, and sets the weight decay of the next;
``step(epoch)`` follows an epoch. timm's own base class multiplies what it schedules by a group's ``lr_scale`` (layer-wise decay
of the learning rate). That is right for a learning rate and wrong for a weight decay, whose shrink per step lr*weight_decay has
that factor already: nothing here does so. timm's noise options are not offered.

timm rebuilds its schedulers from the number of updates when it resumes, and its checkpoints hold none of their state. That is
enough for `TimmWeightDecay`; `TimmAutoL2` listens to the training, so its `state_dict` has to be saved, and it says so if not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from decaycast.adapters import loss_as_error
from decaycast.adapters.timm_script import Scheduler  # pyright: ignore[reportAttributeAccessIssue]
from decaycast.core.decay import WeightDecayController, WeightDecayScheduler
from decaycast.core.schedule import Schedule, whole
from decaycast.methods.l2.autol2 import AutoL2


class _Driven(Scheduler):
    """timm's face of one of our controllers, which does all the writing: in place, groups at 0 stay 0."""

    def __init__(self, held: WeightDecayController, t_in_epochs: bool) -> None:
        self.held = held
        super().__init__(held.optimizer, "weight_decay", t_in_epochs=t_in_epochs)

    def update_groups(self, values: Any) -> None:
        """Nothing: `held` has written already, and timm's own would multiply by ``lr_scale``."""

    def _get_lr(self, t: int) -> list[float]:
        """What timm calls the values at `t`; here those in force."""
        return self.held.get_last_wd()

    def get_last_wd(self) -> list[float]:
        """The weight decay last written to each group."""
        return self.held.get_last_wd()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers (JSON-able), without the optimiser."""
        return self.held.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore `state_dict` and write the restored weight decay; before or after the optimiser's own state."""
        self.held.load_state_dict(state_dict)  # type: ignore[attr-defined]


class TimmWeightDecay(_Driven):
    """Any weight-decay schedule in timm's loop: each group's initial weight decay times fn(t).

    Args:
        optimizer: as timm made it, or any of torch's.
        fn: multiplier, finite and >= 0, by the updates made so far (`decaycast.core.schedule` has some); by epochs with
            `t_in_epochs`.
        t_in_epochs: move with ``step(epoch)`` and not with ``step_update(num_updates)``.

    Raises:
        TypeError: not an optimiser, or `fn` cannot be called.
        ValueError: a group without valid weight decay; in training, a multiplier that is negative or not finite.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fn: Schedule, *, t_in_epochs: bool = False) -> None:
        super().__init__(WeightDecayScheduler(optimizer, fn), t_in_epochs)

    def step(self, epoch: int, metric: Any = None) -> None:
        """Set the weight decay of epoch `epoch`, if this scheduler counts epochs."""
        if self.t_in_epochs:
            self.held._move_to(whole("epoch", epoch, least=0))  # type: ignore[attr-defined]

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        """Set the weight decay of the update after `num_updates`, if this scheduler counts updates."""
        if not self.t_in_epochs:
            self.held._move_to(whole("num_updates", num_updates, least=0))  # type: ignore[attr-defined]


class TimmAutoL2(_Driven):
    """`AutoL2` in timm's loop: ``step_update(num_updates, metric)`` after each update, with the loss of its batch as metric.

    timm's training script hands over the mean loss of the epoch so far (``metric=losses_m.avg``), which stands still long after
    the loss does and jumps between epochs; write ``metric=losses_m.val`` there. A pair (loss, error), error being the share of
    wrong predictions, is the paper's rule; with the loss alone an error that rises and falls with it stands in.

    Args:
        optimizer: as timm made it, `Lookahead` included.
        settings: of `AutoL2`. ``clock="efolds"`` needs `steps`, the updates of the run, and its learning rates as `lr`:
            `learning_rates` has them.

    Raises:
        TypeError, ValueError: as `AutoL2`.
    """

    held: AutoL2

    def __init__(self, optimizer: torch.optim.Optimizer, **settings: Any) -> None:
        # timm's Lookahead hides which optimiser it wraps, and with it what weight decay means
        super().__init__(AutoL2(getattr(optimizer, "_base_optimizer", optimizer), **settings), t_in_epochs=False)

    @property
    def due(self) -> bool:
        """Whether the next `step_update` will look at its metric."""
        return self.held.due

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        """Take in the update just made.

        Raises:
            ValueError: updates were left out (a resumed run whose state was not loaded); no metric where one is due; as
                `AutoL2.step`.
        """
        if num_updates == self.held.steps:  # what timm calls when it resumes
            return self.held._write()
        if num_updates != self.held.steps + 1:
            raise ValueError(
                f"TimmAutoL2 has seen {self.held.steps} updates, and step_update says {num_updates}; call it after every update, "
                "and load its state_dict when a run resumes: timm's checkpoints do not hold it"
            )
        loss, error = metric if isinstance(metric, (tuple, list)) else (metric, None)
        if self.held.due and loss is None:
            raise ValueError("TimmAutoL2 measures at this update: give metric=loss, or metric=(loss, error)")
        if self.held.due and error is None:
            error = loss_as_error(torch.as_tensor(loss).detach())
        self.held.step(loss, error)

    def step(self, epoch: int, metric: Any = None) -> None:
        """Nothing: AutoL2 counts updates."""
