"""The seam: how a method touches training.

A hook overrides what it needs; every method is an optional no-op. The loop of `decaycast.core.train` calls them in this
order, and other trainers have the same places:

====================  ======================================  =========================================  ==============
method                plain loop, per optimiser step          Lightning callback                         Hugging Face
====================  ======================================  =========================================  ==============
prepare(model)        once, before the optimiser is built     setup (LightningModule: configure_model)   before Trainer(...)
on_batch(step, b)     before the forward pass                 on_train_batch_start (edit in place) or    training_step
                                                              LightningModule.on_after_batch_transfer
on_step(step, ctx)    after backward, before the update       on_before_optimizer_step                   on_pre_optimizer_step
on_measure(step, r)   after an evaluation                     on_validation_end                          on_evaluate
state_dict / load     with the checkpoint                     state_dict / load_state_dict               ExportableState
====================  ======================================  =========================================  ==============

`step` counts optimiser steps from 0 and names the update about to be made (`on_batch`, `on_step`); in `on_measure` it is
the number of updates made. With gradient accumulation `on_batch` sees every micro-batch, `on_step` each update once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a hook sees between the backward pass and the update: the batch just used, and who updates."""

    loss: torch.Tensor
    """Detached scalar: the data loss of this batch before the update, without any penalty."""
    output: torch.Tensor
    """Detached model output of this batch."""
    target: torch.Tensor
    optimizer: torch.optim.Optimizer

    def error(self) -> torch.Tensor:
        """Fraction of wrong arg-max predictions in this batch (a scalar tensor; no device synchronisation).

        Targets are class indices, or class probabilities compared by their own arg-max (mixup).
        """
        target = self.target
        if target.is_floating_point() and target.ndim == self.output.ndim:
            target = target.argmax(1)
        return (self.output.argmax(1) != target).float().mean()


class Hook:
    """Base class; each method does nothing until a method of training regularisation overrides it."""

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model to train (the same one, or a converted one). Called once, before training."""
        return model

    def on_batch(self, step: int, batch: Any) -> Any:
        """Return the batch to train on; a hook that edits returns a new batch and leaves the old one alone."""
        return batch

    def on_step(self, step: int, context: StepContext) -> None:
        """Called between backward and the optimiser's update."""

    def on_measure(self, step: int, row: Mapping[str, float]) -> None:
        """Called after each evaluation with the row of `decaycast.core.measure.COLUMNS`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume as if never interrupted; JSON-able or tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""


class _Chain(Hook):
    def __init__(self, hooks: tuple[Hook, ...]) -> None:
        self.hooks = hooks

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        for hook in self.hooks:
            model = hook.prepare(model)
        return model

    def on_batch(self, step: int, batch: Any) -> Any:
        for hook in self.hooks:
            batch = hook.on_batch(step, batch)
        return batch

    def on_step(self, step: int, context: StepContext) -> None:
        for hook in self.hooks:
            hook.on_step(step, context)

    def on_measure(self, step: int, row: Mapping[str, float]) -> None:
        for hook in self.hooks:
            hook.on_measure(step, row)

    def state_dict(self) -> dict[str, Any]:
        return {"hooks": [hook.state_dict() for hook in self.hooks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["hooks"]) != len(self.hooks):
            raise ValueError(
                f"the state holds {len(state['hooks'])} hooks but this chain has {len(self.hooks)}; "
                "resume with the same hooks in the same order"
            )
        for hook, part in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(part)


def chain(*hooks: Hook) -> Hook:
    """One hook that calls `hooks` in order (each sees the model or batch the one before returned)."""
    return hooks[0] if len(hooks) == 1 else _Chain(hooks)
