"""Lightning callbacks for weight decay: AutoL2, any schedule, the log of e-folds (noise and curvature: `lightning_noise`).

Conventions. Steps are the Trainer's `global_step`: updates, whatever the gradient accumulation. (Under 16-bit precision
Lightning also counts, and steps its learning-rate schedulers at, updates that the scaler skips; so does this.) Each callback is
one object in ``Trainer(callbacks=[...])``, keeps its state in the Trainer's checkpoints, needs automatic optimisation with one
optimiser, and says so otherwise.
"""

from __future__ import annotations

from typing import Any

import torch

from decaycast.adapters import loss_as_error
from decaycast.adapters.lightning_base import HookCallback, Stateful, run_rates, total_steps
from decaycast.adapters.loggers import DecayLog
from decaycast.core.decay import WeightDecayScheduler
from decaycast.core.schedule import Schedule, by_name
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook


class WeightDecayCallback(Stateful):
    """Any weight-decay schedule: each group's initial weight decay times ``fn(step)``; groups at 0 stay 0.

    Args:
        fn: 0-based update -> multiplier, or a name of `decaycast.core.schedule.WEIGHT_DECAY_NAMES`, over the whole fit.
    """

    def __init__(self, fn: Schedule | str) -> None:
        super().__init__()
        self.fn, self._made = fn, 0

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> WeightDecayScheduler:
        """The scheduler over this optimiser."""
        self._made = trainer.global_step
        fn = by_name(self.fn, total_steps(trainer)) if isinstance(self.fn, str) else self.fn
        return WeightDecayScheduler(optimizer, fn)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Step when the batch ended in an update."""
        if trainer.global_step > self._made:
            self._made = trainer.global_step
            self.held.step()


class AutoL2Callback(Stateful):
    """`AutoL2`, fed with the loss that `training_step` returns, averaged over micro-batches (and, by `AutoL2`, over ranks).

    Args:
        accuracy: name under which `training_step` logs the batch's accuracy, ``self.log("train_acc", ...)``. None: the loss alone
            decides, through an error that rises and falls with it.
        settings: of `AutoL2`. With ``clock="efolds"``, `steps` and `lr` are by default those of the Trainer and its scheduler.

    Raises:
        TypeError, ValueError: a wrong setting (at once); an optimiser that AutoL2 refuses, no such metric (in training).
    """

    def __init__(self, accuracy: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.accuracy, self.settings, self._micro = accuracy, settings, []
        # on a stand-in, so that wrong settings show at once
        AutoL2Hook(**settings | ({"steps": 1, "lr": 1.0} if settings.get("clock") == "efolds" else {}))

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> AutoL2:
        """AutoL2 over this optimiser, with the length and learning rates of this fit where its clock needs them."""
        self._micro = []
        if self.settings.get("clock") != "efolds":
            return AutoL2(optimizer, **self.settings)
        steps = self.settings.get("steps") or total_steps(trainer)
        # a restored state brings its own horizon
        rates = 1.0 if self.restored else self.settings.get("lr", leading_rates(trainer, optimizer, steps))
        return AutoL2(optimizer, **self.settings | {"steps": steps, "lr": rates})

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Note loss and error of a micro-batch; Lightning has divided the loss by their number, and scaled it in 16 bit."""
        if self.held.due:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss.detach().double() / (scaler.get_scale() if scaler else 1.0) * trainer.accumulate_grad_batches
            self._micro.append(torch.stack([loss, self._error(trainer, loss)]))

    def _error(self, trainer: Any, loss: torch.Tensor) -> torch.Tensor:
        if self.accuracy is None:
            return loss_as_error(loss)
        logged = trainer.callback_metrics
        if self.accuracy not in logged:
            known = ", ".join(logged) or "nothing"
            raise ValueError(
                f"training_step logs no {self.accuracy!r} (but {known}); add self.log({self.accuracy!r}, accuracy)"
            )
        return 1.0 - logged[self.accuracy].detach().to(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Set the weight decay of the update about to be made."""
        means: Any = [None, None]
        if self.held.due:
            means = torch.stack(self._micro).mean(0).tolist()
        self.held.step(*means)
        self._micro = []


class DecayLogCallback(HookCallback):
    """``reg/weight_decay``, ``reg/efolds`` and ``reg/tau`` to all of the Trainer's loggers, every so many updates."""

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        self.every = every

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> DecayLog:
        """The log over this fit."""

        def log(step: int, values: Any) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), step=step)

        return DecayLog(log, total_steps(trainer), self.every)


def leading_rates(trainer: Any, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Learning rates of the group that decays most, shape (steps,); None where they cannot be foreseen."""
    rates = run_rates(trainer, steps)
    if rates is None:
        return None
    decays = [(float(group["weight_decay"]), float(group["lr"])) for group in optimizer.param_groups]
    return rates[:, decays.index(max(decays))]
