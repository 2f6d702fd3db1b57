"""Kernel self-distillation as scikit-learn estimators.

Conventions. `alpha`, `gamma`, `degree`, `coef0`, `kernel` and `kernel_params` are those of `sklearn.kernel_ridge.KernelRidge`,
and one round with a number for `alpha` is that estimator. `rounds` counts fits, `mix` is the weight of the *original* labels in
every later fit, `tolerance` the paper's eps, a mean squared distance. Formulas stand at the head of `theory`.

Sample weights are symmetrised: with S = diag(sqrt(weights)) all rounds run on S K S and S y, so that a weight of 2 is a point
given twice, and 0 a point left out. Leave-one-out takes a point out with all of its weight.
"""

# ruff: noqa: N803, N806  scikit-learn calls inputs X

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np

from decaycast.methods.self_distill import theory
from decaycast.methods.self_distill.options import check_options, checked_weights
from decaycast.methods.self_distill.solve import checked_kernel, constant_duals, constrained_duals, decompose
from decaycast.methods.self_distill.tuning import Choice, tune, tune_tolerance

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.metrics.pairwise import pairwise_kernels
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as missing:
    raise ImportError(
        'KernelSelfDistillation needs scikit-learn 1.6 or later: pip install "decaycast[sklearn]"'
    ) from missing

MIXES = (3.0, 2.0, 1.5, 0.75, 0.5, 0.25, 0.0, -0.25, -0.5, -1.0, -2.0)  # candidates of mix="auto": xi from -2 to 3
MOST_ROUNDS = 10  # of rounds="auto"
_GRID = np.geomspace(1e-9, 3.0, 40)  # candidates of alpha, in units of the largest eigenvalue of the kernel matrix
# positive semi-definite whatever the data; of the others this is made sure
_DEFINITE = ("rbf", "laplacian", "linear", "cosine", "chi2")


class _KernelRounds(BaseEstimator):
    """What the regressor and the classifier share: everything but the labels."""

    def __init__(
        self,
        kernel: Any = "rbf",  # str | callable
        gamma: float | None = None,
        alpha: Any = 1.0,  # float | "auto"
        tolerance: float | None = None,
        rounds: Any = 1,  # int | "auto"
        mix: Any = 0.0,  # float | "auto"
        *,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: dict | None = None,
        criterion: str = "gcv",
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.alpha = alpha
        self.tolerance = tolerance
        self.rounds = rounds
        self.mix = mix
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params
        self.criterion = criterion

    _eps: float  # precision of the kernel matrix
    _flat: bool  # labels came without an axis for outputs
    _targets: np.ndarray  # (n, outputs)
    _weights: np.ndarray  # of samples
    _tolerance: float | None  # over the points whose weight is not 0
    _spectrum: tuple[np.ndarray, np.ndarray] | None  # eigenvalues, coefficients

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self.kernel != "precomputed"
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    @property
    def rounds_until_collapse_(self) -> int | np.ndarray:
        """Fits before pure rounds (mix 0) with this tolerance are f = 0; one number per output if there are several."""
        check_is_fitted(self)
        if self._tolerance is None:
            raise AttributeError(
                "rounds_until_collapse_ is there in tolerance mode only: with a constant alpha rounds decay without end"
            )
        if self._spectrum is None:  # the rounds did without
            kernel, labels, _ = self._weighted(self._kernel(self.X_fit_, None))
            found = decompose(kernel, self._eps)
            self._spectrum = found.eigenvalues, found.coefficients(labels)
        d, z = self._spectrum
        found = np.array([theory.collapse(d, column, self._tolerance) for column in z.T])
        return int(found[0]) if self._flat else found

    def _fit(self, X: Any, targets: np.ndarray, sample_weight: Any) -> None:
        """All rounds on targets of shape (n, outputs)."""
        check_options(self)
        weights = checked_weights(sample_weight, len(targets))
        kernel = self._kernel(X, None)
        auto = "auto" in (self.rounds, self.mix, self.alpha) or self.tolerance is not None
        if not (isinstance(self.kernel, str) and self.kernel in _DEFINITE):
            # an eigendecomposition shows it, too; of rounds with a tolerance one cannot be sure that there will be one
            checked_kernel(kernel, definite=self.tolerance is not None or not auto, eps=self._eps)
        self._targets, self._weights = targets, weights
        kernel, labels, roots = self._weighted(kernel)
        duals = self._rounds_of_many_shifts(kernel, labels, weights.sum()) if auto else self._rounds(kernel, labels)
        self.dual_coefs_ = np.zeros((self.rounds_, *targets.shape))
        self.dual_coefs_[:, weights > 0] = roots * duals
        self.X_fit_ = X

    def _weighted(self, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """S K S, S y and S, as a column, of the points whose weight is not 0."""
        used = self._weights > 0
        roots = np.sqrt(self._weights[used])[:, None]
        if not (self._weights == 1.0).all():
            kernel = roots * kernel[np.ix_(used, used)] * roots.T
        return kernel, roots * self._targets[used], roots

    def _rounds(self, kernel: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """One shift: duals of all rounds."""
        self.alpha_, self.rounds_, self.mix_ = float(self.alpha), int(self.rounds), float(self.mix)
        self.multipliers_, self.choice_, self._spectrum, self._tolerance = None, None, None, None
        duals, self.route_ = constant_duals(kernel, labels, self.alpha_, self.rounds_, self.mix_)
        return duals

    def _rounds_of_many_shifts(self, kernel: np.ndarray, labels: np.ndarray, total: float) -> np.ndarray:
        """A tolerance, or something to choose: duals of all rounds."""
        # the mean over points counts each with its weight
        tolerance = None if self.tolerance is None else self.tolerance * total / len(kernel)
        self._tolerance, self._spectrum = tolerance, None
        if tolerance is not None and "auto" not in (self.rounds, self.mix):
            quick = constrained_duals(kernel, labels, tolerance, int(self.rounds), float(self.mix))
            if quick is not None:
                self.route_, self.choice_ = "lanczos", None
                self.rounds_, self.mix_ = int(self.rounds), float(self.mix)
                self._note_multipliers(quick[0], total)
                return quick[1]
        found, self.route_ = decompose(kernel, self._eps), "eigh"
        d, z = found.eigenvalues, found.coefficients(labels)
        self.choice_ = self._choose(found.vectors.numpy(), d, z, tolerance)
        self.rounds_ = int(self.rounds) if self.choice_ is None else self.choice_.rounds
        self.mix_ = float(self.mix) if self.choice_ is None else self.choice_.weight
        if tolerance is None:
            assert self.choice_ is not None  # something is "auto", or this route was not taken
            self.alpha_, self.multipliers_ = self.choice_.shift, None
            shift = self.alpha_
            filters = theory.mixed_filters(d, shift, np.full(self.rounds_ - 1, self.mix_))
            kept = np.concatenate([np.ones((1, len(d))), self.mix_ + (1.0 - self.mix_) * filters[:-1]])
            return found.lift((kept / (d + shift))[:, :, None] * z)
        rounds = theory.constrained_rounds(d, z, tolerance, self.rounds_, self.mix_)
        self._spectrum = d, z
        self._note_multipliers(rounds.shifts, total)
        return found.lift(rounds.duals * z)

    def _note_multipliers(self, shifts: np.ndarray, total: float) -> None:
        """What the paper calls c_t; warns of collapse. Shifts have shape (rounds, outputs)."""
        self.alpha_ = None
        self.multipliers_ = shifts[:, 0] / total if self._flat else shifts / total
        gone = np.isinf(shifts)
        self._say_collapse(tuple(int(column.argmax()) if column.any() else None for column in gone.T))

    def _choose(self, vectors: np.ndarray, d: np.ndarray, z: np.ndarray, tolerance: float | None) -> Choice | None:
        """Whatever is "auto"."""
        rounds = MOST_ROUNDS if self.rounds == "auto" else int(self.rounds)
        options = {"any_round": self.rounds == "auto", "criterion": self.criterion}
        mixes = MIXES if self.mix == "auto" else (float(self.mix),)
        if tolerance is not None:
            if "auto" not in (self.rounds, self.mix):
                return None
            return tune_tolerance(vectors, d, z, tolerance, mixes, rounds, **options)
        grid = _GRID * (d[-1] if d[-1] > 0 else 1.0)
        if self.alpha == "auto":
            shifts = grid
        elif self.rounds == "auto" and self.mix == "auto":
            shifts = np.append(grid, float(self.alpha))
        else:
            shifts = np.array([float(self.alpha)])
        return tune(vectors, d, z, shifts, mixes, rounds, **options)

    def _say_collapse(self, collapsed: tuple[int | None, ...]) -> None:
        """Warn if what is predicted is f = 0 for the tolerance's sake."""
        gone = [fits for fits in collapsed if fits is not None and fits < self.rounds_]
        if not gone:
            return
        of = "" if self._flat else f" for {len(gone)} of {len(collapsed)} outputs"
        if min(gone) == 0:
            text = f"the labels lie within the tolerance of {self.tolerance:g}{of}: their mean square is no larger, so f = 0 "
            text += "answers from the first fit on; lower the tolerance"
        else:
            text = f"self-distillation has collapsed to f = 0{of} after {min(gone)} of {self.rounds_} fits"
            text += "; take fewer rounds (rounds_until_collapse_ says how many there are) or a lower tolerance"
        warnings.warn(text, UserWarning, stacklevel=4)

    def _inputs(self) -> dict[str, Any]:
        """How inputs are checked."""
        sparse = self.kernel != "precomputed"
        return {"accept_sparse": ("csr", "csc") if sparse else False, "dtype": np.float64}

    def _note_precision(self, X: Any) -> None:
        """A precomputed kernel in float32 has negative eigenvalues and asymmetries of that size."""
        coarse = self.kernel == "precomputed" and getattr(X, "dtype", None) in (np.float32, np.float16)
        self._eps = float(np.finfo(np.float32 if coarse else np.float64).eps)

    def _kernel(self, X: Any, other: Any) -> np.ndarray:
        metric: Any = self.kernel
        if not isinstance(metric, str):
            params = self.kernel_params or {}
        else:
            params = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        return pairwise_kernels(X, other, metric=metric, filter_params=True, **params)

    def _staged(self, X: Any) -> np.ndarray:
        """Predictions of all rounds, shape (rounds, samples, outputs)."""
        check_is_fitted(self)
        X = validate_data(self, X, **self._inputs(), reset=False)
        return np.tensordot(self._kernel(X, self.X_fit_), self.dual_coefs_, (1, 1)).swapaxes(0, 1)

    def _values(self, X: Any, rounds: int | None) -> np.ndarray:
        """Predictions of one round, shape (samples, outputs)."""
        check_is_fitted(self)
        fits = self.rounds_ if rounds is None else rounds
        if isinstance(fits, bool) or not isinstance(fits, Integral) or not 1 <= fits <= self.rounds_:
            raise ValueError(
                f"rounds has to be a whole number from 1 to the {self.rounds_} that were fitted, got {rounds!r}"
            )
        X = validate_data(self, X, **self._inputs(), reset=False)
        return self._kernel(X, self.X_fit_) @ self.dual_coefs_[fits - 1]


class KernelSelfDistillation(MultiOutputMixin, RegressorMixin, _KernelRounds):
    """Kernel ridge regression that is fitted again to its own predictions, in closed form.

    Args:
        kernel: a name of `sklearn.metrics.pairwise`, a callable of two samples, or ``"precomputed"``. It has to be positive
            semi-definite; for kernels that need not be (``"poly"``, ``"sigmoid"``, callables, ...) that is checked.
        gamma: parameter of the kernel, as in `KernelRidge`; None is 1/features.
        alpha: lambda > 0, added to the diagonal of the kernel matrix, as in `KernelRidge`; or ``"auto"``, chosen by
            `criterion`. Ignored with a `tolerance`. *If rounds and mix are both* ``"auto"`` *it is chosen with them*, from a
            grid to which the value given here is added.
        tolerance: the paper's eps > 0 instead of alpha: every fit has a mean squared distance of exactly `tolerance` to its
            labels, until they are so small that f = 0 is within it (collapse). With several outputs each has its own
            multipliers and collapses by itself.
        rounds: number of fits, >= 1; 1 is plain kernel ridge. ``"auto"``: 1 to 10, by `criterion`.
        mix: weight of the original labels in every later fit; 0 is pure self-distillation. May lie outside [0, 1]: below 0
            the labels of later fits lie beyond the previous fit, above 1 beyond the labels. ``"auto"``: 11 values, -2 to 3.
        degree: as in `KernelRidge`.
        coef0: as in `KernelRidge`.
        kernel_params: arguments of a callable kernel.
        criterion: ``"gcv"`` or ``"leave_one_out"`` (exact for constant alpha: all rounds go without the point). Either way a
            choice other than one fit has to win by more than two standard errors of paired leave-one-out errors.

    Attributes:
        dual_coef_: of the last round, shape (n,) or (n, outputs), as in `KernelRidge`.
        dual_coefs_: of all rounds, shape (rounds, n, outputs).
        alpha_: lambda in force; None with a tolerance.
        rounds_: number of fits in force.
        mix_: in force.
        multipliers_: the paper's c_t = lambda_t/n with a tolerance, shape (rounds,) or (rounds, outputs), infinite where f = 0;
            None otherwise. With sample weights n is their sum.
        rounds_until_collapse_: with a tolerance, fits before pure rounds are f = 0, one number per output if there are
            several; 0 if the labels lie within the tolerance. No such attribute otherwise.
        choice_: what the criterion saw, a `Choice`; None if nothing was ``"auto"``.
        route_: ``"cholesky"``, ``"lanczos"`` or ``"eigh"``.
        X_fit_: the training inputs.

    Raises:
        ValueError: in `fit`: an option is out of range, the kernel matrix is not one, or the tolerance cannot be met.

    Warns:
        UserWarning: in `fit`: the labels lie within the tolerance, or the rounds asked for go beyond collapse.

    Source: Mobahi, Farajtabar, Bartlett 2020 (arXiv 2002.05715); `mix`: Borup & Andersen 2021 (arXiv 2102.13088).

    Example:
        >>> model = KernelSelfDistillation(kernel="precomputed", alpha=1.0, rounds=2).fit(np.eye(2), [2.0, 4.0])
        >>> [stage.round(6).tolist() for stage in model.staged_predict(np.eye(2))]
        [[1.0, 2.0], [0.5, 1.0]]
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelSelfDistillation:
        """Fit all rounds.

        Args:
            X: inputs, shape (n, features), dense or sparse; the kernel matrix (n, n) if it is precomputed.
            y: labels, shape (n,) or (n, outputs).
            sample_weight: >= 0, shape (n,); None for equal weights.

        Returns:
            The estimator.

        Raises:
            ValueError: see the class.
        """
        self._note_precision(X)
        X, y = validate_data(self, X, y, **self._inputs(), multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self._flat = y.ndim == 1
        self._fit(X, y.reshape(len(y), -1), sample_weight)
        self.dual_coef_ = self.dual_coefs_[-1, :, 0] if self._flat else self.dual_coefs_[-1]
        return self

    def predict(self, X: Any, rounds: int | None = None) -> np.ndarray:
        """Predictions after `rounds` fits, or after all of them.

        Args:
            X: inputs, shape (samples, features); kernel with the training points (samples, n) if it is precomputed.
            rounds: 1 to `rounds_`; None is `rounds_`.

        Returns:
            Shape (samples,) or (samples, outputs).

        Raises:
            ValueError: `rounds` is out of range.
        """
        values = self._values(X, rounds)
        return values[:, 0] if self._flat else values

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """Predictions after 1, 2, ..., `rounds_` fits, with one kernel matrix for all.

        Args:
            X: as in `predict`.

        Yields:
            Shape (samples,) or (samples, outputs).
        """
        for values in self._staged(X):
            yield values[:, 0] if self._flat else values


class KernelSelfDistillationClassifier(ClassifierMixin, _KernelRounds):
    """Classification by kernel self-distillation of one-hot labels: the class with the largest value is predicted.

    The values are least-squares fits, not probabilities, and there is no `predict_proba`: calibrate with
    `sklearn.calibration.CalibratedClassifierCV`.

    Args:
        kernel: as in `KernelSelfDistillation`, and so are all others.
        gamma: see there.
        alpha: see there.
        tolerance: see there; every class has its own multipliers.
        rounds: see there.
        mix: see there.
        degree: see there.
        coef0: see there.
        kernel_params: see there.
        criterion: see there; errors are summed over the one-hot columns.

    Attributes:
        classes_: in the order of the columns of `dual_coef_`; the rest as in `KernelSelfDistillation`.

    Source: as `KernelSelfDistillation`.

    Example:
        >>> model = KernelSelfDistillationClassifier(kernel="linear", rounds=2).fit([[-1.0], [1.0]], ["no", "yes"])
        >>> model.predict([[-2.0], [3.0]]).tolist()
        ['no', 'yes']
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelSelfDistillationClassifier:
        """Fit all rounds to one-hot labels.

        Args:
            X: inputs, shape (n, features), dense or sparse; the kernel matrix (n, n) if it is precomputed.
            y: classes, shape (n,).
            sample_weight: >= 0, shape (n,); None for equal weights.

        Returns:
            The estimator.

        Raises:
            ValueError: see `KernelSelfDistillation`.
        """
        self._note_precision(X)
        X, y = validate_data(self, X, y, **self._inputs())
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        self._flat = False
        self._fit(X, np.eye(len(self.classes_))[codes], sample_weight)
        self.dual_coef_ = self.dual_coefs_[-1]
        return self

    def decision_function(self, X: Any, rounds: int | None = None) -> np.ndarray:
        """Fitted values of the one-hot columns; for two classes that of the second minus that of the first.

        Args:
            X: as in `KernelSelfDistillation.predict`.
            rounds: 1 to `rounds_`; None is `rounds_`.

        Returns:
            Shape (samples, classes), or (samples,) for two classes.

        Raises:
            ValueError: `rounds` is out of range.
        """
        values = self._values(X, rounds)
        return values[:, 1] - values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any, rounds: int | None = None) -> np.ndarray:
        """Classes after `rounds` fits, or after all of them.

        Args:
            X: as in `KernelSelfDistillation.predict`.
            rounds: 1 to `rounds_`; None is `rounds_`.

        Returns:
            Classes, shape (samples,).

        Raises:
            ValueError: `rounds` is out of range.
        """
        values = self._values(X, rounds)  # first: it says so if there was no fit
        return self.classes_[values.argmax(1)]

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """Classes after 1, 2, ..., `rounds_` fits, with one kernel matrix for all.

        Args:
            X: as in `predict`.

        Yields:
            Classes, shape (samples,).
        """
        for values in self._staged(X):
            yield self.classes_[values.argmax(1)]
