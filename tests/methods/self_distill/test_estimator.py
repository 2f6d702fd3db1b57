from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.utils.estimator_checks import parametrize_with_checks

from decaycast.methods.self_distill.estimator import KernelSelfDistillation, KernelSelfDistillationClassifier


def expected(estimator) -> dict[str, str]:
    """What cannot hold: see the reasons."""
    if "auto" in (estimator.rounds, estimator.mix):
        reason = "leaving out a point of weight 2 is not leaving out one of two equal points"
        return dict.fromkeys(
            [f"check_sample_weight_equivalence_on_{kind}_data" for kind in ("dense", "sparse")], reason
        )
    if estimator.tolerance is not None:
        reason = "the labels are noise on repeated inputs, and no fit comes within the tolerance"
        names = ("check_estimator_sparse_tag", "check_estimator_sparse_array", "check_estimator_sparse_matrix")
        return dict.fromkeys(names, reason)
    return {}


@parametrize_with_checks([KernelSelfDistillation(), KernelSelfDistillationClassifier()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the labels lie within the tolerance")
@pytest.mark.filterwarnings("ignore:self-distillation has collapsed")
@parametrize_with_checks(
    [
        KernelSelfDistillation(kernel="linear", rounds=3, mix=0.5),
        KernelSelfDistillation(rounds="auto", mix="auto"),
        KernelSelfDistillation(tolerance=0.1, rounds=2),
        KernelSelfDistillationClassifier(rounds="auto", alpha="auto"),
    ],
    expected_failed_checks=expected,
)
def test_scikit_learns_own_checks_of_other_options(estimator, check):
    check(estimator)


def data(n: int = 60, outputs: int = 0, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 2))
    clean = np.sin(3 * x[:, 0]) + x[:, 1]
    noise = rng.normal(size=(n, outputs) if outputs else n)
    return x, (clean[:, None] if outputs else clean) + 0.5 * noise


# ridge mode


@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "linear", "poly", "cosine"])
@pytest.mark.parametrize("outputs", [0, 2])
def test_one_round_is_scikit_learns_kernel_ridge(kernel: str, outputs: int):
    x, y = data(outputs=outputs)
    options = {"kernel": kernel, "gamma": 0.7, "alpha": 0.3, "degree": 2, "coef0": 0.5}
    weights = np.random.default_rng(1).uniform(0, 2, 60)
    ours = KernelSelfDistillation(**options).fit(x, y, weights)
    theirs = KernelRidge(**options).fit(x, y, weights)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, atol=1e-9)
    np.testing.assert_allclose(ours.predict(x[:5] + 0.1), theirs.predict(x[:5] + 0.1), atol=1e-10)
    assert ours.predict(x).shape == y.shape


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.3])
def test_rounds_are_refits_of_kernel_ridge(mix: float):
    x, y = data(outputs=2)
    model = KernelSelfDistillation(alpha=0.3, rounds=5, mix=mix).fit(x, y)
    labels, probe = y, x[:7] * 0.9
    for t, stage in enumerate(model.staged_predict(probe), start=1):
        ridge = KernelRidge(kernel="rbf", alpha=0.3).fit(x, labels)
        np.testing.assert_allclose(stage, ridge.predict(probe), atol=1e-9)
        np.testing.assert_allclose(model.predict(probe, rounds=t), stage, atol=1e-12)
        labels = mix * y + (1 - mix) * ridge.predict(x)
    assert t == 5


def test_kernels_by_name_by_callable_and_precomputed_agree():
    x, y = data()
    named = KernelSelfDistillation(gamma=0.5, rounds=3).fit(x, y).predict(x[:4])
    called = KernelSelfDistillation(
        kernel=lambda a, b, rate: np.exp(-rate * ((a - b) ** 2).sum()), kernel_params={"rate": 0.5}, rounds=3
    )
    np.testing.assert_allclose(called.fit(x, y).predict(x[:4]), named, rtol=1e-9)
    given = KernelSelfDistillation(kernel="precomputed", rounds=3).fit(rbf_kernel(x, gamma=0.5), y)
    np.testing.assert_allclose(given.predict(rbf_kernel(x[:4], x, gamma=0.5)), named, rtol=1e-9)
    single = KernelSelfDistillation(kernel="precomputed", rounds=3).fit(rbf_kernel(x, gamma=0.5).astype(np.float32), y)
    np.testing.assert_allclose(single.predict(rbf_kernel(x[:4], x, gamma=0.5)), named, atol=1e-3)


@pytest.mark.parametrize("options", [{"rounds": 4, "mix": 0.2}, {"rounds": 3, "tolerance": 0.05, "gamma": 5.0}])
def test_weights_are_repetitions(options: dict):
    x, y = data(outputs=2)
    counts = np.random.default_rng(2).integers(0, 4, 60)
    weighted = KernelSelfDistillation(**options).fit(x, y, counts)
    repeated = KernelSelfDistillation(**options).fit(np.repeat(x, counts, 0), np.repeat(y, counts, 0))
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), atol=1e-8)
    assert weighted.dual_coefs_.shape == (options["rounds"], 60, 2)
    if "tolerance" in options:
        np.testing.assert_allclose(weighted.multipliers_, repeated.multipliers_, rtol=1e-8)
        assert weighted.rounds_until_collapse_.tolist() == repeated.rounds_until_collapse_.tolist()


# tolerance mode


def test_every_fit_misses_its_labels_by_the_tolerance_until_it_collapses():
    x, y = data()
    with pytest.warns(UserWarning, match=r"collapsed to f = 0 after \d+ of 30 fits; take fewer rounds"):
        model = KernelSelfDistillation(gamma=5.0, tolerance=0.05, rounds=30).fit(x, y)
    labels = y
    for t, fit in enumerate(model.staged_predict(x)):
        if t < model.rounds_until_collapse_:
            assert ((fit - labels) ** 2).mean() == pytest.approx(0.05, rel=1e-8)
            # scikit-learn with alpha = n*c
            ridge = KernelRidge(kernel="rbf", gamma=5.0, alpha=60 * model.multipliers_[t]).fit(x, labels)
            np.testing.assert_allclose(ridge.predict(x), fit, atol=1e-7)
        else:
            assert not fit.any() and np.isinf(model.multipliers_[t])
        labels = fit
    assert not model.predict(x).any() and model.alpha_ is None
    assert 1 < model.rounds_until_collapse_ < 30


def test_rounds_until_collapse_looks_beyond_the_rounds_that_were_fitted():
    x, y = data(outputs=2)
    model = KernelSelfDistillation(gamma=5.0, tolerance=0.05).fit(x, y)
    assert model.multipliers_.shape == (1, 2)
    alone = [KernelSelfDistillation(gamma=5.0, tolerance=0.05).fit(x, y[:, k]) for k in range(2)]
    assert model.rounds_until_collapse_.tolist() == [one.rounds_until_collapse_ for one in alone]
    assert isinstance(alone[0].rounds_until_collapse_, int) and alone[0].multipliers_.shape == (1,)


def test_labels_within_the_tolerance_are_said_clearly():
    x, y = data()
    with pytest.warns(UserWarning, match=r"labels lie within the tolerance of 9.*f = 0 answers from the first fit on"):
        model = KernelSelfDistillation(tolerance=9.0).fit(x, y)
    assert model.rounds_until_collapse_ == 0 and not model.predict(x).any()
    with pytest.warns(UserWarning, match="for 1 of 2 outputs"):
        KernelSelfDistillation(gamma=5.0, tolerance=0.05).fit(x, np.stack([y, 0.01 * y], 1))


def test_a_tolerance_that_cannot_be_met():
    x, y = data()
    with pytest.raises(ValueError, match=r"a tolerance of 0.01 cannot be met"):
        KernelSelfDistillation(kernel="linear", tolerance=0.01).fit(x, y)


def test_there_is_no_collapse_with_a_constant_alpha():
    model = KernelSelfDistillation(rounds=2).fit(*data())
    assert not hasattr(model, "rounds_until_collapse_") and model.multipliers_ is None
    with pytest.raises(AttributeError, match="tolerance mode only"):
        _ = model.rounds_until_collapse_


# auto


@pytest.mark.parametrize("criterion", ["gcv", "leave_one_out"])
def test_auto_is_what_it_says_it_chose(criterion: str):
    x, y = data(outputs=2)
    model = KernelSelfDistillation(rounds="auto", mix="auto", criterion=criterion).fit(x, y)
    assert model.route_ == "eigh" and model.choice_.rounds == model.rounds_
    again = KernelSelfDistillation(alpha=model.alpha_, rounds=model.rounds_, mix=model.mix_).fit(x, y)
    np.testing.assert_allclose(model.predict(x), again.predict(x), atol=1e-7)
    np.testing.assert_allclose(model.dual_coefs_, again.dual_coefs_, atol=1e-5)


def test_what_is_given_is_kept():
    x, y = data()
    assert KernelSelfDistillation(alpha=0.01, rounds="auto", mix=0.25).fit(x, y).alpha_ == 0.01
    assert KernelSelfDistillation(alpha=0.01, rounds=3, mix="auto").fit(x, y).rounds_ == 3
    model = KernelSelfDistillation(alpha="auto", rounds=3, mix=0.25).fit(x, y)
    assert (model.rounds_, model.mix_) == (3, 0.25) and model.alpha_ != 1.0
    tolerant = KernelSelfDistillation(tolerance=0.1, gamma=5.0, rounds="auto").fit(x, y)
    assert tolerant.alpha_ is None and 1 <= tolerant.rounds_ <= 10 and len(tolerant.multipliers_) == tolerant.rounds_


def test_auto_of_a_kernel_of_zeros():
    model = KernelSelfDistillation(kernel="precomputed", alpha="auto").fit(np.zeros((3, 3)), np.ones(3))
    assert not model.predict(np.zeros((1, 3))).any()


def test_leave_one_out_of_the_estimator_is_that_of_refits():
    x, y = data(25)
    model = KernelSelfDistillation(alpha=0.05, rounds="auto", criterion="leave_one_out").fit(x, y)
    missed = []
    for i in range(25):
        others = np.arange(25) != i
        one = KernelSelfDistillation(alpha=0.05, rounds=model.rounds_, gamma=0.5).fit(x[others], y[others])
        missed.append(y[i] - one.predict(x[i : i + 1])[0])
    assert model.choice_.score == pytest.approx(np.mean(np.square(missed)), rel=1e-8)


# the classifier


def test_the_classifier_is_the_regressor_on_one_hot_labels():
    x, y = load_iris(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    model = KernelSelfDistillationClassifier(rounds=3, mix=0.1).fit(x, names)
    values = KernelSelfDistillation(rounds=3, mix=0.1).fit(x, np.eye(3)[y])
    np.testing.assert_allclose(model.decision_function(x), values.predict(x), atol=1e-12)
    assert model.score(x, names) > 0.95 and not hasattr(model, "predict_proba")
    stages = list(model.staged_predict(x))
    assert len(stages) == 3 and (stages[1] == model.predict(x, rounds=2)).all()


def test_two_classes_have_one_value():
    x, y = load_iris(return_X_y=True)
    model = KernelSelfDistillationClassifier().fit(x[:100], y[:100])
    assert model.decision_function(x[:4]).shape == (4,)
    assert ((model.decision_function(x[:100]) > 0) == model.predict(x[:100])).all()


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha has to be a finite number above 0 or 'auto', got 0.0"),
        ({"alpha": [1.0]}, "alpha has to be a finite number above 0"),
        ({"alpha": np.nan}, "alpha has to be a finite number above 0"),
        ({"tolerance": -1.0}, "tolerance has to be a finite number above 0"),
        ({"rounds": -1}, r"rounds is the number of fits, a whole number >= 1 .* or 'auto', got -1"),
        ({"rounds": 0}, "rounds is the number of fits"),
        ({"rounds": 2.0}, "rounds is the number of fits"),
        ({"rounds": True}, "rounds is the number of fits"),
        ({"mix": np.inf}, "mix is the weight of the original labels"),
        ({"mix": "some"}, "mix is the weight of the original labels"),
        ({"criterion": "loo"}, "unknown criterion 'loo'"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        KernelSelfDistillation(**options).fit(*data())


def bad_kernel(what: str) -> np.ndarray:
    kernel = rbf_kernel(data()[0])
    if what == "asymmetric":
        kernel[0, 1] += 0.01
    if what == "indefinite":
        kernel -= 2.0 * np.eye(60)
    return kernel[:, :30] if what == "not square" else kernel


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("asymmetric", "not symmetric: entries differ from their mirror image by up to 0.01"),
        ("indefinite", "not positive semi-definite"),
        ("not square", r"Precomputed metric requires shape"),
    ],
)
@pytest.mark.parametrize("options", [{"alpha": 5.0}, {"rounds": "auto"}, {"tolerance": 0.4}])
def test_bad_precomputed_kernels(what: str, message: str, options: dict):
    with pytest.raises(ValueError, match=message):
        KernelSelfDistillation(kernel="precomputed", **options).fit(bad_kernel(what), data()[1])


def test_nan_in_a_precomputed_kernel_and_from_a_callable():
    kernel = rbf_kernel(data()[0])
    kernel[3, 3] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        KernelSelfDistillation(kernel="precomputed").fit(kernel, data()[1])
    with pytest.raises(ValueError, match="the kernel matrix holds NaN or infinity"):
        KernelSelfDistillation(kernel=lambda a, b: np.nan).fit(*data())


def test_a_kernel_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match="not positive semi-definite"):
        KernelSelfDistillation(kernel="sigmoid", gamma=3.0, coef0=-1.0).fit(*data())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(3), r"sample_weight has to have shape \(60,\)"),
        (-np.ones(60), "finite and >= 0"),
        (np.full(60, np.nan), "finite and >= 0"),
        (np.zeros(60), "every sample_weight is zero"),
    ],
)
def test_bad_weights(weights: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        KernelSelfDistillation().fit(*data(), weights)


@pytest.mark.parametrize("rounds", [0, 3, True, 1.0])
def test_rounds_that_were_not_fitted(rounds):
    model = KernelSelfDistillation(rounds=2).fit(*data())
    with pytest.raises(ValueError, match="from 1 to the 2 that were fitted"):
        model.predict(data()[0], rounds=rounds)


def test_it_survives_pickling_and_cloning():
    x, y = data()
    model = KernelSelfDistillation(gamma=5.0, tolerance=0.05, rounds=2).fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.predict(x), model.predict(x), rtol=1e-12)  # arrays may be laid out anew
    assert again.rounds_until_collapse_ == model.rounds_until_collapse_
    assert clone(model).get_params() == model.get_params()


def test_without_scikit_learn_the_error_names_the_command():
    script = "import sys; sys.modules['sklearn.base'] = None\nimport decaycast.methods.self_distill.estimator"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert 'pip install "decaycast[sklearn]"' in done.stderr
