"""Rules that carry a weight decay from one training to another, or name one outright: numbers in, numbers out.

Conventions of this file. `weight_decay` (lambda) is torch's; for AdamW and kin the shrink per step is lr*lambda. `lr` (eta) is
the rate the rule's authors mean, the *peak* of a schedule unless said otherwise. Batch B is what one optimiser step sees, data
D what the whole run sees, T = D/B the steps; B and D are in **one unit**. tau is a time scale:

    tau_iter = 1/(eta*lambda) steps      tau_epoch = tau_iter/M, M steps per epoch      tau = tau_iter/T, fraction of the run

With a schedule, e-folds sum the rates step by step, so E = 1/tau only where the rate is constant: a linear decay to zero spends
half of 1/tau(peak). Everything broadcasts over numpy arrays; a number gives a float.
"""

from __future__ import annotations

import numpy as np

from decaycast.core.names import choose
from decaycast.core.schedule import whole
from decaycast.core.timescale import LearningRate, learning_rates
from decaycast.methods.l2.checked import Values, at_least_zero, momentum_like, plain, positive
from decaycast.methods.l2.language_models import (
    OutsideFittedRange,
    critical_batch,
    in_tokens,
    optimal_batch,
    power_lines,
    power_lines_weight_decay,
)
from decaycast.methods.l2.recipe import Recipe, convert

__all__ = [
    "OutsideFittedRange",
    "Recipe",
    "across_batch",
    "across_budget",
    "across_data",
    "across_width",
    "convert",
    "critical_batch",
    "in_tokens",
    "nanochat_rule",
    "normalised_weight_decay",
    "optimal_batch",
    "power_lines",
    "power_lines_weight_decay",
    "rotation_adamw",
    "rotation_sgd",
    "tau_epoch",
    "tau_iter",
    "weight_decay_from_normalised",
    "weight_decay_from_tau",
]

PARAMETRISATIONS = ("mup", "standard")


def weight_decay_from_tau(tau: Values, lr: LearningRate, steps: int) -> Values:
    """The decoupled weight decay with time scale tau: lambda = 1/(tau*sum of lr), for a number lr 1/(tau*lr*steps).

    Args:
        tau: fraction of the run, > 0.
        lr: a number, one value per step, or a function of the 0-based step. For tau of `power_lines` give the peak, a number.
        steps: optimiser steps of the run, >= 1.

    Returns:
        lambda in AdamW's convention, of tau's shape.

    Raises:
        ValueError: tau is not positive, lr is negative or zero throughout, or steps is no whole number >= 1.

    Source: tau = 1/(lr*lambda*steps), Wang & Aitchison 2025 (arXiv 2405.13698); the sum is the same for a rate that moves.

    Example:
        >>> round(weight_decay_from_tau(0.25, 1e-3, 10_000), 6)
        0.4
    """
    single = not callable(lr) and np.ndim(lr) == 0
    spent = learning_rates(lr, 1)[0] * whole("steps", steps, least=1) if single else learning_rates(lr, steps).sum()
    if spent == 0:
        raise ValueError(
            "the learning rate is zero at every step, so no weight decay has an effect; give a positive lr"
        )
    return plain(1.0 / (positive("tau", tau) * spent))


# AdamW's time scale in epochs, and what follows from keeping it


def tau_iter(lr: Values, weight_decay: Values) -> Values:
    """AdamW's time scale in optimiser steps: 1/(lr*lambda), how far back its weights average their updates.

    Args:
        lr: learning rate > 0.
        weight_decay: lambda > 0, decoupled.

    Returns:
        Optimiser steps, of the broadcast shape.

    Raises:
        ValueError: a number that is not positive and finite.

    Source: Wang & Aitchison 2025 (arXiv 2405.13698): AdamW's weights are an exponential moving average of its updates.

    Example:
        >>> round(tau_iter(1e-3, 0.1), 6)
        10000.0
    """
    return plain(1.0 / (positive("lr", lr) * positive("weight_decay", weight_decay)))


def tau_epoch(lr: Values, weight_decay: Values, steps_per_epoch: Values) -> Values:
    """AdamW's time scale in epochs: 1/(lr*lambda*M).

    Args:
        lr: learning rate > 0.
        weight_decay: lambda > 0, decoupled.
        steps_per_epoch: M > 0, optimiser steps.

    Returns:
        Epochs, of the broadcast shape. Its best value hardly moves with batch, data and width, in the source's experiments.

    Raises:
        ValueError: a number that is not positive and finite.

    Source: Wang & Aitchison 2025 (arXiv 2405.13698); ResNet-18 and ViT on CIFAR-10 and ImageNet, a small GPT on text.

    Example:
        >>> round(tau_epoch(1e-3, 0.1, 500), 6)
        20.0
    """
    return plain(tau_iter(lr, weight_decay) / positive("steps_per_epoch", steps_per_epoch))


def across_batch(weight_decay: Values, batch: Values, new_batch: Values) -> Values:
    """Weight decay at another batch size, tau_epoch and lr kept: lambda*new_batch/batch.

    Args:
        weight_decay: lambda >= 0, tuned at `batch`; decoupled.
        batch: samples (or tokens) per optimiser step > 0.
        new_batch: the same unit, > 0.

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: a number outside its range.

    Source: Wang & Aitchison 2025; for language models at fixed size and data also Bergsma et al. 2025. lr stays: change
    lambda rather than lr. Not far beyond `critical_batch`.

    Example:
        >>> round(across_batch(0.1, 256, 1024), 6)
        0.4
    """
    return plain(
        at_least_zero("weight_decay", weight_decay) * positive("new_batch", new_batch) / positive("batch", batch)
    )


def across_data(weight_decay: Values, samples: Values, new_samples: Values) -> Values:
    """Weight decay for another data-set size, tau_epoch, lr and batch kept: lambda*samples/new_samples.

    Arguments, returns and errors as `across_batch`, with samples per epoch. It does not depend on the number of epochs; equal
    e-folds do (`across_budget`), and the two agree where that number stays.

    Source: Wang & Aitchison 2025 (arXiv 2405.13698).

    Example:
        >>> round(across_data(0.1, 50_000, 200_000), 6)
        0.025
    """
    return plain(
        at_least_zero("weight_decay", weight_decay)
        * positive("samples", samples)
        / positive("new_samples", new_samples)
    )


def across_width(weight_decay: Values, width: Values, new_width: Values, parametrisation: str = "mup") -> Values:
    """Weight decay for another width with lr*lambda kept: muP lowers hidden lr as 1/width, so lambda grows as width.

    Args:
        weight_decay: lambda >= 0, tuned at `width`; decoupled.
        width: > 0.
        new_width: > 0.
        parametrisation: "mup" (hidden matrices get lr*width/new_width), or "standard" (lr, and so lambda, stay).

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: a number outside its range, an unknown parametrisation.

    Source: Wang & Aitchison 2025 (arXiv 2405.13698): with lambda left alone, muP's transfer of the lr breaks. Implementations
    that take lr out of the decay (mup's `decoupled_wd=True`) already do this.

    Example:
        >>> round(across_width(0.1, 256, 1024), 6)
        0.4
    """
    ratio = positive("new_width", new_width) / positive("width", width)
    kept = choose(parametrisation, PARAMETRISATIONS, "parametrisation") == "standard"
    return plain(at_least_zero("weight_decay", weight_decay) * (np.ones_like(ratio) if kept else ratio))


# the length of the run


def across_budget(weight_decay: Values, steps: Values, new_steps: Values) -> Values:
    """Weight decay for a longer or shorter run at equal e-folds: lambda*steps/new_steps.

    Exact for every schedule whose shape is stretched with the run, below heavy ball's cap; `convert` does the others.

    Args:
        weight_decay: lambda >= 0, tuned at `steps`; any convention.
        steps: optimiser steps > 0.
        new_steps: optimiser steps > 0.

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: a number outside its range.

    Source: Lewkowycz & Gur-Ari 2020 (arXiv 2006.08643): the time to the best accuracy is c/lambda, in networks that fit
    their data.

    Example:
        >>> round(across_budget(5e-4, 100, 400), 9)
        0.000125
    """
    return plain(
        at_least_zero("weight_decay", weight_decay) * positive("steps", steps) / positive("new_steps", new_steps)
    )


def weight_decay_from_normalised(normalised: Values, *, batch: Values, samples: Values, epochs: Values) -> Values:
    """Loshchilov & Hutter's lambda from their normalised one: lambda_norm*sqrt(b/(B*T)).

    Their lambda is the shrink per step at full rate, not multiplied with lr: ``convention="relative"`` of `dc.efolds`; torch's
    AdamW needs it divided by its lr. Runs k times longer keep sqrt(k) times more e-folds.

    Args:
        normalised: lambda_norm >= 0.
        batch: b > 0, samples per optimiser step.
        samples: B >= b, samples per epoch.
        epochs: T > 0.

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: a number outside its range; a batch larger than the run.

    Source: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization (arXiv 1711.05101).

    Example:
        >>> round(weight_decay_from_normalised(0.025, batch=128, samples=50_000, epochs=100), 7)
        0.0001265
    """
    return plain(at_least_zero("normalised", normalised) * _normaliser(batch, samples, epochs))


def normalised_weight_decay(weight_decay: Values, *, batch: Values, samples: Values, epochs: Values) -> Values:
    """The inverse of `weight_decay_from_normalised`: lambda*sqrt(B*T/b); arguments and errors as there.

    Example:
        >>> round(normalised_weight_decay(1.264911e-4, batch=128, samples=50_000, epochs=100), 5)
        0.025
    """
    return plain(at_least_zero("weight_decay", weight_decay) / _normaliser(batch, samples, epochs))


def nanochat_rule(weight_decay: Values, *, batch: Values, new_batch: Values, data: Values, new_data: Values) -> Values:
    """The rule of nanochat: lambda*sqrt(new_batch/batch)*(data/new_data), for a learning rate that moves as sqrt(batch).

    With that rate the e-folds of the run stay what they were: the rule is `across_budget` in another dress.

    Args:
        weight_decay: lambda >= 0 of the reference run.
        batch: B > 0 of the reference run, tokens per optimiser step.
        new_batch: the same unit, > 0.
        data: D > 0 of the reference run, tokens.
        new_data: the same unit, > 0.

    Returns:
        lambda, of the broadcast shape.

    Raises:
        ValueError: a number outside its range.

    Source: karpathy/nanochat at 92d63d4e, where the matrices are trained with Muon and a cosine-shaped weight decay.

    Example:
        >>> round(nanochat_rule(0.28, batch=2**19, new_batch=2**21, data=1e9, new_data=4e9), 4)
        0.14
    """
    batches = positive("new_batch", new_batch) / positive("batch", batch)
    return plain(
        at_least_zero("weight_decay", weight_decay)
        * np.sqrt(batches)
        * positive("data", data)
        / positive("new_data", new_data)
    )


# rotation of normalised layers in equilibrium


def rotation_adamw(lr: Values, weight_decay: Values, beta1: Values = 0.9) -> Values:
    """Angle per step of a normalised layer under AdamW, in equilibrium: sqrt(2*lr*lambda*(1-beta1)/(1+beta1)) radians.

    Args:
        lr: > 0.
        weight_decay: lambda > 0.
        beta1: first Adam beta, in [0, 1).

    Returns:
        Radians per optimiser step, of the broadcast shape; small angles. Reached after about 1/(lr*lambda) steps.

    Raises:
        ValueError: a number outside its range.

    Source: Kosson et al. 2024, Rotational Equilibrium (arXiv 2305.17212): a random walk whose gradients are independent.

    Example:
        >>> round(rotation_adamw(1e-3, 0.1, 0.9), 5)
        0.00324
    """
    beta = momentum_like("beta1", beta1)
    return plain(np.sqrt(2 * (1 - beta) / (1 + beta) / tau_iter(lr, weight_decay)))


def rotation_sgd(lr: Values, weight_decay: Values, momentum: Values = 0.0) -> Values:
    """Angle per step of a scale-invariant layer under torch's SGD, in equilibrium: sqrt(2*lr*lambda/(1+momentum)) radians.

    Arguments, returns and errors as `rotation_adamw`; coupled weight decay, no dampening.

    Source: Kosson et al. 2024 (arXiv 2305.17212).

    Example:
        >>> round(rotation_sgd(0.1, 5e-4, 0.9), 5)
        0.00725
    """
    return plain(np.sqrt(2 / (1 + momentum_like("momentum", momentum)) / tau_iter(lr, weight_decay)))


def _normaliser(batch: Values, samples: Values, epochs: Values) -> np.ndarray:
    b, total = positive("batch", batch), positive("samples", samples) * positive("epochs", epochs)
    if np.any(b > total):
        raise ValueError(
            f"one batch ({batch}) is more than the whole run ({samples} samples x {epochs} epochs); check units"
        )
    return np.sqrt(b / total)
