"""Three small trained networks whose whole Hessian is known: tanh MLP, convolutions with batch norm, attention."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

from decaycast.core.ntk_routes import plain_attention

loss_fn = nn.functional.cross_entropy
NETWORKS = ("mlp", "convolutions", "attention")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.read = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.block(x).mean(1))


def _mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(60, 6)
    return model, x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def _convolutions() -> tuple[nn.Module, Tensor, Tensor]:
    head = (nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), *head)
    x = torch.randn(50, 1, 8, 8)
    return model, x, (x.mean((1, 2, 3)) * 8).long().clamp(-1, 2) + 1


def _attention() -> tuple[nn.Module, Tensor, Tensor]:
    model = Attention()
    x = torch.randn(40, 5, 6)
    return model, x, (x[:, 0, 0] > 0).long() + (x[:, 1, 1] > 0).long()


@cache
def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(model in float64 and evaluation mode, inputs, labels); shared between tests, which must not change it."""
    torch.manual_seed(NETWORKS.index(name))
    model, x, y = {"mlp": _mlp, "convolutions": _convolutions, "attention": _attention}[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.double().eval(), x.double(), y


def function_of(model: nn.Module, x: Tensor, wrap):
    """wrap(output) as a function of the flat vector of all parameters, and that vector."""
    theta = dict(model.named_parameters())
    sizes = [value.numel() for value in theta.values()]

    def function(flat: Tensor) -> Tensor:
        cut = {name: part.view_as(theta[name]) for name, part in zip(theta, flat.split(sizes))}
        return wrap(functional_call(model, cut, (x,)))

    return function, torch.cat([value.detach().flatten() for value in theta.values()])


@cache
def true_hessian(name: str) -> Tensor:
    """By torch alone, none of our code: `torch.func.hessian`, or autograd's where that is slow (convolutions) or wrong.

    Through two layer norms torch.func's answer (2.13) is not even symmetric, and finite differences agree with autograd's.
    """
    model, x, y = network(name)
    function, flat = function_of(model, x, lambda output: loss_fn(output, y))
    with plain_attention(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # torch's forward mode compiles its rules as torch deprecates
        if name == "mlp":
            return hessian(function)(flat).detach()
        return torch.autograd.functional.hessian(function, flat)


@cache
def true_ggn(name: str) -> Tensor:
    """mean of J^T (diag q - q q^T) J, from the Jacobian of the logits."""
    model, x, _ = network(name)
    function, flat = function_of(model, x, lambda output: output)
    with plain_attention():
        jacobian = torch.autograd.functional.jacobian(function, flat)
    q = model(x).detach().softmax(1)
    middle = torch.diag_embed(q) - q[:, :, None] * q[:, None]
    return torch.einsum("nap,nab,nbq->pq", jacobian, middle, jacobian) / len(x)
