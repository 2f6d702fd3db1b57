"""Self-distillation on a kernel matrix: one factorisation serves all rounds, and the cheapest one is taken.

Conventions and symbols stand at the head of `theory`. Dual vectors a_t are those of a kernel expansion,
f_t(x) = sum_k a_t[k] k(x, x_k), and with one shift every round is one solve and no product with K:

    a_t = (K + lambda)^-1 l_t,    f_t = l_t - lambda*a_t,    l_{t+1} = w*y + (1 - w)*f_t

=============  ==========================  =====================================================================
route          cost                        for
=============  ==========================  =====================================================================
``cholesky``   n^3/3 + 2 n^2 per round     one shift
``eigh``       about 9 n^3, then n^2       many shifts: a tolerance, a grid of lambda; 10 to 15 Choleskys
``lanczos``    2 n^2 per step, m steps     one shift or a tolerance, few outputs, large n; `krylov` checks its residual
=============  ==========================  =====================================================================

numpy arrays in, numpy arrays out; tensors in, tensors out, on their device (a GPU among them). Vectors of n numbers in the
eigenbasis are numpy in both cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decaycast.core.names import choose
from decaycast.methods.self_distill import krylov
from decaycast.methods.self_distill.checked import check_rounds, clipped, finite

Array = Any  # a numpy array or a tensor; results are of the kind of the kernel

ROUTES = ("cholesky", "eigh", "lanczos")
_SHIFTS_FOR_EIGH = 10  # measured: one eigh costs 10 to 15 Choleskys
_KRYLOV_FROM = 1000  # points per output; measured: below, one eigendecomposition costs no more
_LANCZOS_FROM = 1500  # points; below, a Cholesky takes milliseconds


# the matrix


def checked_kernel(kernel: Array, *, definite: bool = False, eps: float | None = None) -> Tensor:
    """The kernel matrix as a tensor that shares its memory, refused if it cannot be one.

    Args:
        kernel: K, shape (n, n), float64 or float32.
        eps: precision of the kernel's numbers, where they were computed more coarsely than their dtype; None for the dtype's.
        definite: also make sure, by a Cholesky factorisation, that no eigenvalue lies below zero by more than rounding.

    Returns:
        The tensor.

    Raises:
        ValueError: not square, not finite, not symmetric up to rounding, or (if asked) not positive semi-definite.

    Source: what a kernel matrix has to be for the rounds to have a meaning.

    Example:
        >>> checked_kernel(np.eye(2)).shape
        torch.Size([2, 2])
    """
    matrix = kernel if isinstance(kernel, Tensor) else _shared(np.ascontiguousarray(kernel))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"the kernel matrix has to have shape (n, n), got {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the kernel matrix has to be float64 or float32, got {matrix.dtype}; convert it first")
    ends = torch.stack(torch.aminmax(matrix))
    size = float(ends.abs().max())
    if not math.isfinite(size):
        raise ValueError("the kernel matrix holds NaN or infinity; look for it in the inputs")
    eps = torch.finfo(matrix.dtype).eps if eps is None else eps
    gap = _asymmetry(matrix)
    if gap > math.sqrt(eps) / 100.0 * size:
        raise ValueError(
            f"the kernel matrix is not symmetric: entries differ from their mirror image by up to {gap:g}, the largest is "
            f"{size:g}; if it is meant to be, pass (K + K.T)/2"
        )
    if definite:
        # what `clipped` takes for rounding
        jitter = max(math.sqrt(eps) / 100.0, 10.0 * len(matrix) * eps) * float(torch.linalg.matrix_norm(matrix, 1))
        if jitter > 0 and krylov.cholesky(matrix, jitter) is None:
            raise ValueError(
                f"the kernel matrix has an eigenvalue below {-jitter:.2g}, more than rounding: it is not positive semi-definite; "
                "take another kernel, or add the missing amount to its diagonal"
            )
    return matrix


# one shift


def constant_duals(
    kernel: Array, labels: Array, shift: float, rounds: int, weight: float = 0.0, route: str | None = None
) -> tuple[Array, str]:
    """Dual vectors of all rounds with one shift.

    Args:
        kernel: K, shape (n, n), symmetric and positive semi-definite.
        labels: y, shape (n,) or (n, outputs), of the kind and dtype of the kernel.
        shift: lambda > 0.
        rounds: number of fits, >= 1.
        weight: of the original labels in every later fit.
        route: one of `ROUTES`; None lets `choose_route` decide. Lanczos falls back to Cholesky if its residual stays large.

    Returns:
        Duals, shape (rounds, n) or (rounds, n, outputs), and the route that gave them.

    Raises:
        ValueError: an argument is out of range, shapes do not fit, or K + lambda is not positive definite.

    Source: head of this file.

    Example:
        >>> duals, route = constant_duals(np.eye(2), np.array([1.0, 2.0]), 1.0, 2)
        >>> duals.round(9).tolist(), route
        ([[0.5, 1.0], [0.25, 0.5]], 'cholesky')
    """
    matrix = checked_kernel(kernel)
    y = _labels(labels, matrix)
    check_rounds(rounds)
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(
            f"shift has to be finite and above 0, got {shift}; it is added to the diagonal of the kernel matrix"
        )
    if not math.isfinite(weight):
        raise ValueError(f"weight has to be finite, got {weight}")
    table = y.reshape(len(y), -1)
    way = choose_route(len(y), 1, outputs=table.shape[1], dtype=matrix.dtype) if route is None else route
    choose(way, ROUTES, "route")
    duals = krylov.constant_rounds(matrix, table, shift, rounds, weight) if way == "lanczos" else None
    if way == "eigh":
        duals = _by_eigh(matrix, table, shift, rounds, weight)
    elif duals is None:
        way, duals = "cholesky", _by_cholesky(matrix, table, shift, rounds, weight)
    return _as_kernel(duals.reshape(rounds, *y.shape), kernel), way


def choose_route(n: int, shifts: int, *, outputs: int = 1, dtype: torch.dtype = torch.float64) -> str:
    """Cheapest route for a number of different shifts.

    Args:
        n: training points.
        shifts: different values of lambda that are needed.
        outputs: columns of labels; Lanczos works one by one.
        dtype: of the kernel; Lanczos needs float64 for its residual.

    Returns:
        ``"cholesky"``, ``"eigh"`` or ``"lanczos"``.

    Raises:
        ValueError: a number is below 1.

    Source: measured, bench/results/self_distill.md.

    Example:
        >>> choose_route(500, 1), choose_route(500, 20), choose_route(5000, 1)
        ('cholesky', 'eigh', 'lanczos')
    """
    if min(n, shifts, outputs) < 1:
        raise ValueError(f"n, shifts and outputs have to be at least 1, got {n}, {shifts} and {outputs}")
    if shifts >= _SHIFTS_FOR_EIGH:
        return "eigh"
    few = outputs * _LANCZOS_FROM <= n and dtype == torch.float64
    return "lanczos" if shifts == 1 and few else "cholesky"


def _by_cholesky(matrix: Tensor, y: Tensor, shift: float, rounds: int, weight: float) -> Tensor:
    lower = krylov.cholesky(matrix, shift)
    if lower is None:
        raise ValueError(
            f"the kernel matrix plus {shift:g} on its diagonal is not positive definite: the kernel has eigenvalues below "
            f"{-shift:g}, or the shift is lost in rounding; take another kernel or a larger alpha"
        )
    duals, target = torch.empty((rounds, *y.shape), dtype=y.dtype, device=y.device), y
    for t in range(rounds):
        duals[t] = krylov.solve_lower(lower, target)
        target = weight * y + (1.0 - weight) * (target - shift * duals[t])
    return duals


def _by_eigh(matrix: Tensor, y: Tensor, shift: float, rounds: int, weight: float) -> Tensor:
    found = decompose(matrix)
    h = found.eigenvalues / (found.eigenvalues + shift)
    kept, tables = np.ones_like(h), []
    for _ in range(rounds):
        tables.append(kept / (found.eigenvalues + shift))
        kept = weight + (1.0 - weight) * h * kept
    return found.lift(np.array(tables)[:, :, None] * found.coefficients(y))


# many shifts


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """K = V diag(d) V^T.

    Attributes:
        eigenvalues: d, float64 numpy, shape (n,), ascending, rounding set to 0.
        vectors: V, shape (n, n), a tensor on the device of the kernel.
        numpy: whether the kernel was a numpy array, so that results are.
    """

    eigenvalues: np.ndarray
    vectors: Tensor
    numpy: bool

    def coefficients(self, labels: Array) -> np.ndarray:
        """Z = V^T y, numpy, shape of the labels."""
        return (self.vectors.T @ _labels(labels, self.vectors)).double().cpu().numpy()

    def lift(self, components: np.ndarray) -> Array:
        """V c for components of shape (..., n) or, for tables of outputs, (..., n, outputs) with at least three axes."""
        table = torch.from_numpy(np.ascontiguousarray(components)).to(self.vectors)
        if table.ndim < 3:
            lifted = table @ self.vectors.T
        else:  # one product for all rounds and outputs
            flat = table.movedim(-2, 0).reshape(len(self.vectors), -1)
            shape = (len(self.vectors), *table.shape[:-2], table.shape[-1])
            lifted = (self.vectors @ flat).reshape(shape).movedim(0, -2)
        return lifted.numpy() if self.numpy else lifted


def constrained_duals(
    kernel: Array, labels: Array, tolerance: float, rounds: int, weight: float
) -> tuple[np.ndarray, Array] | None:
    """Shifts and dual vectors with a tolerance from Krylov spaces, or None where that is not the cheap or certain way.

    Args:
        kernel: K, shape (n, n), float64, symmetric (not checked here).
        labels: y, shape (n, outputs).
        tolerance: eps > 0.
        rounds: number of fits, >= 1.
        weight: of the original labels in every later fit.

    Returns:
        Shifts, numpy (rounds, outputs), and duals, shape (rounds, n, outputs), of the kind of the kernel; None if there are few
        points, many outputs, or a residual that stays large: then `decompose`.

    Raises:
        ValueError: shapes do not fit, or labels are not finite.

    Source: head of `krylov`.

    Example:
        >>> constrained_duals(np.eye(2), np.ones((2, 1)), 0.1, 1, 0.0) is None  # two points
        True
    """
    matrix = kernel if isinstance(kernel, Tensor) else _shared(kernel)
    y = _labels(labels, matrix)
    if len(y) < _KRYLOV_FROM * y.shape[1] or matrix.dtype != torch.float64:
        return None
    found = []
    for column in y.T:
        one = krylov.constrained_rounds(matrix, column.contiguous(), tolerance, rounds, weight)
        if one is None:
            return None
        found.append(one)
    shifts, duals = zip(*found, strict=True)
    return np.stack(shifts, -1), _as_kernel(torch.stack(duals, -1), kernel)


def decompose(kernel: Array, eps: float | None = None) -> Decomposition:
    """One eigendecomposition, for many shifts.

    Args:
        kernel: K, shape (n, n).
        eps: as in `checked_kernel`.

    Returns:
        Eigenvalues and eigenvectors.

    Raises:
        ValueError: not a kernel matrix: see `checked_kernel`; or eigenvalues below zero by more than rounding.

    Source: LAPACK's divide and conquer; on the processor numpy's took 0.7 of the time of torch's (n = 1000 and 2000, one
        thread).

    Example:
        >>> decompose(np.diag([1.0, 3.0])).coefficients(np.array([2.0, 0.0])).tolist()
        [2.0, 0.0]
    """
    matrix = checked_kernel(kernel, eps=eps)
    if matrix.device.type == "cpu":
        values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(matrix.detach().numpy()))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    d = clipped(values.double().cpu().numpy(), torch.finfo(matrix.dtype).eps if eps is None else eps)
    return Decomposition(eigenvalues=d, vectors=vectors, numpy=not isinstance(kernel, Tensor))


# arguments


def _asymmetry(matrix: Tensor) -> float:
    """Largest |K - K^T|, in blocks: no second matrix, and what is read across stays in cache."""
    step = 512 if matrix.device.type == "cpu" else 8192
    rows, largest = matrix.split(step), 0.0
    for i, row in enumerate(rows):
        for j in range(i + 1):
            part = row[:, j * step : (j + 1) * step] - rows[j][:, i * step : (i + 1) * step].T
            largest = max(largest, float(part.abs_().max()))
    return largest


def _labels(labels: Array, matrix: Tensor) -> Tensor:
    """Labels as a tensor beside the matrix."""
    if isinstance(labels, Tensor):
        y = labels
        if y.device != matrix.device:
            raise ValueError(f"labels are on {y.device} and the kernel on {matrix.device}; move one of them")
    else:
        y = _shared(finite(labels, "labels")).to(matrix.device)
    if y.ndim not in (1, 2) or len(y) != len(matrix):
        raise ValueError(
            f"labels have to have shape ({len(matrix)},) or ({len(matrix)}, outputs), got {tuple(y.shape)}"
        )
    y = y.to(matrix.dtype)
    if not bool(torch.isfinite(y).all()):
        raise ValueError("labels have to be finite, but hold NaN or infinity; look for it in the data")
    return y


def _shared(array: np.ndarray) -> Tensor:
    """A tensor on the array's memory; of a read-only array a copy, since torch warns of those."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _as_kernel(values: Tensor, kernel: Array) -> Array:
    return values if isinstance(kernel, Tensor) else values.numpy()
