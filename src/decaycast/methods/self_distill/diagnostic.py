"""Does self-distillation help on these data? Asked of a kernel and the labels, before anything is trained.

What is worked out: kernel ridge with this kernel, distilled for some rounds, and its error at each training point *left out of
every round* (`selection.leave_one_out_rounds`, exact). The change of that error from the first fit to each later one has a
mean over the points, and an interval from their scatter; the rounds are compared at once, so each interval is wider than it
would be alone (Bonferroni). The answer:

    "yes"          at some round the whole interval lies below no change
    "no"           at no round does the interval reach the gain worth having, a share of the first fit's error
    "cannot tell"  anything else: more samples would decide

For a network, the kernel is its tangent kernel at the start (`network_kernel`), or that of features of its last layer,
features @ features.T. Errors are those of the labels as given, wrong ones among them: with flips that are alike for all classes
a fall here is a fall on clean labels, only smaller.

How much the first fit is regularised decides, and is asked for in one of three ways: as a ridge (`shift`); as the mean squared
error that the teacher has on its training labels (`tolerance`, in the paper's sense: the ridge then misses them as much);
or not at all: the ridge is tuned by leave-one-out, and a gain is one over a *tuned* teacher. A network that fits noisy labels
more closely than a tuned one has more to gain, so give `tolerance` as soon as a teacher has been trained.

What it cannot see: that a trained network's kernel moves, and that it is no kernel method at all. How well it does is the matter
of the room's figures. Points are taken to be drawn independently, and their errors left out as nearly so.

Source: link to kernels: Mobahi, Farajtabar & Bartlett 2020 (arXiv 2002.05715), section 5, by Jacot et al. 2018 (arXiv
1806.07572). Leave-one-out through all rounds, intervals and answer are derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from decaycast.core.names import choose
from decaycast.core.ntk import empirical_ntk
from decaycast.methods.self_distill.checked import Values, check_rounds, clipped
from decaycast.methods.self_distill.selection import leave_one_out, leave_one_out_rounds, mix_powers
from decaycast.methods.self_distill.theory import multiplier, ridge_filter

Answer = Literal["yes", "no", "cannot tell"]
ERRORS = ("squared error", "error rate")
WORTH = 0.02  # of the first fit's error: nobody trains twice for less
LEVEL = 0.95
_SHIFTS = np.logspace(-8, 3, 45)  # of the mean eigenvalue
_CLOSE = 1e-6  # of the largest entry: asymmetry that float32 kernels have


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What rounds of self-distillation are expected to bring."""

    answer: Answer
    reason: str
    error: str
    """What is counted: "squared error" (mean over points of the sum over outputs) or "error rate"."""
    errors: tuple[float, ...]
    """Leave-one-out error of each fit, the teacher's first."""
    changes: tuple[float, ...]
    """Error of each fit minus the teacher's; negative is a gain. The first is 0."""
    low: tuple[float, ...]
    """Lower ends of the changes' intervals, for all rounds at once."""
    high: tuple[float, ...]
    """Upper ends."""
    best_rounds: int
    """Number of fits with the smallest error; 1 says to leave it at the teacher."""
    shift: float
    """Ridge added to the kernel matrix, as given or tuned."""
    mix: float
    """Weight of the original labels in later fits."""


def does_it_help(
    kernel: Values,
    targets: Values,
    *,
    rounds: int = 6,
    mix: float = 0.0,
    shift: float | None = None,
    tolerance: float | None = None,
    error: str | None = None,
    worth: float = WORTH,
    level: float = LEVEL,
) -> Prospect:
    """Predicted change of the error by each round, and whether that is a gain (head of this file).

    Args:
        kernel: matrix of the training inputs, shape (n, n), array or tensor, n >= 3, positive semi-definite.
        targets: floats of shape (n,) or (n, outputs), or whole numbers of shape (n,): classes, which become one-hot.
        rounds: number of fits, >= 2, the teacher among them.
        mix: weight of the original labels in later fits; 0 is pure.
        shift: ridge > 0 added to the kernel matrix. Without it and `tolerance`, that with the smallest leave-one-out squared
            error of one fit.
        tolerance: mean squared error of the teacher on its training labels, over points and outputs, > 0; in place of `shift`.
        error: ``"squared error"`` or ``"error rate"`` (by the largest output; classes or one-hot targets). None: the error
            rate for classes, else the squared error.
        worth: smallest gain worth having, as a share of the first fit's error.
        level: of the intervals, all rounds together.

    Returns:
        Answer, words, and the numbers by round.

    Raises:
        ValueError: a kernel that is not square, symmetric, finite or positive semi-definite; targets that do not fit; a
            number out of range; fewer than two rounds; both a shift and a tolerance, or a tolerance that no ridge has.

    Source: see the head of this file.

    Example:
        >>> x = np.linspace(0.0, 1.0, 200)
        >>> kernel = np.exp(-5000 * (x[:, None] - x) ** 2)
        >>> noisy = np.sin(6 * x) + np.random.default_rng(0).normal(0.0, 0.5, 200)
        >>> does_it_help(kernel, noisy, shift=0.1).answer  # a teacher that follows the noise
        'yes'
        >>> does_it_help(kernel, np.sin(6 * x), shift=0.5).answer  # nothing to remove
        'no'
    """
    matrix, (labels, classes) = _checked_kernel(kernel), _checked_targets(targets)
    _check_numbers(matrix, labels, rounds, mix, worth, level)
    _check_strength(shift, tolerance)
    counted = choose(error or (ERRORS[1] if classes else ERRORS[0]), ERRORS, "error")
    if counted == ERRORS[1] and (labels.ndim == 1 or labels.shape[1] < 2):
        raise ValueError("an error rate needs classes or one column per class; give whole numbers as targets")
    d, v = np.linalg.eigh(matrix)
    d, z = clipped(d), v.T @ labels
    chosen = _chosen_shift(d, v, z, shift, tolerance)
    pure = leave_one_out_rounds(v, d, z, chosen, rounds)
    residuals = np.tensordot(mix_powers([mix] * (rounds - 1)), pure, axes=1)
    losses = _losses(residuals, labels, counted)
    changes = losses - losses[0]
    half = NormalDist().inv_cdf(0.5 + 0.5 * (1.0 - (1.0 - level) / (rounds - 1)))
    spread = half * changes.std(axis=1, ddof=1) / math.sqrt(losses.shape[1])
    errors, means = losses.mean(1), changes.mean(1)
    answer = _answer(means[1:] - spread[1:], means[1:] + spread[1:], worth * float(errors[0]))
    best = int(np.argmin(errors))
    return Prospect(
        answer=answer,
        reason=_words(answer, counted, errors, means, spread, chosen, worth),
        error=counted,
        errors=tuple(errors.tolist()),
        changes=tuple(means.tolist()),
        low=tuple((means - spread).tolist()),
        high=tuple((means + spread).tolist()),
        best_rounds=best + 1,
        shift=chosen,
        mix=float(mix),
    )


def tuned_shift(eigenvalues: np.ndarray, vectors: np.ndarray, coefficients: np.ndarray) -> float:
    """The ridge with the smallest leave-one-out squared error of one fit, among 45 from 1e-8 to 1e3 mean eigenvalues.

    Args:
        eigenvalues: d of the kernel matrix, shape (n,), not all 0.
        vectors: its eigenvectors as columns, shape (n, n).
        coefficients: z = V^T y, shape (n,) or (n, outputs).

    Returns:
        lambda > 0, in the units of the kernel matrix.

    Source: Allen 1974.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(200, 5))
        >>> d, v = np.linalg.eigh(x @ x.T)
        >>> labels = x @ np.ones(5) + rng.normal(0.0, 3.0, 200)
        >>> 2 < tuned_shift(np.maximum(d, 0.0), v, v.T @ labels) < 200  # ridge regression's best: variance 9 over weights 1
        True
    """
    shifts = _SHIFTS * float(np.mean(eigenvalues))
    residuals = leave_one_out(vectors, ridge_filter(eigenvalues, shifts), coefficients)
    squares = (residuals**2).reshape(len(shifts), -1).mean(1)
    return float(shifts[np.nanargmin(squares)])


def _chosen_shift(d: np.ndarray, v: np.ndarray, z: np.ndarray, shift: float | None, tolerance: float | None) -> float:
    if shift is not None:
        return float(shift)
    if tolerance is None:
        return tuned_shift(d, v, z)
    # one ridge for all outputs: as if they were one output on as many copies of the points
    outputs = 1 if z.ndim == 1 else z.shape[1]
    found = float(multiplier(np.repeat(d, outputs), z.reshape(-1), tolerance))
    if math.isinf(found):
        raise ValueError(
            f"a tolerance of {tolerance:g} is met by predicting 0 everywhere, whose mean squared error is "
            f"{float((z**2).mean()):g}; give the teacher's error as the mean over points and outputs, not their sum"
        )
    return found


def network_kernel(model: nn.Module, inputs: Tensor, **options: Any) -> np.ndarray:
    """Tangent kernel of a network at its present weights, as `does_it_help` takes it: summed over outputs.

    Args:
        model: at its start; in evaluation mode if it has batch norm or dropout.
        inputs: n training inputs, a random part of them if there are many: time and memory grow as n^2.
        options: those of `decaycast.core.ntk.empirical_ntk`, such as ``memory_bytes``.

    Returns:
        float64, shape (n, n).

    Raises:
        ValueError: as `empirical_ntk`.

    Source: Jacot et al. 2018.

    Example:
        >>> import torch
        >>> network_kernel(nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))  # 3*(x.x' + 1)
        array([[18., 12.],
               [12., 30.]])
    """
    return empirical_ntk(model, inputs, mode="trace", **options).double().cpu().numpy()


def _losses(residuals: np.ndarray, labels: np.ndarray, counted: str) -> np.ndarray:
    """Loss at every point, shape (rounds, n), from y - prediction of shape (rounds, n) or (rounds, n, outputs)."""
    if counted == ERRORS[1]:
        return ((labels - residuals).argmax(-1) != labels.argmax(-1)).astype(float)
    squares = residuals**2
    return squares.sum(-1) if labels.ndim == 2 else squares


def _answer(low: np.ndarray, high: np.ndarray, worth: float) -> Answer:
    if np.any(high < 0):
        return "yes"
    return "no" if np.all(low > -worth) or np.all(low >= 0) else "cannot tell"


def _words(
    answer: Answer,
    counted: str,
    errors: np.ndarray,
    means: np.ndarray,
    spread: np.ndarray,
    shift: float,
    worth: float,
) -> str:
    # the round that decides: for a yes the one that is surest, else the best
    at = 1 + int(np.argmin((means + spread if answer == "yes" else means)[1:]))
    first = float(errors[0])
    scale = 1.0 / first if first > 0 else 0.0
    change = (
        f"{scale * means[at]:+.1%} ({scale * (means[at] - spread[at]):+.1%} to {scale * (means[at] + spread[at]):+.1%})"
    )
    said = {
        "yes": f"yes: {at + 1} fits change the {counted} left out by {change} of the teacher's",
        "no": f"no: no number of fits gains {worth:.1%} of the teacher's {counted}; the best, {at + 1}, changes it by {change}",
        "cannot tell": f"cannot tell: {at + 1} fits change the {counted} left out by {change}; more samples would decide",
    }
    return f"{said[answer]}. Teacher: {first:.4g} at a ridge of {shift:.3g}."


# arguments


def _checked_kernel(kernel: Values) -> np.ndarray:
    matrix = np.asarray(kernel.detach().cpu() if isinstance(kernel, Tensor) else kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 3:
        raise ValueError(f"kernel must be a square matrix of at least 3 training inputs, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("kernel holds NaN or infinite values; look for them in the inputs or the network")
    top = float(np.abs(matrix).max())
    if top == 0:
        raise ValueError("kernel is zero everywhere: it says nothing about these inputs; take another")
    if float(np.abs(matrix - matrix.T).max()) > _CLOSE * top:
        raise ValueError("kernel is not symmetric; give that of the training inputs with themselves")
    return (matrix + matrix.T) / 2.0


def _checked_targets(targets: Values) -> tuple[np.ndarray, bool]:
    """Float targets, and whether they were classes."""
    given = np.asarray(targets.detach().cpu() if isinstance(targets, Tensor) else targets)
    classes = given.dtype.kind in "iub" and given.ndim == 1
    if classes and given.size:
        if given.min() < 0 or given.max() < 1:
            raise ValueError(
                f"whole numbers as targets are classes 0, 1, ..., at least two, got {given.min()} to {given.max()}; make them "
                "floats to regress on them"
            )
        given = np.eye(int(given.max()) + 1)[given.astype(np.int64)]
    return given.astype(np.float64), classes


def _check_numbers(matrix: np.ndarray, labels: np.ndarray, rounds: int, mix: float, worth: float, level: float) -> None:
    if labels.ndim not in (1, 2) or len(labels) != len(matrix) or not np.isfinite(labels).all():
        raise ValueError(
            f"targets must be finite, of shape ({len(matrix)},) or ({len(matrix)}, outputs) for this kernel, got {labels.shape}"
        )
    check_rounds(rounds)
    if rounds < 2:
        raise ValueError(
            "rounds must be at least 2, the teacher and one fit more; there is nothing to compare otherwise"
        )
    if not math.isfinite(mix):
        raise ValueError(f"mix must be finite, got {mix}; 0 is pure self-distillation")
    if not (math.isfinite(worth) and worth >= 0):
        raise ValueError(f"worth must be finite and >= 0, got {worth}; it is a share of the first fit's error")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; 0.95 is usual")


def _check_strength(shift: float | None, tolerance: float | None) -> None:
    if shift is not None and tolerance is not None:
        raise ValueError(
            f"shift and tolerance both say how much is regularised, got {shift} and {tolerance}; leave one out"
        )
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be finite and > 0, got {shift}; None tunes it")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(
            f"tolerance must be finite and > 0, got {tolerance}; it is the teacher's mean squared training error"
        )
