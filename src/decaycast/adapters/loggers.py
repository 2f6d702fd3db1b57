"""What regularisation does along a run, to TensorBoard, MLflow, Weights & Biases or anything with a function `log`.

The protocol is one call, ``log(step, {key: value})``. Keys: ``reg/weight_decay``, of the group that decays most;
``reg/efolds``, the e-folds of decay spent before the step, of the group that shrinks fastest; ``reg/tau``, the relaxation time
at the rate r now in force as a fraction of the run, 1/(r * total_steps). What has no value is left out: `reg/tau` where
nothing decays, `reg/efolds` and `reg/tau` where the optimiser has no shrink rate (Adam with coupled L2).

Each framework's logger is something you have made already: nothing here opens a run, a file or a connection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from decaycast.adapters import require
from decaycast.core.decay import check_keys
from decaycast.core.hook import Hook, StepContext
from decaycast.core.schedule import check_multiplier, whole
from decaycast.core.timescale import group_rate

Log = Callable[[int, Mapping[str, float]], object]
WEIGHT_DECAY, EFOLDS, TAU = "reg/weight_decay", "reg/efolds", "reg/tau"


class DecayLog(Hook):
    """A hook, and a plain object with `step`, that adds up the e-folds of a run and logs every so many optimiser steps.

    Args:
        log: ``log(step, values)``; `tensorboard`, `mlflow`, `wandb` below, or a function of your own.
        total_steps: optimiser steps of the whole run, >= 1.
        every: log at steps that it divides, and at the last; >= 1.

    Raises:
        TypeError: `log` cannot be called.
        ValueError: no whole number >= 1.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.5)
    >>> reg = DecayLog(lambda step, values: print(step, values), total_steps=100, every=2)
    >>> for _ in range(3):
    ...     reg.step(optimizer)  # just before optimizer.step()
    0 {'reg/weight_decay': 0.5, 'reg/efolds': 0.0, 'reg/tau': 0.2}
    2 {'reg/weight_decay': 0.5, 'reg/efolds': 0.1, 'reg/tau': 0.2}
    """

    def __init__(self, log: Log, total_steps: int, every: int = 10) -> None:
        if not callable(log):
            raise TypeError(f"log must be a function of (step, values), got {type(log).__name__}")
        self.log, self.every = log, whole("every", every, least=1)
        self.total_steps = whole("total_steps", total_steps, least=1)
        self.steps, self.efolds = 0, 0.0

    def on_step(self, step: int, context: StepContext) -> None:
        """As a hook: count and log the update about to be made."""
        self.step(context.optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call once per optimiser step, just before the update; with gradient accumulation once per update."""
        rate = _rate(optimizer)
        if self.steps % self.every == 0 or self.steps == self.total_steps - 1:
            self.log(self.steps, self._values(optimizer, rate))
        self.steps += 1
        self.efolds += rate or 0.0

    def _values(self, optimizer: torch.optim.Optimizer, rate: float | None) -> dict[str, float]:
        values = {WEIGHT_DECAY: max(float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups)}
        if rate is not None:
            values[EFOLDS] = self.efolds
        if rate:
            values[TAU] = 1.0 / (rate * self.total_steps)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Steps counted and e-folds spent."""
        return {"steps": self.steps, "efolds": self.efolds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where the saved run stopped.

        Raises:
            ValueError: a state of something else.
        """
        check_keys(state, self.state_dict(), type(self).__name__)
        steps, efolds = whole("steps", state["steps"], least=0), check_multiplier("efolds", state["efolds"])
        self.steps, self.efolds = steps, efolds


def _rate(optimizer: torch.optim.Optimizer) -> float | None:
    """Shrink per step of the fastest group; None where the optimiser has none."""
    try:
        return max(group_rate(optimizer, group) for group in optimizer.param_groups)
    except ValueError:
        return None


def tensorboard(writer: Any) -> Log:
    """`log` into a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar(key, value, step)``.

    Raises:
        TypeError: something else.
    """
    add = _method(writer, "add_scalar", "a SummaryWriter of torch.utils.tensorboard")
    return lambda step, values: [add(key, value, step) for key, value in values.items()]


def mlflow(run_id: str | None = None) -> Log:
    """`log` into an MLflow run: the one named, or the active one.

    Raises:
        ImportError: MLflow is missing, or of a version that was not tested.
    """
    require("loggers", mlflow_skinny=">=3.1", mlflow=">=3.1")
    from mlflow import log_metrics  # pyright: ignore[reportMissingImports]

    return lambda step, values: log_metrics(dict(values), step=step, run_id=run_id)


def wandb(run: Any) -> Log:
    """`log` into what ``wandb.init()`` returned.

    A run has one step counter for all who log into it and drops what is behind it, so the optimiser step goes along as
    ``reg/step``, which becomes the axis of the keys ``reg/``.

    Raises:
        TypeError: something without ``log`` and ``define_metric``.
    """
    log, define = (_method(run, name, "a run, as wandb.init() returns it") for name in ("log", "define_metric"))
    define("reg/step", hidden=True)
    define("reg/*", step_metric="reg/step")
    return lambda step, values: log({**values, "reg/step": step})


def _method(owner: Any, name: str, wanted: str) -> Callable[..., Any]:
    method = getattr(owner, name, None)
    if not callable(method):
        raise TypeError(f"expected {wanted}, got {type(owner).__name__}, which has no {name}")
    return method
