"""One arm of `WeightDecayFinder`: a fit with one weight decay that stops, and goes on, where it is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from decaycast.adapters.finding import set_largest, shrink_per_decay
from decaycast.adapters.lightning_base import (
    Callback,  # pyright: ignore[reportAttributeAccessIssue]
    only_optimizer,
    run_rates,
    total_steps,
)
from decaycast.adapters.lightning_noise import ActivationNoiseCallback, LabelNoiseCallback

_MEASUREMENTS = 120  # over the whole run, of which an arm trains the beginning


class PauseError(Exception):
    """An arm has come as far as it was asked to."""


class Arm(Callback):
    """Trains with one weight decay up to `stop` updates, noting the metric, and saves a checkpoint there."""

    def __init__(
        self, weight_decay: float, stop: int, monitor: str, path: Path, curve: dict[int, float], attr: str
    ) -> None:
        self.weight_decay, self.stop, self.monitor, self.path, self.curve, self.attr = (
            weight_decay, stop, monitor, path, curve, attr,
        )  # fmt: skip
        self.budget, self.rates = 0, None

    def fit(self, trainer: Any, model: Any, data: dict[str, Any]) -> None:
        """Train with this Trainer and model, which are this arm's own, from where the arm was."""
        noises = [one for one in trainer.callbacks if isinstance(one, (LabelNoiseCallback, ActivationNoiseCallback))]
        trainer.callbacks, trainer.loggers, trainer.num_sanity_val_steps = [*noises, self], [], 0
        self.owner = owner_of(model, self.attr)
        if self.owner is not None:
            setattr(self.owner, self.attr, self.weight_decay)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="You're resuming from a checkpoint that ended before the epoch"
                )
                trainer.fit(model, **data, ckpt_path=self.path if self.path.exists() else None)
        except PauseError:
            pass

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate evenly over the run."""
        trainer.check_val_every_n_epoch = None  # every so many batches, across epochs
        steps = total_steps(trainer)
        trainer.val_check_interval = max(1, steps * trainer.accumulate_grad_batches // _MEASUREMENTS)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See to it that the optimiser has this arm's weight decay; with `stop` 0, look at the run ahead and stop."""
        optimizer = only_optimizer(trainer, pl_module, "WeightDecayFinder")
        if self.owner is None:
            set_largest(optimizer, self.weight_decay)
        largest = max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)
        if abs(largest - self.weight_decay) > 1e-9 * self.weight_decay:
            raise ValueError(
                f"configure_optimizers does not pass {self.attr} on: with {self.attr}={self.weight_decay:g} the optimizer's "
                f"largest weight decay is {largest:g}; use it for the groups that shall decay, or name another in attr_name"
            )
        if self.stop == 0:
            self.budget = total_steps(trainer)
            self.rates = shrink_per_decay(optimizer, run_rates(trainer, self.budget))
            raise PauseError

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop here, after the validation of the batch before."""
        if trainer.global_step >= self.stop:
            trainer.save_checkpoint(self.path)
            raise PauseError

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the metric."""
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            known = ", ".join(logged) or "nothing"
            raise ValueError(f"validation logs no {self.monitor!r} (but {known}); name another monitor, or log it")
        self.curve[trainer.global_step] = float(logged[self.monitor])


def owner_of(model: Any, name: str) -> Any:
    """What holds the attribute: the module, its hparams, or None."""
    if hasattr(model, name):
        return model
    return model.hparams if name in getattr(model, "hparams", {}) else None
