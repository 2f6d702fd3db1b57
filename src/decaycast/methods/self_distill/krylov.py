"""All rounds of self-distillation in one Krylov space of the labels: a small problem instead of one of n points.

Conventions and symbols stand at the head of `theory`. Every round's labels, fits and duals lie close to a space of few dimensions
that powers of K, or of (K + p)^-1, span from y. With an orthonormal basis Q of m vectors, Q^T K Q has eigenvalues d^ and the
labels coefficients z^ in its eigenbasis: the formulas of `theory` apply to those as they stand, only a mean over n points has to
be told from one over m.

* One shift: powers of K (Lanczos). Few steps unless the shift is tiny beside the eigenvalues.
* A tolerance: its shifts begin tiny and grow by orders of magnitude. Powers of (K + p)^-1 with a few poles p in turn, each from
  one Cholesky factorisation: in the middle of the shifts as a short run with K guesses them, then at their ends.

Nothing is taken on trust: the equations of all rounds are put together from the n points and their residuals measured; where
they are not small the answer is None, and the caller takes a dense route.

Source: Lanczos 1950; rational Krylov spaces: Ruhe 1984.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decaycast.methods.self_distill import theory

_FIRST, _EVERY = 32, 8  # steps before the first look at convergence, and between two
_PILOT = 20  # products for the guess of the first pole
_POLED = 16  # steps with the first pole, before others are chosen; again at 2 and 4 times as many
_MOST = 128  # steps with poles
_APART = 4.0  # a pole is worth its factorisation if it is this far from all others, as a ratio


def constant_rounds(
    matrix: Tensor, y: Tensor, shift: float, rounds: int, weight: float, error: float = 1e-11
) -> Tensor | None:
    """Duals of rounds with one shift, or None if the residual is not small after n/8 steps.

    Args:
        matrix: K, shape (n, n), float64.
        y: labels, shape (n, outputs); every output has a space of its own.
        shift: lambda > 0.
        rounds: number of fits, >= 1.
        weight: of the original labels in every later fit.
        error: residual of every round's equation, in units of |y|, at which to stop; 10 times as much is let pass.

    Returns:
        Shape (rounds, n, outputs), or None.

    Source: head of this file.

    Example:
        >>> y = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> constant_rounds(torch.eye(2, dtype=torch.float64), y, 1.0, 2, 0.0).round(decimals=6).squeeze(-1).tolist()
        [[0.5, 1.0], [0.25, 0.5]]
    """
    limit, columns = max(_FIRST, len(y) // 8), []
    for column in y.T:
        space = _Space(column, lambda vector: matrix @ vector)
        found = space.grow(limit, lambda small: small.constant(shift, rounds, weight), error)
        if found is None:
            return None
        columns.append(space.lift(found[1]))
    duals = torch.stack(columns, -1)
    images = (matrix @ duals.movedim(0, 1).reshape(len(y), -1)).reshape(len(y), rounds, -1).movedim(1, 0)
    missed, _ = _residuals(images, duals, [shift] * rounds, y, weight)
    return duals if bool((missed <= 10 * error * torch.linalg.vector_norm(y, dim=0)).all()) else None


def constrained_rounds(
    matrix: Tensor, y: Tensor, tolerance: float, rounds: int, weight: float, error: float = 1e-9
) -> tuple[np.ndarray, Tensor] | None:
    """Shifts and duals of rounds with a tolerance, or None if the residual is not small after 128 steps.

    Args:
        matrix: K, shape (n, n), float64.
        y: labels of one output, shape (n,).
        tolerance: eps > 0.
        rounds: number of fits, >= 1.
        weight: of the original labels in every later fit.
        error: residual of every round's equation that is let pass, in units of sqrt(n*eps). Rounding alone leaves 1e-10 where
            the first shift is 1e-7 of the largest eigenvalue; shifts are some digits better than that.

    Returns:
        Shifts, shape (rounds,), infinite after collapse, and duals, shape (rounds, n); or None, too, where the tolerance seems
        out of reach.

    Source: head of this file.

    Example:
        >>> y = torch.tensor([4.0, 0.0], dtype=torch.float64)
        >>> shifts, duals = constrained_rounds(torch.eye(2, dtype=torch.float64), y, 0.5, 2, 0.0)  # 4 -> 3 -> 2
        >>> shifts.round(6).tolist(), (shifts * duals[:, 0].numpy()).round(6).tolist()
        ([0.333333, 0.5], [1.0, 1.0])
    """
    try:
        return _with_poles(matrix, y, tolerance, rounds, weight, error)
    except ValueError:  # negative eigenvalues, or a tolerance out of reach: all eigenvalues have to decide that
        return None


def cholesky(matrix: Tensor, shift: float) -> Tensor | None:
    """Lower factor of K + shift, None if that is not positive definite."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    lower, info = torch.linalg.cholesky_ex(shifted)
    return None if int(info) else lower


def solve_lower(lower: Tensor, target: Tensor) -> Tensor:
    """(L L^T)^-1 target. Two triangular solves: torch's cholesky_solve of a column is 3 to 10 times slower (CPU, torch 2.13)."""
    half = torch.linalg.solve_triangular(lower, target, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True)


# the small problem


@dataclass(frozen=True, kw_only=True)
class _Small:
    """What a Krylov space knows of K: eigenvalues d^ (m,), eigenvectors in columns (m, m), coefficients z^ (m,)."""

    eigenvalues: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray

    def constant(self, shift: float, rounds: int, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Shifts and duals (rounds, m) in the basis."""
        h = self.eigenvalues / (self.eigenvalues + shift)
        kept, duals = np.ones_like(h), []
        for _ in range(rounds):
            duals.append(self.vectors @ (kept / (self.eigenvalues + shift) * self.coefficients))
            kept = weight + (1.0 - weight) * h * kept
        return np.full(rounds, shift), np.array(duals)

    def constrained(self, tolerance: float, rounds: int, weight: float, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The same with a tolerance: a mean over n points."""
        scaled = tolerance * n / len(self.eigenvalues)
        found = theory.constrained_rounds(self.eigenvalues, self.coefficients, scaled, rounds, weight)
        return found.shifts, (found.duals * self.coefficients) @ self.vectors.T


class _Space:
    """The Krylov space of one vector, grown step by step; every new direction is made orthogonal to all before, twice."""

    def __init__(self, start: Tensor, apply: Callable[[Tensor], Tensor]) -> None:
        self.apply = apply
        self.length = float(torch.linalg.vector_norm(start))
        self.basis = start[None] / (self.length or 1.0)
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def step(self) -> bool:
        """One more direction; False if there is none."""
        newest = self.basis[-1]
        image = self.apply(newest)
        self.alphas.append(float(image @ newest))
        for _ in range(2):
            image = image - self.basis.T @ (self.basis @ image)
        self.betas.append(float(torch.linalg.vector_norm(image)))
        if self.betas[-1] <= 1e-14 * (abs(self.alphas[0]) + self.betas[0]):
            return False
        self.basis = torch.cat([self.basis, image[None] / self.betas[-1]])
        return True

    def small(self) -> _Small:
        """K as the space sees it."""
        beside = self.betas[: len(self.alphas) - 1]
        values, vectors = np.linalg.eigh(np.diag(self.alphas) + np.diag(beside, 1) + np.diag(beside, -1))
        return _Small(eigenvalues=values, vectors=vectors, coefficients=self.length * vectors[0])

    def grow(
        self, limit: int, solved: Callable[[_Small], tuple[np.ndarray, np.ndarray]], error: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Shifts and duals in the basis once the newest directions do not matter any more; None if they still do."""
        for steps in range(1, limit + 1):
            ended = not self.step()
            if not (ended or steps == limit or (steps >= _FIRST and steps % _EVERY == 0)):
                continue
            shifts, duals = solved(self.small())
            # what one more direction would change: the last components of every round, against its length
            tail = np.abs(duals[:, -2:]).max(1) > error * np.linalg.norm(duals, axis=1)
            if ended or not tail.any():
                return shifts, duals
        return None

    def lift(self, duals: np.ndarray) -> Tensor:
        """From the basis to the n points."""
        return torch.from_numpy(duals).to(self.basis) @ self.basis[: duals.shape[1]]


class _Poled:
    """A space spanned by y and products with (K + p)^-1, the poles p taken in turn."""

    def __init__(self, matrix: Tensor, y: Tensor) -> None:
        self.matrix, self.y = matrix, y
        self.poles: list[float] = []
        self.lowers: list[Tensor] = []
        self.basis = y[None] / torch.linalg.vector_norm(y)
        self.images = y.new_empty((0, len(y)))  # K q of every vector of the basis
        self.grows = True

    def add(self, pole: float) -> None:
        """One more pole; left out if K + p is not positive definite up to rounding."""
        self.poles.append(pole)
        lower = cholesky(self.matrix, pole)
        if lower is not None:
            self.lowers.append(lower)

    def add_ends(self, shifts: np.ndarray) -> None:
        """Poles at the smallest and the largest shift where none is near."""
        for pole in (float(shifts.min()), float(shifts.max())) if len(shifts) else ():
            if min(max(pole / other, other / pole) for other in self.poles) > _APART:
                self.add(pole)

    def extend(self, steps: int) -> None:
        """Up to `steps` vectors, fewer if the space has no more directions."""
        while self.grows and self.lowers and len(self.basis) < steps:
            lower = self.lowers[len(self.basis) % len(self.lowers)]
            image = solve_lower(lower, self.basis[-1][:, None])[:, 0]
            size = torch.linalg.vector_norm(image)
            for _ in range(2):
                image = image - self.basis.T @ (self.basis @ image)
            left = torch.linalg.vector_norm(image)
            self.grows = bool(left > 1e-13 * size)
            if self.grows:
                self.basis = torch.cat([self.basis, image[None] / left])
        self.images = torch.cat([self.images, self.basis[len(self.images) :] @ self.matrix])

    def small(self) -> _Small:
        """K as the space sees it."""
        seen = self.basis @ self.images.T
        values, vectors = np.linalg.eigh(((seen + seen.T) / 2.0).cpu().numpy())
        return _Small(eigenvalues=values, vectors=vectors, coefficients=vectors.T @ (self.basis @ self.y).cpu().numpy())


def _with_poles(
    matrix: Tensor, y: Tensor, tolerance: float, rounds: int, weight: float, error: float
) -> tuple[np.ndarray, Tensor] | None:
    def solved(small: _Small) -> tuple[np.ndarray, np.ndarray]:
        return small.constrained(tolerance, rounds, weight, len(y))

    guess = _Space(y, lambda vector: matrix @ vector)
    while len(guess.alphas) < _PILOT and guess.step():
        pass
    shifts = solved(guess.small())[0]
    space = _Poled(matrix, y)
    space.add(_middle(shifts))
    for steps in range(_POLED, _MOST + 1, _EVERY):
        space.extend(steps)
        shifts, duals = solved(space.small())
        if _right(space, shifts, duals, tolerance, weight, error):
            return shifts, torch.from_numpy(duals).to(y) @ space.basis
        if not space.grows:
            return None
        if steps in (_POLED, 2 * _POLED, 4 * _POLED):  # the ends of the shifts are known better now
            space.add_ends(shifts[np.isfinite(shifts)])
    return None


def _middle(shifts: np.ndarray) -> float:
    """Geometric mean of the shifts that are finite."""
    finite = shifts[np.isfinite(shifts)]
    if not len(finite):
        raise ValueError("no round has a shift")  # the labels lie within the tolerance; caught above
    return float(np.exp(np.log(finite).mean()))


def _right(space: _Poled, shifts: np.ndarray, duals: np.ndarray, tolerance: float, weight: float, error: float) -> bool:
    """Whether all rounds' equations hold on the n points, and so does the tolerance."""
    y, budget = space.y, len(space.y) * tolerance
    weights = torch.from_numpy(duals).to(y)
    a, images = (weights @ space.basis)[..., None], (weights @ space.images)[..., None]
    live = torch.from_numpy(np.isfinite(shifts)).to(y.device)
    finite = np.where(np.isfinite(shifts), shifts, 0.0)
    missed, targets = _residuals(images, a, list(finite), y[:, None], weight)
    sizes = (torch.from_numpy(finite).to(y)[:, None] * a[..., 0]).square().sum(1) / budget
    inside = targets[..., 0].square().sum(1) <= budget
    close = (missed[:, 0] <= error * math.sqrt(budget)) & ((sizes - 1.0).abs() <= 1e-10)
    return bool(torch.where(live, close, inside).all())


def _residuals(images: Tensor, duals: Tensor, shifts: list[float], y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """|K a_t + lambda_t a_t - l_t|, shape (rounds, outputs), from K a_t, and the labels l_t, shape (rounds, n, outputs)."""
    targets = torch.empty_like(duals)
    target = y
    for t, shift in enumerate(shifts):
        targets[t] = target
        fit = target - shift * duals[t] if shift else torch.zeros_like(target)
        target = weight * y + (1.0 - weight) * fit
    added = torch.tensor(shifts, dtype=y.dtype, device=y.device)[:, None, None]
    return torch.linalg.vector_norm(images + added * duals - targets, dim=1), targets
