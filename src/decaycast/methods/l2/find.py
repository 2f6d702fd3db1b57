"""`find`: the forecast on a real training loop, which leaves everything as it found it.

Arms share the caller's model: each keeps a copy of its weights, its optimiser, its place in the data and its random state,
and is swapped in when it trains. All arms start from the same weights and see the same batches. Whatever happens, the model,
its mode and buffers, the random generators and the loaders' generators are put back.

On several ranks give the model in DistributedDataParallel and loaders of each rank's own part of the data (a
DistributedSampler): the ranks train the arms together, measure over all validation samples and get the same forecast. A model
that is not wrapped is this rank's own, and nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from decaycast.core import ranks
from decaycast.core.measure import Loss, evaluate, measuring_steps
from decaycast.core.names import choose
from decaycast.core.randomness import generators_of, randomness, set_randomness
from decaycast.core.schedule import whole
from decaycast.core.timescale import group_rate
from decaycast.core.train import DivergedError, endless, train
from decaycast.methods.l2.forecast import Forecast, forecast

MakeOptimizer = Callable[[torch.nn.Module, float], torch.optim.Optimizer]
METRICS = ("loss", "accuracy")
_REFERENCE_DECAY = 1e-6  # small enough that no momentum cap binds when the rate per unit of decay is read


def find(
    model: torch.nn.Module,
    make_optimizer: MakeOptimizer,
    loss_fn: Loss,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    budget_steps: int,
    lr_schedule: Callable[[int], float] | None = None,
    metric: Literal["loss", "accuracy"] = "loss",
    candidates: Sequence[float] | None = None,
    max_cost: float = 0.3,
    amp_dtype: torch.dtype | None = None,
) -> Forecast:
    """Forecast the best weight decay for training `model` for `budget_steps` optimiser steps.

    Args:
        model: at its initial weights, on its device. Restored before this returns or raises.
        make_optimizer: ``(model, weight_decay) -> optimizer``, a new one at each call; groups it gives no decay stay so. A first
            argument named ``params`` or ``parameters`` is given the model's parameters instead.
        loss_fn: ``(output, target) -> scalar``: the mean data loss, without penalty.
        train_loader: yields (inputs, target); gone through again and again. One batch is one optimiser step.
        val_loader: yields (inputs, target): held-out data, never the test set.
        budget_steps: optimiser steps of the training to come, >= 10.
        lr_schedule: 0-based step -> multiplier of the optimiser's learning rate (as ``LambdaLR`` takes it) over the whole
            budget; None for a constant rate. The arms train its beginning.
        metric: what should be best at the end of the training: validation "loss" or "accuracy".
        candidates: weight decays to choose from; None for any.
        max_cost: most full-run equivalents (budgets of optimiser steps) to spend, in (0, 1]; validation passes come on top.
        amp_dtype: torch.float16 or torch.bfloat16 for mixed precision; float16 on CUDA scales gradients.

    Returns:
        A `Forecast` in the optimiser's own convention of `weight_decay`.

    Raises:
        ValueError: an empty or one-shot loader, labels outside the model's outputs, an optimiser whose weight decay has no
            shrink rate (Adam with coupled L2), a `make_optimizer` that ignores the decay or hands out one optimiser twice, ranks
            that were asked different things.

    Source: Lewkowycz & Gur-Ari 2020, sec. 2 (one short run predicts); arms, drift and prior as in `forecast`.
    """
    choose(metric, METRICS, "metric")
    make_optimizer = _checked_maker(make_optimizer)
    budget_steps = whole("budget_steps", budget_steps, least=10)
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name} is an iterator, which can be gone through only once, but every arm starts from its beginning; "
                "give the loader itself"
            )
    asked = {"budget_steps": budget_steps, "max_cost": max_cost, "metric": metric}
    ranks.agree({**asked, "candidates": _plain(candidates)}, ranks.group_of(model))
    bench = _Bench(model, make_optimizer, loss_fn, train_loader, val_loader, lr_schedule, amp_dtype, budget_steps)
    try:
        return forecast(
            bench.probe(metric),
            budget_steps,
            lr=_effective_rates(model, make_optimizer, lr_schedule, budget_steps),
            candidates=candidates,
            higher_is_better=metric == "accuracy",
            max_cost=max_cost,
            metric=f"validation {metric}",
        )
    finally:
        bench.restore()


def _plain(candidates: Sequence[float] | None) -> list[float] | None:
    return None if candidates is None else [float(each) for each in candidates]


def _checked_maker(make_optimizer: Callable[..., torch.optim.Optimizer]) -> MakeOptimizer:
    """`make_optimizer` as a function of model and weight decay; refuses one that cannot be called so."""
    signature = inspect.signature(make_optimizer)
    try:
        signature.bind(None, 0.0)
    except TypeError as error:
        raise ValueError(
            f"make_optimizer must take (model, weight_decay) and return an optimiser, got one that takes {signature}"
        ) from error
    if next(iter(signature.parameters)) in ("params", "parameters"):
        return lambda model, weight_decay: make_optimizer(list(model.parameters()), weight_decay)
    return make_optimizer


def _effective_rates(
    model: torch.nn.Module,
    make_optimizer: MakeOptimizer,
    lr_schedule: Callable[[int], float] | None,
    budget_steps: int,
) -> np.ndarray:
    """Shrink per step and unit of weight decay, shape (budget_steps,): what `forecast` calls the learning rate."""
    optimizer, other = (make_optimizer(model, decay) for decay in (_REFERENCE_DECAY, 2 * _REFERENCE_DECAY))
    if optimizer is other:
        raise ValueError("make_optimizer handed out the same optimiser twice; build a new one at each call")
    groups = list(zip(optimizer.param_groups, other.param_groups, strict=True))
    # per unit of what make_optimizer is given, which it may scale, or keep from some groups
    rate = max(group_rate(other, twice) - group_rate(optimizer, group) for group, twice in groups) / _REFERENCE_DECAY
    if rate <= 0:
        raise ValueError(
            "make_optimizer(model, weight_decay) gives no parameter group a shrink rate that depends on weight_decay; pass "
            "it on to the groups that should decay, with lr > 0"
        )
    schedule = lr_schedule or (lambda step: 1.0)
    return rate * np.array([float(schedule(step)) for step in range(budget_steps)])


class _Arm:
    """One weight decay's training, parked between extensions."""

    def __init__(self, optimizer: torch.optim.Optimizer, batches: Iterator[Any], scaler: Any) -> None:
        self.optimizer, self.batches, self.scaler = optimizer, batches, scaler
        self.weights: dict[str, torch.Tensor] = {}
        self.randomness: list[Any] = []
        self.step, self.rows = 0, []


class _Bench:
    """Trains arms in the caller's model, one swapped in at a time."""

    def __init__(
        self,
        model: torch.nn.Module,
        make_optimizer: MakeOptimizer,
        loss_fn: Loss,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        lr_schedule: Callable[[int], float] | None,
        amp_dtype: torch.dtype | None,
        budget_steps: int,
    ) -> None:
        self.model, self.make_optimizer, self.loss_fn = model, make_optimizer, loss_fn
        self.train_loader, self.val_loader, self.lr_schedule = train_loader, val_loader, lr_schedule
        self.amp_dtype, self.measure_at = amp_dtype, measuring_steps(budget_steps)
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError("the model has no parameters, so there is nothing to decay")
        self.device = parameter.device
        self.generators = generators_of(train_loader) + generators_of(val_loader)
        self.arms: dict[float, _Arm] = {}
        self.active: _Arm | None = None
        self.initial_weights = _copy_of(model)
        self.initial_modes = [(module, module.training) for module in model.modules()]
        self.initial_grads = [(p, p.grad) for p in model.parameters()]
        self.initial_randomness = randomness(self.generators)

    def probe(self, metric: str) -> Callable[[float, int], tuple[list[float], list[float]]]:
        """The function `forecast` asks: extend an arm and return its curve so far."""

        def ask(weight_decay: float, steps: int) -> tuple[list[float], list[float]]:
            arm = self._swap_in(weight_decay)
            try:
                arm.rows += self._advance(arm, steps)
            except DivergedError as error:
                arm.rows += [*error.rows, {"step": error.step + 1.0, f"validation_{metric}": math.nan}]
            arm.step = steps
            return [row["step"] for row in arm.rows], [row[f"validation_{metric}"] for row in arm.rows]

        return ask

    def restore(self) -> None:
        """Put back weights, buffers, modes, gradients, and every random generator; drop the arms."""
        self.active = None
        self.arms.clear()  # their iterators refer back to here: left to the garbage collector, workers would linger
        self._load(self.initial_weights)
        for module, mode in self.initial_modes:
            module.training = mode
        for parameter, grad in self.initial_grads:
            parameter.grad = grad
        set_randomness(self.initial_randomness, self.generators)

    def _swap_in(self, weight_decay: float) -> _Arm:
        arm = self.arms.get(weight_decay)
        if arm is not None and arm is self.active:
            return arm
        if self.active is not None:
            self.active.weights, self.active.randomness = _copy_of(self.model), randomness(self.generators)
        if arm is None:
            arm = self._new_arm(weight_decay)
        else:
            self._load(arm.weights)
            set_randomness(arm.randomness, self.generators)
        self.active = arm
        return arm

    def _new_arm(self, weight_decay: float) -> _Arm:
        self._load(self.initial_weights)
        set_randomness(self.initial_randomness, self.generators)
        for parameter, _ in self.initial_grads:
            parameter.grad = None  # or backward would add to the caller's gradients where the optimiser zeroes none
        optimizer = self.make_optimizer(self.model, weight_decay)
        if any(optimizer is other.optimizer for other in self.arms.values()):
            raise ValueError("make_optimizer handed out the same optimiser twice; build a new one at each call")
        scaler = torch.amp.GradScaler(self.device.type) if self._scales() else None
        arm = _Arm(optimizer, map(self._to_device, endless(_unshared(self.train_loader))), scaler)
        self.arms[weight_decay] = arm
        return arm

    def _advance(self, arm: _Arm, stop: int) -> list[dict[str, float]]:
        return train(
            self.model,
            arm.batches,
            self.loss_fn,
            arm.optimizer,
            start=arm.step,
            stop=stop,
            lr_schedule=self.lr_schedule,
            evaluate=self._evaluate,
            measure_at=(*self.measure_at, stop),
            autocast=self._autocast,
            scaler=arm.scaler,
        )

    def _evaluate(self, model: torch.nn.Module) -> tuple[float, float]:
        state = randomness(self.generators)  # a loader draws a seed whenever it starts, shuffling or not
        try:
            with self._autocast():
                return evaluate(model, map(self._to_device, self.val_loader), self.loss_fn, ranks.group_of(self.model))
        finally:
            set_randomness(state, self.generators)

    def _to_device(self, batch: Any) -> Any:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not (is_pair and all(isinstance(part, torch.Tensor) for part in batch)):
            got = f"({', '.join(type(part).__name__ for part in batch)})" if is_pair else type(batch).__name__
            raise ValueError(
                f"a loader must yield pairs of tensors (inputs, target), got {got}; wrap it, or call decaycast.forecast "
                "with a probe of your own"
            )
        return tuple(part.to(self.device, non_blocking=True) for part in batch)

    def _autocast(self) -> Any:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _load(self, tensors: dict[str, Any]) -> None:
        state, hidden = tensors["state"], tensors["hidden"]
        self.model.load_state_dict(state)
        buffers = dict(self.model.named_buffers())
        for name, value in hidden.items():
            if not torch.equal(buffers[name], value):  # constants may be views that cannot be written to
                buffers[name].copy_(value)

    def _scales(self) -> bool:
        return self.amp_dtype is torch.float16 and self.device.type == "cuda"


def _copy_of(model: torch.nn.Module) -> dict[str, Any]:
    state = model.state_dict()  # which leaves out buffers registered with persistent=False
    hidden = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    return copy.deepcopy({"state": state, "hidden": hidden})


def _unshared(loader: Any) -> Any:
    """A loader with persistent workers has one iterator for all its users: each arm takes a copy with its own."""
    if not getattr(loader, "persistent_workers", False):
        return loader
    own = copy.copy(loader)
    own._iterator = None
    return own
