"""What a training recipe does with its weight decay, without training: e-folds, relaxation time, advice, and who decays."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from decaycast.core.timescale import LearningRate, efolds, weight_decay_for
from decaycast.methods.l2.forecast import PRIOR_EFOLDS

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The time scale of a recipe: E e-folds over the run, tau = 1/E of the run, and what that usually means."""

    efolds: float
    tau: float | None
    advice: str
    usual_weight_decay: float | None
    """The weight decay that would spend `PRIOR_EFOLDS`, the zero-cost guess; None where momentum cannot shrink that fast."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def audit(
    *, lr: LearningRate, weight_decay: float, steps: int, momentum: float = 0.0, convention: str = "sgd"
) -> Audit:
    """Audit a recipe; arguments as `decaycast.efolds`."""
    recipe: dict[str, Any] = {"lr": lr, "steps": steps, "momentum": momentum, "convention": convention}
    spent = efolds(weight_decay=weight_decay, **recipe)
    return Audit(
        efolds=spent,
        tau=1 / spent if spent > 0 else None,
        advice=_advice(spent),
        usual_weight_decay=_usual(recipe),
    )


def _usual(recipe: dict[str, Any]) -> float | None:
    if 0 < efolds(weight_decay=1e100, **recipe) <= PRIOR_EFOLDS:
        return None
    return weight_decay_for(efolds=PRIOR_EFOLDS, **recipe)


def _advice(spent: float) -> str:
    if spent == 0:
        return "no decay at all"
    if spent < 0.1:
        return "hardly any: weights keep more than 90 % of what they start with, so decay barely acts within this run"
    if spent < 0.5:
        return (
            "light: less than the 0.5 to 4 e-folds that usually come out best; a longer run or more decay would use it"
        )
    if spent <= 4:
        return "usual: 0.5 to 4 e-folds are what usually comes out best"
    if spent <= 20:
        return "strong: the initial weights are forgotten; right for runs in equilibrium, otherwise expect underfitting"
    return "very strong: most networks collapse towards zero here; check the unit of the weight decay"


@dataclass(frozen=True, kw_only=True)
class Decaying:
    """One parameter tensor and whether the optimiser decays it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    weight_decay: float


def parameter_table(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Decaying]:
    """Every parameter with its weight decay and its kind (weight, bias or normalisation), in the model's order.

    A parameter the optimiser does not hold has weight decay NaN: it is not trained at all.
    """
    decay = {id(p): float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]}
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    return [
        Decaying(
            name=name,
            shape=tuple(p.shape),
            kind="normalisation" if id(p) in norms else "bias" if p.ndim <= 1 else "weight",
            weight_decay=decay.get(id(p), math.nan),
        )
        for name, p in model.named_parameters()
    ]
