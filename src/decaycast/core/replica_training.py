"""The training loop for K networks at once: what K calls of `decaycast.core.train.train` do, as one batched program.

Replica k has a network, a torch optimiser, hooks, a learning-rate schedule and a stop of its own. Its optimiser never steps: it
holds the replica's learning rate and weight decay, so that a schedule or AutoL2 drives a replica as it drives any training. A
replica that ends, because it reached its stop, diverged, or a hook of its raised, leaves the batch; the others go on.

The rows are those of separate training up to rounding (products are summed in another order). What a replica computes does
not depend on which others are in the batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.func import vmap

from decaycast.core.hook import Hook, StepContext, chain
from decaycast.core.measure import Loss, check_labels, is_classification
from decaycast.core.replica_batches import Batches, shared
from decaycast.core.replica_optimizers import stacked
from decaycast.core.replicas import Replicas
from decaycast.core.timescale import group_rate
from decaycast.core.train import Batch, DivergedError

Measured = tuple[list[float], list[float]]
Evaluate = Callable[[Replicas], Measured]
_LOOK_EVERY = 25  # steps between looks at the loss, as in `train`


def mean_losses(loss_fn: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each replica, (K,), for outputs and targets of shape (K, batch, ...)."""
    if loss_fn is not functional.cross_entropy:
        return vmap(loss_fn)(output, target)
    each = functional.cross_entropy(output.flatten(0, 1), target.flatten(0, 1), reduction="none").view(len(output), -1)
    if target.is_floating_point():
        return each.mean(1)
    return each.sum(1) / (target.flatten(1) != -100).sum(1)  # torch's mean leaves out labels that are ignored


def evaluate_replicas(replicas: Replicas, batches: Iterable[Batch], loss_fn: Loss) -> Measured:
    """`decaycast.core.measure.evaluate` for all replicas on the same `batches`: mean losses and accuracies, K each.

    Raises:
        ValueError: no samples; labels outside the networks' outputs.
    """
    losses, right, count, classes = 0.0, 0.0, 0, True
    with replicas.evaluating():
        for inputs, target in batches:
            output, wanted = replicas(shared(inputs, len(replicas))), shared(target, len(replicas))
            check_labels(output[0], target)
            losses = losses + mean_losses(loss_fn, output, wanted).double() * len(target)
            classes = classes and is_classification(output[0], target)
            if classes:
                hits = (output.argmax(2) == wanted).flatten(1)
                right = right + hits.sum(1).double() * len(target) / hits.shape[1]  # of a text its share
            count += len(target)
    if count == 0:
        raise ValueError("there is nothing to evaluate on: the validation data are empty; give at least one sample")
    nothing = [math.nan] * len(replicas)
    return (losses / count).tolist(), (right / count).tolist() if classes else nothing  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one replica ended."""

    rows: list[dict[str, float]]
    """As `train` returns them; of a replica that failed, those before."""
    error: Exception | None
    """`DivergedError`, or what a hook of this replica raised; None where it reached its stop."""
    final: tuple[float, float] | None
    """Loss and accuracy of `evaluate_end`, where it reached its stop."""
    seconds: float
    """Its share of the time: each step's, divided by the number of replicas that made it."""


class ReplicaTraining:
    """K trainings at once; can pause at any step (`advance`).

    The networks are trained as copies; each gets its tensors back when its replica ends.

    Args:
        models: K networks of one structure, in training mode.
        batches: of all replicas.
        loss_fn: (output, target) -> scalar, the data loss without penalty.
        optimizers: K, SGD or AdamW, see `decaycast.core.replica_optimizers.stacked`.
        stop: optimiser steps of each replica, >= 1.
        lr_schedules: per replica 0-based step -> multiplier of its ``initial_lr``, or None.
        hooks: per replica, see `decaycast.core.hook`; `prepare` is the caller's to call.
        evaluate: replicas -> validation losses and accuracies, K each.
        evaluate_end: the same on test data, called when replicas reach their stop.
        measure_at: numbers of made steps after which to measure, of each replica.
        device: where to train; None for where the first network is. The batches have to be there.

    Raises:
        ValueError: lists of different lengths; networks or optimisers that cannot be batched; a stop below 1.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        batches: Batches,
        loss_fn: Loss,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        stop: Sequence[int],
        lr_schedules: Sequence[Callable[[int], float] | None] | None = None,
        hooks: Sequence[Sequence[Hook]] | None = None,
        evaluate: Evaluate | None = None,
        evaluate_end: Evaluate | None = None,
        measure_at: Sequence[Collection[int]] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        count = len(models)
        lists: dict[str, Sequence[Any]] = {
            "optimizers": optimizers,
            "stop": stop,
            "lr_schedules": lr_schedules or [None] * count,
            "hooks": hooks or [()] * count,
            "measure_at": measure_at or [()] * count,
        }
        for name, values in lists.items():
            if len(values) != count:
                raise ValueError(f"{name} must have one entry per network, {count}, got {len(values)}")
        self.replicas, self.optimizer = Replicas(models, device=device), stacked(optimizers)
        self.batches, self.loss_fn, self.step = batches, loss_fn, 0
        self.evaluate, self.evaluate_end = evaluate, evaluate_end
        self.outcomes: dict[int, Outcome] = {}
        """What has ended, by its place."""
        self._seats = [_Seat(place, *values) for place, values in enumerate(zip(*lists.values(), strict=True))]
        self._seat()

    def __len__(self) -> int:
        """Replicas that have not ended."""
        return len(self._seats)

    def advance(self, stop: int | None = None) -> None:
        """Train on until `stop` steps are made in all, or every replica has ended.

        Raises:
            ValueError: as `train`, for reasons that concern all replicas (labels outside the outputs, data that run dry).
        """
        while self._seats and (stop is None or self.step < stop):
            began, seats = time.perf_counter(), self._seats
            ended = self._make_step()
            took = (time.perf_counter() - began) / len(seats)
            for seat in seats:
                seat.seconds += took
            if ended:
                self._end(ended)

    def _make_step(self) -> list[_Seat]:
        """One update of all; the replicas that ended in it."""
        step, replicas = self.step, self.replicas
        for seat in self._scheduled:
            seat.group["lr"] = seat.initial_lr * seat.schedule(step)  # type: ignore[misc]
        inputs, target = self._edited(step, *self.batches.next())
        output = replicas(inputs)
        if step == 0:
            check_labels(output.flatten(0, 1), target.flatten(0, 1))
        losses = mean_losses(self.loss_fn, output, target)
        names = list(replicas.parameters)
        found = torch.autograd.grad(losses.sum(), list(replicas.parameters.values()), allow_unused=True)
        grads = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
        seen = _Seen(losses.detach(), output.detach(), target)
        if self._hooked:
            self._call_hooks(step, seen)
        if self._changing:
            self._read_settings()
        self._spent += self._rates
        self.optimizer.step(replicas.parameters, grads, self._lr, self._weight_decay)
        self.step = step + 1
        return self._look(seen)

    def _edited(self, step: int, inputs: Tensor, target: Tensor) -> Batch:
        """The batch after the hooks that edit batches."""
        if not self._editing:
            return inputs, target
        parts = list(zip(inputs.unbind(), target.unbind(), strict=True))
        for slot in self._editing:
            seat = self._seats[slot]
            edited = seat.attempt(lambda seat=seat, part=parts[slot]: seat.hook.on_batch(step, part))
            parts[slot] = parts[slot] if edited is None else edited
        return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])

    def _call_hooks(self, step: int, seen: _Seen) -> None:
        for slot, seat in self._hooked:
            if seat.error is None:
                context = _ReplicaContext(
                    loss=seen.separate[0][slot],
                    output=seen.separate[1][slot],
                    target=seen.separate[2][slot],
                    optimizer=seat.optimizer,
                    seen=seen,
                    slot=slot,
                )
                seat.attempt(lambda seat=seat, context=context: seat.hook.on_step(step, context))

    def _read_settings(self) -> None:
        """Learning rate, weight decay and decay per step of each replica, as its optimiser has them now."""
        self._lr = [float(seat.group["lr"]) for seat in self._seats]
        self._weight_decay = [float(seat.group["weight_decay"]) for seat in self._seats]
        for slot, stamp in enumerate(zip(self._lr, self._weight_decay, strict=True)):
            if stamp != self._stamps[slot]:
                self._stamps[slot], self._rates[slot] = stamp, self._seats[slot].rate()

    def _look(self, seen: _Seen) -> list[_Seat]:
        """Measure where due, find who diverged, and return who ended."""
        made, seats = self.step, self._seats
        measured = [slot for slot, seat in enumerate(seats) if made in seat.measure_at]
        looking = (made - 1) % _LOOK_EVERY == 0
        if measured or looking:
            for slot, value in enumerate(seen.losses.tolist()):
                if (looking or slot in measured) and not math.isfinite(value) and seats[slot].error is None:
                    seats[slot].error = DivergedError(made - 1, value, seats[slot].rows)
        measured = [slot for slot in measured if seats[slot].error is None]
        if measured:
            self._measure(measured, seen)
        return [seat for seat in seats if seat.error is not None or seat.stop <= made]

    def _measure(self, slots: Sequence[int], seen: _Seen) -> None:
        nothing = [math.nan] * len(self._seats)
        losses, accuracies = self.evaluate(self.replicas) if self.evaluate else (nothing, nothing)
        train_losses, train_accuracies = seen.losses.tolist(), seen.accuracies()
        for slot in slots:
            seat = self._seats[slot]
            row = {
                "step": float(self.step),
                "efolds": float(self._spent[slot]),
                "lr": self._lr[slot],
                "weight_decay": self._weight_decay[slot],
                "train_loss": train_losses[slot],
                "train_accuracy": train_accuracies[slot],
                "validation_loss": losses[slot],
                "validation_accuracy": accuracies[slot],
            }
            seat.rows.append(row)
            seat.attempt(lambda seat=seat, row=row: seat.hook.on_measure(self.step, row))

    def _end(self, ended: list[_Seat]) -> None:
        """Hand out the ended replicas and go on with the others."""
        finals = self.evaluate_end(self.replicas) if self.evaluate_end and any(s.error is None for s in ended) else None
        places = [slot for slot, seat in enumerate(self._seats) if seat in ended]
        self.replicas.write_back(places)
        for slot in places:
            seat = self._seats[slot]
            final = (finals[0][slot], finals[1][slot]) if finals and seat.error is None else None
            self.outcomes[seat.place] = Outcome(rows=seat.rows, error=seat.error, final=final, seconds=seat.seconds)
        left = [slot for slot in range(len(self._seats)) if slot not in places]
        self._seats = [self._seats[slot] for slot in left]
        for part in (self.replicas, self.optimizer, self.batches) if left else ():
            part.keep(left)
        self._seat(left)

    def _seat(self, left: Sequence[int] | None = None) -> None:
        """What follows from who is in the batch."""
        count, seats = len(self._seats), self._seats
        if left is None:
            self._spent, self._rates = np.zeros(count), np.zeros(count)
            self._stamps: list[Any] = [None] * count
        else:
            self._spent, self._rates = self._spent[left], self._rates[left]
            self._stamps = [self._stamps[slot] for slot in left]
        self._lr, self._weight_decay = [], []
        self._scheduled = [seat for seat in seats if seat.schedule is not None]
        self._hooked = [(slot, seat) for slot, seat in enumerate(seats) if seat.has_hooks]
        self._editing = [slot for slot, seat in self._hooked if seat.edits]
        self._changing = bool(self._scheduled or self._hooked)
        if seats:
            self._read_settings()


@dataclass(eq=False)
class _Seat:
    """One replica in the batch."""

    place: int
    optimizer: torch.optim.Optimizer
    stop: int
    schedule: Callable[[int], float] | None
    hooks: Sequence[Hook]
    measure_at: Collection[int]
    rows: list[dict[str, float]] = field(default_factory=list)
    error: Exception | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.stop < 1:
            raise ValueError(f"a replica must make at least 1 step, got stop={self.stop}")
        self.group = self.optimizer.param_groups[0]
        if self.schedule is not None:
            self.initial_lr = float(self.group.setdefault("initial_lr", float(self.group["lr"])))
        self.hook, self.has_hooks = chain(*self.hooks), bool(self.hooks)
        self.edits = any(type(hook).on_batch is not Hook.on_batch for hook in self.hooks)
        self.measure_at = set(self.measure_at)

    def attempt(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; an exception is this replica's alone and ends it."""
        try:
            return call()
        except Exception as error:
            self.error = error
            return None

    def rate(self) -> float:
        """Shrink per step now; NaN where the optimiser has no fixed one."""
        try:
            return group_rate(self.optimizer, self.group)
        except ValueError:
            return math.nan


class _Seen:
    """Loss, output and target of one step, of all replicas."""

    def __init__(self, losses: Tensor, output: Tensor, target: Tensor) -> None:
        self.losses, self.output, self.target = losses, output, target

    @cached_property
    def separate(self) -> tuple[tuple[Tensor, ...], ...]:
        """The same, replica by replica."""
        return self.losses.unbind(), self.output.unbind(), self.target.unbind()

    @cached_property
    def errors(self) -> tuple[Tensor, ...]:
        """Share of wrong predictions per replica, fetched from the device once."""
        target = self.target
        if target.is_floating_point() and target.ndim == self.output.ndim:
            target = target.argmax(2)
        return (self.output.argmax(2) != target).flatten(1).float().mean(1).cpu().unbind()

    def accuracies(self) -> list[float]:
        """Training accuracy per replica; NaN where targets are no class indices."""
        if not is_classification(self.output[0], self.target[0]):
            return [math.nan] * len(self.losses)
        return (self.output.argmax(2) == self.target).flatten(1).float().mean(1).tolist()


@dataclass(frozen=True, kw_only=True)
class _ReplicaContext(StepContext):
    seen: _Seen
    slot: int

    def error(self) -> Tensor:
        return self.seen.errors[self.slot]
