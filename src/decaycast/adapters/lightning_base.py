"""What all Lightning callbacks here share: which Lightning, when state is restored, whose optimiser, how long the fit is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from decaycast.adapters import require
from decaycast.adapters.schedules import rates_ahead
from decaycast.core.decay import WeightDecayController
from decaycast.core.hook import StepContext

_VERSIONS = ">=2.5,!=2.6.2,!=2.6.3,<3"  # 2.6.2 and 2.6.3 on the registry were malicious; nothing of them is imported

if require("lightning", lightning=_VERSIONS, pytorch_lightning=_VERSIONS) == "lightning":
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
else:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]


class Stateful(Callback, ABC):  # pyright: ignore[reportGeneralTypeIssues]  # one of two classes, by what is installed
    """A callback around something with ``state_dict`` that is built when training starts; a restored state waits until then."""

    def __init__(self) -> None:
        self.held: Any = None
        self.restored: dict[str, Any] = {}

    @abstractmethod
    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> Any:
        """What is held during training; the optimiser's own state is restored already."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build, then restore: no update is made with a constructor's value."""
        self.held = self.build(trainer, pl_module, only_optimizer(trainer, pl_module, type(self).__name__))
        if self.restored:
            self.held.load_state_dict(self.restored)
            self.restored = {}

    def state_dict(self) -> dict[str, Any]:
        """Of what is held."""
        return self.restored if self.held is None else self.held.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self.restored, self.held = dict(state_dict), None

    def get_last_wd(self) -> list[float]:
        """The weight decay last written to each group.

        Raises:
            RuntimeError: before the optimiser exists.
        """
        if not isinstance(self.held, WeightDecayController):
            raise RuntimeError(f"{type(self).__name__} gets its optimizer in trainer.fit(...); there is none yet")
        return self.held.get_last_wd()


class HookCallback(Stateful):
    """Around a training hook that looks at each update and its optimiser alone."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Hand the update on."""
        nothing = torch.empty(0)
        context = StepContext(loss=nothing, output=nothing, target=nothing, optimizer=optimizer)
        self.held.on_step(trainer.global_step, context)


def only_optimizer(trainer: Any, module: Any, who: str) -> torch.optim.Optimizer:
    """The Trainer's optimiser.

    Raises:
        ValueError: manual optimisation, or not exactly one optimiser.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{who} needs automatic optimization: in manual optimization only the module knows which update is which; drive "
            "decaycast.WeightDecayScheduler or decaycast.AutoL2 beside optimizer.step() in training_step"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"{who} needs exactly one optimizer, but configure_optimizers gave {len(trainer.optimizers)}")
    return trainer.optimizers[0]


def total_steps(trainer: Any) -> int:
    """Updates of the whole fit.

    Raises:
        ValueError: the Trainer does not know.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):
        raise ValueError(
            f"the Trainer expects {steps} updates; give it max_steps or max_epochs, or the schedule as a function"
        )
    return int(steps)


def run_rates(trainer: Any, steps: int) -> Any:
    """Learning rates of a fit that begins now, shape (steps, groups); None where they cannot be foreseen."""
    if not trainer.lr_scheduler_configs:
        return rates_ahead(trainer.optimizers[0], None, steps)
    config = trainer.lr_scheduler_configs[0]
    per_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches) if config.interval == "epoch" else 1
    return rates_ahead(trainer.optimizers[0], config.scheduler, steps, every=int(per_epoch * config.frequency))
