"""`WeightDecayFinder`: the forecast with a Lightning Trainer, in the manner of ``Tuner.lr_find``."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from decaycast.adapters.finding import FoundWeightDecay, random_state
from decaycast.adapters.lightning_arm import Arm, owner_of
from decaycast.core.names import choose
from decaycast.methods.l2.forecast import forecast


class WeightDecayFinder:
    """Forecast the best weight decay for the fit that `trainer` is set up to make.

    The arms are trained by copies of the Trainer and of the model, so accumulation, clipping and precision are those of the
    fit, and neither Trainer nor model is touched (but for the attribute, below). Learning-rate schedules are those of the whole
    fit, of which the arms train the beginning. Loggers and callbacks are left out, but for decaycast's label and activation
    noise. An arm that is taken up again starts its epoch's data anew, as Lightning does when it resumes; checkpoints of the arms
    lie in a temporary folder meanwhile.

    Args:
        trainer: a Trainer that has not fitted anything, of one process, with `max_steps` or `max_epochs`.

    Raises:
        ValueError: several processes, `fast_dev_run`.
    """

    def __init__(self, trainer: Any) -> None:
        if trainer.world_size > 1:
            raise ValueError(
                f"WeightDecayFinder needs a Trainer of one process, got {trainer.world_size}; use devices=1 for it"
            )
        if trainer.fast_dev_run:
            raise ValueError(
                "a Trainer with fast_dev_run makes too few updates to forecast from; set it up for the whole fit"
            )
        self._trainer = trainer

    def find(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        candidates: Sequence[float] | None = None,
        max_cost: float = 0.3,
        update_attr: bool = True,
        attr_name: str = "weight_decay",
    ) -> FoundWeightDecay:
        """Train the arms and forecast.

        Args:
            model: a LightningModule with a `validation_step`, one optimiser and automatic optimisation.
            train_dataloaders: as for ``trainer.fit``, and so the next two.
            val_dataloaders: held-out data, never the test set.
            datamodule: instead of loaders.
            monitor: the metric that validation logs.
            mode: whether it should be small, "min", or large, "max".
            candidates: as in `decaycast.forecast`.
            max_cost: as there; validation comes on top.
            update_attr: set ``model.<attr_name>`` (or that of ``model.hparams``) to the suggestion, if there is one.
            attr_name: where `configure_optimizers` reads the weight decay. Without such an attribute the optimiser's groups are
                set, and what is found is the weight decay of the group that decays most.

        Raises:
            ValueError: the metric is not logged, the attribute has no effect, several optimisers, manual optimisation, no
                group decays, an optimiser in which weight decay has no shrink rate.
        """
        choose(mode, ("min", "max"), "mode")
        data = {"train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders, "datamodule": datamodule}
        with random_state(train_dataloaders, val_dataloaders) as again, tempfile.TemporaryDirectory() as folder:

            def run(weight_decay: float, stop: int, curve: dict[int, float]) -> Arm:
                again()
                arm = Arm(weight_decay, stop, monitor, Path(folder, f"{weight_decay:.12g}.ckpt"), curve, attr_name)
                arm.fit(copy.deepcopy(self._trainer), copy.deepcopy(model), data)
                return arm

            first = run(1e-6, 0, {})
            curves: dict[float, dict[int, float]] = {}

            def probe(weight_decay: float, stop: int) -> tuple[list[float], list[float]]:
                curve = curves.setdefault(weight_decay, {})
                run(weight_decay, stop, curve)
                return [float(step) for step in curve], list(curve.values())

            found = forecast(
                probe,
                first.budget,
                lr=first.rates,
                candidates=candidates,
                higher_is_better=mode == "max",
                max_cost=max_cost,
                metric=monitor,
            )
        result = FoundWeightDecay(forecast=found)
        if update_attr and found.verdict != "refuse":
            _update(model, attr_name, found.weight_decay)
        return result


def _update(model: Any, name: str, value: float) -> None:
    owner = owner_of(model, name)
    if owner is None:
        warnings.warn(
            f"the model has no attribute {name!r} to update; give the optimizer the suggestion yourself", stacklevel=3
        )
    else:
        setattr(owner, name, value)
