"""Theory of infinite width: what its functions refuse, and what its documentation says."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path

import numpy as np
import pytest

from decaycast.methods.l2 import theory

CASE = {"eigenvalue": 1.0, "target": 1.0, "weight_decay": 0.1, "homogeneity": 2}
EYE = np.eye(2)
WHOLE = {"weight_decay": 0.1, "homogeneity": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.kernel_scale(1.0, -0.1, 2), "weight_decay has to be at least 0, got -0.1"),
        (lambda: theory.kernel_scale(-1.0, 0.1, 2), "time has to be at least 0, got -1"),
        (lambda: theory.kernel_scale(np.nan, 0.1, 2), "time has to be at least 0, got nan"),
        (lambda: theory.kernel_scale(1.0, 0.1, -1), "homogeneity has to be at least 0, got -1"),
        (lambda: theory.kernel_scale(1.0, np.inf, 2), "weight_decay has to be finite, got inf"),
        (lambda: theory.kernel_scale("soon", 0.1, 2), "time has to be a real number or an array of them, got 'soon'"),
        (lambda: theory.kernel_scale("1", 0.1, 2), "time has to be a real number or an array of them, got '1'"),
        (
            lambda: theory.kernel_scale(1.0, None, 2),
            "weight_decay has to be a real number or an array of them, got None",
        ),
        (
            lambda: theory.kernel_scale(1.0, 0.1, 10**400),
            "homogeneity has to be a real number or an array of them, got 10",
        ),
        (lambda: theory.kernel_eigenvalue(-1.0, 0.1, 1.0, 2), "eigenvalues have to be at least 0, got -1"),
        (lambda: theory.mode(1.0, **{**CASE, "homogeneity": 1.5}), "homogeneity has to be 0, 1 or at least 2, got 1.5"),
        (lambda: theory.mode(1.0, **{**CASE, "eigenvalue": np.nan}), "eigenvalue has to be finite, got nan"),
        (lambda: theory.mode(1.0, **{**CASE, "eigenvalue": [1, -1e-3]}), "more than rounding"),
        (lambda: theory.mode(1.0, **{**CASE, "target": np.inf}), "target has to be finite"),
        (lambda: theory.mode(1.0, **CASE, initial=np.nan), "initial has to be finite"),
        (lambda: theory.mode(1.0, **{**CASE, "eigenvalue": [1.0, 1 + 2j]}), "eigenvalue has to be a real number"),
        (lambda: theory.mode([1.0, -2.0], **CASE), "t has to be at least 0, got -2"),
        (lambda: theory.time_of_loss(eigenvalue=1.0, weight_decay=0.1, homogeneity=-2), "at least 0, got -2"),
        (lambda: theory.time_of_peak(**{**CASE, "weight_decay": -1}), "weight_decay has to be at least 0"),
        (lambda: theory.effective_learning_rate(0.0, 0.1, 1), "lr has to be above 0, got 0"),
        (lambda: theory.effective_learning_rate(0.1, 0.1, -1), "steps has to be at least 0, got -1"),
        (lambda: theory.outputs([1.0, 0.5], [1.0], [1.0], 0.0, 0.1, 2), "it decreases; sort it first"),
        (lambda: theory.outputs([1.0], [1.0, np.inf], [1.0, 1.0], 0.0, 0.1, 2), "eigenvalue has to be finite, got inf"),
        (lambda: theory.outputs([1.0], [1.0, -1e-9], [1.0, 1.0], 0.0, 0.1, 2), "got -1e-09: more than rounding"),
        (
            lambda: theory.outputs([1.0], [1.0], [1.0], 0.0, 0.1, -1),
            "degree of homogeneity has to be at least 0, got -1",
        ),
        (lambda: theory.outputs([1.0], [1.0], [1.0], 0.0, -0.1, 2), "weight_decay has to be at least 0, got -0.1"),
        (lambda: theory.outputs(1.0, [1.0], [1.0], 0.0, 0.1, 2), r"time has to have shape \(times,\), got \(\)"),
        (lambda: theory.outputs([1.0], 1.0, [1.0], 0.0, 0.1, 2), r"eigenvalues have to have shape \(n,\)"),
        (lambda: theory.outputs([1.0], [1.0], [1.0, 2.0], 0.0, 0.1, 2), r"targets have to have shape \(1,\)"),
        (lambda: theory.outputs([1.0], [1.0], [1.0], [0.0, 0.0], 0.1, 2), "initial has to be one number or of shape"),
        (lambda: theory.outputs([1.0], [1.0], [1.0], 0.0, [0.1, 0.2], 2), "single numbers here"),
        (lambda: theory.function_evolution([1.0], [1.0], [1.0], **WHOLE), r"square matrix, got shape \(1,\)"),
        (lambda: theory.function_evolution([1.0], [[1, 2], [0, 1]], [1, 1], **WHOLE), "kernel is not symmetric"),
        (lambda: theory.function_evolution([1.0], [[1, 2], [2, 1]], [1, 1], **WHOLE), "is the kernel a kernel"),
        (lambda: theory.function_evolution([1.0], EYE * np.nan, [1, 1], **WHOLE), "kernel has to be finite, got nan"),
        (lambda: theory.function_evolution([2.0, 1.0], EYE, [1, 1], **WHOLE), "it decreases; sort it first"),
        (lambda: theory.function_evolution([1.0], EYE, [1, 1, 1], **WHOLE), r"targets have to have shape \(2,\)"),
        (lambda: theory.prediction_evolution([1.0], EYE, [1, 1], [[1.0]], **WHOLE), r"\(points, 2\), got \(1, 1\)"),
        (
            lambda: theory.prediction_evolution([1.0], EYE, [1, 1], EYE, cross_initial=[1.0], **WHOLE),
            "cross_initial has to be one number or of shape",
        ),
    ],
)
def test_it_refuses(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_examples_are_true():
    failed, tried = doctest.testmod(theory)
    assert failed == 0 and tried >= 10


def test_the_page_prints_what_it_says():
    page = (Path(__file__).resolve().parents[3] / "docs" / "theory.md").read_text()
    (block,), (output,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), {})
    assert printed.getvalue() == output
    peaks = theory.time_of_peak(**{**CASE, "weight_decay": [0.1, 0.01, 0.001]}, initial=0.3) * [0.1, 0.01, 0.001]
    assert "({:.3f}, {:.3f}, {:.3f} for".format(*peaks) in " ".join(page.split())


def test_few_eigenvalues_of_a_large_kernel_keep_its_rounding():
    """A selection says nothing about the size of the matrix whose rounding it carries."""
    found = theory.outputs([1.0], [1.0, -9e-12], [1.0, 1.0], 0.0, 0.1, 2)
    assert found[0, 1] == 0.0
    with pytest.raises(ValueError, match="got -2e-11: more than rounding"):
        theory.outputs([1.0], [1.0, -2e-11], [1.0, 1.0], 0.0, 0.1, 2)
