"""Self-distillation as a loop over whole trainings: fit, replace the labels by the fit's outputs, fit again.

Conventions of this file. `rounds` counts *fits*, as in `KernelSelfDistillation`: the first is the teacher, on the labels as
given; ``rounds=1`` is plain training, and ``rounds=3`` distils twice. With labels y and outputs f_t of fit t on the training
inputs, fit t + 1 gets

    y_{t+1} = m_t*y + (1 - m_t)*g(f_t)

m_t is the weight of the original labels (`mix`; 0 is pure self-distillation, and 1 - m_t is what the literature on mixing
calls xi). g is the identity, or softmax(f/T) where a temperature T is given. Each round starts anew, because `fit` makes a
new model each time it is called.

Source: Mobahi, Farajtabar & Bartlett 2020 (arXiv 2002.05715), section 3 (the rounds); Borup & Andersen 2021 (arXiv 2102.13088)
for the weight of the original labels; Hinton, Vinyals & Dean 2015 (arXiv 1503.02531) for the temperature.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from decaycast.methods.self_distill.progress import Progress, fingerprint

Values = Any
"""A numpy array or a torch tensor; whichever the labels are, everything that comes from them is too."""
Predict = Callable[[Any], Values]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a distillation leaves behind: one entry per fit in `outputs`, `targets` and `measured`, the teacher's first."""

    predict: Predict | None
    """Outputs for inputs by the last fit. None where the last round was read from `store`: ``fit(inputs, targets[-1])``."""
    outputs: tuple[Values, ...]
    """What each fit says on the training inputs, before any softmax; the shape of the labels."""
    targets: tuple[Values, ...]
    """What each fit was trained on; the first are the labels, one-hot where they were classes."""
    measured: tuple[Mapping[str, float], ...]
    """What `measure` said after each fit; empty mappings without it."""
    read_rounds: int
    """How many of the rounds were read from `store` and not trained by this call."""


def distill(
    fit: Callable[..., Predict],
    inputs: Any,
    targets: Values,
    rounds: int,
    mix: float | Sequence[float] = 0.0,
    *,
    temperature: float | None = None,
    measure: Callable[[Predict], Mapping[str, float]] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Distilled:
    """Train `rounds` times, each time on the outputs of the time before (head of this file); `rounds` counts fits.

    Args:
        fit: ``fit(inputs, targets) -> predict``: trains a *new* model and returns a function from inputs to outputs, shaped
            like the targets. Where `fit` has a parameter called ``round`` it gets the round's number, 0 for the teacher (a
            seed, say); where it has one called ``previous``, the predict of the round before (None at first), to go on from
            its weights in place of starting anew.
        inputs: handed to `fit` and to its predict as they are; n samples.
        targets: floats of shape (n,) or (n, outputs) are values to regress on, or class probabilities. Integers or booleans
            of shape (n,) are classes 0, 1, ...: every round, the first too, gets them one-hot as (n, classes).
        rounds: fits, >= 1.
        mix: weight of the original labels in later fits: one number, or one for each of the rounds - 1 later fits. Usually
            in [0, 1], where it has to be if there is a temperature.
        temperature: T > 0 says that outputs are logits: later targets have softmax(outputs/T). None takes them raw.
        measure: called with each fit's predict; returns numbers by name, which are kept.
        store: file for finished rounds, in numpy's npz format without pickle. It is replaced whole after each round, so that a
            killed call goes on where it was: called again, it trains no finished round anew. More rounds can be asked for
            later. The file is bound to inputs (where they are an array or tensor), targets, mix and temperature, but
            not to `fit`: take another file for another model.

    Returns:
        Outputs, targets and measurements of every round, and the last fit's predict.

    Raises:
        ValueError: `rounds`, `mix`, `temperature` or `targets` are out of range, outputs differ from the targets in shape or
            are not finite, a file does not belong to this call, or there is a `store` although `fit` wants ``previous``,
            which no file holds.
        TypeError: targets are neither array nor tensor, or `fit` returns something that cannot be called.

    Source: see the head of this file.

    Example:
        >>> def half(inputs, targets):  # a fit that shrinks what it is given, as ridge does
        ...     return lambda x: 0.5 * targets
        >>> done = distill(half, None, np.array([8.0, -4.0]), rounds=3)
        >>> [out.tolist() for out in done.outputs]
        [[4.0, -2.0], [2.0, -1.0], [1.0, -0.5]]
        >>> distill(half, None, np.array([8.0, -4.0]), rounds=3, mix=0.5).outputs[-1].tolist()  # of 8, 6 and 5.5
        [2.75, -1.375]
    """
    original = _checked_targets(targets)
    weights = _checked_weights(rounds, mix)
    _check_temperature(temperature, weights, original)
    extras = [name for name in ("round", "previous") if name in _parameters(fit)]
    if store is not None and "previous" in extras:
        raise ValueError("fit wants the previous round's model, which store does not hold; leave out one of the two")
    progress = None if store is None else Progress(store, fingerprint(original, inputs, temperature), weights)
    outputs, measured = ([], []) if progress is None else progress.read(original, rounds)
    read, given = len(outputs), [original]
    given += [_mixed(original, out, weight, temperature) for out, weight in zip(outputs, weights, strict=False)]
    predict: Predict | None = None
    for number in range(read, rounds):
        offered = {"round": number, "previous": predict}
        predict = fit(inputs, given[number], **{name: offered[name] for name in extras})
        outputs.append(_checked_outputs(predict, inputs, original, number))
        measured.append(_checked_measures(measure, predict))
        if progress is not None:
            progress.write(outputs, measured)
        if number < rounds - 1:
            given.append(_mixed(original, outputs[-1], weights[number], temperature))
    return Distilled(
        predict=predict,
        outputs=tuple(outputs),
        targets=tuple(given[:rounds]),
        measured=tuple(measured),
        read_rounds=read,
    )


def _mixed(original: Values, outputs: Values, weight: float, temperature: float | None) -> Values:
    """Targets of the next fit, in new memory."""
    return weight * original + (1.0 - weight) * (outputs if temperature is None else _softmax(outputs / temperature))


def _softmax(logits: Values) -> Values:
    if isinstance(logits, torch.Tensor):
        return torch.softmax(logits, dim=-1)
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def _parameters(fit: Callable[..., Predict]) -> Mapping[str, Any]:
    try:
        return inspect.signature(fit).parameters
    except (TypeError, ValueError):  # some callables written in C have none
        return {}


# what was given


def _checked_targets(targets: Values) -> Values:
    """The labels as floats in new memory, classes one-hot."""
    if not isinstance(targets, (np.ndarray, torch.Tensor)):
        raise TypeError(f"targets must be a numpy array or a torch tensor, got {type(targets).__name__}; convert them")
    if targets.ndim not in (1, 2) or len(targets) == 0 or targets.shape[-1] == 0:
        raise ValueError(f"targets must have shape (n,) or (n, outputs) with n >= 1, got {tuple(targets.shape)}")
    if isinstance(targets, torch.Tensor):
        whole, is_complex = not targets.is_floating_point(), targets.is_complex()
    else:
        whole, is_complex = targets.dtype.kind in "iub", targets.dtype.kind not in "iubf"
    if is_complex:
        raise ValueError(f"targets must be real numbers or classes, got dtype {targets.dtype}")
    if whole and targets.ndim == 1:
        return _one_hot(targets)
    if isinstance(targets, torch.Tensor):
        kept = targets.detach().clone()
        kept = kept.to(torch.get_default_dtype()) if whole else kept
    else:
        kept = targets.astype(np.float64 if whole else targets.dtype)  # a copy
    if not _all_finite(kept):
        raise ValueError("targets hold NaN or infinite values; clean them first")
    return kept


def _one_hot(classes: Values) -> Values:
    if isinstance(classes, torch.Tensor):
        _check_classes(int(classes.min()), int(classes.max()))
        return functional.one_hot(classes.detach().long()).to(torch.get_default_dtype())
    _check_classes(int(classes.min()), int(classes.max()))
    return np.eye(int(classes.max()) + 1)[classes.astype(np.int64)]


def _check_classes(smallest: int, largest: int) -> None:
    if smallest < 0 or largest < 1:
        raise ValueError(
            f"whole numbers as targets are classes 0, 1, ..., at least two of them, got {smallest} to {largest}; "
            "make them floats to regress on them"
        )


def _checked_weights(rounds: int, mix: float | Sequence[float]) -> list[float]:
    """One weight of the original labels for each later fit."""
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or rounds < 1:
        raise ValueError(f"rounds counts fits and must be a whole number >= 1, got {rounds!r}; 1 is plain training")
    given = [float(weight) for weight in np.atleast_1d(np.asarray(mix, dtype=np.float64))]
    if np.ndim(mix) and len(given) != rounds - 1:
        raise ValueError(
            f"mix needs one weight for each fit after the first, {rounds - 1} for rounds={rounds}, got {len(given)}"
        )
    if not all(map(math.isfinite, given)):
        raise ValueError(f"mix must be finite, got {mix}; 0 is pure self-distillation, 1 trains on the labels again")
    return given if np.ndim(mix) else given * (int(rounds) - 1)


def _check_temperature(temperature: float | None, weights: Sequence[float], original: Values) -> None:
    if temperature is None:
        return
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}; 1.0 is the plain softmax")
    if any(not 0 <= weight <= 1 for weight in weights):
        raise ValueError(f"with a temperature mix must lie in [0, 1], or targets are no probabilities, got {weights}")
    if original.ndim != 2 or float(original.min()) < 0 or float(abs(original.sum(-1) - 1).max()) > 1e-3:
        raise ValueError(
            "with a temperature targets must be classes (whole numbers) or probabilities of shape (n, classes) that sum to 1"
        )


# what came back


def _checked_outputs(predict: Any, inputs: Any, original: Values, number: int) -> Values:
    if not callable(predict):
        raise TypeError(f"fit must return a function from inputs to outputs, got {type(predict).__name__}")
    outputs: Any = predict(inputs)
    if isinstance(original, torch.Tensor):
        outputs = torch.as_tensor(outputs).detach().to(original, copy=True)
    else:
        outputs = outputs.detach().cpu().numpy() if isinstance(outputs, torch.Tensor) else outputs
        outputs = np.array(outputs, dtype=original.dtype)
    if outputs.shape != original.shape:
        raise ValueError(
            f"the fit of round {number} predicts shape {tuple(outputs.shape)} for targets of shape "
            f"{tuple(original.shape)}; let predict return the shape of its targets"
        )
    if not _all_finite(outputs):
        raise ValueError(f"the fit of round {number} predicts NaN or infinite values; nothing was kept of that round")
    return outputs


def _checked_measures(measure: Callable[[Predict], Mapping[str, float]] | None, predict: Predict) -> dict[str, float]:
    return {} if measure is None else {str(name): float(value) for name, value in measure(predict).items()}


def _all_finite(values: Values) -> bool:
    return bool(values.isfinite().all() if isinstance(values, torch.Tensor) else np.isfinite(values).all())
