from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.core.networks import NETWORKS, loss_fn, network, true_ggn, true_hessian
from torch import Tensor, nn

from decaycast.core import trace
from decaycast.core.estimate import Estimate, mean_estimate, student
from decaycast.core.trace import estimate_trace, hessian_trace, layer_shares

mse = nn.functional.mse_loss


class Dense:
    """A symmetric matrix that counts the products made with it; its parts are halves."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size, self.spent = matrix, len(matrix), 0
        first = self.size // 3
        self.shapes = {"first": torch.Size([first]), "second": torch.Size([self.size - first])}
        self.dtype, self.device = matrix.dtype, matrix.device

    def products(self, vectors: Tensor) -> Tensor:
        self.spent += len(vectors)
        return vectors @ self.matrix

    def parts(self, vectors: Tensor) -> list[Tensor]:
        return list(vectors.split([shape.numel() for shape in self.shapes.values()], -1))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=seeded(seed)))[0]
    return (q * values) @ q.T


# exact first


def test_variance_of_one_probe_by_all_sign_vectors():
    matrix = with_spectrum(torch.tensor([3.0, -1.0, 0.5, 0.2, 2.0], dtype=torch.float64))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    forms = torch.einsum("ki,ij,kj->k", signs, matrix, signs)
    off = matrix - torch.diag(matrix.diagonal())
    assert float(forms.mean()) == pytest.approx(float(matrix.trace()))
    assert float(forms.var(correction=0)) == pytest.approx(2 * float(off.square().sum()))
    probes = trace._Probes(trace._Basis(Dense(matrix)))
    probes.add(signs)
    assert probes.value() == pytest.approx(float(matrix.trace()))
    assert probes.variance() == pytest.approx(2 * float(off.square().sum()) * 32 / 31)


def test_with_a_basis_by_all_sign_vectors():
    dense = Dense(with_spectrum(torch.tensor([9.0, -4.0, 0.5, 0.2, 1.0, 0.1], dtype=torch.float64)))
    basis = trace._Basis(dense)
    basis.grow(dense.products(torch.randn(2, 6, dtype=torch.float64, generator=seeded(1))))
    basis.grow(dense.products(torch.randn(1, 6, dtype=torch.float64, generator=seeded(2))))
    assert basis.rank == 3
    torch.testing.assert_close(basis.directions @ basis.directions.T, torch.eye(3, dtype=torch.float64))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    probes = trace._Probes(basis)
    probes.add(signs)
    found, true = probes.result(spent=0), dense.matrix.diagonal()
    assert found.total.value == pytest.approx(float(true.sum()))  # the mean over all signs is exact, for each part
    assert [part.value for part in found.parts.values()] == pytest.approx(
        [float(true[:2].sum()), float(true[2:].sum())]
    )
    rest = torch.eye(6, dtype=torch.float64) - basis.directions.T @ basis.directions
    left = rest @ dense.matrix @ rest
    off = left - torch.diag(left.diagonal())
    assert probes.variance() == pytest.approx(2 * float(off.square().sum()) * 64 / 63)


def test_a_diagonal_matrix_needs_ten_probes_and_has_no_error():
    found = estimate_trace(Dense(torch.diag(torch.arange(500.0, dtype=torch.float64))), generator=seeded(0)).total
    assert (found.value, found.probes) == (pytest.approx(500 * 499 / 2), trace.BLOCK)
    assert found.stderr <= 1e-6 * found.value


def test_a_matrix_of_low_rank_is_known_once_the_basis_spans_it():
    values = torch.zeros(400, dtype=torch.float64)
    values[:6] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    dense = Dense(with_spectrum(values))
    found = estimate_trace(dense, 0.001, seeded(0)).total
    assert found.value == pytest.approx(15.5)
    assert found.probes == dense.spent <= 30  # 10 probes, a basis of rank 6, 10 probes that see nothing
    assert found.stderr < 1e-6


def test_few_parameters_and_small_errors_take_the_diagonal():
    matrix = with_spectrum(torch.linspace(-1, 3, 64, dtype=torch.float64))
    dense = Dense(matrix)
    found = estimate_trace(dense)
    assert found.total == Estimate(
        value=found.total.value, stderr=0.0, interval=(found.total.value,) * 2, probes=dense.spent
    )
    assert found.total.value == pytest.approx(float(matrix.trace())) and dense.spent == 64
    diagonal = matrix.diagonal()
    assert [part.value for part in found.parts.values()] == pytest.approx(
        [float(diagonal[:21].sum()), float(diagonal[21:].sum())]
    )
    dense = Dense(with_spectrum(torch.linspace(-1, 3, 200, dtype=torch.float64)))
    found = estimate_trace(dense, 1e-6, seeded(0)).total
    assert (found.stderr, found.probes) == (0.0, dense.spent) and dense.spent < 260
    assert found.value == pytest.approx(200.0)


@pytest.mark.parametrize("matrix", [torch.zeros(300, 300), torch.diag(torch.tensor([1.0, -1.0] * 150))])
def test_a_trace_of_zero_ends(matrix: Tensor):
    found = estimate_trace(Dense(matrix.double()), generator=seeded(0), max_probes=50).total
    assert found.value == pytest.approx(0.0, abs=1e-9) and found.probes <= 50
    hard = Dense(with_spectrum(torch.linspace(-1, 1, 300, dtype=torch.float64)))
    found = estimate_trace(hard, generator=seeded(0), max_probes=50).total
    assert found.interval[0] < 0 < found.interval[1] and found.probes == hard.spent == 50


# what it promises


@pytest.mark.parametrize("relative_error", [0.2, 0.05, 0.02, 0.005])
def test_it_stops_at_the_standard_error_asked_for(relative_error: float):
    dense = Dense(with_spectrum(torch.logspace(1, -3, 600, dtype=torch.float64)))
    found = estimate_trace(dense, relative_error, seeded(0), max_probes=1000).total
    assert found.stderr <= relative_error * found.value
    assert found.probes == dense.spent
    assert abs(found.value - float(dense.matrix.trace())) < 4 * found.stderr + 1e-9


def test_max_probes_is_kept_whatever_comes():
    for most in (10, 11, 25, 39, 57):
        dense = Dense(with_spectrum(torch.randn(300, dtype=torch.float64, generator=seeded(3))))
        assert estimate_trace(dense, 1e-3, seeded(0), max_probes=most).total.probes == dense.spent <= most


def test_the_basis_pays():
    values = torch.full((3000,), 1e-3, dtype=torch.float64)
    values[:12] = torch.linspace(4.0, 8.0, 12)
    dense = Dense(with_spectrum(values))
    found = estimate_trace(dense, 0.01, seeded(0), max_probes=3000).total
    off = dense.matrix - torch.diag(dense.matrix.diagonal())
    hutchinson = 2 * float(off.square().sum()) / (0.01 * float(dense.matrix.trace())) ** 2
    assert found.probes < 0.05 * hutchinson


def coverage(matrix: Tensor, seeds: int, relative_error: float = 0.05) -> float:
    dense, true = Dense(matrix), float(matrix.trace())
    found = [estimate_trace(dense, relative_error, seeded(seed)).total for seed in range(seeds)]
    return sum(each.interval[0] <= true <= each.interval[1] for each in found) / seeds


@pytest.mark.slow
@pytest.mark.parametrize("relative_error", [0.1, 0.05, 0.02])
@pytest.mark.parametrize("which", ["hessian", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_intervals_cover_the_true_trace(name: str, which: str, relative_error: float):
    # torch's own matrix, so that nothing here can be wrong in the same way; products of ours equal it (test_curvature)
    matrix = true_hessian(name) if which == "hessian" else true_ggn(name)
    assert 0.92 <= coverage(matrix, 400, relative_error) <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_trace_covers_torchs_trace(name: str):
    model, x, y = network(name)
    true = float(true_hessian(name).trace())
    found = [hessian_trace(model, loss_fn, [(x, y)], generator=seeded(seed)) for seed in range(400)]
    share = sum(each.interval[0] <= true <= each.interval[1] for each in found) / 400
    assert 0.92 <= share <= 0.98
    spread = math.sqrt(sum((each.value - true) ** 2 for each in found) / 400)
    assert spread == pytest.approx(sum(each.stderr for each in found) / 400, rel=0.25)


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_trace_and_shares_of_a_network(name: str):
    model, x, y = network(name)
    matrix = true_hessian(name)
    found = hessian_trace(model, loss_fn, [(x, y)], generator=seeded(0))
    assert found.stderr <= 0.05 * found.value and found.probes <= 60
    assert abs(found.value - float(matrix.trace())) < 4 * found.stderr
    shares = layer_shares(model, loss_fn, [(x, y)], generator=seeded(0))
    assert list(shares) == [name for name, _ in model.named_parameters()]
    assert sum(share.value for share in shares.values()) == pytest.approx(found.value)
    blocks = matrix.diagonal().split([value.numel() for value in model.parameters()])
    for share, block in zip(shares.values(), blocks):
        assert abs(share.value - float(block.sum())) < 5 * share.stderr + 1e-12


def test_the_generator_decides_and_the_global_one_is_left_alone():
    model, x, y = network("mlp")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (hessian_trace(model, loss_fn, [(x, y)], generator=seeded(seed)) for seed in (1, 1, 2))
    assert first == again and first.value != other.value
    assert torch.equal(before, torch.random.get_rng_state())
    assert hessian_trace(model, loss_fn, [(x, y)]) != first  # the global one
    assert not torch.equal(before, torch.random.get_rng_state())


def test_ggn_of_a_network_in_single_precision():
    model, x, y = network("mlp")
    single = nn.Sequential(
        *(nn.Linear(*layer.weight.shape[::-1]) if hasattr(layer, "weight") else layer for layer in model)
    )
    single.load_state_dict(model.state_dict())
    found = hessian_trace(single, loss_fn, [(x.float(), y)], matrix="ggn", generator=seeded(0))
    double = hessian_trace(model, loss_fn, [(x, y)], matrix="ggn", generator=seeded(0))
    # single signs are other signs, so only within the error
    assert abs(found.value - float(true_ggn("mlp").trace())) < 4 * found.stderr
    assert found.probes == double.probes


def test_a_big_matrix_goes_in_small_blocks(monkeypatch: pytest.MonkeyPatch):
    matrix = with_spectrum(torch.logspace(1, -3, 600, dtype=torch.float64))
    whole = estimate_trace(Dense(matrix), 0.02, seeded(0))
    monkeypatch.setattr(trace, "_BASIS_BYTES", 60 * 8 * 600)  # basis of 40 at most
    small = estimate_trace(Dense(matrix), 0.02, seeded(0))
    assert small.total.stderr <= 0.02 * small.total.value
    monkeypatch.setattr(trace, "_BASIS_BYTES", 4 * 3 * 8 * 600)  # no basis, rows three by three
    none = estimate_trace(Dense(matrix), 0.2, seeded(0))
    assert none.total.stderr <= 0.2 * none.total.value and whole.total.stderr <= 0.02 * whole.total.value


def test_the_warning_when_max_probes_is_too_few():
    model, x, y = network("mlp")
    with pytest.warns(
        RuntimeWarning, match="stopped at max_probes, after 20 products, at .* raise max_probes"
    ) as caught:
        found = hessian_trace(model, loss_fn, [(x, y)], 1e-4, generator=seeded(0), max_probes=20)
    assert found.stderr > 1e-4 * found.value and caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="raise max_probes"):
        layer_shares(model, loss_fn, [(x, y)], 1e-4, generator=seeded(0), max_probes=20)


@pytest.mark.parametrize("wrong", [0.0, -0.1, math.nan])
def test_relative_error_has_to_be_positive(wrong: float):
    with pytest.raises(ValueError, match="relative_error has to be positive, got"):
        estimate_trace(Dense(torch.eye(3)), wrong)


def test_max_probes_has_a_least():
    with pytest.raises(ValueError, match="max_probes is 9, but no standard error can be trusted before 10 products"):
        estimate_trace(Dense(torch.eye(3)), max_probes=9)


# the record


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (3, 3.182), (5, 2.571), (6, 2.447), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_of_student_are_those_of_the_tables(degrees: int, quantile: float):
    assert student(degrees) == pytest.approx(quantile, abs=0.01)


def test_an_estimate_is_a_record_that_reads_as_words():
    found = Estimate.of(100.0, 2.0, degrees=9, probes=10)
    assert found.interval == pytest.approx((100 - 2.262 * 2, 100 + 2.262 * 2), abs=0.02)
    assert str(found) == "100 +- 2 (95 %: 95.48 to 104.5; 10 products)"
    with pytest.raises(AttributeError):
        found.value = 1.0  # type: ignore[misc]
    assert mean_estimate([2.0, 4.0], 2).stderr == pytest.approx(1.0)
