"""The trace of a Hessian or Gauss-Newton matrix, with a standard error and a stop rule on it.

Conventions of this file. A is the p x p matrix of `decaycast.core.curvature`. A *probe* z has p random signs (Rademacher).
E[z.Az] = tr A, and since the squared signs are 1,

    Var(z.Az) = 2 sum over i != j of A_ij^2 = 2 sum over i of Var((z*Az)_i)

The right side is taken from the p-vectors z*Az of the probes drawn. It is far steadier than the sample variance of a dozen
numbers z.Az, which is small just when their mean is too small: intervals from that one cover 90 % instead of 95 (measured on
the three networks of the tests).

Hutchinson's estimator is the mean of z.Az. Where it would need more than about 30 products, the products made so far become
an orthonormal basis Q of the large eigenvectors (Hutch++): tr A = tr Q'AQ, which is exact, plus the trace of what is left,
(I-QQ')A(I-QQ'), by fresh probes. The basis grows as long as the last growth says that it saves more products than it costs.
Fewer products than p always suffice: then the diagonal is taken, and the error is 0.

Whether to go on is judged by the standard error alone, never by how the running mean moves.

Source: Hutchinson 1989; Meyer, Musco, Musco & Woodruff 2021 (arXiv 2010.09649); the choice of the basis' size while running is
in the spirit of Persson, Cortinovis & Kressner 2022 (arXiv 2109.10659). The variance is derived.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn

from decaycast.core.curvature import Curvature
from decaycast.core.estimate import Estimate
from decaycast.core.reading import Loss

BLOCK = 10  # probes drawn at least, and added to the basis at a time; 3 blocks are what the smallest Hutch++ costs
EXACT_BELOW = 64  # parameters: the diagonal costs about as much as an estimate
_BASIS_BYTES = 2 * 1024**3  # what the basis and the block that extends it may take


class Matrix(Protocol):
    """A symmetric matrix by its products, cut into named parts: `Curvature`, or a function of it."""

    size: int
    shapes: dict[str, Size]
    dtype: torch.dtype
    device: torch.device

    def products(self, vectors: Tensor) -> Tensor:
        """The matrix times each row of `vectors`, shape (k, p)."""
        ...

    def parts(self, vectors: Tensor) -> list[Tensor]:
        """Views (..., numbers) of the last dimension, one per name in `shapes`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TraceEstimate:
    """A trace and the part that each named block of the diagonal contributes; the parts add up to the total."""

    total: Estimate
    parts: dict[str, Estimate]


def hessian_trace(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    relative_error: float = 0.05,
    matrix: str = "hessian",
    generator: torch.Generator | None = None,
    max_probes: int = 300,
) -> Estimate:
    """Trace of the Hessian (or GGN) of the mean loss, to a relative standard error (head of this file).

    Args:
        model: any torch module; read in evaluation mode (batch norm with running statistics, no dropout), each module's mode
            put back. Weights, gradients and buffers stay as they are.
        loss_fn: (output, target) -> scalar mean over the batch.
        batches: list or loader of (inputs, target), or of dicts with ``"labels"``; see `decaycast.core.curvature.Curvature`.
        relative_error: stop when the standard error is at most this share of the value; > 0.
        matrix: ``"hessian"`` or ``"ggn"``.
        generator: of the probes; None for torch's global one.
        max_probes: matrix-vector products after which to stop in any case (with a warning), at least `BLOCK`.

    Returns:
        The estimate. Up to `EXACT_BELOW` parameters, and wherever it takes fewer products, it is exact, with stderr 0.

    Raises:
        ValueError: no parameter requires a gradient, no batch or an empty one, a loss that is no scalar or cannot be
            differentiated twice, arguments out of range.
        FloatingPointError: the loss or a product is not finite.

    Source: see the head of this file.

    Example:
        >>> line = torch.nn.Linear(2, 1)
        >>> batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))
        >>> hessian_trace(line, torch.nn.functional.mse_loss, [batch]).value  # 2*mean(x.x + 1) = 2*(6 + 10)/2
        16.0
    """
    found = estimate_trace(Curvature(model, loss_fn, batches, matrix), relative_error, generator, max_probes)
    return warned(found.total, relative_error)


def layer_shares(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    relative_error: float = 0.05,
    matrix: str = "hessian",
    generator: torch.Generator | None = None,
    max_probes: int = 300,
) -> dict[str, Estimate]:
    """What each parameter tensor contributes to the trace: the traces of the diagonal blocks, which add up to the whole.

    Arguments and errors as `hessian_trace`; `relative_error` is that of the whole, the blocks' own are larger. One set of
    probes serves all, so the errors of the blocks are not independent.

    Returns:
        Name as in ``model.named_parameters()`` -> estimate, in that order.

    Example:
        >>> line = torch.nn.Linear(2, 1)
        >>> batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))
        >>> {name: part.value for name, part in layer_shares(line, torch.nn.functional.mse_loss, [batch]).items()}
        {'weight': 14.0, 'bias': 2.0}
    """
    found = estimate_trace(Curvature(model, loss_fn, batches, matrix), relative_error, generator, max_probes)
    warned(found.total, relative_error)
    return found.parts


def estimate_trace(
    matrix: Matrix, relative_error: float = 0.05, generator: torch.Generator | None = None, max_probes: int = 300
) -> TraceEstimate:
    """The trace of any symmetric `matrix` given by products; what `hessian_trace` does, without the warning.

    Raises:
        ValueError: `relative_error` not positive, `max_probes` below `BLOCK`.
    """
    if not relative_error > 0:
        raise ValueError(
            f"relative_error has to be positive, got {relative_error}; 0.05 stops at a standard error of 5 %"
        )
    if max_probes < BLOCK:
        raise ValueError(
            f"max_probes is {max_probes}, but no standard error can be trusted before {BLOCK} products; give {BLOCK} or more"
        )
    if matrix.size <= min(EXACT_BELOW, max_probes):
        return _exact(matrix, spent=0)
    search = _Search(matrix, generator, max_probes)
    probes = search.with_best_basis(relative_error)
    while (more := probes.wanted(relative_error) - probes.count) > 0 and search.left > 0:
        if matrix.size <= min(more, search.left):
            return _exact(matrix, search.spent)
        search.draw(probes, min(more, search.left))
    return probes.result(search.spent)


def warned(found: Estimate, relative_error: float) -> Estimate:
    """The estimate as it is, with a warning to the caller's caller where its error is above the one asked for."""
    if found.stderr > relative_error * abs(found.value):
        warnings.warn(
            f"stopped at max_probes, after {found.probes} products, at {found.value:.4g} with a standard error of "
            f"{found.stderr:.2g}, above the {relative_error:g} of the value asked for; raise max_probes",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def _exact(matrix: Matrix, spent: int) -> TraceEstimate:
    """The diagonal, by one product per parameter."""
    rows = max(1, min(256, _BASIS_BYTES // (4 * matrix.size * matrix.dtype.itemsize)))
    blocks = []
    for start in range(0, matrix.size, rows):
        unit = torch.zeros(min(rows, matrix.size - start), matrix.size, dtype=matrix.dtype, device=matrix.device)
        unit.diagonal(start).fill_(1.0)
        blocks.append(matrix.products(unit).diagonal(start))
    parts = _sums(matrix, torch.cat(blocks)[None])[0].tolist()
    count = spent + matrix.size
    named = {
        name: Estimate.of(part, 0.0, degrees=count, probes=count)
        for name, part in zip(matrix.shapes, parts, strict=True)
    }
    return TraceEstimate(total=Estimate.of(math.fsum(parts), 0.0, degrees=count, probes=count), parts=named)


class _Search:
    """Draws probes, counts products, and lets the basis grow as long as that saves some."""

    def __init__(self, matrix: Matrix, generator: torch.Generator | None, max_probes: int) -> None:
        self.matrix, self.generator, self.max_probes = matrix, generator, max_probes
        self.spent = 0
        self.basis = _Basis(matrix)
        number = matrix.size * matrix.dtype.itemsize
        self.rows = max(1, min(BLOCK, _BASIS_BYTES // (4 * number)))
        self.largest_basis = _BASIS_BYTES // number - 2 * BLOCK

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return self.max_probes - self.spent

    def with_best_basis(self, relative_error: float) -> _Probes:
        """The first block of probes of the last basis worth its cost."""
        before, ratio = 0.0, 0.0
        while True:
            probes = _Probes(self.basis)
            products = self.draw(probes, BLOCK)
            if before:
                ratio = probes.variance() / before
            before = probes.variance()
            # growing costs a block of products with the new directions and the block of probes that has to be drawn anew;
            # it is expected to lower the variance as much as it did last time (all of it, the first time)
            saved = min(probes.wanted(relative_error) - BLOCK, self.left) * (1.0 - ratio)
            if saved <= 2 * BLOCK or self.basis.rank + BLOCK > self.largest_basis:
                return probes
            self.spent += self.basis.grow(products)

    def draw(self, probes: _Probes, count: int) -> Tensor:
        """Add `count` probes; returns the last products made with them."""
        self.spent += count
        products = torch.empty(0)
        kept = []
        for start in range(0, count, self.rows):
            rows = min(self.rows, count - start)
            products = probes.add(_signs((rows, self.matrix.size), self.matrix, self.generator))
            if count == BLOCK:
                kept.append(products)
        return torch.cat(kept) if kept else products


def _signs(shape: tuple[int, int], matrix: Matrix, generator: torch.Generator | None) -> Tensor:
    device = matrix.device if generator is None else generator.device
    drawn = torch.empty(shape, dtype=matrix.dtype, device=device).bernoulli_(0.5, generator=generator)
    return drawn.mul_(2).sub_(1).to(matrix.device)


class _Basis:
    """Rows Q of orthonormal directions in which the matrix is known, and what they contribute to each part."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.directions = torch.empty(0, matrix.size, dtype=matrix.dtype, device=matrix.device)
        self.inner = torch.empty(0, 0, dtype=matrix.dtype, device=matrix.device)  # Q A Q'
        self._doubled = torch.zeros(len(matrix.shapes), dtype=torch.float64)  # of 2 Q'QA, by part

    @property
    def rank(self) -> int:
        return len(self.directions)

    def project(self, vectors: Tensor) -> Tensor:
        """Rows without what lies in the basis."""
        return vectors - (vectors @ self.directions.T) @ self.directions if self.rank else vectors

    def grow(self, products: Tensor) -> int:
        """Add the directions of `products`, and return how many products that took."""
        fresh = _orthonormal(self.project(self.project(products)))
        if not len(fresh):
            return 0
        images = self.matrix.products(fresh)
        across, corner = self.directions @ images.T, fresh @ images.T
        top = torch.cat([self.inner, across], 1)
        self.inner = torch.cat([top, torch.cat([across.T, (corner + corner.T) / 2], 1)])
        self.directions = torch.cat([self.directions, fresh])
        self._doubled += 2 * _sums(self.matrix, fresh * images).sum(0)
        return len(fresh)

    def known(self) -> Tensor:
        """Trace of A - (I-Q'Q)A(I-Q'Q) by part, shape (parts,): that of Q'QA + AQ'Q - Q'QAQ'Q."""
        if not self.rank:
            return self._doubled
        return self._doubled - _sums(self.matrix, (self.inner @ self.directions) * self.directions).sum(0)


def _orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the rows, without the directions that rounding made."""
    q, r = torch.linalg.qr(rows.T)
    size = r.diagonal().abs()
    kept = size > 100 * torch.finfo(rows.dtype).eps * rows.norm(dim=1).max()
    return q.T[kept]


class _Probes:
    """What the probes drawn with one basis say about the trace outside of it."""

    def __init__(self, basis: _Basis) -> None:
        self.basis, self.matrix = basis, basis.matrix
        self.samples: list[Tensor] = []  # (k, parts): the parts' z.Rz
        self.norms: list[Tensor] = []  # (k,): squared length of Rz
        self.entries = torch.zeros(self.matrix.size, dtype=self.matrix.dtype, device=self.matrix.device)  # sum of z*Rz

    @property
    def count(self) -> int:
        return sum(len(some) for some in self.norms)

    def add(self, signs: Tensor) -> Tensor:
        """Use the rows of `signs` as probes; returns the products made."""
        products = self.matrix.products(self.basis.project(signs))
        rest = self.basis.project(products)
        self.norms.append(rest.square().sum(1, dtype=torch.float64).cpu())
        terms = signs * rest
        self.samples.append(_sums(self.matrix, terms))
        self.entries += terms.sum(0)
        return products

    def variance(self) -> float:
        """Of one probe's z.Rz: twice the summed variances of the entries of z*Rz."""
        total = float(torch.cat(self.norms).sum())
        spread = total - float(self.entries.square().sum(dtype=torch.float64)) / self.count
        return max(0.0, 2.0 * spread / (self.count - 1))

    def value(self) -> float:
        return float(self.basis.known().sum() + torch.cat(self.samples).mean(0).sum())

    def wanted(self, relative_error: float) -> int:
        """Number of probes after which the standard error is expected to be small enough."""
        variance, allowed = self.variance(), (relative_error * self.value()) ** 2
        if variance <= self.count * allowed:
            return self.count
        # a trace of zero is never known to a share of itself: as many as there may be
        return max(self.count + 1, math.ceil(variance / allowed)) if variance < 1e9 * allowed else 10**9

    def result(self, spent: int) -> TraceEstimate:
        """What is known after `spent` products."""
        count, variance = self.count, self.variance()
        stderr = math.sqrt(variance / count)
        # Satterthwaite's degrees of freedom of the variance, which is a mean over probes of their squared lengths
        lengths = float(torch.cat(self.norms).var())
        degrees = max(count - 1, min(1e6, count * variance**2 / (2 * lengths))) if lengths > 0 else 1e6
        total = Estimate.of(self.value(), stderr, degrees=degrees, probes=spent)
        samples, known = torch.cat(self.samples), self.basis.known()
        means, errors = (samples.mean(0) + known).tolist(), (samples.std(0) / math.sqrt(count)).tolist()
        parts = {
            name: Estimate.of(mean, error, degrees=count - 1, probes=spent)
            for name, mean, error in zip(self.matrix.shapes, means, errors, strict=True)
        }
        return TraceEstimate(total=total, parts=parts)


def _sums(matrix: Matrix, rows: Tensor) -> Tensor:
    """Sums over each part, (k, p) -> (k, parts), in float64 on the processor."""
    return torch.stack([part.sum(1, dtype=torch.float64) for part in matrix.parts(rows)], 1).cpu()
