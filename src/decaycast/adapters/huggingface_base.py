"""What all Hugging Face callbacks here share: which versions, when state is restored, how they get around the Trainer."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from decaycast.adapters import require
from decaycast.core.decay import WeightDecayController

require("hf", transformers=">=5.0,<6")
require("hf", accelerate=">=1.1,<2")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402  # pyright: ignore[reportMissingImports]
from transformers.trainer_callback import ExportableState, TrainerCallback  # noqa: E402  # pyright: ignore[reportMissingImports]


class Stateful(TrainerCallback, ExportableState, ABC):
    """A callback around something with ``state_dict`` that is built when training begins, and restored at once."""

    held: Any = None
    arguments: dict[str, Any]

    @abstractmethod
    def build(self, state: Any, optimizer: Any, scheduler: Any) -> Any:
        """What is held during training; `optimizer` is prepared, and its own state is restored already."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build, then restore: no update is made with a constructor's value."""
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, {})  # Trainer expects the entry when it saves
        self.held = self.build(state, kwargs["optimizer"], kwargs.get("lr_scheduler"))
        if state.global_step:
            latest = saved[-1] if isinstance(saved, list) else saved
            if latest:
                self.held.load_state_dict(copy.deepcopy(latest["attributes"]["saved"]))

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: what JSON can hold of the arguments, and the state."""
        kept = {name: value for name, value in self.arguments.items() if not callable(value)}
        return {"args": kept, "attributes": {"saved": {} if self.held is None else self.held.state_dict()}}

    def get_last_wd(self) -> list[float]:
        """The weight decay last written to each group.

        Raises:
            RuntimeError: before the optimiser exists.
        """
        if not isinstance(self.held, WeightDecayController):
            raise RuntimeError(f"{type(self).__name__} gets its optimizer in trainer.train(); there is none yet")
        return self.held.get_last_wd()


def attachable(trainer: Any, callback: Any) -> Any:
    """Add `callback` to a Trainer; returns its `training_step`. Raises TypeError for anything else."""
    if not (hasattr(trainer, "callback_handler") and callable(getattr(trainer, "training_step", None))):
        raise TypeError(f"attach expects a transformers.Trainer, got {type(trainer).__name__}")
    trainer.add_callback(callback)
    return trainer.training_step


def live(trainer: Any, callback: Any) -> Any:
    """`callback`, or what the Trainer rebuilt it as from a checkpoint."""
    found = [other for other in trainer.callback_handler.callbacks if type(other) is type(callback)]
    return found[0] if found else callback


def bare(optimizer: Any) -> Any:
    """The torch optimiser inside accelerate's."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
