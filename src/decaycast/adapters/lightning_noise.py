"""Lightning callbacks for label noise, activation noise and the curvature monitor; conventions as in `lightning`.

What they change on the LightningModule they take back when `fit` ends, also by an error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from decaycast.adapters.lightning_base import HookCallback, Stateful, total_steps
from decaycast.core.hook import Hook
from decaycast.core.schedule import Schedule, by_name, constant
from decaycast.methods.label_noise.method import LabelNoise
from decaycast.methods.label_noise.monitor import CurvatureMonitor
from decaycast.methods.large_lr.insert import insert_activation_noise, remove_activation_noise
from decaycast.methods.large_lr.noise import NoiseSchedule


class LabelNoiseCallback(Stateful):
    """Fresh label noise on every training batch, by going in front of `training_step`; validation and test stay clean.

    (`on_train_batch_start` could only write into the batch it is given, `on_after_batch_transfer` of a data module would go
    first, and copies of the noise in a loader's workers would repeat each other's flips.) A batch is a pair (inputs, labels), or
    a mapping with ``"labels"``.

    Args:
        flip, num_classes, settings: of `LabelNoise`; or give any noise with `on_batch` and `state_dict`, such as
            `TargetNoise`, as ``noise=``.

    Raises:
        TypeError, ValueError: as `LabelNoise`, at once; as its call, in training.
    """

    def __init__(
        self, flip: float | None = None, num_classes: int | None = None, *, noise: Hook | None = None, **settings: Any
    ) -> None:
        super().__init__()
        if (noise is None) == (flip is None or num_classes is None):
            raise TypeError("give either flip and num_classes, or noise=")
        self.noise = noise or LabelNoise(flip, num_classes, **settings)  # type: ignore[arg-type]
        self._before: Any = None

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> Hook:
        """The noise, in front of `training_step`."""
        step = module.training_step
        self._before = vars(module).get("training_step")  # a compiled module has one of its own

        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return step(self.noise.on_batch(trainer.global_step, batch), *args, **kwargs)

        module.training_step = training_step
        return self.noise

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give `training_step` back."""
        if stage == "fit" and "training_step" in vars(pl_module):
            del pl_module.training_step
            if self._before is not None:
                pl_module.training_step = self._before

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After an error Lightning calls no teardown."""
        self.teardown(trainer, pl_module, "fit")


class ActivationNoiseCallback(Stateful):
    """Noise in front of every activation while `fit` runs, at a level of ``std * fn(step)``; none in evaluation.

    Args:
        std: standard deviation at multiplier 1, in units of the activations' input.
        fn: 0-based update -> multiplier, or a name of `decaycast.core.schedule.WEIGHT_DECAY_NAMES`; None for a constant level.
        settings: of `insert_activation_noise`; its table is printed unless ``report=None``.

    Raises:
        ValueError: as `insert_activation_noise`, when `fit` sets up.
    """

    def __init__(self, std: float, fn: Schedule | str | None = None, **settings: Any) -> None:
        super().__init__()
        self.std, self.fn, self.settings = std, fn, settings

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Insert the noise; it has no parameters, so checkpoints and optimisers do not see it."""
        if stage == "fit":
            insert_activation_noise(pl_module, self.std, **self.settings)

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> NoiseSchedule:
        """The level over this fit."""
        fn = by_name(self.fn, total_steps(trainer)) if isinstance(self.fn, str) else self.fn
        return NoiseSchedule(module, fn or constant())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The level of this update."""
        self.held.on_batch(trainer.global_step, batch)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the noise out."""
        if stage == "fit":
            remove_activation_noise(pl_module, report=None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After an error Lightning calls no teardown."""
        self.teardown(trainer, pl_module, "fit")


class CurvatureCallback(HookCallback):
    """`CurvatureMonitor` along `fit`; its rows are in ``callback.rows``.

    Args:
        batches, loss_fn, settings: of `CurvatureMonitor`.
        network: name of the submodule that maps inputs to outputs; "" for the LightningModule's own `forward`.
    """

    def __init__(self, batches: Any, loss_fn: Any, *, network: str = "", **settings: Any) -> None:
        super().__init__()
        self.monitor, self.network = CurvatureMonitor(batches, loss_fn, **settings), network

    @property
    def rows(self) -> list[dict[str, float]]:
        """One dict per measurement, with the keys of `CurvatureMonitor`."""
        return self.monitor.rows

    def build(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> Hook:
        """The monitor, knowing its network."""
        self.monitor.prepare(module.get_submodule(self.network))
        return self.monitor
