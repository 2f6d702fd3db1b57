"""Lanczos: the end of a symmetric matrix' spectrum, from products with vectors.

Conventions of this file. After m products from a unit vector q1 there are m orthonormal vectors Q = (q1 ... qm) and a
tridiagonal T = Q'AQ. Its eigenvalues (Ritz values) lie within the spectrum of A, and those at the ends converge first. For a
Ritz value theta with eigenvector s of T,

    ||A y - theta y|| = beta_m*|s_m|,   y = Q s

is the residual: an eigenvalue of A lies within it, and where the next one is a gap away, the error is only residual^2/gap.
Every new vector is made orthogonal to all before, twice: without that, rounding brings converged eigenvalues back as copies.
So m vectors of p numbers are kept.

Source: Lanczos 1950; Parlett, "The symmetric eigenvalue problem", chapters 11 and 13.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.curvature import Curvature
from decaycast.core.reading import Loss
from decaycast.core.trace import Matrix


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """An eigenvalue with the residual of its vector.

    Attributes:
        value: the Ritz value, never above the largest eigenvalue but for rounding.
        residual: an eigenvalue of the matrix lies within `residual` of `value`.
        iterations: matrix-vector products spent.
        vector: of length 1, shape (p,), in the order of ``named_parameters()``; None unless asked for.
    """

    value: float
    residual: float
    iterations: int
    vector: Tensor | None = field(default=None, repr=False, compare=False)


def top_eigenvalue(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    matrix: str = "hessian",
    relative_error: float = 0.01,
    generator: torch.Generator | None = None,
    max_iterations: int = 100,
    with_vector: bool = False,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian (or GGN) of the mean loss.

    "Largest" counts the sign. A random start misses its direction with probability zero, but if the next eigenvalue is very
    close the answer may be that one.

    Args:
        model: any torch module, read as in `decaycast.core.curvature.Curvature`.
        loss_fn: (output, target) -> scalar mean over the batch.
        batches: list or loader of (inputs, target), or of dicts with ``"labels"``.
        matrix: ``"hessian"`` or ``"ggn"``.
        relative_error: stop when the residual is at most this share of the value; > 0. The value is better than that.
        generator: of the random start; None for torch's global one.
        max_iterations: products after which to stop in any case (with a warning), >= 1. Each keeps p numbers in memory.
        with_vector: return the eigenvector, too.

    Returns:
        The eigenvalue with its residual.

    Raises:
        ValueError: an argument out of range; for the rest see `Curvature`.
        FloatingPointError: the loss or a product is not finite.

    Source: see the head of this file.

    Example:
        >>> line = torch.nn.Linear(1, 1)
        >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))  # Hessian [[10, 4], [4, 2]]
        >>> round(top_eigenvalue(line, torch.nn.functional.mse_loss, [batch]).value, 4)  # 6 + sqrt(32)
        11.6569
    """
    found = largest_eigenvalue(
        Curvature(model, loss_fn, batches, matrix), relative_error, generator, max_iterations, with_vector
    )
    if found.residual > relative_error * abs(found.value):
        warnings.warn(
            f"stopped after max_iterations = {found.iterations} products at {found.value:.4g} with a residual of "
            f"{found.residual:.2g}, above the {relative_error:g} of the value asked for; raise max_iterations",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def largest_eigenvalue(
    matrix: Matrix,
    relative_error: float = 0.01,
    generator: torch.Generator | None = None,
    max_iterations: int = 100,
    with_vector: bool = False,
) -> Eigenvalue:
    """The largest eigenvalue of any symmetric `matrix` given by products; what `top_eigenvalue` does, without the warning.

    Raises:
        ValueError: `relative_error` not positive, `max_iterations` below 1.
    """
    if not relative_error > 0:
        raise ValueError(
            f"relative_error has to be positive, got {relative_error}; 0.01 stops at a residual of 1 % of the value"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}, but one product is the least; give 20 or more")
    device = matrix.device if generator is None else generator.device
    start = torch.randn(1, matrix.size, dtype=matrix.dtype, device=device, generator=generator).to(matrix.device)
    krylov = Krylov(matrix, start)
    while True:
        krylov.step()
        values, vectors = krylov.ritz()
        value, weights = float(values[0, -1]), vectors[0, :, -1]
        residual = float(krylov.betas[-1][0] * weights[-1].abs())
        done = residual <= relative_error * abs(value) or krylov.steps >= min(max_iterations, matrix.size)
        if done or not krylov.grows:
            break
    vector = krylov.combined(weights[None])[0] if with_vector else None
    return Eigenvalue(value=value, residual=residual, iterations=krylov.steps, vector=vector)


class Krylov:
    """Lanczos from each row of `start` (k, p), all rows in step; a row of zeros stays zero.

    Attributes:
        lengths: of the rows of `start`, shape (k,).
        alphas: diagonals of the k tridiagonal matrices, one tensor (k,) per step; float64 on the processor, as all small ones.
        betas: what stands beside the diagonal below each of them; 0 where a row's space is exhausted.
    """

    def __init__(self, matrix: Matrix, start: Tensor) -> None:
        self.matrix = matrix
        self.lengths = start.norm(dim=1).double().cpu()
        self.basis = [_unit(start, start.norm(dim=1))]
        self.alphas: list[Tensor] = []
        self.betas: list[Tensor] = []
        self._scale = torch.zeros(len(start), dtype=torch.float64)  # size of the matrix seen so far

    @property
    def steps(self) -> int:
        """Products per row made so far."""
        return len(self.alphas)

    @property
    def grows(self) -> bool:
        """Whether any row's space has a further direction."""
        return bool((self.betas[-1] > 0).any())

    def step(self) -> None:
        """One product with the newest vector of each row."""
        newest = self.basis[-1]
        image = self.matrix.products(newest)
        self.alphas.append((image * newest).sum(1, dtype=torch.float64).cpu())
        for _ in range(2):
            for old in self.basis:
                image = image - (image * old).sum(1, keepdim=True) * old
        length = image.norm(dim=1)
        beta = length.double().cpu()
        self._scale = torch.maximum(self._scale, self.alphas[-1].abs() + beta)
        beta[beta <= 100 * torch.finfo(image.dtype).eps * self._scale] = 0.0  # rounding, not a direction
        self.betas.append(beta)
        self.basis.append(_unit(image, torch.where((beta > 0).to(image.device), length, 0.0)))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k, m), ascending, and eigenvectors (k, m, m), in columns, of the tridiagonal matrices."""
        beside = torch.stack(self.betas[:-1], 1) if self.steps > 1 else torch.empty(len(self.lengths), 0)
        beside = torch.diag_embed(beside.double(), 1)
        return torch.linalg.eigh(torch.diag_embed(torch.stack(self.alphas, 1)) + beside + beside.mT)

    def combined(self, weights: Tensor) -> Tensor:
        """Sum over the steps of `weights` (k, m) times the basis, shape (k, p)."""
        weights = weights.to(self.basis[0])
        total = torch.zeros_like(self.basis[0])
        for column, rows in zip(weights.unbind(1), self.basis, strict=False):
            total.addcmul_(column[:, None], rows)
        return total


def _unit(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows divided by their lengths; zeros where the length is 0."""
    return rows * torch.where(lengths > 0, 1.0 / lengths, 0.0)[:, None]
