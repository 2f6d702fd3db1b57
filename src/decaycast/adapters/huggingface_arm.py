"""One arm of `huggingface_finder`: a training with one weight decay that stops, and goes on, where it is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from decaycast.adapters.huggingface_base import TrainerCallback  # pyright: ignore[reportAttributeAccessIssue]
from decaycast.core.measure import measuring_steps


class Arm(TrainerCallback):
    """Trains with one weight decay, notes the metric at the steps of `measuring_steps`, and saves a checkpoint where it stops.

    Args:
        weight_decay: the arm's.
        metric: key of the evaluation.
        folder: for its checkpoints.
        budget: updates of the whole training.
    """

    def __init__(self, weight_decay: float, metric: str, folder: Path, budget: int) -> None:
        self.weight_decay, self.metric, self.folder = weight_decay, metric, folder
        self.measure_at, self.stop, self.made = set(measuring_steps(budget)), 0, 0
        self.curve: dict[int, float] = {}

    def train(self, trainer: Any, stop: int, start: Any) -> None:
        """Train up to `stop` updates in all.

        Args:
            trainer: borrowed, with arguments that may be changed.
            stop: updates in all.
            start: puts the initial weights and random state back.
        """
        from transformers.trainer_callback import DefaultFlowCallback  # pyright: ignore[reportMissingImports]

        self.stop = stop
        trainer.args.weight_decay, trainer.args.output_dir = self.weight_decay, str(self.folder)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.callbacks = [DefaultFlowCallback(), self]
        start()
        last = self.folder / f"checkpoint-{self.made}"
        trainer.train(resume_from_checkpoint=str(last) if self.made else None)
        self.made = trainer.state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, save and stop when it is time."""
        done = state.global_step >= self.stop
        control.should_evaluate = done or state.global_step in self.measure_at
        control.should_save = control.should_training_stop = done

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note the metric."""
        if self.metric not in metrics:
            raise ValueError(
                f"evaluation gives no {self.metric!r}, but {', '.join(metrics)}; name one of these as metric"
            )
        self.curve[state.global_step] = float(metrics[self.metric])


def trainer_steps(trainer: Any) -> int:
    """Updates of the training that a Trainer is set up for.

    Raises:
        ValueError: neither `max_steps` nor a data set with a length.
    """
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    try:
        batches = len(trainer.get_train_dataloader())
    except TypeError as error:
        raise ValueError("the training data have no length, so the Trainer needs max_steps") from error
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
