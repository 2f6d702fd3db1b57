"""One training with or without a planted shortcut, at a large rate and then a small one, and what it knows on the way.

Conventions. A *control* is trained on the samples as they are; everything else (start, order of the samples, which of them are
marked) follows from the seed and is the same with the shortcut and without. Accuracies are fractions, read in evaluation mode:
*clean* on held-out samples as they are, *alone* on the shortcut by itself at full strength, which chance alone gets right as
often as its commonest class. Rates are multiplied in all groups of the optimiser: lr before `anneal_at`, small from there on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.hook import Hook
from decaycast.core.measure import evaluate
from decaycast.core.train import train
from decaycast.methods.large_lr.patch import Shares, Shortcut, choose_marked, plant

Part = tuple[Tensor, Tensor]
COLUMNS = ("step", "lr", "train_loss", "clean_accuracy", "alone_accuracy")
ALONE_SAMPLES = 1000  # as many blanks as the paper's code looks at
_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long, at which rates and in which batches a network is trained.

    Args:
        lr: rate before annealing, finite and > 0.
        small: rate after it, finite and > 0, at most `lr`.
        steps: optimiser steps, >= 2.
        anneal_at: first step with the small rate, in [1, steps).
        batch_size: samples in a step.
        points: measurements on the way, at least one before annealing and one after; the last step is always measured.

    Raises:
        ValueError: a training that ends before it anneals; an argument outside its range.
    """

    lr: float
    small: float
    steps: int
    anneal_at: int
    batch_size: int = 64
    points: int = 8

    def __post_init__(self) -> None:
        for name in ("lr", "small"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"a learning rate must be a finite number > 0, got {name} = {value!r}")
        if self.small > self.lr:
            raise ValueError(f"annealing means to a smaller rate, got {self.lr:g} and then {self.small:g}")
        for name in ("steps", "anneal_at", "batch_size", "points"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.anneal_at >= self.steps:
            raise ValueError(
                f"the training ends at step {self.steps}, before it anneals at step {self.anneal_at}: rates are compared only "
                "after annealing; anneal earlier or train longer"
            )

    def multiplier(self, step: int) -> float:
        """Of the optimiser's own rate, which is `lr`.

        >>> course = Course(lr=0.4, small=0.1, steps=10, anneal_at=5)
        >>> [course.multiplier(step) for step in (0, 4, 5, 9)]
        [1.0, 1.0, 0.25, 0.25]
        """
        return 1.0 if step < self.anneal_at else self.small / self.lr

    def measured_at(self) -> list[int]:
        """Numbers of made steps after which to measure: the moment before annealing is one of them.

        >>> Course(lr=1, small=1, steps=10, anneal_at=4, points=4).measured_at()
        [2, 4, 7, 10]
        """
        late = max(1, self.points // 2)
        early = max(1, self.points - late)
        rest = self.steps - self.anneal_at
        steps = {math.ceil(self.anneal_at * (i + 1) / early) for i in range(early)}
        return sorted(steps | {self.anneal_at + math.ceil(rest * (i + 1) / late) for i in range(late)})


@dataclass(frozen=True, kw_only=True)
class Task:
    """Samples to train on and samples held out, the shortcut for them, and how it is shared out."""

    train: Part
    held_out: Part
    shortcut: Shortcut
    shares: Shares = field(default_factory=Shares)


def train_planted(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    course: Course,
    *,
    planted: bool,
    seed: int,
    hooks: Sequence[Hook] = (),
    on_row: Callable[[dict[str, float]], None] | None = None,
    stop: int | None = None,
) -> dict[str, list[float]]:
    """Train `model`, in place, and read what it knows.

    Args:
        model: samples -> scores of shape (n, classes), on the samples' device.
        optimizer: over its parameters, at the course's `lr`.
        task: samples and shortcut.
        course: rates, steps, batches.
        planted: with the shortcut, or the control without.
        seed: of order and marking.
        hooks: see `decaycast.core.hook`.
        on_row: called with each measurement.
        stop: end after so many steps; None for all of them.

    Returns:
        `COLUMNS` by name, one entry per measurement of `Course.measured_at`; `train_loss` is that of the last batch.

    Raises:
        DivergedError: the training loss is not finite.
        ValueError: fewer samples than a batch has.
    """
    batches = _batches(task, course.batch_size, planted, seed)
    curve: dict[str, list[float]] = {name: [] for name in COLUMNS}
    last = course.steps if stop is None else stop
    start = 0
    for pause in [step for step in course.measured_at() if step < last] + [last]:
        row = train(
            model,
            batches,
            functional.cross_entropy,
            optimizer,
            start=start,
            stop=pause,
            lr_schedule=course.multiplier,
            hooks=hooks,
            measure_at=(pause,),
        )[-1]
        start = pause
        clean, alone = clean_accuracy(model, task.held_out), alone_accuracy(model, task)
        read = {**row, "clean_accuracy": clean, "alone_accuracy": alone}
        for name in COLUMNS:
            curve[name].append(read[name])
        if on_row:
            on_row(read)
    return curve


def clean_accuracy(model: nn.Module, part: Part) -> float:
    """Share of samples, as they are, that the model gets right."""
    pairs = zip(part[0].split(_AT_ONCE), part[1].split(_AT_ONCE), strict=True)
    return evaluate(model, pairs, functional.cross_entropy)[1]


def alone_accuracy(model: nn.Module, task: Task) -> float:
    """Share of shortcuts alone that the model gets right: the same `ALONE_SAMPLES` held-out labels at every call."""
    inputs, labels = (tensor[:ALONE_SAMPLES] for tensor in task.held_out)
    alone = task.shortcut.alone(inputs, labels, generator_for("alone", 0))
    return clean_accuracy(model, (alone, labels))


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """A generator on the CPU whose stream depends on both: what one purpose draws does not move what another one gets."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _batches(task: Task, batch_size: int, planted: bool, seed: int) -> Iterator[Part]:
    """Endless shuffled batches, each epoch in a fresh order; an incomplete last batch is left out."""
    inputs, labels = task.train
    if len(inputs) < batch_size:
        raise ValueError(f"a batch of {batch_size} needs as many samples, got {len(inputs)}; lower the batch size")
    marked = choose_marked(len(inputs), task.shares, generator_for("marked", seed))
    order_of, drawn = generator_for("order", seed), generator_for("planted", seed)
    while True:
        order = torch.randperm(len(inputs), generator=order_of)
        for start in range(0, len(inputs) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            batch, target = inputs[index.to(inputs.device)], labels[index.to(labels.device)]
            if planted:
                batch = plant(task.shortcut, batch, target, marked[index], task.shares, drawn)
            yield batch, target
