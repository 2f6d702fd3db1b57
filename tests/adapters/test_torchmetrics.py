"""The trace as a metric: against the dense Hessian, over batches and ranks, inside torch's gradient-free modes."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))  # a rank runs this file alone
from tests.ranks import RANKS, on_ranks

REASON = "TorchMetrics is not installed: pip install 'decaycast[torchmetrics]'"
adapter = pytest.importorskip("decaycast.adapters.torchmetrics", reason=REASON, exc_type=ImportError)

INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = (INPUTS[:, 0] > 0).long()
BATCHES = [(INPUTS[:40], LABELS[:40]), (INPUTS[40:], LABELS[40:])]


def network(width: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)).double()


def dense_trace(model: torch.nn.Module) -> float:
    """By torch's dense Hessian of the mean loss over all samples."""
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), model.parameters(), strict=True)]
        output = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (INPUTS,))
        return functional.cross_entropy(output, LABELS)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float(torch.autograd.functional.hessian(loss, flat).trace())  # type: ignore[union-attr]


def test_over_batches_it_is_the_trace_of_the_mean_loss():
    model, metric = network(), adapter.HessianTrace(functional.cross_entropy, matrix="hessian")
    for batch in BATCHES:
        metric.update(model, batch)
    assert float(metric.compute()) == pytest.approx(dense_trace(model), rel=1e-6)  # few parameters: exact
    assert metric.estimate().stderr == 0


def test_the_error_is_what_it_says():
    model = network(40)
    truth, errors = dense_trace(model), []
    for seed in range(30):
        metric = adapter.HessianTrace(functional.cross_entropy, matrix="hessian", relative_error=0.1, seed=seed)
        for batch in BATCHES:
            metric.update(model, batch)
        found = metric.estimate()
        assert 0 < found.stderr <= 0.1 * abs(found.value) * 1.01
        errors.append((found.value - truth) / found.stderr)
    assert 0.6 < torch.tensor(errors).square().mean().sqrt() < 1.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(mode: Any):
    model, metric = network(), adapter.HessianTrace(functional.cross_entropy)
    outside = adapter.HessianTrace(functional.cross_entropy)
    for inputs, labels in BATCHES:
        outside.update(model, (inputs, labels))
        with mode():
            metric.update(model, [inputs.clone(), labels.clone()])
    assert torch.equal(metric.compute(), outside.compute())
    assert all(p.grad is None for p in model.parameters())


def test_it_takes_dicts_and_leaves_the_model_alone():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.net(inputs)

    model = Model()
    with torch.inference_mode():
        batches = [{"inputs": inputs.clone(), "labels": labels.clone()} for inputs, labels in BATCHES]
    metric, pairs = adapter.HessianTrace(functional.cross_entropy), adapter.HessianTrace(functional.cross_entropy)
    for batch, pair in zip(batches, BATCHES, strict=True):
        metric.update(model, batch)
        pairs.update(model.net, pair)
    assert float(metric.compute()) == pytest.approx(float(pairs.compute()), rel=1e-12)
    assert model.training


def test_it_holds_no_model_and_can_be_reset_copied_and_pickled():
    metric = adapter.HessianTrace(functional.cross_entropy)
    metric.update(network(), BATCHES[0])
    again = pickle.loads(pickle.dumps(copy.deepcopy(metric)))
    assert torch.equal(again.compute(), metric.compute())
    assert not list(metric.parameters()) and not metric.state_dict()
    metric.reset()
    with (
        pytest.warns(UserWarning, match="before the"),
        pytest.raises(RuntimeError, match=r"no batch was measured yet; call update\(model, batch\) first"),
    ):
        metric.compute()


def run_rank(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    metric = adapter.HessianTrace(functional.cross_entropy)
    metric.update(network(), BATCHES[rank])
    torch.save({"trace": metric.compute()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_add_up(tmp_path: Path):
    whole = adapter.HessianTrace(functional.cross_entropy)
    for batch in BATCHES:
        whole.update(network(), batch)
    for found in on_ranks(__file__, tmp_path):
        assert float(found["trace"]) == pytest.approx(float(whole.compute()), rel=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="relative_error has to be positive, got 0"):
        adapter.HessianTrace(functional.cross_entropy, relative_error=0)
    with pytest.raises(ValueError, match="unknown matrix 'hesian'; did you mean 'hessian'"):
        adapter.HessianTrace(functional.cross_entropy, matrix="hesian")
    metric = adapter.HessianTrace(functional.cross_entropy)
    with pytest.raises(ValueError, match=r"a batch must be a pair \(inputs, target\) or a dict"):
        metric.update(network(), INPUTS)
