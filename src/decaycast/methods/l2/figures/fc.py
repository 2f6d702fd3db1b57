"""The fully connected networks of fig. 2a-c, trained over three decades of time by plain SGD written out by hand.

A network this small spends more than half of an optimiser step in bookkeeping (autograd, optimiser, hooks). The figures on
the time to the best accuracy need millions of steps, so gradient and update stand here as the few products they are;
the tests hold them against autograd and `torch.optim.SGD`.

Conventions: cross-entropy averaged over the batch; coupled weight decay as in `torch.optim.SGD`, on all parameters,
biases too: w <- (1 - lr*weight_decay)*w - lr*gradient, so lr*weight_decay is the e-folds of decay per step.

Weights start as N(0, 2*init_gain^2/fan_in), biases at zero. A gain above 1 starts the network where its weights change
relatively little while it learns: there the first fit generalises poorly and the decay has much to improve. At gain 1 a
small network comes within a point of its best as soon as it fits, and the time to come within half a point says little.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from decaycast.core.experiment import Row, Run, Scalar
from decaycast.core.measure import COLUMNS

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # (weight of shape (inputs, outputs), bias of shape (outputs,))
EARLIEST = 0.01  # of the run: where measuring begins


def train_fc(run: Run, data: Any) -> Row:
    """Train the network that `run` describes on `data` and return its row; a loss that is not finite is a failed row.

    Args:
        run: config with the keys model ("mlp-<width>x<hidden layers>"), init_gain, lr, weight_decay (>= 0), steps,
            batch_size (at least the number of samples: full batch) and points (measurements, see `geometric_steps`).
        data: `train`, `validation` and `test`, each (images of shape (n, ...), labels of shape (n,)), and `classes`.

    Returns:
        A row with the columns of `decaycast.core.measure.COLUMNS`. It was trained on torch's default device.
    """
    began, config = time.perf_counter(), run.config
    inputs, labels = _on_device(data.train)
    layers = start(
        str(config["model"]), inputs.shape[1], data.classes, gain=_number(config, "init_gain"), seed=run.seed
    )
    lr, decay, steps = _number(config, "lr"), _number(config, "weight_decay"), int(_number(config, "steps"))
    validation, rows = _on_device(data.validation), []
    measure_at = set(geometric_steps(steps, int(_number(config, "points"))))
    batches = _batches(inputs, labels, data.classes, int(_number(config, "batch_size")), run.seed)
    with torch.inference_mode():
        for made in range(1, steps + 1):
            batch, targets = next(batches)
            scores = step(layers, batch, targets, lr=lr, shrink=1.0 - lr * decay)
            if made in measure_at:
                seen = (*_loss_accuracy(scores, targets.argmax(1)), *evaluate(layers, *validation))
                if not math.isfinite(seen[0] + seen[2]):
                    return _row(
                        run,
                        rows,
                        began,
                        failed=f"a loss is not finite at step {made}: training {seen[0]}, validation {seen[2]}",
                    )
                values = (made, made * lr * decay, lr, decay, *seen)
                rows.append(dict(zip(COLUMNS, map(float, values), strict=True)))
        loss, accuracy = evaluate(layers, *_on_device(data.test))
    return _row(run, rows, began, final={"test_loss": loss, "test_accuracy": accuracy})


def start(model: str, inputs: int, classes: int, *, gain: float, seed: int) -> Layers:
    """Weights N(0, 2*gain^2/fan_in) and zero biases of a ReLU network, drawn from `seed` alone.

    Raises:
        ValueError: `model` is not of the form mlp-<width>x<hidden layers>.
    """
    match = re.fullmatch(r"mlp-(\d+)x(\d+)", model)
    if match is None:
        raise ValueError(f"this figure trains fully connected networks, got model {model!r}; name one like mlp-128x3")
    width, depth = (int(group) for group in match.groups())
    sizes, generator = [inputs, *[width] * depth, classes], torch.Generator().manual_seed(seed)
    return [
        (
            (gain * math.sqrt(2.0 / fan_in) * torch.randn(fan_in, fan_out, generator=generator, device="cpu")).to(
                torch.get_default_device()
            ),
            torch.zeros(fan_out),
        )
        for fan_in, fan_out in pairwise(sizes)
    ]


def step(layers: Layers, inputs: torch.Tensor, targets: torch.Tensor, *, lr: float, shrink: float) -> torch.Tensor:
    """One step of SGD on the mean cross-entropy, in place; returns the scores (n, classes) from before the step.

    With a_0 the inputs, a_i = relu(a_{i-1} W_i + b_i) and p the softmax of the scores: d = (p - targets)/n at the top,
    d <- (d W_i^T) * [a_{i-1} > 0] going down, and W_i <- shrink*W_i - lr * a_{i-1}^T d.

    Args:
        layers: changed in place.
        inputs: shape (n, features).
        targets: one-hot, shape (n, classes).
        lr: learning rate.
        shrink: 1 - lr * weight decay.
    """
    hidden = _hidden(layers, inputs)
    weight, bias = layers[-1]
    scores = torch.addmm(bias, hidden[-1], weight)
    down = scores.softmax(1).sub_(targets)
    for (weight, bias), below in zip(reversed(layers), reversed(hidden), strict=True):
        here = down
        if below is not inputs:
            down = (here @ weight.t()).mul_(below > 0)
        weight.addmm_(below.t(), here, beta=shrink, alpha=-lr / len(inputs))
        bias.mul_(shrink).add_(here.sum(0), alpha=-lr / len(inputs))
    return scores


def evaluate(layers: Layers, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    weight, bias = layers[-1]
    return _loss_accuracy(torch.addmm(bias, _hidden(layers, inputs)[-1], weight), labels)


def geometric_steps(steps: int, points: int) -> list[int]:
    """About `points` steps, evenly spaced in their logarithm, from a hundredth of the run to its end.

    Runs of one number of e-folds are so measured at the same e-folds, whatever their weight decay: a coarse grid moves
    the time to the best accuracy by the same factor everywhere and leaves its slope alone.
    """
    return sorted({math.ceil(value) for value in np.geomspace(EARLIEST * steps, steps, points).round(9)})


def _hidden(layers: Layers, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of every layer."""
    hidden = [inputs]
    for weight, bias in layers[:-1]:
        hidden.append(torch.addmm(bias, hidden[-1], weight).relu_())
    return hidden


def _loss_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    return functional.cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).sum().item() / len(labels)


def _on_device(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.get_default_device()
    return part[0].flatten(1).to(device), part[1].to(device)


def _batches(
    inputs: torch.Tensor, labels: torch.Tensor, classes: int, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, one-hot targets): each epoch in a fresh order, an incomplete last batch skipped.

    A batch size of at least the number of samples gives all of them each time.
    """
    targets, count = functional.one_hot(labels, classes).to(inputs.dtype), len(inputs)
    generator = torch.Generator().manual_seed(seed)
    while True:
        if batch_size >= count:
            yield inputs, targets
            continue
        order = torch.randperm(count, generator=generator, device="cpu")[: count - count % batch_size].to(inputs.device)
        yield from zip(inputs[order].split(batch_size), targets[order].split(batch_size), strict=True)


def _number(config: Mapping[str, Scalar], name: str) -> float:
    return float(config[name])  # type: ignore[arg-type]


def _row(
    run: Run,
    rows: Sequence[Mapping[str, float]],
    began: float,
    *,
    failed: str = "",
    final: Mapping[str, float] | None = None,
) -> Row:
    curve = {name: [row[name] for row in rows] for name in COLUMNS}
    status = "failed" if failed else "done"
    return Row(
        run=run, status=status, reason=failed, curve=curve, final=final or {}, seconds=time.perf_counter() - began
    )
