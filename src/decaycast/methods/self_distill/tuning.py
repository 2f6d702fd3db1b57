"""Shift, rounds and mix chosen by a criterion from one eigendecomposition, with plain ridge unless the gain is clear.

Conventions and symbols stand at the head of `theory`, criteria in `selection`. A grid of thousands of filters always holds one
that looks better by chance. So the winner has to beat the best single fit by more than two standard errors of the paired
squared leave-one-out errors; otherwise that single fit is the choice. One standard error is too few: on twelve points
(scikit-learn's linnerud, 20 splits) it cost 8 % against plain ridge, two cost nothing.

Filters that leave [0, 1] are no candidates. For the truth m and noise variance sigma^2 the best filter is
m^2/(m^2 + sigma^2), which never does; and with a weight outside [0, 1], after many rounds, a filter can be huge in one direction,
which criteria that leave points out may take for knowledge: centred labels say the label of the point left out as minus the sum
of the others (found on real data, with a test error four times the criterion's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from decaycast.core.names import choose
from decaycast.methods.self_distill.checked import Values, check_rounds, clipped, finite
from decaycast.methods.self_distill.selection import gcv, leave_one_out, leave_one_out_rounds, mix_powers
from decaycast.methods.self_distill.theory import constrained_rounds, mixed_filters

CRITERIA = ("gcv", "leave_one_out")
CLEAR = 2.0  # standard errors
SLACK = 0.01  # by which a filter may leave [0, 1]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a criterion chose.

    Attributes:
        shift: lambda; None if a tolerance decides it.
        rounds: number of fits.
        weight: of the original labels in later fits; 1 is plain ridge whatever the rounds.
        score: the criterion there, over all outputs.
        plain_score: of the best single fit.
        gain: how much lower the mean squared leave-one-out error is than that of the best single fit, before the guard.
        gain_stderr: its standard error, over the points in pairs.
    """

    shift: float | None
    rounds: int
    weight: float
    score: float
    plain_score: float
    gain: float
    gain_stderr: float


def tune(
    vectors: Values,
    eigenvalues: Values,
    coefficients: Values,
    shifts: Values,
    weights: Values,
    rounds: int,
    *,
    any_round: bool = True,
    criterion: str = "gcv",
) -> Choice:
    """Shift, rounds and mix with the least criterion, or plain ridge unless the gain is clear.

    Args:
        vectors: V, shape (n, n).
        eigenvalues: d, shape (n,).
        coefficients: z = V^T y, shape (n,) or (n, outputs); outputs share one choice.
        shifts: candidates of lambda, each > 0.
        weights: candidates of the weight of the original labels.
        rounds: largest number of fits, >= 1.
        any_round: False if the number of fits is fixed to `rounds`: plain ridge is then weight 1, and with one candidate of
            the weight only the shift is chosen.
        criterion: ``"gcv"`` or ``"leave_one_out"`` (exact, all rounds without the point).

    Returns:
        The choice.

    Raises:
        ValueError: an argument is out of range or its shape does not fit.

    Source: criteria as above; what it gains on real data is in bench/results/self_distill.md.

    Example:
        >>> tune(np.eye(2), [1.0, 1.0], [1.0, 0.0], [1.0], [0.0], 2).rounds  # nothing to gain
        1
    """
    choose(criterion, CRITERIA, "criterion")
    check_rounds(rounds)
    d, z = clipped(eigenvalues), finite(coefficients, "coefficients")
    w, shifts = np.atleast_1d(finite(weights, "weights")), np.atleast_1d(finite(shifts, "shifts"))
    later = np.broadcast_to(w[:, None], (w.size, rounds - 1))
    powers = mix_powers(later)
    scores = np.stack([_scores(vectors, d, z, shift, later, powers, criterion) for shift in shifts])
    if any_round or w.size > 1:
        filters = np.stack([mixed_filters(d, shift, later) for shift in shifts])
        scores = np.where(_sensible(filters), scores, np.inf)
    plain = int(scores[:, 0, 0].argmin())
    allowed = scores if any_round else scores[:, :, -1:]
    at, mix, last = (int(i) for i in np.unravel_index(allowed.argmin(), allowed.shape))
    last = last if any_round else rounds - 1
    pure = [leave_one_out_rounds(vectors, d, z, shifts[i], rounds) for i in (plain, at)]
    gain, stderr = paired_gain(pure[0][0], np.tensordot(powers[mix, last], pure[1], 1))
    base = float(scores[plain, 0, 0])
    won = (gain > CLEAR * stderr and bool(np.isfinite(scores[at, mix, last]))) or not (any_round or w.size > 1)
    fits, weight = (last + 1, float(w[mix])) if won else _one_fit(rounds, float(w[mix]), any_round)
    return Choice(
        shift=float(shifts[at if won else plain]),
        rounds=fits,
        weight=weight,
        score=float(scores[at, mix, last]) if won else base,
        plain_score=base,
        gain=gain,
        gain_stderr=stderr,
    )


def tune_tolerance(
    vectors: Values,
    eigenvalues: Values,
    coefficients: Values,
    tolerance: float,
    weights: Values,
    rounds: int,
    *,
    any_round: bool = True,
    criterion: str = "gcv",
) -> Choice:
    """Rounds and mix for the paper's tolerance; the same guard as `tune`, against one fit with that tolerance.

    The shifts depend on the labels, which criteria for linear smoothers do not know: both are approximations here, and
    ``"leave_one_out"`` is the usual residual/(1 - leverage).

    Args:
        vectors: as in `tune`.
        eigenvalues: as in `tune`.
        coefficients: as in `tune`.
        tolerance: eps > 0.
        weights: as in `tune`.
        rounds: as in `tune`.
        any_round: as in `tune`.
        criterion: as in `tune`.

    Returns:
        The choice, its shift None.

    Raises:
        ValueError: as `tune` and `theory.multiplier`.

    Source: as `tune`.

    Example:
        >>> tune_tolerance(np.eye(2), [1.0, 1.0], [2.0, 0.0], 0.5, [0.0], 1).rounds
        1
    """
    choose(criterion, CRITERIA, "criterion")
    z = finite(coefficients, "coefficients")
    table, w = z.reshape(len(z), -1), np.atleast_1d(finite(weights, "weights"))
    scores, residuals = [], []
    for weight in w:
        filters = constrained_rounds(eigenvalues, table, tolerance, rounds, float(weight)).filters
        outputs = range(table.shape[1])
        missed = np.stack([leave_one_out(vectors, filters[..., k], table[:, k]) for k in outputs], -1)
        residuals.append(missed)
        found = (missed**2).mean(1) if criterion == "leave_one_out" else None
        found = sum(gcv(filters[..., k], table[:, k]) for k in outputs) if found is None else found.sum(-1)
        free = _sensible(np.moveaxis(filters, -1, 0)).all(0) if any_round or w.size > 1 else True
        scores.append(np.where(free, found, np.inf))
    scores = np.stack(scores)
    first = 0 if any_round else rounds - 1
    mix, last = (int(i) for i in np.unravel_index(scores[:, first:].argmin(), scores[:, first:].shape))
    last += first
    gain, stderr = paired_gain(residuals[0][0], residuals[mix][last])
    base = float(scores[0, 0])
    won = gain > CLEAR * stderr or not (any_round or w.size > 1)
    fits, weight = (last + 1, float(w[mix])) if won else _one_fit(rounds, float(w[mix]), any_round)
    return Choice(
        shift=None,
        rounds=fits,
        weight=weight,
        score=float(scores[mix, last]) if won else base,
        plain_score=base,
        gain=gain,
        gain_stderr=stderr,
    )


def paired_gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """How much lower the mean of squared residuals is afterwards, with its standard error over the points.

    Args:
        before: residuals, shape (n,) or (n, outputs).
        after: of the same shape.

    Returns:
        Mean over points of the difference of squares (summed over outputs), and its standard error; infinite for one point.

    Raises:
        ValueError: shapes differ.

    Source: paired differences.

    Example:
        >>> gain, stderr = paired_gain(np.array([2.0, 2.0]), np.array([1.0, 1.0]))
        >>> gain, stderr
        (3.0, 0.0)
    """
    if before.shape != after.shape:
        raise ValueError(f"residuals before and after have to have one shape, got {before.shape} and {after.shape}")
    change = (before**2 - after**2).reshape(len(before), -1).sum(1)
    stderr = float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.inf
    return float(change.mean()), stderr


def _sensible(filters: np.ndarray) -> np.ndarray:
    """Which filters, along the last axis, stay in [0, 1] up to `SLACK`."""
    return (filters.min(-1) >= -SLACK) & (filters.max(-1) <= 1 + SLACK)


def _one_fit(rounds: int, weight: float, any_round: bool) -> tuple[int, float]:
    """Rounds and weight that are one plain fit: one round if that may be, else all rounds to the original labels."""
    return (1, weight) if any_round else (rounds, 1.0)


def _scores(
    vectors: Values, d: np.ndarray, z: np.ndarray, shift: float, later: np.ndarray, powers: np.ndarray, criterion: str
) -> np.ndarray:
    """The criterion for one shift, shape (weights, rounds), summed over outputs."""
    if criterion == "gcv":
        found = gcv(mixed_filters(d, shift, later), z)
        return found if z.ndim == 1 else found.sum(-1)
    pure = leave_one_out_rounds(vectors, d, z, shift, later.shape[-1] + 1)
    table = pure.reshape(len(pure), -1)
    gram = table @ table.T / len(z)  # every mix is a quadratic form in it
    return np.einsum("wtj,jk,wtk->wt", powers, gram, powers, optimize=True)
