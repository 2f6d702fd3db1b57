"""AutoL2: an L2 coefficient that lowers itself whenever training stops improving.

Source: Lewkowycz & Gur-Ari, "On the training dynamics of deep networks with L2 regularization" (NeurIPS 2020,
arXiv 2006.08643), sec. 1 and 4; details as in the authors' code (google/autol2).

Two clocks. ``clock="steps"`` is the paper's rule (`AutoL2Rule`), made for a constant learning rate. ``clock="efolds"`` is ours
(`BudgetRule`, derived in docs/autol2-schedules.md), made for any schedule: it spends a budget of e-folds.

Conventions. `AutoL2` writes the paper's L as torch's ``weight_decay``, the lambda of lambda*w added to the gradient, that
is, of the penalty (lambda/2)*||w||^2. The authors penalise with L2*||w||^2 (no 1/2) and average the cross-entropy over the k
classes as well, so their L2 is 2k times smaller than the same torch weight decay, and their learning rate k times larger
(`reference_units`). The defaults are the paper's numbers, taken as torch weight decay. The paper's schedule, step by step,
in torch's units is ``AutoL2(optimizer, start=2*k*0.1, refractory=2*k*0.1)`` with ``lr = eta/k``.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from decaycast.core import ranks
from decaycast.core.decay import WeightDecayController
from decaycast.core.hook import Hook, StepContext
from decaycast.core.names import choose
from decaycast.core.schedule import check_multiplier, whole
from decaycast.core.timescale import LearningRate, effective_rate, learning_rates, shrink_gain
from decaycast.methods.l2.budget import BudgetRule
from decaycast.methods.l2.rule import AutoL2Rule, Number, in_range

CLOCKS = ("steps", "efolds")


class AutoL2(WeightDecayController):
    """`AutoL2Rule` or, on the clock of e-folds, `BudgetRule` driving an optimiser's weight decay.

    The group with the largest initial weight decay gets the rule's coefficient; the others keep their ratio to it,
    and groups at 0 stay 0. So the sizes given to the optimiser matter only against each other. The constructor writes
    the first coefficient at once, as torch's schedulers do. The learning rate and the momentum buffers are never touched.

    Call `step` once per *optimiser* step (with gradient accumulation: once per update, with the mean loss and error
    of its micro-batches), between ``backward()`` and ``optimizer.step()``, with loss and error of that very batch:
    this is the paper's order, measured before the update. Called after ``optimizer.step()`` it does the same, each
    decay one step later.

    In data-parallel training (a process group of several ranks is up) every rank calls `step` with the numbers of its own
    batch. When `due`, AutoL2 averages them over the ranks, all of which then decide alike: ranks that decided on their own
    batches would decay at different steps, and their copies of the model drift apart. It refuses ranks whose steps, learning
    rates or settings differ. With ``reduce=False`` nothing is exchanged: for numbers that are means over the ranks already,
    and for ranks that each train a model of their own.

    ``clock="steps"``, the default, is the paper's rule with the paper's numbers; see the head of this file for its units.
    Its refractory period counts steps, and under a falling learning rate it does not match a tuned constant (stated in the
    paper). ``clock="efolds"`` is for learning-rate schedules: it needs no size of the weight decay, only the learning rate of
    the run. It reads the optimiser's learning rate at each step, so a rate that turns out lower than announced leaves a part
    of the budget unspent, and a higher one spends it sooner.

    Args:
        optimizer: torch optimiser in which weight decay has a fixed shrink rate (SGD, AdamW, ...), with at least one
            group that decays.
        start: first coefficient in the units of torch's weight decay [0.1]; for the clock of steps.
        factor, measure_every: as in `AutoL2Rule` and `BudgetRule`.
        refractory: for the clock of steps as in `AutoL2Rule` [0.1]; for the clock of e-folds in e-folds [0.4].
        clock: ``"steps"`` or ``"efolds"``. The arguments below belong to ``"efolds"``.
        budget_efolds: e-folds of decay to spend over the run [1.3, what the paper's own setting comes to]; the `efolds` of a
            `Forecast` fit.
        steps: optimiser steps of the run, >= 1.
        lr: learning rate of the run for the group that leads (it decays most, among equals the fastest): a number, one value
            per step or a function of the 0-based step; by default the rate that the optimiser has now, taken as constant.
        reduce: whether to average loss and error over all ranks of torch.distributed [True].

    Warns:
        UserWarning: `lr` is left out, and a learning-rate scheduler has already moved the rate (a warm-up, say).

    Raises:
        TypeError: not a torch optimiser.
        ValueError: a setting out of range or of the other clock; no group decays; weight decay coupled into an adaptive
            step (Adam); a learning rate that is zero throughout.

    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=5e-4)
    >>> scheduler = AutoL2(optimizer)
    >>> for _ in range(21):  # forward and backward would come first
    ...     scheduler.step(loss=1.0, error=0.5)
    ...     optimizer.step()
    >>> scheduler.get_last_wd()
    [0.01]
    >>> auto = AutoL2(optimizer, clock="efolds", budget_efolds=1.0, steps=1000)
    >>> round(auto.get_last_wd()[0], 9)  # 2 * 1.0 / (1000 * 0.1)
    0.02
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        start: float | None = None,
        factor: float = 10.0,
        measure_every: int = 10,
        refractory: float | None = None,
        *,
        clock: str = "steps",
        budget_efolds: float | None = None,
        steps: int | None = None,
        lr: LearningRate | None = None,
        reduce: bool = True,
    ) -> None:
        given = {"start": start, "budget_efolds": budget_efolds, "steps": steps, "lr": lr}
        _check_settings(given, clock)
        super().__init__(optimizer)
        effective_rate(optimizer)  # refuses an optimiser in which weight decay has no rate
        self._largest = max(self._initial, default=0.0)
        if self._largest == 0:
            raise ValueError(
                "every parameter group has weight_decay 0, so AutoL2 has nothing to set; give the groups that shall "
                "decay a positive weight_decay (only its ratio between groups matters)"
            )
        self.rule: AutoL2Rule | BudgetRule
        if steps is None:
            self.rule = AutoL2Rule(
                0.1 if start is None else start, factor, measure_every, 0.1 if refractory is None else refractory
            )
        else:
            horizon = self._horizon(lr, steps)
            self.rule = BudgetRule(
                1.3 if budget_efolds is None else budget_efolds,
                horizon,
                factor,
                0.4 if refractory is None else refractory,
                measure_every,
            )
        self._in_force = self.rule.coefficient
        self.steps, self.reduce = 0, reduce
        self._write()

    @property
    def due(self) -> bool:
        """Whether the next `step` will look at loss and error; otherwise they need not be computed."""
        return self.rule.due(self.steps)

    def step(self, loss: Number = None, error: Number = None) -> None:
        """Take in the batch of this optimiser step and set the weight decay in force for it.

        Args:
            loss: mean data loss of the batch, without any L2 term; a number or a zero-dimensional tensor.
            error: its share of wrong predictions, in [0, 1]. Both are read only when `due`.

        Raises:
            ValueError: as `AutoL2Rule.update`; the step then does not count. On all of several ranks: a number that is not
                finite on one of them, or steps, learning rates or settings that differ.
            RuntimeError: torchrun started several ranks, but there is no process group.
        """
        if self.reduce and self.due:
            loss, error = self._over_ranks(loss, error)
        before = self._in_force
        if isinstance(self.rule, BudgetRule):
            self._in_force = self.rule.update(self.steps, loss, error, self._rate_now())
        else:
            self._in_force = self.rule.update(self.steps, loss, error)
        self.steps += 1
        if self._in_force != before or self._stale():
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers (JSON-able), without the optimiser."""
        return {
            "steps": self.steps,
            "largest": self._largest,
            "in_force": self._in_force,
            "initial_weight_decay": list(self._initial),
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` and write the restored weight decay; before or after the optimiser's own state.

        Raises:
            ValueError: the state does not belong here (keys, number of groups, numbers); nothing is changed then.
        """
        initial = self._restored_initial(state, self.state_dict())
        largest, steps = in_range("saved largest", state["largest"]), whole("saved steps", state["steps"], least=0)
        if largest not in initial:
            raise ValueError(f"saved largest must be one of the saved initial_weight_decay {initial}, got {largest}")
        in_force = check_multiplier("saved in_force", state["in_force"])
        self.rule.load_state_dict(state["rule"])
        self._initial, self._largest, self.steps, self._in_force = initial, largest, steps, in_force
        self._write()

    def _over_ranks(self, loss: Number, error: Number) -> tuple[Number, Number]:
        group = ranks.world()
        if group is None:
            return loss, error
        state = self.state_dict()
        rule = state.pop("rule")
        same = {"AutoL2's steps": self.steps, "AutoL2's rule": rule, **ranks.settings_of(self.optimizer)}
        same["initial weight decay"] = state["initial_weight_decay"]
        return tuple(ranks.mean([loss, error], group, same=same))  # type: ignore[return-value]

    def _scaled(self, initial: float) -> float:
        return self._in_force * (initial / self._largest)

    def _leader(self) -> dict[str, Any]:
        """The group that gets the coefficient itself: largest initial weight decay, and among equals the fastest shrink.

        With layer-wise learning rates the slowest group would make all others overspend. A group added later may have a
        larger weight decay, but the coefficient goes on being that of the first leader.
        """
        groups = zip(self.optimizer.param_groups, self._initial, strict=False)
        return max((group for group, initial in groups if initial == self._largest), key=self._shrink_per_decay)

    def _shrink_per_decay(self, group: dict[str, Any]) -> float:
        return float(group["lr"]) * shrink_gain(self.optimizer, group)

    def _rate_now(self) -> float:
        return self._shrink_per_decay(self._leader())

    def _horizon(self, lr: LearningRate | None, steps: int) -> float:
        """Shrink per unit of weight decay, summed over the run."""
        group = self._leader()
        if lr is None:
            _warn_of_schedule(group)
        total = learning_rates(float(group["lr"]) if lr is None else lr, steps).sum()
        if total == 0:
            raise ValueError(
                "the learning rate is zero at every step, so no decay can be spent; give the run's own as lr"
            )
        return float(total) * shrink_gain(self.optimizer, group)


class AutoL2Hook(Hook):
    """`AutoL2` as a training hook; takes the settings of `AutoL2` by name, and the optimiser from the first step it sees.

    Raises:
        TypeError: an unknown setting (at once).
        ValueError: a setting out of range (at once); an optimiser that `AutoL2` refuses (at the first step).
    """

    def __init__(self, **settings: Any) -> None:
        # on a stand-in optimiser, so that wrong settings show before training and not at its first step
        AutoL2(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=1.0), **settings)
        self._settings = settings
        self.scheduler: AutoL2 | None = None
        self._saved: dict[str, Any] = {}

    def on_step(self, step: int, context: StepContext) -> None:
        """Measure the batch just used, when due, and set the weight decay of the update about to be made."""
        if self.scheduler is None:
            self.scheduler = AutoL2(context.optimizer, **self._settings)
            if self._saved:
                self.scheduler.load_state_dict(self._saved)
        due = self.scheduler.due
        self.scheduler.step(loss=context.loss if due else None, error=context.error() if due else None)

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state; empty before the first step."""
        return self.scheduler.state_dict() if self.scheduler else copy.deepcopy(self._saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`, at once or, where the optimiser is not known yet, at the first step."""
        if self.scheduler and state:
            self.scheduler.load_state_dict(state)
        else:
            self.scheduler, self._saved = None, copy.deepcopy(state)


def reference_units(eta: float, l2: float, classes: int) -> tuple[float, float]:
    """The paper's learning rate and L2 coefficient as torch SGD's: (lr, weight_decay) = (eta/k, 2*k*l2).

    The authors minimise (cross-entropy)/k + l2*||w||^2 with rate eta; torch minimises the cross-entropy with rate lr
    and adds weight_decay*w to its gradient. One step is the same, momentum included, and lr*weight_decay = 2*eta*l2.

    Args:
        eta: learning rate in the authors' code, > 0.
        l2: their coefficient, >= 0, on *all* parameters, biases and normalisation included.
        classes: k >= 1.

    Raises:
        ValueError: an argument outside its range.

    >>> lr, weight_decay = reference_units(eta=0.2, l2=1e-4, classes=10)
    >>> round(lr, 9), round(weight_decay, 9)
    (0.02, 0.002)
    """
    classes = whole("classes", classes, least=1)
    if not (math.isfinite(eta) and eta > 0 and math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"eta must be finite and > 0 and l2 finite and >= 0, got eta={eta}, l2={l2}")
    return eta / classes, 2 * classes * l2


def _warn_of_schedule(group: Mapping[str, Any]) -> None:
    """A rate that a scheduler has already moved is no constant: lambda would be off by their ratio."""
    now = float(group["lr"])
    usual = float(group.get("max_lr", group.get("initial_lr", now)))  # max_lr: torch's OneCycleLR and CyclicLR
    if now not in (0.0, usual):  # zero is refused by itself
        warnings.warn(
            f"the learning rate is {now:g} now but {usual:g} in its scheduler, and AutoL2 takes {now:g} for the whole run: the "
            f"weight decay will be off by up to {max(now, usual) / (min(now, usual) or math.nan):.3g} times. Give the run's "
            "rates as lr= (where a saved state is loaded next, this does not matter)",
            stacklevel=4,
        )


def _check_settings(given: Mapping[str, Any], clock: str) -> None:
    """Refuse settings that belong to the other clock: they would be ignored in silence."""
    choose(clock, CLOCKS, "clock")
    foreign = ("start",) if clock == "efolds" else ("budget_efolds", "steps", "lr")
    wrong = [name for name in foreign if given[name] is not None]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} cannot be given with clock={clock!r}; it belongs to the other clock")
    if clock == "efolds" and given["steps"] is None:
        raise ValueError("clock='efolds' needs steps, the optimiser steps of the run, and lr if it has a schedule")
