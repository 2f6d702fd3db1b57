"""E-folds: the one quantity in which every weight decay can be compared.

Conventions of this file. The optimiser shrinks weights by a relative amount r per optimiser step, all else being equal;
E = sum_t r_t is the number of *e-folds* of decay over a run and tau = 1/E the relaxation time as a fraction of it.
`weight_decay` (lambda) is what the named optimiser calls so; torch adds lambda*w to the gradient, that is, the penalty is
(lambda/2)*||w||^2. Rates are per optimiser step (after gradient accumulation), never per micro-batch or epoch.

==================  ==========================================  ===========================================
convention          who                                          r per step
==================  ==========================================  ===========================================
``"sgd"``           torch SGD, coupled L2, momentum b, damp. d   min(lr*lambda*(1-d)/(1-b), -log(b)/2)
``"decoupled"``     AdamW, Muon, ``decoupled_weight_decay``      lr*lambda
``"relative"``      Composer's decoupled optimisers              (lr/lr_0)*lambda
``"corrected"``     timm's ``*c`` optimisers, AdamC              (lr**2/lr_max)*lambda
==================  ==========================================  ===========================================

Heavy ball: the first expression holds while the decay is slow against the momentum buffer, lr*lambda < (1-sqrt(b))**2;
beyond, the weights oscillate inside an envelope that shrinks by sqrt(b) per step however large lambda is. The cap
-log(b)/2 is that envelope's rate: the largest shrink heavy ball can deliver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from decaycast.core.names import choose
from decaycast.core.schedule import one_number, whole

LearningRate = float | Sequence[float] | np.ndarray | Callable[[int], float]
CONVENTIONS = ("sgd", "decoupled", "relative", "corrected")


def shrink_rate(
    lr: float | np.ndarray, weight_decay: float | np.ndarray, *, momentum: float = 0.0, dampening: float = 0.0
) -> np.ndarray:
    """Relative shrink r per step of coupled L2 in (heavy-ball) SGD; broadcasts over `lr` and `weight_decay`.

    r = min(lr*lambda*(1-d)/(1-b), -log(b)/2); see the head of this file.
    """
    quasi_static = np.asarray(lr, float) * weight_decay * (1.0 - dampening) / (1.0 - momentum)
    return np.minimum(quasi_static, _momentum_cap(momentum))


def efolds(
    *,
    lr: LearningRate,
    weight_decay: float,
    steps: int,
    momentum: float = 0.0,
    convention: str = "sgd",
) -> float:
    """E-folds of decay over a run, E = sum_t r_t.

    Args:
        lr: learning rate; a number, one value per step, or a function of the 0-based step.
        weight_decay: lambda >= 0, in the optimiser's own convention.
        steps: number of optimiser steps, >= 1.
        momentum: heavy-ball coefficient in [0, 1); used by ``convention="sgd"`` only.
        convention: one of `CONVENTIONS`, the table at the head of this file.

    Returns:
        E >= 0 (dimensionless). exp(-E) is what remains of a weight that receives no gradient.

    Raises:
        ValueError: a negative or non-finite number, no steps, a sequence of the wrong length, an unknown convention.

    Source: time scale of L2, Lewkowycz & Gur-Ari 2020, sec. 2 (t* ~ 1/(lr*lambda)); heavy ball derived.

    >>> round(efolds(lr=0.02, weight_decay=0.2, steps=32, momentum=0.9), 6)
    1.28
    """
    weight_decay = _number("weight_decay", weight_decay)
    rates = learning_rates(lr, steps)
    with np.errstate(over="ignore"):
        spent = float(_rates(rates, weight_decay, momentum, convention).sum())
    if not math.isfinite(spent):
        raise ValueError(
            f"lr and weight_decay multiply to more than a float holds (weight_decay {weight_decay:g}); check units"
        )
    return spent


def weight_decay_for(
    *,
    efolds: float,
    lr: LearningRate,
    steps: int,
    momentum: float = 0.0,
    convention: str = "sgd",
) -> float:
    """The weight decay that spends `efolds` over the run: the inverse of `efolds`, same arguments.

    Raises:
        ValueError: as `efolds`; also when the learning rate is zero throughout, or when heavy ball cannot shrink
            weights that much in so few steps.

    >>> round(weight_decay_for(efolds=1.28, lr=0.02, steps=32, momentum=0.9), 6)
    0.2
    """
    efolds = _number("efolds", efolds)
    rates = learning_rates(lr, steps)
    per_decay = _rates(rates, 1.0, 0.0, convention)
    cap = math.inf
    if convention == "sgd":
        momentum = _momentum(momentum)
        per_decay = per_decay / (1.0 - momentum)
        cap = _momentum_cap(momentum)
    if efolds == 0:
        return 0.0
    if per_decay.sum() == 0:
        raise ValueError(
            "the learning rate is zero at every step, so no weight decay has an effect; give a positive lr"
        )
    with np.errstate(over="ignore"):
        found = _solve_capped(per_decay, cap, efolds)
    if not math.isfinite(found):
        raise ValueError(
            f"lr is so small that {efolds:g} e-folds need a weight decay beyond what a float holds; check units"
        )
    return found


def learning_rates(lr: LearningRate, steps: int) -> np.ndarray:
    """The learning rate of each of `steps` optimiser steps, shape (steps,), checked to be finite and >= 0."""
    steps = whole("steps", steps, least=1)
    if callable(lr):
        values = np.array([one_number(lr(step)) for step in range(steps)])
    elif np.ndim(lr) == 0:
        values = np.full(steps, one_number(lr))
    else:
        values = np.asarray(lr, dtype=float)
        if values.shape != (steps,):
            raise ValueError(f"lr has shape {values.shape}, but the run has {steps} steps; give one value per step")
    if not np.isfinite(values).all() or (values < 0).any():
        worst = lr if isinstance(lr, str) else values[~(np.isfinite(values) & (values >= 0))][0]
        raise ValueError(f"lr must be finite and >= 0 at every step, got {worst}")
    return values


def effective_rate(optimizer: Any) -> list[float]:
    """Shrink rate r of each parameter group per optimiser step, at the current learning rate.

    Args:
        optimizer: a torch optimiser: SGD, Adam(decoupled_weight_decay=True), AdamW, NAdam/RAdam with
            ``decoupled_weight_decay=True``, Muon; or any whose groups say ``decoupled_weight_decay``. AdamW and Lion of timm
            count with their corrected decay, where a group asks for it.
            Groups without decay give 0.0 whatever the optimiser.

    Returns:
        One float >= 0 per group.

    Raises:
        ValueError: L2 is coupled into an adaptive optimiser (Adam and kin divide lambda*w by the root mean square of
            the gradient, so there is no fixed shrink), or the optimiser's convention is not known.
    """
    return [group_rate(optimizer, group) for group in optimizer.param_groups]


def group_rate(optimizer: Any, group: dict[str, Any]) -> float:
    """`effective_rate` of one parameter group."""
    weight_decay = float(group.get("weight_decay", 0.0))
    lr = float(group["lr"])
    if weight_decay == 0:
        return 0.0
    if group_convention(optimizer, group) == "decoupled":
        return lr * weight_decay * _correction(group)
    momentum, dampening = _heavy_ball(group)
    return float(shrink_rate(lr, weight_decay, momentum=momentum, dampening=dampening))


def shrink_gain(optimizer: Any, group: dict[str, Any]) -> float:
    """What lr*weight_decay is multiplied with to give the shrink per step of this group while that is slow.

    1 for decoupled decay, lr/lr_max where it is corrected (timm), (1-d)/(1-b) for SGD with momentum b and dampening d. Errors
    as `effective_rate`.
    """
    if group_convention(optimizer, group) == "decoupled":
        return _correction(group)
    momentum, dampening = _heavy_ball(group)
    return (1.0 - dampening) / (1.0 - momentum)


def _correction(group: dict[str, Any]) -> float:
    """lr/lr_max for groups that say ``corrected_weight_decay``, as timm's do; else 1."""
    if not group.get("corrected_weight_decay"):
        return 1.0
    if "max_lr_snapshot" not in group:
        raise ValueError(
            "this group says corrected_weight_decay but not the largest learning rate it is measured against "
            '(max_lr_snapshot, as timm keeps it); compute the rate with efolds(convention="corrected") instead'
        )
    return float(group["lr"]) / float(group["max_lr_snapshot"])


def _heavy_ball(group: dict[str, Any]) -> tuple[float, float]:
    momentum = float(group.get("momentum", 0.0))
    # torch ignores dampening when there is no momentum buffer
    return momentum, float(group.get("dampening", 0.0)) if momentum else 0.0


_ALWAYS_DECOUPLED = {"AdamW", "Muon", "Lion"}
_ADAPTIVE = {"Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD", "SparseAdam"}


def group_convention(optimizer: Any, group: dict[str, Any]) -> str:
    """``"sgd"`` or ``"decoupled"``: what `weight_decay` means in this group; raises ValueError where it has no rate."""
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    if group.get("decoupled_weight_decay") or any(name in _ALWAYS_DECOUPLED for name in names):
        return "decoupled"
    if any(name in _ADAPTIVE for name in names):
        raise ValueError(
            f"{names[0]} couples weight decay into an adaptive step, so weights have no fixed shrink rate: the decay of "
            "each weight depends on its gradients. Use AdamW, or decoupled_weight_decay=True where the optimiser has it"
        )
    if "SGD" in names:
        return "sgd"
    raise ValueError(
        f"what weight_decay means in {names[0]} is not known; compute the rate with efolds(convention=...) instead, "
        f"one of {', '.join(CONVENTIONS)}"
    )


def _rates(lrs: np.ndarray, weight_decay: float, momentum: float, convention: str) -> np.ndarray:
    choose(convention, CONVENTIONS, "convention")
    if convention == "sgd":
        momentum = _momentum(momentum)
        return shrink_rate(lrs, weight_decay, momentum=momentum)
    if convention == "decoupled":
        return lrs * weight_decay
    reference = lrs[0] if convention == "relative" else lrs.max()
    if reference == 0:
        raise ValueError(f"convention {convention!r} divides by a learning rate that is zero; start from a positive lr")
    return lrs / reference * weight_decay if convention == "relative" else lrs**2 / reference * weight_decay


def _solve_capped(per_decay: np.ndarray, cap: float, target: float) -> float:
    """Solve sum_t min(lambda*a_t, cap) = target for lambda; exact, the left side being piecewise linear."""
    ordered = np.sort(per_decay[per_decay > 0])[::-1]
    if math.isfinite(cap) and target >= cap * len(ordered):
        raise ValueError(
            f"heavy ball shrinks weights by at most {cap:.4g} e-folds per step, {cap * len(ordered):.4g} over "
            f"{len(ordered)} steps with a positive lr, so {target:.4g} e-folds are out of reach; use less momentum or "
            "more steps"
        )
    tail = ordered[::-1].cumsum()[::-1]  # sum of a over the steps that are not capped when the first i are
    for capped in range(len(ordered)):
        weight_decay = (target - (cap * capped if capped else 0.0)) / tail[capped]
        if weight_decay * ordered[capped] <= cap:
            return float(weight_decay)
    raise AssertionError("unreachable: the target is below the cap's total")


def _momentum_cap(momentum: float) -> float:
    return -0.5 * math.log(momentum) if momentum > 0 else math.inf


def _momentum(value: float) -> float:
    number = one_number(value)
    if not 0 <= number < 1:
        raise ValueError(f"momentum must be in [0, 1), got {value}")
    return number


def _number(name: str, value: float) -> float:
    number = one_number(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return number
