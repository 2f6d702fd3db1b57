"""The implicit regulariser R of label-noise SGD, exact and differentiable, for models and data small enough to hold a Jacobian.

Conventions. The loss is L = (1/2) mean over the n samples of the sum over the C outputs of (f - y)^2, at zero loss, where its
Hessian is H = J^T J/n with J the (n C, parameters) Jacobian of the outputs. H shares its eigenvalues above 0 with the Gram
matrix K = J J^T/n, of n C rows, so that with momentum beta

    R = -((1+beta)/(2 lr))*log det(1 - lr*K/(2(1+beta)))        needs lr*l1 < 2(1+beta)

Targets do not occur: away from zero loss this is R of the Gauss-Newton matrix. A loss whose curvature by the output is alpha
instead of 1 (flips: `flips.flip_loss`) has alpha*implicit_regularizer(model, inputs, alpha*lr, momentum). Torch's ``MSELoss``
divides by all n C outputs and lacks the 1/2: alpha = 2/C.

The model is taken in evaluation mode, whatever mode it is in, since batch norm in training ties samples together. Its modes
and buffers are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from decaycast.core.ntk import empirical_ntk
from decaycast.core.ntk_routes import Problem, plain_attention
from decaycast.core.schedule import one_number
from decaycast.methods.label_noise.theory import UnstableError

_BLOCK_BYTES = 256 * 1024**2  # of Jacobian rows that are worked out at a time


def implicit_regularizer(model: nn.Module, inputs: Tensor, lr: float, momentum: float = 0.0) -> Tensor:
    """R of label-noise SGD for the squared loss at zero loss, through the Gram matrix (head of this file).

    Exact; costs one gradient per sample and output and a Cholesky factor of n C rows. Its gradient keeps the whole
    Jacobian; under `torch.no_grad` the matrix is built in blocks instead, in bounded memory.

    Args:
        model: maps (n, ...) to (n,) or (n, C), each sample for itself. Its parameters that require a gradient count.
        inputs: the n training samples.
        lr: learning rate > 0 of the SGD whose regulariser it is.
        momentum: beta in [0, 1).

    Returns:
        R, a scalar of the parameters' dtype and device, differentiable by the parameters. The determinant is taken in
        float64.

    Raises:
        UnstableError: lr times the largest eigenvalue reaches 2(1+beta); it carries that number.
        ValueError: `lr` or `momentum` outside its range; inputs or outputs empty, of another shape or not finite; no parameter
            with a gradient, or outputs that do not depend on one; samples that depend on each other.

    Source: Damian, Ma & Lee 2021 (R); Gram form and momentum derived.

    Example:
        >>> line = nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()  # H has the eigenvalue 1/2 twice
        >>> round(implicit_regularizer(line, x, lr=1.0).item(), 6)  # -log(3/4)
        0.287682
    """
    rate, beta = one_number(lr), one_number(momentum)
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"lr has to be finite and > 0, got {lr!r}")
    if not 0 <= beta < 1:
        raise ValueError(f"momentum has to be in [0, 1), got {momentum!r}")
    _check_inputs(inputs)
    with _evaluating(model):
        gram = _gram(model, inputs) if torch.is_grad_enabled() else _gram_in_blocks(model, inputs)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the gradients of the outputs are not finite; look at the model's weights and the inputs")
    # log det of 1 - (small) loses what is small: half the digits that a float32 has, few of a float64's
    wide = gram if gram.device.type == "mps" else gram.double()
    half = rate / (2.0 * (1.0 + beta))
    factor, failed = torch.linalg.cholesky_ex(torch.eye(len(wide), dtype=wide.dtype, device=wide.device) - half * wide)
    if bool(failed):
        raise UnstableError(rate, float(torch.linalg.eigvalsh(wide.detach())[-1]), beta)
    return (factor.diagonal().log().sum() * (-1.0 / (2.0 * half))).to(gram.dtype)


def _check_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor) or inputs.ndim == 0 or not len(inputs):
        got = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs have to be a tensor of one sample at least, got {got}")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise ValueError("inputs have to be finite, but hold NaN or infinity; look for it in the data")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module's mode is what it was, and so are buffers that it wrote to."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for buffer, before, version in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(before)


def _gram_in_blocks(model: nn.Module, inputs: Tensor) -> Tensor:
    """K without a gradient, (n C, n C)."""
    kernel = empirical_ntk(model, inputs, mode="full").transpose(1, 2)
    return kernel.reshape(len(inputs) * kernel.shape[1], -1) / len(inputs)


def _gram(model: nn.Module, inputs: Tensor) -> Tensor:
    """K with a gradient, (n C, n C)."""
    problem = Problem.checked(model, None, inputs, None)
    weights: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if name in problem.chosen}
    try:
        rows = _jacobian(problem, weights, inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a module that torch.func cannot batch, such as a recurrent one
        rows = _jacobian_by_loop(problem, weights, inputs)
    gram = rows[0] @ rows[0].T
    for row in rows[1:]:
        gram = gram + row @ row.T
    # an empty sum of every parameter: one that the Jacobian does not depend on has a gradient of zero, not none
    return gram / len(inputs) + torch.stack([weight.flatten()[:0].sum() for weight in weights.values()]).sum()


def _jacobian(problem: Problem, weights: dict[str, Tensor], inputs: Tensor) -> list[Tensor]:
    """Rows of J per parameter tensor, (n C, numbers), all samples of a block at once."""

    def one(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return problem.call(theta, sample[None]).reshape(-1)

    size = problem.outputs * sum(weight.numel() * weight.element_size() for weight in weights.values())
    with plain_attention():
        found = vmap(jacrev(one), (None, 0), chunk_size=max(1, _BLOCK_BYTES // size))(weights, inputs)
    return [rows.flatten(2).flatten(0, 1) for rows in found.values()]


def _jacobian_by_loop(problem: Problem, weights: dict[str, Tensor], inputs: Tensor) -> list[Tensor]:
    """The same by one gradient per sample and output."""
    outputs, leaves = problem.call(weights, inputs).reshape(-1), list(weights.values())
    rows = [torch.autograd.grad(each, leaves, create_graph=True, materialize_grads=True) for each in outputs]
    return [torch.stack([row[i].flatten() for row in rows]) for i in range(len(leaves))]
