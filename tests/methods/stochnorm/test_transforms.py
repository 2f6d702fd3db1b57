"""Compilers, exports, transforms of torch.func, symbolic tracing, activation checkpointing."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from tests.methods.stochnorm.layers import MASK, activations, away_from_start
from torch import nn
from torch.utils.checkpoint import checkpoint

from decaycast.methods.stochnorm import kernels, recomputation
from decaycast.methods.stochnorm.method import StochNorm, StochNorm1d, StochNorm2d

COMPILER = next((path for path in ("g++", "clang++") if shutil.which(path)), None)


def compiled_and_plain(model: nn.Module, x: torch.Tensor, backend: str) -> tuple[nn.Module, nn.Module]:
    """After one step each with equal masks: a compiled copy's underlying model, and the model."""
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for each in (compiled, plain):
        torch.manual_seed(6)
        each(x).square().mean().backward()
    return model, plain


def assert_alike(model: nn.Module, plain: nn.Module) -> None:
    for found, wanted in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled_without_graph_breaks(p: float):
    # buffers move all the way, so that reading them after the move would show
    layer = away_from_start(StochNorm2d(6, p=p, momentum=1.0))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.ReLU())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_alike(*compiled_and_plain(model, x, "aot_eager"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert p == 0 or not torch.equal(compiled(x), compiled(x)), "the mask must not be a constant of the graph"
    torch.testing.assert_close(compiled.eval()(x), copy.deepcopy(model).eval()(x))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_compiled_by_inductor():
    model = nn.Sequential(nn.Linear(3, 6), away_from_start(StochNorm1d(6, p=0.0, momentum=1.0)), nn.Tanh())
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert_alike(*compiled_and_plain(model, x, "inductor"))


def test_evaluation_is_exported_as_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), away_from_start(StochNorm2d(6))).eval()
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), away_from_start(nn.BatchNorm2d(6))).eval()
    x = (torch.zeros(2, 3, 8, 8),)
    calls = [
        [str(node.target) for node in torch.export.export(each, x).graph.nodes if node.op == "call_function"]
        for each in (model, plain)
    ]
    assert calls[0] == calls[1] and "batch_norm" in calls[0][1]


def test_gradients_under_torch_func():
    layer, x = away_from_start(StochNorm2d(6, dtype=torch.float64)), activations((4, 6, 5, 3), torch.float64)
    vectors = MASK, layer.running_mean, layer.running_var, layer.weight.detach(), layer.bias.detach()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kernels.mixed_norm(x, *vectors, layer.eps)[0].square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_vmap_is_refused_in_training_and_works_in_evaluation():
    layer, x = away_from_start(StochNorm2d(6)), torch.randn(3, 4, 6, 5, 3)
    before = layer.running_mean.clone()
    with pytest.raises(RuntimeError, match="in training mode cannot be vmapped"):
        torch.func.vmap(lambda each: layer(each, MASK))(x)
    assert torch.equal(layer.running_mean, before)
    layer.eval()
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(each) for each in x]))


def test_vmap_below_a_gradient_and_without_a_mask_is_refused():
    layer, x = away_from_start(StochNorm2d(6)), torch.randn(3, 4, 6, 5, 3)
    with pytest.raises(RuntimeError, match="in training mode cannot be vmapped"):
        torch.func.vmap(torch.func.grad(lambda each: layer(each).sum()))(x)
    with pytest.raises(RuntimeError, match="in training mode cannot be vmapped"):
        torch.func.vmap(layer)(x)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_forward_mode_is_refused():
    layer, x = away_from_start(StochNorm2d(6)), activations((4, 6, 5, 3), torch.float32).detach()
    with pytest.raises(RuntimeError, match="in training mode has no forward-mode derivative; use reverse mode"):
        torch.func.jvp(lambda each: layer(each, MASK), (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        layer(torch.autograd.forward_ad.make_dual(x, x), MASK)
    torch.func.jvp(layer.eval(), (x,), (x,))


def test_symbolic_traces_hold_batch_norm_in_evaluation():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), away_from_start(StochNorm2d(6))).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(RuntimeError, match=r"cannot be traced symbolically in training mode; call eval\(\)"):
        torch.fx.symbolic_trace(model.train())


# activation checkpointing


class Checkpointed(nn.Module):
    """Layers between linear ones, one of them twice; run under checkpoints or not."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = away_from_start(StochNorm1d(6, momentum=0.9, generator=generator))
        self.first = nn.Sequential(nn.Linear(6, 6), shared, nn.Dropout(0.3), nn.Linear(6, 6), shared, nn.Tanh())
        self.second = nn.Sequential(
            away_from_start(StochNorm1d(6, momentum=0.9, generator=generator), 1), nn.Linear(6, 2)
        )
        self.double()

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        for part in (self.first, self.second):
            x = checkpoint(part, x, **options) if options else part(x)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("own_generator", [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool, own_generator: bool):
    plain, again = (Checkpointed(torch.Generator().manual_seed(5) if own_generator else None) for _ in range(2))
    batches = [activations((8, 6), torch.float64, seed=seed).detach() for seed in range(4)]
    for model, options in ((plain, {}), (again, {"use_reentrant": use_reentrant})):
        torch.manual_seed(2)
        for pair in (batches[:2], batches[2:]):  # two forwards before each backward, as with accumulated gradients
            losses = [model(x.clone().requires_grad_(), **options).square().mean() for x in pair]
            sum(losses).backward()  # type: ignore[union-attr]
    for found, wanted in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dict(again.named_buffers()), dict(plain.named_buffers()))


def test_a_backward_that_repeats_no_call_is_an_error():
    layer, other = StochNorm1d(6), activations((8, 6), torch.float32, seed=3).detach()
    x = activations((8, 6), torch.float32)
    y = layer(x, MASK)
    y.register_hook(lambda grad: layer(other, MASK) and None)
    with pytest.raises(RuntimeError, match="during a backward pass, on a batch that is none of its last 1 in training"):
        y.sum().backward()


def test_a_layer_remembers_a_few_calls_and_its_copies_none():
    layer = StochNorm1d(6)
    for seed in range(2 * recomputation.KEPT):
        layer(activations((8, 6), torch.float32, seed=seed))
    assert len(layer._calls()._kept) == recomputation.KEPT
    assert len(copy.deepcopy(layer)._calls()._kept) == 0
    StochNorm.revert(layer, report=None)
    assert vars(layer).keys() == vars(nn.BatchNorm1d(6)).keys()
