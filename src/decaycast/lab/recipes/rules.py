"""What each rule of `dc.transfer` says about a recipe, why others say nothing, and where they disagree.

A rule about *this run* names a weight decay outright. A rule about *the new run* carries the recipe's own weight decay to another
length, batch, data set or width, and takes the recipe as tuned. Rules are compared in e-folds: two of them may ask for different
learning rates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decaycast.core.timescale import efolds, weight_decay_for
from decaycast.methods.l2 import transfer
from decaycast.methods.l2.forecast import PRIOR_EFOLDS

THIS_RUN, NEW_RUN = "this run", "the new run"
MOVES = "--new-steps, --new-batch-size, --new-samples or --width-factor"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe with everything that is known of it, ready to be judged. Batch and samples in samples (for text: sequences)."""

    lr: np.ndarray
    peak: float
    weight_decay: float
    steps: int
    momentum: float = 0.0
    convention: str = "sgd"
    schedule: str = "constant"
    batch_size: float | None = None
    samples: float | None = None
    steps_per_epoch: float | None = None
    tokens: float | None = None
    parameters: float | None = None
    sequence_length: float | None = None
    new_steps: float | None = None
    new_batch_size: float | None = None
    new_samples: float | None = None
    width_factor: float | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What `dc.efolds` and `dc.weight_decay_for` need besides their own number."""
        return {"lr": self.lr, "steps": self.steps, "momentum": self.momentum, "convention": self.convention}

    def efolds(self, weight_decay: float, lr_factor: float = 1.0) -> float:
        """E-folds of this run with another weight decay, all rates times `lr_factor`."""
        return efolds(weight_decay=weight_decay, **{**self.recipe, "lr": self.lr * lr_factor})

    @property
    def seen_tokens(self) -> float | None:
        """Tokens the run sees, from steps, batch and sequence length; None where one is missing."""
        if self.batch_size is None or self.sequence_length is None:
            return None
        return self.steps * self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one rule says; without a weight decay, `why` is the reason for its silence."""

    rule: str
    about: str
    source: str
    why: str
    weight_decay: float | None = None
    efolds: float | None = None
    times_yours: float | None = None


@dataclass(frozen=True)
class Move:
    """From the recipe's run to the new one: factors of batch, samples per epoch, steps and width."""

    batch: float
    samples: float
    steps: float
    width: float

    @property
    def same(self) -> bool:
        """Nothing moves."""
        return self.batch == self.samples == self.steps == self.width == 1


Carry = Callable[
    [Plan, Move], tuple[float, float]
]  # the new weight decay, and the factor of the rates that goes with it


def rules(plan: Plan) -> list[Said]:
    """Every rule in turn; those that cannot speak say which fact is missing."""
    return [_paper(plan), _power_lines(plan), *(_carried(plan, *rule) for rule in _CARRIERS)]


def _paper(plan: Plan) -> Said:
    rule = "L2 paper"
    about: dict[str, Any] = {"about": THIS_RUN, "source": "Lewkowycz & Gur-Ari 2020"}
    usual = usual_weight_decay(plan.recipe)
    if usual is None:
        return Said(rule=rule, why="heavy ball cannot shrink weights that much in so few steps", **about)
    return _says(
        plan,
        rule,
        usual,
        f"{PRIOR_EFOLDS} e-folds, best in one setting (WRN-28-10 on CIFAR-10): a start, not a law",
        **about,
    )


def usual_weight_decay(recipe: dict[str, Any]) -> float | None:
    """The weight decay that spends `PRIOR_EFOLDS`; None where momentum cannot shrink that fast."""
    if 0 < efolds(weight_decay=1e100, **recipe) <= PRIOR_EFOLDS:
        return None
    return weight_decay_for(efolds=PRIOR_EFOLDS, **recipe)


def _power_lines(plan: Plan) -> Said:
    about: dict[str, Any] = {"about": THIS_RUN, "source": "Bergsma et al. 2025"}
    silence = _no_power_lines(plan)
    if silence:
        return Said(rule="Power Lines", why=silence, **about)
    assert plan.parameters is not None
    ratio = (plan.tokens or plan.seen_tokens or math.nan) / plan.parameters
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tau = transfer.power_lines(ratio)
    why = f"tau {tau:.3g} of the run, at the peak lr, for {ratio:.3g} tokens per parameter"
    if plan.weight_decay > 0 and plan.peak > 0:
        why += f" (yours is {1 / (plan.peak * plan.weight_decay * plan.steps):.3g})"
    if plan.schedule != "linear":
        why += f"; fitted with linear decay to zero, this schedule is {plan.schedule}"
    why = "; ".join([why, *(str(item.message) for item in caught)])
    return _says(plan, "Power Lines", transfer.weight_decay_from_tau(tau, plan.peak, plan.steps), why, **about)


def _no_power_lines(plan: Plan) -> str:
    """Why Power Lines do not apply, or nothing."""
    seen = plan.seen_tokens
    if plan.convention != "decoupled":
        return f"fitted for AdamW's decoupled decay; this recipe's is {plan.convention!r}"
    if plan.parameters is None:
        return "for language models; needs --parameters"
    if plan.tokens is None and seen is None:
        return "needs --tokens, or --sequence-length and --batch-size"
    if plan.tokens is not None and seen is not None and not 0.9 < plan.tokens / seen < 1.1:
        return (
            f"{plan.steps} steps of {plan.batch_size:g} sequences of {plan.sequence_length:g} tokens are {seen:.3g} tokens, not "
            f"{plan.tokens:.3g}: a unit is wrong, or data repeat, for which the law was not fitted"
        )
    return ""


# from this run to a new one


def move(plan: Plan) -> Move:
    """The factors of the new run; unless its steps are given, it keeps the number of epochs."""
    batch = plan.new_batch_size / plan.batch_size if plan.new_batch_size and plan.batch_size else 1.0
    samples = plan.new_samples / plan.samples if plan.new_samples and plan.samples else 1.0
    steps = plan.new_steps / plan.steps if plan.new_steps else samples / batch
    return Move(batch, samples, steps, plan.width_factor or 1.0)


def _carried(plan: Plan, rule: str, source: str, carry: Carry, decoupled: bool, why: str) -> Said:
    about: dict[str, Any] = {"rule": rule, "about": NEW_RUN, "source": source}
    moved = move(plan)
    silence = _no_carrying(plan, decoupled)
    if silence:
        return Said(why=silence, **about)
    new, lr_factor = carry(plan, moved)
    spent = moved.steps * plan.efolds(new, lr_factor)
    return Said(weight_decay=new, efolds=spent, times_yours=_ratio(new, plan.weight_decay), why=why, **about)


def _no_carrying(plan: Plan, decoupled: bool) -> str:
    """Why nothing is carried over, or nothing."""
    if plan.new_batch_size is not None and plan.batch_size is None:
        return "needs this run's --batch-size"
    if plan.new_samples is not None and plan.samples is None:
        return "needs this run's --samples"
    if move(plan).same:
        return f"needs the run to carry the weight decay to: {MOVES}"
    if plan.weight_decay == 0:
        return "there is no weight decay to carry over"
    if decoupled and plan.convention == "sgd":
        return "stated for decoupled decay; this recipe's is coupled"
    return ""


def _equal_efolds(plan: Plan, moved: Move) -> tuple[float, float]:
    return transfer.across_budget(plan.weight_decay, 1.0, moved.steps), 1.0


def _equal_tau_epoch(plan: Plan, moved: Move) -> tuple[float, float]:
    new = transfer.across_batch(plan.weight_decay, 1.0, moved.batch)
    new = transfer.across_data(new, 1.0, moved.samples)
    return transfer.across_width(new, 1.0, moved.width), 1.0 / moved.width


def _equal_normalised(plan: Plan, moved: Move) -> tuple[float, float]:
    # samples over batch is steps, which is all the rule looks at
    kept = transfer.normalised_weight_decay(plan.weight_decay, batch=1, samples=plan.steps, epochs=1)
    new_steps = max(1.0, plan.steps * moved.steps)
    return transfer.weight_decay_from_normalised(kept, batch=1, samples=new_steps, epochs=1), 1.0


def _nanochat(plan: Plan, moved: Move) -> tuple[float, float]:
    seen = moved.steps * moved.batch
    new = transfer.nanochat_rule(plan.weight_decay, batch=1.0, new_batch=moved.batch, data=1.0, new_data=seen)
    return new, math.sqrt(moved.batch)


_CARRIERS: tuple[tuple[str, str, Carry, bool, str], ...] = (
    ("equal e-folds", "Lewkowycz & Gur-Ari 2020", _equal_efolds, False, "same lr, schedule stretched with the run"),
    (
        "equal tau in epochs",
        "Wang & Aitchison 2025",
        _equal_tau_epoch,
        True,
        "same lr (hidden layers: divided by the width)",
    ),
    (
        "normalised decay",
        "Loshchilov & Hutter 2019",
        _equal_normalised,
        True,
        "same lr; falls as the root of the steps",
    ),
    ("nanochat", "karpathy/nanochat", _nanochat, True, "with the lr times the root of the batch, as there"),
)


# comparing


def disagreements(said: Sequence[Said]) -> list[str]:
    """For each run that two rules speak about: how far the lowest and the highest are apart, in words."""
    found = []
    for about in (THIS_RUN, NEW_RUN):
        speaking = [item for item in said if item.about == about and item.efolds]
        if len(speaking) < 2:
            continue
        low, *_, high = sorted(speaking, key=lambda item: item.efolds or 0.0)
        ratio = (high.efolds or 0.0) / (low.efolds or math.nan)
        words = f"{_name(low)} and {_name(high)}, a factor of {ratio:.2g}"
        if ratio < 1.05:
            found.append(f"on {about} the rules agree: {low.efolds:.3g} e-folds")
        elif ratio < 2:
            found.append(f"on {about} the rules differ little: {words}, less than such rules can tell apart")
        else:
            found.append(f"on {about} the rules disagree: {words}")
    return found


def _name(said: Said) -> str:
    return f"{said.rule} with {said.efolds:.3g} e-folds"


def _says(plan: Plan, rule: str, weight_decay: float, why: str, **about: Any) -> Said:
    return Said(
        rule=rule,
        why=why,
        weight_decay=weight_decay,
        efolds=plan.efolds(weight_decay),
        times_yours=_ratio(weight_decay, plan.weight_decay),
        **about,
    )


def _ratio(value: float, own: float) -> float | None:
    return value / own if own > 0 else None
