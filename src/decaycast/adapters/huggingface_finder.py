"""The forecast with a Hugging Face Trainer, whatever its data, collator, loss and model."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from decaycast.adapters.finding import FoundWeightDecay, random_state, shrink_per_decay
from decaycast.adapters.huggingface_arm import Arm, trainer_steps
from decaycast.adapters.schedules import rates_ahead
from decaycast.methods.l2.forecast import forecast

_OWN = (
    "args", "model", "model_wrapped", "optimizer", "lr_scheduler", "_created_lr_scheduler", "callback_handler", "state",
    "control",
)  # fmt: skip


def find_weight_decay(
    trainer: Any,
    *,
    metric: str = "eval_loss",
    greater_is_better: bool = False,
    candidates: Sequence[float] | None = None,
    max_cost: float = 0.3,
    update_args: bool = True,
) -> FoundWeightDecay:
    """Forecast the best ``args.weight_decay`` for the training that `trainer` is set up to make.

    The arms are trained by the Trainer itself, with its own accumulation, clipping, loss and precision and the learning-rate
    schedule of the whole training, of which they train the beginning, and are evaluated on `eval_dataset`. Callbacks are left
    out (no logging, no early stopping); attached label noise stays. Arms lie as checkpoints in a temporary folder. Model,
    arguments, callbacks and random state are put back, whatever happens.

    Args:
        trainer: a Trainer that has not trained yet and builds its own optimiser.
        metric: a key of what ``trainer.evaluate()`` returns.
        greater_is_better: whether it should be large.
        candidates: as in `decaycast.forecast`.
        max_cost: as there; evaluations come on top.
        update_args: set ``trainer.args.weight_decay`` to the suggestion, if there is one.

    Raises:
        ValueError: several processes, no evaluation data, an optimiser that was handed in, a metric that is not there, an
            optimiser in which weight decay has no shrink rate.
    """
    _check(trainer)
    budget = trainer_steps(trainer)
    with _borrowed(trainer) as (folder, start):
        arms: dict[float, Arm] = {}
        rates = _rates(trainer, budget)

        def probe(weight_decay: float, stop: int) -> tuple[list[float], list[float]]:
            arm = arms.setdefault(weight_decay, Arm(weight_decay, metric, Path(folder, f"{weight_decay:.12g}"), budget))
            arm.train(trainer, stop, start)
            return [float(step) for step in arm.curve], list(arm.curve.values())

        found = forecast(
            probe,
            budget,
            lr=rates,
            candidates=candidates,
            higher_is_better=greater_is_better,
            max_cost=max_cost,
            metric=metric,
        )
    if update_args and found.verdict != "refuse":
        trainer.args.weight_decay = found.weight_decay
    return FoundWeightDecay(forecast=found)


def _check(trainer: Any) -> None:
    if not hasattr(trainer, "callback_handler"):
        raise TypeError(f"expected a transformers.Trainer, got {type(trainer).__name__}")
    if trainer.optimizer is not None:
        raise ValueError(
            "this Trainer has its optimizer already, handed in or from a training before, so no arm can have a weight decay of "
            "its own; call find_weight_decay on a new Trainer that builds it (args.optim)"
        )
    if trainer.eval_dataset is None:
        raise ValueError(
            "the Trainer has no eval_dataset to compare the arms on; give it held-out data, never the test set"
        )
    if trainer.args.world_size > 1:
        raise ValueError(f"find_weight_decay needs one process, got {trainer.args.world_size}; run it alone first")


@contextlib.contextmanager
def _borrowed(trainer: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """The Trainer, quiet, with arguments of its own, put back at the end; yields a folder and what makes a new start."""
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback  # pyright: ignore[reportMissingImports]

    kept = {name: getattr(trainer, name) for name in _OWN}
    weights = copy.deepcopy(trainer.model.state_dict())
    modes = [(module, module.training) for module in trainer.model.modules()]
    with random_state() as again, tempfile.TemporaryDirectory() as folder:
        trainer.args = copy.copy(trainer.args)
        off = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
        quiet = {
            "save_only_model": False,
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "eval_on_start": False,
        }
        for name, value in {**quiet, "save_total_limit": None, "ignore_data_skip": False, **off}.items():
            setattr(trainer.args, name, value)
        trainer.callback_handler = CallbackHandler(
            [DefaultFlowCallback()], trainer.model, trainer.processing_class, None, None
        )

        def start() -> None:
            trainer.model.load_state_dict(weights)
            again()

        try:
            yield folder, start
        finally:
            trainer.accelerator.free_memory()
            for name, value in kept.items():
                setattr(trainer, name, value)
            trainer.model.load_state_dict(weights)
            for module, mode in modes:
                module.training = mode
            for parameter in trainer.model.parameters():
                parameter.grad = None


def _rates(trainer: Any, budget: int) -> Any:
    """What `forecast` calls lr; also refuses an optimiser without a shrink rate."""
    trainer.args.weight_decay = 1e-6
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=budget, optimizer=optimizer)
    rates = shrink_per_decay(optimizer, rates_ahead(optimizer, scheduler, budget))
    trainer.optimizer = trainer.lr_scheduler = None
    return rates
