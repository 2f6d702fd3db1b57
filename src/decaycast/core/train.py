"""The one explicit training loop: model, batches, hooks -> rows.

Written to be read. It can stop at any step and be called again to go on (`start`): nothing is kept between calls but the
model, the optimiser, the batches' iterator and the hooks, which the caller owns.

On several ranks (`decaycast.core.ranks`) give a model in DistributedDataParallel and, on each rank, its own part of the data.
The rows are then means over the ranks, the same on each, and a training that diverges on one ends on all. Hooks see their own
rank's batch and loss; one that decides by them has to average (`decaycast.core.ranks.mean`), as AutoL2 does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from decaycast.core import ranks
from decaycast.core.hook import Hook, StepContext, chain
from decaycast.core.measure import Loss, check_labels, is_classification
from decaycast.core.timescale import group_rate

Batch = tuple[torch.Tensor, torch.Tensor]
Evaluate = Callable[[torch.nn.Module], tuple[float, float]]


class DivergedError(FloatingPointError):
    """The training loss became NaN or infinite; `step` says at which update, `rows` holds what was measured before."""

    def __init__(self, step: int, value: float, rows: list[dict[str, float]]) -> None:
        super().__init__(f"the training loss is {value} at step {step}; lower the learning rate or the weight decay")
        self.step, self.rows = step, rows


def train(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    stop: int,
    start: int = 0,
    lr_schedule: Callable[[int], float] | None = None,
    hooks: Sequence[Hook] = (),
    evaluate: Evaluate | None = None,
    measure_at: Iterable[int] = (),
    efolds_spent: float = 0.0,
    autocast: Callable[[], Any] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> list[dict[str, float]]:
    """Make optimiser steps `start`, ..., `stop` - 1 and return one row per measurement.

    Args:
        model: trained in place, on whatever device it is; in DistributedDataParallel by all ranks of its group.
        batches: yields (inputs, target) on that device; must not run dry before `stop`.
        loss_fn: (output, target) -> scalar, the data loss without penalty.
        optimizer: over the model's parameters; its weight decay is read anew at each measurement.
        stop: optimiser steps made in all when this returns.
        start: steps made before this call.
        lr_schedule: 0-based step -> multiplier of each group's ``initial_lr``; None leaves the rate alone.
        hooks: see `decaycast.core.hook`; `prepare` is the caller's to call, before it builds the optimiser.
        evaluate: model -> (validation loss, validation accuracy); on several ranks it gets the network without its wrapper,
            and the rows have the mean over ranks, each counting alike (over samples: `measure.evaluate` with a group).
        measure_at: numbers of made steps after which to measure.
        efolds_spent: e-folds of decay before `start` (the fastest group's), carried on in the rows.
        autocast: context for forward and loss (mixed precision).
        scaler: gradient scaler for float16.

    Returns:
        Rows with the keys of `decaycast.core.measure.COLUMNS`.

    Raises:
        DivergedError: the training loss is not finite (looked at when measuring and every 25 steps).
        ValueError: labels outside the model's outputs; batches that run dry; ranks that do not agree on steps, learning rates or
            weight decays (on each of them).
    """
    hook = chain(*hooks)
    wanted, rows = set(measure_at), []
    scheduled = _initial_rates(optimizer) if lr_schedule else []
    has_hooks, spent, together = bool(hooks), _EfoldMeter(optimizer, efolds_spent), ranks.group_of(model)
    if not model.training:
        model.train()  # a model already in training mode keeps the modules its owner froze in evaluation mode
    for step in range(start, stop):
        for group, rate in scheduled:
            _set(group, "lr", rate * lr_schedule(step))  # type: ignore[misc]
        inputs, target = _next(batches, step)
        if has_hooks:
            inputs, target = hook.on_batch(step, (inputs, target))
        with autocast():
            output = model(inputs)
            if step == start:
                _check_start(
                    output, target, optimizer, {"start": start, "stop": stop, "measure_at": sorted(wanted)}, together
                )
            loss = loss_fn(output, target)
        _backward(loss, optimizer, scaler)
        if has_hooks:
            context = StepContext(loss=loss.detach(), output=output.detach(), target=target, optimizer=optimizer)
            hook.on_step(step, context)
        spent.add_step()
        _update(optimizer, scaler)
        measured = step + 1 in wanted
        if measured or step % 25 == 0:
            (value,) = ranks.mean([loss.item()], together)
            if not math.isfinite(value):
                raise DivergedError(step, value, rows)
        if measured:
            rows.append(_row(step + 1, spent.total, optimizer, loss.item(), output, target, evaluate, model))
            hook.on_measure(step + 1, rows[-1])
    return rows


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Go through a loader again and again; refuses one that yields nothing."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the training loader is empty: it yields no batch; check the data set and drop_last")


def _next(batches: Iterator[Batch], step: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise ValueError(f"the training data ran dry at step {step}; give an iterator that repeats (endless(loader))")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise ValueError(f"a batch must be a pair (inputs, target), got {type(batch).__name__}; wrap the loader")
    return batch[0], batch[1]


def _backward(loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    optimizer.zero_grad(set_to_none=True)
    (loss if scaler is None else scaler.scale(loss)).backward()


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _row(
    step: int,
    efolds: float,
    optimizer: torch.optim.Optimizer,
    loss: float,
    output: torch.Tensor,
    target: torch.Tensor,
    evaluate: Evaluate | None,
    model: torch.nn.Module,
) -> dict[str, float]:
    first = optimizer.param_groups[0]
    accuracy = math.nan
    if is_classification(output, target):
        accuracy = (output.detach().argmax(1) == target).float().mean().item()
    validation = evaluate(ranks.unwrapped(model)) if evaluate else (math.nan, math.nan)
    names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
    measured = ranks.mean([loss, accuracy, *validation], ranks.group_of(model))
    return {
        "step": float(step),
        "efolds": efolds,
        "lr": float(first["lr"]),
        "weight_decay": float(first.get("weight_decay", 0.0)),
        **dict(zip(names, measured, strict=True)),
    }


def _check_start(
    output: torch.Tensor,
    target: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    steps: dict[str, Any],
    group: ranks.Group,
) -> None:
    """What is wrong with the first batch, or differs between the ranks, is an error on all of them."""
    try:
        check_labels(output, target)
        error = None
    except ValueError as found:
        error = found
    ranks.agree({**steps, **ranks.settings_of(optimizer)} if group is not None else {}, group, error=error)


def _initial_rates(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], float]]:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return [(group, float(group["initial_lr"])) for group in optimizer.param_groups]


def _set(group: dict[str, Any], name: str, value: float) -> None:
    # a tensor-valued hyper-parameter is shared with compiled or captured code: write into it
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


class _EfoldMeter:
    """Adds up the fastest group's rate; looks it up anew only when a rate or decay was changed since the last step."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: float) -> None:
        self.optimizer, self.total = optimizer, total
        self._rate, self._stamp = 0.0, None

    def add_step(self) -> None:
        stamp = [(_stamp(group["lr"]), _stamp(group.get("weight_decay", 0.0))) for group in self.optimizer.param_groups]
        if stamp != self._stamp:
            self._stamp, self._rate = stamp, self._current_rate()
        self.total += self._rate

    def _current_rate(self) -> float:
        try:
            return max(group_rate(self.optimizer, group) for group in self.optimizer.param_groups)
        except ValueError:
            return math.nan


def _stamp(value: Any) -> Any:
    # reading a tensor would wait for the device; its version counter tells whether it was written
    return (id(value), value._version) if isinstance(value, torch.Tensor) else value
