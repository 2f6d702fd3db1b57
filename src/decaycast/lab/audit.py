"""What a training recipe does with its weight decay, without training: e-folds, relaxation time, rules, and who decays."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from decaycast.core.schedule import whole
from decaycast.core.timescale import LearningRate, efolds
from decaycast.lab.recipes.recipe import Facts
from decaycast.lab.recipes.rules import Plan, Said, disagreements, rules, usual_weight_decay
from decaycast.methods.l2 import transfer

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The time scale of a recipe: E e-folds over the run, tau = 1/E of the run, and what that usually means."""

    efolds: float
    tau: float | None
    advice: str
    usual_weight_decay: float | None
    """The weight decay that would spend 1.3 e-folds, the zero-cost guess; None where momentum cannot shrink that fast."""

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
        usual_weight_decay=usual_weight_decay(recipe),
    )


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


# with everything that is known of the recipe

MOST_STEPS = 50_000_000
COUNTS = (
    "samples",
    "tokens",
    "parameters",
    "sequence_length",
    "new_steps",
    "new_batch_size",
    "new_samples",
    "width_factor",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The audit of a whole recipe: what it is, its time scale, what the rules say, and what was assumed."""

    plan: Plan
    source: str
    audit: Audit
    tau_epochs: float | None
    """AdamW's time scale 1/(lr*lambda) at the peak lr, in epochs; None where it is not known."""
    batch: dict[str, float] | None
    """Tokens per step of the recipe, and what Power Lines hold best and critical; None where they are not known."""
    rules: list[Said]
    disagreements: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the rates of the run are left out."""
        recipe = {key: value for key, value in asdict(self.plan).items() if key != "lr" and value is not None}
        return {
            **self.audit.to_dict(),
            "source": self.source,
            "recipe": recipe,
            "tau_epochs": self.tau_epochs,
            "batch": self.batch,
            "rules": [asdict(said) for said in self.rules],
            "disagreements": self.disagreements,
            "notes": self.notes,
        }


def audit_facts(facts: Facts, *, convention: str | None = None, **counts: float | None) -> Report:
    """Audit what is known of a recipe.

    Args:
        facts: as read from a file or given as options.
        convention: what `weight_decay` means; default: what the optimiser is known to mean by it.
        counts: the numbers called `COUNTS`, each > 0 or None: samples per epoch, tokens of the run, model parameters, tokens per
            sequence, and the run to carry the weight decay to (steps, batch size, samples; width as a factor).

    Raises:
        ValueError: lr, weight decay or steps are missing (the message names the options), or a number makes no sense.
    """
    for name, value in counts.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number > 0, got {value}")
    plan = _plan(facts, convention, counts)
    found = audit(weight_decay=plan.weight_decay, **plan.recipe)
    said = rules(plan)
    return Report(
        plan=plan,
        source=facts.source,
        audit=found,
        tau_epochs=_tau_epochs(plan),
        batch=_batch(plan),
        rules=said,
        disagreements=disagreements(said),
        notes=list(facts.notes),
    )


def _plan(facts: Facts, convention: str | None, counts: dict[str, float | None]) -> Plan:
    samples = counts.get("samples")
    per_epoch = None if samples is None else facts.steps_per_epoch(samples)
    steps = facts.steps
    if steps is None and facts.epochs is not None and per_epoch is not None:
        steps = math.ceil(facts.epochs * per_epoch)
    missing = _missing(facts, steps)
    if missing:
        raise ValueError(f"the recipe ({facts.source}) lacks {'; '.join(missing)}")
    assert facts.lr is not None
    assert facts.weight_decay is not None
    assert steps is not None
    steps = whole("steps", steps, least=1)
    if steps > MOST_STEPS:
        raise ValueError(
            f"{steps:,} optimiser steps are more than {MOST_STEPS:,}: are these samples or tokens? Give "
            "steps = samples / batch size"
        )
    if convention is None:
        convention = facts.convention(facts.optimizer or "") if facts.convention else "sgd"
    return Plan(
        lr=facts.rates_for(steps),
        peak=facts.lr,
        weight_decay=facts.weight_decay,
        steps=steps,
        momentum=facts.momentum if convention == "sgd" else 0.0,
        convention=convention,
        schedule=facts.schedule,
        batch_size=facts.batch_size,
        steps_per_epoch=per_epoch,
        **counts,
    )


def _missing(facts: Facts, steps: int | None) -> list[str]:
    """What the audit cannot do without, each with the option that gives it."""
    missing = ["the learning rate: --lr"] if facts.lr is None else []
    missing += ["the weight decay: --weight-decay"] if facts.weight_decay is None else []
    if steps is None and facts.epochs is None:
        missing.append("the length of the run: --steps")
    elif steps is None:
        batch = "" if facts.batch_size else " and --batch-size"
        missing.append(f"the steps of its {facts.epochs:g} epochs: --samples (per epoch){batch}, or --steps")
    return missing


def _tau_epochs(plan: Plan) -> float | None:
    if plan.convention != "decoupled" or plan.steps_per_epoch is None or plan.weight_decay == 0 or plan.peak == 0:
        return None
    return transfer.tau_epoch(plan.peak, plan.weight_decay, plan.steps_per_epoch)


def _batch(plan: Plan) -> dict[str, float] | None:
    """Power Lines on the batch size, for a language model."""
    tokens = plan.tokens or plan.seen_tokens
    if plan.parameters is None or plan.batch_size is None or plan.sequence_length is None or tokens is None:
        return None
    return {
        "tokens": transfer.in_tokens(plan.batch_size, "sequences", plan.sequence_length),
        "optimal_tokens": transfer.optimal_batch(tokens),
        "critical_tokens": transfer.critical_batch(tokens),
    }


# which parameters decay


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
