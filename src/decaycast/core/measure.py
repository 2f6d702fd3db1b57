"""What is measured, when, and on which data.

`COLUMNS` is the fixed row of every training curve. Losses are means over samples, accuracies fractions in [0, 1]. Validation
data only; test data are read once, at the end, by whoever owns them, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from decaycast.core import ranks

COLUMNS = (
    "step",  # optimiser steps made when measured
    "efolds",  # e-folds of decay spent so far (NaN where the optimiser has no fixed rate)
    "lr",
    "weight_decay",
    "train_loss",  # data loss of the last training batch, without penalty
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    loss_fn: Loss,
    group: ranks.Group = None,
) -> tuple[float, float]:
    """Mean loss and accuracy over `batches`, in evaluation mode without gradients; each module's mode is put back.

    With a `group` the means are over the samples of all its ranks, however many each brings, and every rank gets the same.
    Accuracy is NaN where it has no meaning (targets that are not class indices).
    """
    # module by module: batch norm that was frozen inside a training model has to stay frozen
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss_sum, correct, count, classes = 0.0, 0.0, 0, True
    try:
        with (
            torch.no_grad()
        ):  # not inference_mode: a model that caches a tensor here must still be able to train with it
            for inputs, target in batches:
                output = model(inputs)
                check_labels(output, target)
                loss_sum += float(loss_fn(output, target)) * len(target)
                classes = classes and is_classification(output, target)
                if classes:
                    right = output.argmax(1) == target
                    correct += float(right.sum()) * len(target) / max(1, right.numel())  # of a text its share
                count += len(target)
    finally:
        for module, was_training in modes:
            module.training = was_training
    unclear = float(not classes)
    loss_sum, correct, count, unclear = ranks.total([loss_sum, correct, float(count), unclear], group)
    if count == 0:
        raise ValueError("there is nothing to evaluate on: the validation data are empty; give at least one sample")
    return loss_sum / count, math.nan if unclear else correct / count


def is_classification(output: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether `target` holds class indices: (n,) for scores (n, classes), (n, places) for scores (n, classes, places)."""
    shape = (*output.shape[:1], *output.shape[2:])
    return output.ndim >= 2 and target.shape == shape and not target.is_floating_point()


def check_labels(output: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse class labels outside [0, number of outputs): on a GPU they would crash far from the cause.

    The convention that negative labels are ignored (``ignore_index=-100``) is left to the loss.
    """
    if is_classification(output, target) and len(target):
        low, high = int(target.min()), int(target.max())
        if high >= output.shape[1] or (low < 0 and low != -100):
            raise ValueError(
                f"labels run from {low} to {high}, but the model has {output.shape[1]} outputs (0 to "
                f"{output.shape[1] - 1}); check the data set or the last layer"
            )


def measuring_steps(total_steps: int, points: int = 60, *, dense_until: float = 0.25) -> list[int]:
    """Steps at which to evaluate: half of `points` evenly over the first `dense_until` of the run, half over the rest.

    The beginning is dense because that is where short probes have to decide. The last step is always measured.
    """
    if total_steps < 1 or points < 2:
        raise ValueError(f"need total_steps >= 1 and points >= 2, got {total_steps} and {points}")
    early = max(1, points // 2)
    steps = {round(total_steps * dense_until * (i + 1) / early) for i in range(early)}
    late = points - early
    steps |= {round(total_steps * (dense_until + (1 - dense_until) * (i + 1) / late)) for i in range(late)}
    return sorted(step for step in steps | {total_steps} if step >= 1)
