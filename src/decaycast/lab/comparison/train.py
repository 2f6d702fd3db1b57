"""How each arm of a comparison is trained: the same budget, the same first weights and batches per seed.

The budget counts gradients of one batch. Most arms take one per step; SAM takes two and makes half the steps; in
self-distillation teacher and student share them; a forecast spends some on probes. The learning-rate schedule spans the steps
an arm makes. Arms of one seed start from the same weights and see the same batches in the same order; only a student starts
from weights of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.experiment import Row, Run
from decaycast.core.hook import Hook
from decaycast.core.measure import COLUMNS, Loss, evaluate, measuring_steps
from decaycast.core.schedule import lr_by_name, step_decay
from decaycast.core.timescale import group_rate
from decaycast.core.train import DivergedError, train
from decaycast.lab import data
from decaycast.lab.comparison.sharpness import GRADIENTS_PER_STEP, SharpnessAware
from decaycast.lab.comparison.task import Task
from decaycast.lab.provenance import provenance
from decaycast.lab.trial import make_optimizer
from decaycast.methods.l2.autol2 import AutoL2Hook
from decaycast.methods.l2.forecast import forecast
from decaycast.methods.label_noise.method import LabelNoise
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.large_lr.noise import NoiseSchedule
from decaycast.methods.self_distill.distill import distill
from decaycast.methods.stochnorm.method import StochNorm

STUDENT = 1_000_003  # added to the seed for a student's weights and batches
PROBE_POINTS = 60
_AT_ONCE = 500  # samples in one evaluation


def train_arm(run: Run, *, task: Task) -> Row:
    """Train the arm that `run` names within its budget, and read the test data at the end.

    Returns:
        A row with the columns of `COLUMNS` and "gradients", those spent when measured. In `final`: test loss and accuracy, the
        last validation loss and accuracy, gradients and optimiser steps, e-folds of weight decay, and the seconds of training
        without measuring: of the processor on a CPU, where other work would else count, and of the clock elsewhere.
        Divergence gives a failed row with the curve up to it.
    """
    began, job = time.perf_counter(), _Job(run, task)
    status, reason, final = "done", "", {}
    with _own_randomness(run.seed, task.device):
        job.warm_up()
        started = job.clock()
        try:
            _TRAINERS[str(run.config["arm"])](job)
            final = job.numbers(job.clock() - started)
            bad = [name for name in ("test_loss", "test_accuracy") if not math.isfinite(final[name])]
            if bad:
                status, reason = "failed", f"the trained network's {bad[0].replace('_', ' ')} is not finite"
        except DivergedError as error:
            status, reason = "failed", f"DivergedError: {error}"
    return Row(
        run=run,
        status=status,
        reason=reason,
        curve=job.curve(),
        final=final,
        seconds=time.perf_counter() - began,
        provenance=provenance(task.device),
    )


class _Training:
    """One network on its way through `steps` optimiser steps; it can stop at any and go on."""

    def __init__(
        self,
        job: _Job,
        model: nn.Module,
        *,
        steps: int,
        seed: int,
        weight_decay: float,
        loss_fn: Loss,
        target: Tensor | None,
        hooks: Sequence[Hook],
        gradients_per_step: int,
        points: int,
    ) -> None:
        self.model, self.steps, self.job = model, steps, job
        self.optimizer = make_optimizer({**job.config, "weight_decay": weight_decay}, model.parameters())
        inputs, labels = job.part("train")
        batches = data.batches(inputs, labels if target is None else target, job.config["batch_size"], seed)
        self._train = partial(train, model, batches, loss_fn, self.optimizer, hooks=hooks, evaluate=self._validate)
        self._schedule = lr_by_name(job.config["schedule"], steps)
        self._measure_at = measuring_steps(steps, points)
        self.gradients_per_step, self.before = gradients_per_step, job.gradients
        self.step, self.efolds, self.rows, self.measuring = 0, 0.0, [], 0.0

    @property
    def gradients(self) -> int:
        return self.step * self.gradients_per_step

    def advance(self, stop: int) -> None:
        """Train on to `stop` steps in all, and measure there."""
        if stop <= self.step:
            return
        at = {*(step for step in self._measure_at if self.step < step < stop), stop}
        start, self.step = self.step, stop
        try:
            self.rows += self._train(
                start=start, stop=stop, measure_at=at, lr_schedule=self._schedule, efolds_spent=self.efolds
            )
        except DivergedError as error:
            self.rows += error.rows
            raise
        self.efolds = self.rows[-1]["efolds"]

    def outputs(self, inputs: Tensor) -> Tensor:
        """Scores in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self.model(part) for part in inputs.split(_AT_ONCE)])

    def _validate(self, model: nn.Module) -> tuple[float, float]:
        began = self.job.clock()
        found = self.job.measured(model, "validation")
        self.measuring += self.job.clock() - began
        return found


class _Job:
    """One run at work: its settings, its samples, and every training it has made."""

    def __init__(self, run: Run, task: Task) -> None:
        self.config: dict[str, Any] = dict(run.config)
        self.seed, self.task, self.budget = run.seed, task, int(self.config["steps"])
        self.split = task.split()
        self.clock = time.process_time if torch.device(task.device).type == "cpu" else time.perf_counter
        self.trainings: list[_Training] = []
        self.shown: list[_Training] = []

    @property
    def gradients(self) -> int:
        """Spent so far."""
        return sum(training.gradients for training in self.trainings)

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        inputs, target = getattr(self.split, name)
        return inputs.to(self.task.device), target.to(self.task.device)

    def warm_up(self) -> None:
        """One gradient of a throwaway network: what torch sets up at first use is no arm's time."""
        model, (inputs, target) = self.task.network(self.split, self.seed).to(self.task.device), self.part("train")
        batch = slice(self.config["batch_size"])
        functional.cross_entropy(model(inputs[batch]), target[batch]).backward()

    def start(
        self,
        steps: int,
        *,
        seed: int | None = None,
        weight_decay: float = 0.0,
        loss_fn: Loss = functional.cross_entropy,
        target: Tensor | None = None,
        prepare: Callable[[nn.Module], object] = lambda model: None,
        hooks: Callable[[nn.Module], Sequence[Hook]] = lambda model: (),
        gradients_per_step: int = 1,
        probe: bool = False,
    ) -> _Training:
        """A new training with weights of its seed; `prepare` edits the model in place, `hooks` are made for it."""
        seed = self.seed if seed is None else seed
        model = self.task.network(self.split, seed).to(self.task.device)
        prepare(model)
        torch.manual_seed(seed)
        made = list(hooks(model))
        torch.manual_seed(seed)  # whatever the hooks have drawn: a model's own dropout is the same in all arms
        training = _Training(
            self,
            model,
            steps=steps,
            seed=seed,
            weight_decay=weight_decay,
            loss_fn=loss_fn,
            target=target,
            hooks=made,
            gradients_per_step=gradients_per_step,
            points=PROBE_POINTS if probe else self.config["points"],
        )
        self.trainings.append(training)
        if not probe:
            self.shown.append(training)
        return training

    def finish(self, steps: int | None = None, **about: Any) -> None:
        """Train once, to the end; all of the budget if nothing else is said."""
        training = self.start(self.budget if steps is None else steps, **about)
        training.advance(training.steps)

    def measured(self, model: nn.Module, part: str) -> tuple[float, float]:
        """Loss and accuracy on one part of the samples."""
        pairs = zip(*(tensor.split(_AT_ONCE) for tensor in self.part(part)), strict=True)
        return evaluate(model, pairs, functional.cross_entropy)

    def numbers(self, seconds: float) -> dict[str, float]:
        """The row's `final`; reads the test data."""
        last = self.shown[-1]
        loss, accuracy = self.measured(last.model, "test")
        own = {name: last.rows[-1][name] for name in ("validation_loss", "validation_accuracy", "weight_decay")}
        return {
            "test_loss": loss,
            "test_accuracy": accuracy,
            **own,
            "efolds": last.efolds,
            "gradients": float(self.gradients),
            "optimizer_steps": float(sum(training.step for training in self.trainings)),
            "train_seconds": seconds - sum(training.measuring for training in self.shown),
        }

    def curve(self) -> dict[str, list[float]]:
        """What was measured, by column; a teacher's curve is followed by its student's."""
        found: dict[str, list[float]] = {name: [] for name in (*COLUMNS, "gradients")}
        for training in self.shown:
            for row in training.rows:
                spent = training.before + row["step"] * training.gradients_per_step
                for name, value in {**row, "gradients": float(spent)}.items():
                    found[name].append(value)
        return found


def _plain(job: _Job) -> None:
    job.finish()


def _weight_decay(job: _Job) -> None:
    job.finish(weight_decay=job.config["weight_decay"])


def _autol2(job: _Job) -> None:
    """Its weight decay sets itself; of the one that the optimiser is given only the ratio between groups would matter."""
    settings: dict[str, Any] = {"clock": job.config["clock"]}
    if settings["clock"] == "efolds":
        shape = lr_by_name(job.config["schedule"], job.budget)
        settings |= {"steps": job.budget, "lr": [job.config["lr"] * shape(step) for step in range(job.budget)]}
    job.finish(weight_decay=1.0, hooks=lambda model: [AutoL2Hook(**settings)])


def _label_noise(job: _Job) -> None:
    job.finish(hooks=lambda model: [LabelNoise(job.config["flip"], job.split.classes)])


def _activation_noise(job: _Job) -> None:
    level = step_decay(job.budget, milestones=(job.config["until"],), factor=0.0)
    job.finish(
        prepare=partial(insert_activation_noise, std=job.config["std"], report=None),
        hooks=lambda model: [NoiseSchedule(model, level)],
    )


def _stochnorm(job: _Job) -> None:
    job.finish(prepare=partial(StochNorm.convert, p=job.config["p"], report=None))


def _self_distillation(job: _Job) -> None:
    teacher = job.budget // 2
    inputs, labels = job.part("train")
    one_hot = functional.one_hot(labels, job.split.classes).to(torch.float32)

    def fit(inputs: Tensor, targets: Tensor, round: int) -> Callable[[Tensor], Tensor]:
        own = job.start(
            job.budget - teacher if round else teacher,
            seed=job.seed + STUDENT * round,
            target=targets if round else None,
        )
        own.advance(own.steps)
        return own.outputs

    distill(fit, inputs, one_hot, rounds=2, mix=job.config["mix"], temperature=job.config["temperature"])


def _label_smoothing(job: _Job) -> None:
    job.finish(loss_fn=partial(functional.cross_entropy, label_smoothing=job.config["smoothing"]))


def _sam(job: _Job) -> None:
    job.finish(
        job.budget // GRADIENTS_PER_STEP,
        hooks=lambda model: [SharpnessAware(model, functional.cross_entropy, job.config["rho"])],
        gradients_per_step=GRADIENTS_PER_STEP,
    )


def _forecast(job: _Job) -> None:
    """Probes and the run they choose for fit into the budget together; the only arm that looks at validation data."""
    cost = float(job.config["max_cost"])
    steps = int(job.budget / (1 + cost))
    probes: dict[float, _Training] = {}

    def probe(weight_decay: float, stop: int) -> tuple[list[float], list[float]]:
        if weight_decay not in probes:
            probes[weight_decay] = job.start(steps, weight_decay=weight_decay, probe=True)
        probes[weight_decay].advance(min(stop, steps))
        rows = probes[weight_decay].rows
        return [row["step"] for row in rows], [row["validation_loss"] for row in rows]

    rates = _rates(job.config, steps)
    found = forecast(probe, steps, lr=rates, higher_is_better=False, max_cost=cost, metric="validation loss")
    job.finish(steps, weight_decay=found.weight_decay)


def _rates(config: Mapping[str, Any], steps: int) -> list[float]:
    """Shrink per step and unit of weight decay."""
    optimizer = make_optimizer({**config, "weight_decay": 1e-6}, [nn.Parameter(torch.zeros(1))])
    group, shape = optimizer.param_groups[0], lr_by_name(config["schedule"], steps)
    rate = group_rate(optimizer, group) / float(group["weight_decay"])
    return [rate * shape(step) for step in range(steps)]


_TRAINERS: Mapping[str, Callable[[_Job], None]] = {
    "none": _plain,
    "weight-decay": _weight_decay,
    "autol2": _autol2,
    "label-noise": _label_noise,
    "activation-noise": _activation_noise,
    "stochnorm": _stochnorm,
    "self-distillation": _self_distillation,
    "label-smoothing": _label_smoothing,
    "sam": _sam,
    "forecast": _forecast,
}


@contextmanager
def _own_randomness(seed: int, device: str) -> Iterator[None]:
    """Torch's generators seeded inside, and as they were afterwards."""
    kind = torch.device(device)
    devices = [kind.index or 0] if kind.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
