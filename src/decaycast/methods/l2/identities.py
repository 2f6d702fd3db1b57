"""What is exact at any width: how outputs and kernel of a homogeneous network move under gradient flow with L2.

Conventions of this file. Loss: L = `loss`(f(inputs), targets) + (lambda/2)*||theta||^2 over all trained parameters, by default
the mean over the n samples of ||f - y||^2/2. Gradient flow: dtheta/dt = -grad L. f is k-homogeneous in theta:
f(c*theta) = c**k * f(theta) for c > 0, so theta . grad f = k*f. All outputs of all samples are counted as one vector f of
N = n*outputs entries, i and j below; Theta_ij = grad f_i . grad f_j is the N x N kernel, not divided by n.

    df_i/dt      = -sum_j Theta_ij * dL_data/df_j  -  k*lambda*f_i
    dTheta_ij/dt = T_ij + T_ji  -  2(k-1)*lambda*Theta_ij,     T_ij = -grad L_data . (Hessian of f_i) . grad f_j

The left sides are evaluated along the flow of the whole loss, the right sides from its data part alone, so that the two agree
only if the network is homogeneous of the degree k. Infinite width (`decaycast.methods.l2.theory`) drops T, which is O(1/width).

Derivatives are reverse mode throughout, and N Jacobian rows are kept with their graphs: for small batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]
_FACTORS = (0.5, 1.5)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Both sides of the two identities at one moment; N = samples times outputs."""

    degree: float
    """k, measured."""
    outputs: Tensor
    """f, shape (N,)."""
    outputs_rate: Tensor
    """df/dt along the flow, shape (N,)."""
    outputs_identity: Tensor
    """-Theta dL_data/df - k*lambda*f, shape (N,)."""
    kernel: Tensor
    """Theta, shape (N, N)."""
    kernel_rate: Tensor
    """dTheta/dt along the flow, shape (N, N)."""
    kernel_identity: Tensor
    """T + T^T - 2(k-1)*lambda*Theta, shape (N, N)."""
    feature_learning: Tensor
    """T + T^T, shape (N, N): what infinite width leaves out."""


def mean_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples of ||f - y||^2/2, for outputs and targets of one shape."""
    return (outputs - targets).square().sum() / (2 * len(outputs))


def homogeneity(model: nn.Module, inputs: Tensor, *, tolerance: float | None = None) -> float:
    """Degree k with f(c*theta) = c**k * f(theta), measured by scaling all trained parameters by c = 0.5 and 1.5.

    Args:
        model: any module; left as it was, batch norm's running averages included.
        inputs: a batch on which its outputs do not all vanish.
        tolerance: largest ||f(c*theta) - c**k*f(theta)|| against ||c**k*f(theta)||; None for the square root of the outputs'
            rounding (1.5e-8 in float64, 3e-4 in float32). Batch norm's epsilon may need more.

    Returns:
        k: the number of weight layers of a bias-free ReLU network, 0 where a normalisation follows every weight. A float;
        what rounding leaves of an integer is taken off.

    Raises:
        ValueError: nothing is trained, outputs vanish or are not finite, or no degree fits: biases, embeddings or skip
            connections mix degrees, and tanh or GELU have none.

    Source: definition, Lewkowycz & Gur-Ari 2020, sec. 3.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
        >>> homogeneity(net, torch.eye(2))
        2.0
    """
    state, trained = _state(model)
    plain = _outputs(model, state, trained, inputs, 1.0)
    size = plain.norm()
    if not (size > 0 and torch.isfinite(size)):
        raise ValueError(f"the outputs have norm {float(size):g}, so no degree can be read off; give other inputs")
    eps = torch.finfo(size.dtype).eps
    allowed = math.sqrt(eps) if tolerance is None else tolerance
    scaled = [_outputs(model, state, trained, inputs, factor) for factor in _FACTORS]
    degree = float(torch.log(scaled[1].norm() / scaled[0].norm())) / math.log(_FACTORS[1] / _FACTORS[0])
    whole = round(degree) if math.isfinite(degree) else 0
    degree = float(whole) if abs(degree - whole) <= 10 * allowed else degree
    misses = [float((f - c**degree * plain).norm() / (c**degree * size)) for f, c in zip(scaled, _FACTORS, strict=True)]
    if not max(misses) <= allowed:
        raise ValueError(
            f"the module is not homogeneous in its trained parameters: scaling them by {_FACTORS[0]} and {_FACTORS[1]} suggests "
            f"degree {degree:.4g}, which misses the outputs by {max(misses):.2g} (allowed {allowed:.2g}). Remove or freeze "
            "biases, and use ReLU"
        )
    return degree


def rates(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, weight_decay: float, loss: Loss = mean_squared
) -> Rates:
    """Both sides of the finite-width identities (head of this file) for a network as it stands.

    Args:
        model: a k-homogeneous module; parameters with ``requires_grad=False`` are not trained and not decayed.
        inputs: batch of n samples.
        targets: whatever `loss` compares outputs with; of the outputs' shape for the default.
        weight_decay: lambda >= 0.
        loss: (outputs, targets) -> data loss, a scalar, without penalty.

    Returns:
        `Rates`, detached, in the dtype of the parameters (float64 to see the identities to rounding).

    Raises:
        ValueError: as `homogeneity`; `weight_decay` negative or not finite; the default loss with targets of another shape.

    Source: Lewkowycz & Gur-Ari 2020, supplement S5 and S6; exact wherever f is twice differentiable.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
        >>> x, y = torch.eye(2).double(), torch.ones(2, 1).double()
        >>> found = rates(net, x, y, weight_decay=0.1)
        >>> bool((found.kernel_rate - found.kernel_identity).abs().max() < 1e-12)
        True
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay has to be finite and at least 0, got {weight_decay}")
    degree = homogeneity(model, inputs)
    # the model's own parameters, not copies: a module may rewrap them, which would cut copies off the graph
    outputs = functional_call(model, {name: value.clone() for name, value in model.named_buffers()}, (inputs,))
    if loss is mean_squared and outputs.shape != targets.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, but the outputs {tuple(outputs.shape)}; make them agree"
        )
    parameters, flat = [weight for weight in model.parameters() if weight.requires_grad], outputs.reshape(-1)
    data_loss = loss(outputs, targets)
    (pull,) = torch.autograd.grad(data_loss, outputs, retain_graph=True)
    data_slope = _flat_gradient(data_loss, parameters).detach()
    rows = [_flat_gradient(value, parameters, keep=True) for value in flat]
    jacobian, pull = torch.stack([row.detach() for row in rows]), pull.reshape(-1).detach()
    flow = -data_slope - weight_decay * torch.cat([weight.detach().reshape(-1) for weight in parameters])
    bent = torch.stack([_along(row, parameters, flow) for row in rows]) @ jacobian.T
    feature = torch.stack([_along(row, parameters, -data_slope) for row in rows]) @ jacobian.T
    kernel, feature, f = jacobian @ jacobian.T, feature + feature.T, flat.detach()
    return Rates(
        degree=degree,
        outputs=f,
        outputs_rate=jacobian @ flow,
        outputs_identity=-kernel @ pull - degree * weight_decay * f,
        kernel=kernel,
        kernel_rate=bent + bent.T,
        kernel_identity=feature - 2.0 * (degree - 1.0) * weight_decay * kernel,
        feature_learning=feature,
    )


def _state(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of all parameters and buffers, which a forward pass may write into, and the names of those trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the module has no trained parameters (requires_grad), so it has no degree of homogeneity")
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in named.items()}, trained


@torch.no_grad()
def _outputs(
    model: nn.Module, state: dict[str, Tensor], trained: Sequence[str], inputs: Tensor, factor: float
) -> Tensor:
    scaled = {name: value * factor if name in trained else value.clone() for name, value in state.items()}
    return functional_call(model, scaled, (inputs,))


def _flat_gradient(value: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> Tensor:
    """Gradient of a scalar as one vector; with `keep`, differentiable once more."""
    parts = torch.autograd.grad(value, parameters, retain_graph=True, create_graph=keep, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def _along(row: Tensor, parameters: Sequence[Tensor], direction: Tensor) -> Tensor:
    """Derivative of a gradient `row` when the parameters move in `direction`: a Hessian-vector product."""
    slope = row @ direction
    # a model that is linear in its parameters has constant gradients, of which autograd knows no derivative
    return _flat_gradient(slope, parameters) if slope.requires_grad else torch.zeros_like(direction)
