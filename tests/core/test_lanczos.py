from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.networks import NETWORKS, loss_fn, network, true_ggn, true_hessian
from tests.core.test_trace import Dense, seeded, with_spectrum
from torch import Tensor, nn

from decaycast.core import spectrum
from decaycast.core.lanczos import Krylov, largest_eigenvalue, top_eigenvalue
from decaycast.core.spectrum import MatrixFunction, spectral_sum, sum_over_spectrum

mse = nn.functional.mse_loss


def rising(values: Tensor) -> Tensor:
    """R of label noise at a share 0.95 of the stability limit for eigenvalues up to 1."""
    return -torch.log1p(-0.95 * values)


# the end of the spectrum


@pytest.mark.parametrize("which", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_top_eigenvalue_of_a_network(name: str, which: str):
    model, x, y = network(name)
    matrix = true_hessian(name) if which == "hessian" else true_ggn(name)
    values, vectors = torch.linalg.eigh(matrix)
    found = top_eigenvalue(model, loss_fn, [(x, y)], which, 1e-4, seeded(0), with_vector=True)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.residual <= 1e-4 * found.value and found.iterations < 40
    assert found.vector is not None and float(found.vector.norm()) == pytest.approx(1.0)
    assert abs(float(found.vector @ vectors[:, -1])) == pytest.approx(1.0, abs=1e-5)
    own = float((matrix @ found.vector - found.value * found.vector).norm())
    assert own == pytest.approx(found.residual, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 12), shift=st.floats(-3, 3))
def test_an_eigenvalue_lies_within_the_residual(seed: int, steps: int, shift: float):
    values = torch.randn(30, dtype=torch.float64, generator=seeded(seed)) + shift
    found = largest_eigenvalue(Dense(with_spectrum(values, seed)), 1e-9, seeded(seed), max_iterations=steps)
    assert float((values - found.value).abs().min()) <= found.residual + 1e-10
    assert found.value <= float(values.max()) + 1e-10 and found.iterations == steps


def test_largest_means_with_its_sign():
    found = largest_eigenvalue(
        Dense(with_spectrum(torch.linspace(-9.0, 1.0, 80, dtype=torch.float64))), 1e-6, seeded(0)
    )
    assert found.value == pytest.approx(1.0)


def test_vectors_stay_orthonormal_long_after_the_first_has_converged():
    values = torch.cat([torch.tensor([100.0, 50.0]), torch.linspace(0, 1, 98)]).double()
    krylov = Krylov(Dense(with_spectrum(values)), torch.randn(2, 100, dtype=torch.float64, generator=seeded(0)))
    for _ in range(60):
        krylov.step()
    for row in range(2):
        basis = torch.stack([rows[row] for rows in krylov.basis[:-1]])
        torch.testing.assert_close(basis @ basis.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)
    ritz = krylov.ritz()[0]
    assert int((ritz > 10).sum()) == 4  # no copies: two rows, two outliers


def test_it_ends_where_the_space_does():
    zero = largest_eigenvalue(Dense(torch.zeros(40, 40, dtype=torch.float64)), generator=seeded(0))
    assert (zero.value, zero.residual, zero.iterations) == (0.0, 0.0, 1)
    values = torch.zeros(40, dtype=torch.float64)
    values[:2] = torch.tensor([-2.0, -1.0])
    low = largest_eigenvalue(Dense(with_spectrum(values)), 1e-12, generator=seeded(0))
    assert low.value == pytest.approx(0.0, abs=1e-12) and low.iterations == 3
    krylov = Krylov(Dense(torch.eye(5, dtype=torch.float64)), torch.tensor([[0.0] * 5, [3.0] + [0.0] * 4]).double())
    krylov.step()
    assert not krylov.grows and krylov.alphas[0].tolist() == [0.0, 1.0] and krylov.lengths.tolist() == [0.0, 3.0]


def test_the_generator_decides():
    model, x, y = network("mlp")
    before = torch.random.get_rng_state()
    first, again = (top_eigenvalue(model, loss_fn, [(x, y)], generator=seeded(1)) for _ in range(2))
    assert first == again and first.vector is None
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_input_of_the_top_eigenvalue():
    model, x, y = network("mlp")
    with pytest.warns(
        RuntimeWarning, match="stopped after max_iterations = 2 products at .* raise max_iterations"
    ) as caught:
        top_eigenvalue(model, loss_fn, [(x, y)], generator=seeded(0), max_iterations=2)
    assert caught[0].filename == __file__
    for wrong in (0.0, math.nan):
        with pytest.raises(ValueError, match="relative_error has to be positive, got"):
            top_eigenvalue(model, loss_fn, [(x, y)], relative_error=wrong)
    with pytest.raises(ValueError, match="max_iterations is 0, but one product is the least"):
        top_eigenvalue(model, loss_fn, [(x, y)], max_iterations=0)


# sums over the spectrum


@pytest.mark.parametrize("function", [torch.exp, torch.sin, rising, lambda v: v**3 - v])
def test_products_with_a_function_of_the_matrix(function):
    values, vectors = torch.linalg.eigh(
        with_spectrum(torch.cat([torch.rand(390) * 0.1, torch.linspace(0.3, 1, 10)]).double())
    )
    curved = MatrixFunction(Dense((vectors * values) @ vectors.T), function)
    rows = torch.randn(4, 400, dtype=torch.float64, generator=seeded(0))
    expected = ((rows @ vectors) * (function(values) - function(torch.zeros(1, dtype=torch.float64)))) @ vectors.T
    found = curved.products(rows)
    assert float((found - expected).norm() / expected.norm()) < spectrum._VECTOR
    forms, true = (found * rows).sum(1), (expected * rows).sum(1)
    assert float((forms - true).abs().max()) < 2e-3 * float(expected.norm(dim=1).max() * rows.norm(dim=1).max())
    assert curved.spent % 4 == 0 and 12 <= curved.spent <= 60


def test_polynomials_up_to_degree_five_are_exact_after_three_steps():
    # Gauss' quadrature with 3 nodes
    dense = Dense(with_spectrum(torch.linspace(-1, 2, 50, dtype=torch.float64)))
    start = torch.randn(3, 50, dtype=torch.float64, generator=seeded(0))
    krylov = Krylov(dense, start)
    for _ in range(3):
        krylov.step()
    values, vectors = krylov.ritz()
    for degree in range(6):
        form = (values**degree * vectors[:, 0] ** 2).sum(1) * krylov.lengths**2
        exact = torch.einsum("kp,pq,kq->k", start, torch.linalg.matrix_power(dense.matrix, degree), start)
        torch.testing.assert_close(form, exact)


@pytest.mark.parametrize("name", NETWORKS)
def test_r_of_a_network_is_that_of_its_eigenvalues(name: str):
    model, x, y = network(name)
    values = torch.linalg.eigvalsh(true_ggn(name))
    lr = 1.9 / float(values[-1])

    def r(eigenvalues: Tensor) -> Tensor:
        return -torch.log1p(-lr * eigenvalues / 2) / (2 * lr)

    true = float(r(values).sum())
    found = spectral_sum(model, loss_fn, [(x, y)], r, 0.02, "ggn", seeded(1))
    assert found.stderr <= 0.02 * found.value
    assert abs(found.value - true) < 4 * found.stderr + 0.002 * true
    assert true > 1.2 * float(values.sum()) / 4  # not just the trace
    assert found.probes < len(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_its_intervals_cover(name: str):
    matrix = true_ggn(name) / float(torch.linalg.eigvalsh(true_ggn(name))[-1])
    true = float(rising(torch.linalg.eigvalsh(matrix)).sum())
    found = [sum_over_spectrum(Dense(matrix), rising, 0.05, seeded(seed)) for seed in range(200)]
    assert 0.91 <= sum(each.interval[0] <= true <= each.interval[1] for each in found) / 200 <= 0.985
    mean = sum(each.value for each in found) / 200
    assert mean == pytest.approx(true, rel=0.01)


def test_the_error_of_the_quadrature_is_far_below_the_standard_error():
    # the same probes with the dense f(A): what is left is the quadrature
    values, vectors = torch.linalg.eigh(true_ggn("mlp") / float(torch.linalg.eigvalsh(true_ggn("mlp"))[-1]))
    dense = (vectors * rising(values.clamp(min=0))) @ vectors.T
    for seed in range(5):
        rows = torch.randn(10, len(values), dtype=torch.float64, generator=seeded(seed)).sign()
        found = MatrixFunction(Dense((vectors * values) @ vectors.T), rising).products(rows)
        forms, true = (found * rows).sum(1), ((rows @ dense) * rows).sum(1)
        assert abs(float(forms.mean() - true.mean())) < 0.002 * float(rising(values).sum())


def test_few_parameters_are_exact():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    found = spectral_sum(model, loss_fn, [(x, y)], torch.exp)
    hessian = torch.autograd.functional.hessian(
        lambda w, b: loss_fn(nn.functional.linear(x, w, b), y), (model.weight, model.bias)
    )
    rows = [torch.cat([part.reshape(size, -1) for part in row], 1) for row, size in zip(hessian, (12, 3))]
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(torch.cat(rows).detach()).exp().sum()))
    assert (found.stderr, found.probes) == (0.0, 15)


def test_what_f_is_at_zero_is_known_without_probes():
    dense = Dense(with_spectrum(torch.cat([torch.zeros(590), torch.linspace(0.1, 1, 10)]).double()))
    found = sum_over_spectrum(dense, torch.exp, 0.05, seeded(0))
    true = 590 + float(torch.linspace(0.1, 1, 10).double().exp().sum())
    assert abs(found.value - true) < 4 * found.stderr + 0.01
    assert found.stderr <= 0.05 * (found.value - 600)
    assert found.interval[0] <= found.value <= found.interval[1]
    assert found.probes == dense.spent


def test_rows_that_do_not_fit_go_one_by_one(monkeypatch: pytest.MonkeyPatch):
    dense = Dense(with_spectrum(torch.linspace(0, 1, 320, dtype=torch.float64)))
    rows = torch.randn(3, 320, dtype=torch.float64, generator=seeded(0))
    together = MatrixFunction(dense, rising).products(rows)
    monkeypatch.setattr(spectrum, "_BASES_BYTES", 1)
    apart = MatrixFunction(dense, rising).products(rows)
    torch.testing.assert_close(apart, together, rtol=0.05, atol=0.05)  # each stops by itself


def test_bad_functions():
    model, x, y = network("mlp")

    def pole(values: Tensor) -> Tensor:
        return torch.log(1 - values)  # the top eigenvalue is 1.76

    with pytest.raises(ValueError, match="the function is nan at the eigenvalue 1.7"):
        spectral_sum(model, loss_fn, [(x, y)], pole)

    def refusing(values: Tensor) -> Tensor:
        raise ArithmeticError(f"beyond {float(values.max()):.2f}")

    with pytest.raises(ArithmeticError, match="beyond 1.7"):
        spectral_sum(model, loss_fn, [(x, y)], refusing)
    with pytest.raises(ValueError, match="one number per eigenvalue, shape .*, got shape \\(\\)"):
        spectral_sum(model, loss_fn, [(x, y)], torch.sum)
    with pytest.raises(ValueError, match="one number per eigenvalue, shape .*, got float"):
        spectral_sum(model, loss_fn, [(x, y)], lambda values: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="the function is inf at the eigenvalue 0"):
        spectral_sum(model, loss_fn, [(x, y)], lambda values: 1 / values.abs())
    with pytest.warns(RuntimeWarning, match="raise max_probes"):
        spectral_sum(model, loss_fn, [(x, y)], torch.sin, 1e-4, generator=seeded(0), max_probes=10)


def test_a_function_too_steep_for_polynomials():
    dense = Dense(with_spectrum(torch.linspace(-1, 1, 400, dtype=torch.float64)))
    with pytest.raises(ArithmeticError, match="has not settled after 100 Lanczos steps"):
        MatrixFunction(dense, lambda values: (values > 0.0123).double()).products(
            torch.randn(20, 400, dtype=torch.float64, generator=seeded(0))
        )
