"""Hugging Face Trainer callbacks: any weight-decay schedule, the log of e-folds (also `huggingface_autol2`, `huggingface_noise`).

Conventions. Steps are updates that were made: gradient accumulation and updates that the scaler skipped do not count. One
callback of a kind per Trainer. Each is an `ExportableState`, saved in every checkpoint, and restores itself from it, with or
without ``restore_callback_states_from_checkpoint=True``, which builds callbacks anew from JSON and so cannot have functions.
"""

from __future__ import annotations

import functools
from typing import Any

from decaycast.adapters.huggingface_base import Stateful, attachable, bare, live
from decaycast.adapters.loggers import DecayLog
from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.schedule import Schedule, by_name


class WeightDecayCallback(Stateful):
    """Any weight-decay schedule: each group's initial weight decay times ``fn(step)``; groups at 0 stay 0.

    Args:
        fn: 0-based update -> multiplier, or a name of `decaycast.core.schedule.WEIGHT_DECAY_NAMES` over the training.
    """

    def __init__(self, fn: Schedule | str | None = None) -> None:
        self.fn, self.arguments = fn, {"fn": fn}

    def build(self, state: Any, optimizer: Any, scheduler: Any) -> WeightDecayScheduler:
        """The scheduler over the Trainer's optimiser."""
        if self.fn is None:
            raise ValueError(
                "WeightDecayCallback has no schedule; where restore_callback_states_from_checkpoint=True builds callbacks anew, "
                "give it by name, or leave that False: this callback restores itself"
            )
        fn = by_name(self.fn, state.max_steps) if isinstance(self.fn, str) else self.fn
        return WeightDecayScheduler(bare(optimizer), fn)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on to the next update's weight decay, if this one was made."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.held.step()


class DecayLogCallback(Stateful):
    """``reg/weight_decay``, ``reg/efolds``, ``reg/tau`` in what the Trainer logs. Use ``.attach(trainer)``.

    They go wherever `report_to` says, and into ``trainer.state.log_history``.
    """

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.latest: dict[str, float] = {}

    def build(self, state: Any, optimizer: Any, scheduler: Any) -> DecayLog:
        """The sum of e-folds."""
        return DecayLog(lambda step, values: self.latest.update(values), state.max_steps, every=1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the update just made, before either rate or decay moves on."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.held.step(bare(kwargs["optimizer"]))

    def attach(self, trainer: Any) -> Any:
        """Add this callback to the Trainer, and the keys to its training logs; returns the Trainer."""
        attachable(trainer, self)
        log = trainer.log

        @functools.wraps(log)
        def with_keys(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            return log({**logs, **live(trainer, self).latest} if "loss" in logs else logs, *args, **kwargs)

        trainer.log = with_keys
        return trainer
