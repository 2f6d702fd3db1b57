"""From a run's description to a training and its row; a trial can pause at any step and go on.

On several ranks each gets its part of every batch and of the validation samples, and gradients are averaged: up to rounding
the same training as one process on the whole batch, batch norm included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from decaycast.core import ranks
from decaycast.core.checkpoint import CheckpointError
from decaycast.core.decay import WeightDecayScheduler, check_keys
from decaycast.core.experiment import Row, Run
from decaycast.core.hook import Hook, StepContext
from decaycast.core.measure import COLUMNS, evaluate, measuring_steps
from decaycast.core.names import choose
from decaycast.core.schedule import WEIGHT_DECAY_NAMES, by_name, lr_by_name
from decaycast.core.train import DivergedError, train
from decaycast.lab import data, models
from decaycast.lab.provenance import provenance
from decaycast.methods.l2.autol2 import AutoL2Hook
from decaycast.methods.stochnorm.method import StochNorm

if TYPE_CHECKING:
    from decaycast.lab.resume import Keeper

DEFAULTS = {
    "data": "digits",
    "train_size": None,
    "validation_size": None,
    "test_size": None,
    "pool": 1,
    "model": "mlp",
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "steps": 1000,
    "stop": None,
    "batch_size": 128,
    "rule": "constant",  # of the weight decay: a schedule by name, autol2 starting at weight_decay, or autol2-efolds
    "refractory": None,  # of autol2, in steps times weight decay [the rule's 0.1]
    "budget_efolds": 1.3,  # of autol2-efolds, which sets the size of the weight decay by itself
    "points": 60,
}
OPTIMIZERS = ("sgd", "adamw")
RULES = ("autol2", "autol2-efolds", *WEIGHT_DECAY_NAMES)


def make_optimizer(config: dict, parameters) -> torch.optim.Optimizer:
    """The optimiser a run names; its weight decay is in that optimiser's own torch convention."""
    name = choose(config["optimizer"], OPTIMIZERS, "optimizer")
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=config["lr"], momentum=config["momentum"], weight_decay=config["weight_decay"]
        )
    return torch.optim.AdamW(parameters, lr=config["lr"], weight_decay=config["weight_decay"])


class Trial:
    """One run's model, optimiser, batches and curve, held so that training can stop and go on.

    With a `group` every rank of it builds the same trial and makes the same calls.
    """

    def __init__(
        self,
        run: Run,
        *,
        data_dir: str | None = None,
        device: str = "cpu",
        hooks: Sequence[Hook] = (),
        group: ranks.Group = None,
    ) -> None:
        config = {**DEFAULTS, **run.config}
        for name in run.config:
            choose(name, tuple(DEFAULTS), "run setting")
        self.config, self.run, self.device, self.group = config, run, device, group
        sizes = {key: config[key] for key in ("train_size", "validation_size", "test_size", "pool")}
        if config["rule"] == "autol2-efolds":
            config["weight_decay"] = config["weight_decay"] or 1.0  # any: only ratios between groups matter
        self.split = data.load(config["data"], data_dir=data_dir, **sizes)
        model = models.build(config["model"], self.split.shape, self.split.classes, seed=run.seed)
        self.model = (model if group is None else _synchronised(model, group)).to(device)
        self.optimizer = make_optimizer(config, self.model.parameters())
        self.hooks = [*hooks, *_rule_hooks(config, self.optimizer)]
        self.batches = self._batches(skip=0)
        self.schedule = lr_by_name(config["schedule"], config["steps"])
        self.measure_at = measuring_steps(config["steps"], config["points"])
        self.step, self.efolds, self.rows = 0, 0.0, []

    def advance(self, stop: int, on_row: Callable[[dict[str, float]], None] | None = None) -> None:
        """Train on to `stop` optimiser steps in all; a step already passed is no error and does nothing.

        `on_row` is called after each measurement, for a progress display.

        Raises:
            DivergedError: the training loss is not finite; what was measured before stays in `rows`.
        """
        for pause in [step for step in self.measure_at if self.step < step < stop] + [stop]:
            if pause > self.step:
                self._train_to(pause)
                if on_row:
                    on_row(self.rows[-1])

    @cached_property
    def trained(self) -> nn.Module:
        """What the training loop calls: the network, on several ranks inside DistributedDataParallel."""
        return self.model if self.group is None else DistributedDataParallel(self.model, process_group=self.group)

    def _batches(self, skip: int) -> Any:
        inputs, target = (part.to(self.device) for part in self.split.train)
        share = (ranks.rank_in(self.group), ranks.size_of(self.group))
        return data.batches(inputs, target, self.config["batch_size"], self.run.seed, skip=skip, share=share)

    def _train_to(self, stop: int) -> None:
        if self.rows and int(self.rows[-1]["step"]) not in self.measure_at:
            self.rows.pop()  # measured only because training paused there: where it pauses must not show in the curve
        self.rows += train(
            self.trained,
            self.batches,
            functional.cross_entropy,
            self.optimizer,
            start=self.step,
            stop=stop,
            lr_schedule=self.schedule,
            hooks=self.hooks,
            evaluate=self._validate,
            measure_at=(stop,),
            efolds_spent=self.efolds,
        )
        self.step, self.efolds = stop, self.rows[-1]["efolds"]

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from here, on any number of ranks; tensors and plain values."""
        return {
            "run": {"config": dict(self.run.config), "seed": self.run.seed},
            "step": self.step,
            "efolds": self.efolds,
            "rows": [dict(row) for row in self.rows],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved; before the first step.

        Raises:
            CheckpointError: the state of another run.
        """
        check_keys(state, self.state_dict(), "Trial")
        saved = Run(**state["run"])
        if saved.key != self.run.key:
            differing = _differing(saved, self.run)
            raise CheckpointError(
                f"this is the checkpoint of another run ({differing}); choose another file for this one"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for hook, part in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(part)
        self.step, self.efolds, self.rows = state["step"], state["efolds"], [dict(row) for row in state["rows"]]
        self.batches = self._batches(skip=self.step)

    def curve(self) -> dict[str, list[float]]:
        """What was measured so far, by column."""
        return {name: [row[name] for row in self.rows] for name in COLUMNS}

    def test(self) -> dict[str, float]:
        """Loss and accuracy on the test data: read once, at the end, by the caller's decision."""
        loss, accuracy = self._evaluate(self.split.test)
        return {"test_loss": loss, "test_accuracy": accuracy}

    def _validate(self, model: torch.nn.Module) -> tuple[float, float]:
        return self._evaluate(self.split.validation)

    def _evaluate(self, part: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        rank, count = ranks.rank_in(self.group), ranks.size_of(self.group)
        inputs, target = (tensor.tensor_split(count)[rank].to(self.device) for tensor in part)
        pairs = [pair for pair in zip(inputs.split(500), target.split(500), strict=True) if len(pair[1])]
        return evaluate(self.model, pairs, functional.cross_entropy, self.group)


def train_run(
    run: Run,
    *,
    data_dir: str | None = None,
    device: str = "cpu",
    on_row: Callable[[dict[str, float]], None] | None = None,
    group: ranks.Group = None,
    keeper: Keeper | None = None,
) -> Row:
    """Train one run to its `stop` (default: its `steps`) and read the test data at the end.

    Divergence gives a failed row with the curve up to it; other errors are raised for the executor to record. With a `group`
    every rank of it makes this call and gets the same row. A `keeper` (`decaycast.lab.resume`) goes on from its
    checkpoint and writes new ones.

    Raises:
        ValueError: ranks that were given different runs (on each of them).
        RuntimeError: another rank could not build its trial.
    """
    began = time.perf_counter()
    trial = _built(run, data_dir, device, group)
    status, reason, final = "done", "", {}

    def measured(row: dict[str, float]) -> None:
        if keeper is not None:
            keeper.note(trial)
        if on_row is not None:
            on_row(row)

    if keeper is not None:
        keeper.restore(trial)
    try:
        trial.advance(int(trial.config["stop"] or trial.config["steps"]), measured)
        final = trial.test()
        if not all(math.isfinite(value) for value in final.values()):
            status, reason = "failed", f"the trained network's test loss is not finite: {final}"
    except DivergedError as error:
        status, reason = "failed", f"DivergedError: {error}"
    return Row(
        run=run,
        status=status,
        reason=reason,
        curve=trial.curve(),
        final=final,
        seconds=time.perf_counter() - began if keeper is None else keeper.seconds,
        provenance=provenance(device) | ({} if group is None else {"ranks": str(ranks.size_of(group))}),
    )


def _built(run: Run, data_dir: str | None, device: str, group: ranks.Group) -> Trial:
    """The trial; what one rank lacks (data, memory), or was told differently, is an error on all of them."""
    trial, error = None, None
    try:
        trial = Trial(run, data_dir=data_dir, device=device, group=group)
    except Exception as found:
        error = found
    ranks.agree({**run.config, "seed": run.seed, "torch": str(torch.__version__)}, group, error=error)
    assert trial is not None  # else agree has raised
    return trial


def _synchronised(model: nn.Module, group: ranks.Group) -> nn.Module:
    """Batch norm over the batch of all ranks: StochNorm with p = 1, which unlike SyncBatchNorm also trains on CPU."""
    return StochNorm.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model, group), p=1.0, report=None)


def _differing(saved: Run, asked: Run) -> str:
    one, other = ({**run.config, "seed": run.seed} for run in (saved, asked))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} there, {other.get(name)} here" for name in names)


class _DecaySchedule(Hook):
    """The weight-decay schedule that a run names as its rule, over the run's budget."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
        steps = config["steps"]
        shape = by_name(config["rule"], steps, lr_schedule=lr_by_name(config["schedule"], steps))
        self.scheduler = WeightDecayScheduler(optimizer, shape)

    def on_step(self, step: int, context: StepContext) -> None:
        if step > 0:  # the constructor has set the value of step 0
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


def _budgeted(config: dict) -> AutoL2Hook:
    shape = lr_by_name(config["schedule"], config["steps"])
    rate = [config["lr"] * shape(step) for step in range(config["steps"])]
    return AutoL2Hook(clock="efolds", budget_efolds=config["budget_efolds"], steps=config["steps"], lr=rate)


def _rule_hooks(config: dict, optimizer: torch.optim.Optimizer) -> list[Hook]:
    rule = choose(config["rule"], RULES, "weight decay rule")
    if rule == "constant":
        return []
    if rule == "autol2":
        return [AutoL2Hook(start=config["weight_decay"], refractory=config["refractory"])]
    if rule == "autol2-efolds":
        return [_budgeted(config)]
    return [_DecaySchedule(optimizer, config)]
