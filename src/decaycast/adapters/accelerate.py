"""Accelerate: weight-decay schedules that count the updates that were really made.

Conventions. An update is made when gradients are synchronised (the last micro-batch of an accumulation) and the gradient scaler
did not skip it (float16 overflow). Both classes are called once per micro-batch and count updates alone; the number of
processes does not matter. `AcceleratedOptimizer` hides which optimiser it wraps, and with it what weight decay means, so the
wrapped one is driven.

Their state is saved and loaded with the accelerator's (`save_state`, `load_state`), as JSON: accelerate's own way for foreign
objects is pickle, which can execute what it reads. Build them in the same order in the run that resumes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from decaycast.adapters import require
from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.schedule import Schedule
from decaycast.methods.l2.autol2 import AutoL2

require("accelerate", accelerate=">=1.1,<2")

from accelerate import Accelerator  # noqa: E402  # pyright: ignore[reportMissingImports]
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402  # pyright: ignore[reportMissingImports]


class AcceleratedWeightDecay(WeightDecayScheduler):
    """`WeightDecayScheduler` in a loop of accelerate: ``step()`` after every ``optimizer.step()``, micro-batch or not.

    Args:
        accelerator: the run's.
        optimizer: as `accelerator.prepare` returned it.
        fn: 0-based update -> multiplier of each group's initial weight decay.

    Raises:
        TypeError: an optimiser that is not prepared, no Accelerator, `fn` cannot be called.
        ValueError: a group without valid weight decay.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, fn: Schedule) -> None:
        super().__init__(plain_optimizer(accelerator, optimizer), fn)
        self._accelerator, self._prepared = accelerator, optimizer
        _save_with(accelerator, self)

    def step(self) -> None:
        """Go on to the next update's weight decay, if this micro-batch ended in an update."""
        if self._accelerator.sync_gradients and not self._prepared.step_was_skipped:
            super().step()


class AcceleratedAutoL2(AutoL2):
    """`AutoL2` in a loop of accelerate: ``step(loss, error)`` for every micro-batch, between ``backward`` and ``optimizer.step``.

    It takes the mean over the micro-batches of an update; over processes, `AutoL2` does. An update that the scaler skipped is
    taken back.

    Args:
        accelerator: the run's.
        optimizer: as `accelerator.prepare` returned it.
        settings: of `AutoL2`.

    Raises:
        TypeError: an optimiser that is not prepared, or no Accelerator.
        ValueError: as `AutoL2`.
    """

    def __init__(self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, **settings: Any) -> None:
        super().__init__(plain_optimizer(accelerator, optimizer), **settings)
        self._accelerator, self._prepared = accelerator, optimizer
        self._micro: list[torch.Tensor] = []
        self._before: dict[str, Any] | None = None
        _save_with(accelerator, self)

    def step(self, loss: Any = None, error: Any = None) -> None:
        """Take in one micro-batch: its mean data loss, without accelerate's division, and its share of wrong predictions."""
        self._take_back()
        if self.due:
            if loss is None or error is None:
                raise ValueError("AutoL2 measures at this update: give loss and error of each of its micro-batches")
            device = self._accelerator.device
            self._micro.append(
                torch.stack([torch.as_tensor(x, device=device).detach().double() for x in (loss, error)])
            )
        if not self._accelerator.sync_gradients:
            return
        means: list[float | None] = [None, None]
        if self.due:
            means = torch.stack(self._micro).mean(0).tolist()  # over micro-batches; over ranks AutoL2 does it
        before = super().state_dict()
        self._micro = []
        super().step(*means)
        self._before = before

    def _take_back(self) -> None:
        """Forget the last update if it turned out that it was skipped."""
        before, self._before = self._before, None
        if before is not None and self._prepared.step_was_skipped:
            super().load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, of the updates that were made."""
        self._take_back()
        return super().state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Restore `state_dict`; a micro-batch taken in since the last update is dropped."""
        super().load_state_dict(state)
        self._micro, self._before = [], None


def plain_optimizer(accelerator: Any, optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside a prepared one.

    Raises:
        TypeError: it is not prepared, or there is no accelerator.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"expected an accelerate.Accelerator, got {type(accelerator).__name__}")
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise TypeError(
            f"expected the optimizer that accelerator.prepare(...) returns, got {type(optimizer).__name__}; prepare it first, "
            "or its skipped updates and micro-batches cannot be told"
        )
    return optimizer.optimizer


def _save_with(accelerator: Any, scheduler: AcceleratedWeightDecay | AcceleratedAutoL2) -> None:
    """Save and load `scheduler` whenever the accelerator saves and loads its state."""
    number = getattr(accelerator, "_decaycast_saved", 0)
    accelerator._decaycast_saved = number + 1
    name = f"decaycast_{number}.json"

    def save(models: Any, weights: Any, folder: str) -> None:
        state = scheduler.state_dict()
        if accelerator.is_main_process:
            Path(folder, name).write_text(json.dumps(state))

    def load(models: Any, folder: str) -> None:
        path = Path(folder, name)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the state was saved without {type(scheduler).__name__}")
        scheduler.load_state_dict(json.loads(path.read_text()))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
