"""The numbers behind `theory`: propagators of a mode by quadrature, root finding, eigenpairs, and the checks of arguments.

Conventions and formulas stand at the head of `theory`; names here are the same (M, X, r, p).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Values = Any  # a number, a sequence, a numpy array or a CPU tensor

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_FAR = 50.0  # exp(-50) is below float64 rounding
_GONE = 800.0  # exp(-800) underflows
_LATE = 300.0  # k*lambda*t: a mode that has not turned by then is below exp(-300)
_SELECTED = 1e-11  # of the largest eigenvalue: rounding in a float64 matrix of some thousand rows
_BLOCK = 4096  # elements integrated at once: 4096 x 20 nodes stay in cache


def propagators(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, ...]:
    """X, M and k*lambda*t of the head of this file, for every k, of the common shape."""
    t, gamma, decay, k = np.broadcast_arrays(t, gamma, decay, k)
    integrated, decayed = _integrated(t, gamma, decay, k), product(k * decay, t)
    memory = np.array(-np.expm1(-integrated))  # k = 0
    ridge, deep = k == 1, k >= 2
    if ridge.any():
        total = gamma + decay
        share = np.divide(gamma, total, out=np.zeros(total.shape), where=total > 0)
        memory[ridge] = (share * -np.expm1(-(integrated + decayed)))[ridge]
    if deep.any():
        memory[deep] = _memory(t[deep], gamma[deep], decay[deep], k[deep])
    return integrated, memory, decayed


def _integrated(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> np.ndarray:
    """X = int_0^t gamma(s) ds = gamma*(1 - exp(-a*t))/a, a = 2(k-1)*lambda."""
    rate = 2.0 * (k - 1.0) * decay
    shrunk = product(rate, t)
    slow = np.abs(shrunk) < 1e-9  # to second order the average of exp(-a*s) is 1 - a*t/2
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        lasted = np.where(slow, t * (1.0 - shrunk / 2.0), -np.expm1(-shrunk) / rate)
    return product(gamma, lasted)


def _memory(t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray, *, lag: bool = False) -> np.ndarray:
    """M for k >= 2 and flat arrays; with `lag`, its integrand times w of `time_of_peak`."""
    integrated = _integrated(t, gamma, decay, k)
    memory = np.zeros(t.shape)
    # M <= exp(-k*lambda*t)*(a polynomial): zero where that underflows
    (todo,) = np.nonzero((integrated > 0) & (product(k * decay, t) < _GONE))
    for first in range(0, todo.size, _BLOCK):
        block = todo[first : first + _BLOCK]
        memory[block] = _quadrature(integrated[block], t[block], gamma[block], decay[block], k[block], lag)
    return memory


def _quadrature(
    integrated: np.ndarray, t: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray, lag: bool
) -> np.ndarray:
    """Integrate exp(-x)*(1 + r*x)**(-p) over x in (0, X) by Gauss-Legendre panels in z = log(1 + R*x), R = max(r, 1).

    In z the two scales, 1 and 1/r, are both of order one and no singularity is nearer than pi: panels of width 1 do.
    Cutting at x = 50 costs a relative exp(-50), as the second factor only falls.
    """
    with np.errstate(divide="ignore"):  # lambda = 0: log r = -infinity, that is, r = 0
        log_r = np.log(2.0 * (k - 1.0) * decay) + product(2.0 * (k - 1.0) * decay, t) - np.log(gamma)
    log_scale = np.maximum(log_r, 0.0)
    end = np.logaddexp(0.0, log_scale + np.log(np.minimum(integrated, _FAR)))
    panels = int(np.ceil(end.max()))
    half = (end / (2 * panels))[:, None]
    ratio, shift, power = np.exp(np.minimum(log_r, 0.0))[:, None], log_scale[:, None], (k / (2.0 * (k - 1.0)))[:, None]
    total = np.zeros(end.shape)
    for panel in range(panels):
        z = half * (2 * panel + 1 + _NODES)
        grown = np.exp(z - shift)  # (1 + R*x)/R, also dx/dz
        x = grown - np.exp(-shift)
        log_back = np.where(shift > 0, z, np.log1p(ratio * x))  # log(gamma(s)/gamma(t))
        values = grown * np.exp(-x - power * log_back)
        if lag:
            pull = (k * decay)[:, None]
            now = product(gamma, np.exp(-2.0 * (k - 1.0) * decay * t))[:, None] * np.exp(log_back)
            values *= 2.0 * (k - 1.0)[:, None] * decay[:, None] * (pull / (now + pull)) / (now + pull)
        total += (half * values) @ _WEIGHTS
    return total


def crossing(gap: np.ndarray, gamma: np.ndarray, decay: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Time at which a mode that starts `gap` < 0 (in units of y) below its quasi-static value meets it; k >= 2."""

    def above(t: np.ndarray, rows: np.ndarray) -> np.ndarray:
        case = t[rows], gamma[rows], decay[rows], k[rows]
        start = gap[rows] * np.exp(-(_integrated(*case) + k[rows] * decay[rows] * t[rows]))
        return start + _memory(*case, lag=True) >= 0

    with np.errstate(over="ignore"):  # a decay near the smallest float: as good as none
        low, high, last = np.zeros(gap.shape), 1.0 / (gamma + k * decay), _LATE / (k * decay)
    pending, found = np.arange(gap.size), np.zeros(gap.shape, dtype=bool)
    while pending.size:  # double until the crossing is bracketed, or it is too late for one
        found[pending] = above(high, pending)
        pending = pending[~found[pending] & (high[pending] < last[pending])]
        low[pending], high[pending] = high[pending], np.minimum(2.0 * high[pending], last[pending])
    (rows,) = np.nonzero(found)
    for _ in range(60):
        middle = (low + high) / 2.0
        met = np.zeros(gap.shape, dtype=bool)
        met[rows] = above(middle, rows)
        low, high = np.where(met, low, middle), np.where(met, middle, high)
    return np.where(found, (low + high) / 2.0, np.inf)


def evolve(
    time: Values, eigenvalues: Values, targets: Values, weight_decay: Values, degree: Values
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Checked targets, and the propagators of shape (times, n), with an axis for c outputs if there are."""
    t, gamma = _times_in_order(time), checked_eigenvalues(eigenvalues)
    if gamma.ndim != 1 or gamma.size == 0:
        raise ValueError(f"eigenvalues have to have shape (n,) with n >= 1, got {gamma.shape}")
    y = per_sample(targets, gamma, "targets")
    decay, k = checked_decay(weight_decay), solvable(degree)
    if decay.ndim or k.ndim:
        raise ValueError(f"weight_decay and degree have to be single numbers here, got shapes {decay.shape}, {k.shape}")
    found = propagators(t[:, None], gamma, decay, k)
    return y, tuple(part.reshape(*part.shape, *[1] * (y.ndim - 1)) for part in found)


def eigenpairs(kernel: Values) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of Theta_0/n, clipped at 0, and eigenvectors as columns."""
    matrix = finite(kernel, "kernel")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"kernel has to be a square matrix, got shape {matrix.shape}")
    rounding, skew = _rounding(kernel, len(matrix)) * np.abs(matrix).max(), np.abs(matrix - matrix.T).max()
    if skew > rounding:
        raise ValueError(
            f"kernel is not symmetric: entries differ by up to {skew:g}; pass (K + K.T)/2 if that is noise"
        )
    gamma, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0 / len(matrix))
    return _clipped(gamma, rounding / len(matrix)), vectors


# arguments


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a*b with 0*infinity = 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, np.multiply(a, b))


def _array(values: Values, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iufb":  # complex (of eigvals, say), text and None would pass numpy's conversion
            raise TypeError(f"dtype {array.dtype}")
        return array.astype(float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} has to be a real number or an array of them, got {values!r:.80}") from error


def finite(values: Values, name: str) -> np.ndarray:
    """A float64 array of finite numbers; ValueError names what is not."""
    array = _array(values, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has to be finite, got {array[~np.isfinite(array)].flat[0]}")
    return array


def at_least_zero(values: Values, name: str) -> np.ndarray:
    """The array, checked to be >= 0."""
    array = _array(values, name)
    if not (array >= 0).all():
        raise ValueError(f"{name} has to be at least 0, got {array[~(array >= 0)].flat[0]:g}")
    return array


def checked_decay(values: Values) -> np.ndarray:
    """weight_decay, finite and >= 0."""
    return at_least_zero(finite(values, "weight_decay"), "weight_decay")


def checked_degree(values: Values) -> np.ndarray:
    """The degree of homogeneity k, finite and >= 0."""
    name = "degree of homogeneity"
    return at_least_zero(finite(values, name), name)


def solvable(values: Values) -> np.ndarray:
    """The degree of homogeneity where a mode can be solved: 0, 1 or >= 2."""
    k = checked_degree(values)
    between = (k < 2) & (k != 0) & (k != 1)
    if between.any():
        raise ValueError(f"degree of homogeneity has to be 0, 1 or at least 2, got {k[between].flat[0]:g}")
    return k


def _rounding(values: Values, size: int) -> float:
    """Relative size of what rounding in the caller's own precision may leave in a matrix of `size` rows."""
    dtype = np.asarray(values).dtype
    return 8 * size * float(np.finfo(dtype if dtype.kind == "f" else float).eps)


def _clipped(gamma: np.ndarray, rounding: float) -> np.ndarray:
    if gamma.size and gamma.min() < -rounding:
        raise ValueError(
            f"eigenvalues have to be at least 0, got {gamma.min():g}: more than rounding; is the kernel a kernel?"
        )
    return np.maximum(gamma, 0.0)


def checked_eigenvalues(values: Values) -> np.ndarray:
    """Eigenvalues, with negatives of rounding size clipped to 0 and others refused."""
    gamma = finite(values, "eigenvalue")
    largest = float(np.abs(gamma).max(initial=0.0)) if gamma.ndim else 0.0
    # they may be a selection: their number need not be the size of the matrix that was rounded
    return _clipped(gamma, max(_rounding(values, gamma.size), _SELECTED) * largest)


def _times_in_order(values: Values) -> np.ndarray:
    t = at_least_zero(values, "time")
    if t.ndim != 1:
        raise ValueError(f"time has to have shape (times,), got {t.shape}")
    if (t[1:] < t[:-1]).any():
        raise ValueError("time has to be in order, and it decreases; sort it first")
    return t


def per_sample(values: Values, gamma: np.ndarray, name: str) -> np.ndarray:
    """Values of shape (n,) or (n, outputs) for n eigenvalues."""
    array = finite(values, name)
    if array.ndim not in (1, 2) or len(array) != gamma.size:
        raise ValueError(f"{name} have to have shape ({gamma.size},) or ({gamma.size}, outputs), got {array.shape}")
    return array


def like(values: Values, like: np.ndarray, name: str) -> np.ndarray:
    """Values of the shape of `like`, or a number for all of it."""
    array = finite(values, name)
    if array.ndim and array.shape != like.shape:
        raise ValueError(f"{name} has to be one number or of shape {like.shape}, got {array.shape}")
    return array
