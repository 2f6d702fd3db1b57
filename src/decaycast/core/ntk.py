"""The neural tangent kernel of any torch module at its present weights, exact and in bounded memory.

Conventions of this file. For a model that maps a batch (n, ...) to outputs (n, c), with chosen parameters theta,

    Theta[i, j, a, b] = sum_mu d f_a(x_i)/d theta_mu * d f_b(x'_j)/d theta_mu

with no factor of width, outputs or samples. `mode` says what of it is returned:

================  ==================  =============================================================================
mode              shape               meaning
================  ==================  =============================================================================
``"full"``        (n1, n2, c, c)      everything; a view of an (n1, c, n2, c) array, so that
                                      ``theta.transpose(1, 2).reshape(n1*c, n2*c)`` is free
``"per_output"``  (n1, n2, c)         a = b: one kernel per output
``"trace"``       (n1, n2)            summed over a = b
``"mean"``        (n1, n2)            the trace over c: what converges to `decaycast.core.kernel.ntk` with width
================  ==================  =============================================================================

Three exact routes. *structured*: every chosen parameter belongs to a Linear layer z = W u + b that is called once, on one
vector per sample; then dW = delta u^T with delta = df/dz, and the kernel is a sum over layers of (u.u' + 1)*(delta.delta'),
without any Jacobian. *generic*: Jacobians of a few samples and outputs at a time (`torch.func`), for everything else:
convolutions, norms, attention, shared weights. *loop*: the same Jacobians by one plain gradient per sample and output, slow,
for the few modules that `torch.func` cannot batch (recurrent ones). `ntk_route` says which one a model gets and why.

Parameters, buffers, modes and gradients of the model stay as they are. Layers that tie samples of a batch together or draw
random numbers (batch norm and dropout in training mode) have no such kernel and are refused; so call ``model.eval()``.

Source: Jacot et al. 2018 (arXiv 1806.07572); the layer-wise form: Novak, Sohl-Dickstein & Schoenholz 2022
(arXiv 2206.08720), section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.names import choose
from decaycast.core.ntk_routes import METHODS, Generic, Problem, Route, Structured, find_route, plain_attention

MODES = ("full", "per_output", "trace", "mean")
ROUTES = ("auto", "structured", "generic", "loop")
DEFAULT_MEMORY = 256 * 1024**2


def empirical_ntk(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    mode: str = "full",
    parameters: Iterable[str] | None = None,
    route: str = "auto",
    memory_bytes: int = DEFAULT_MEMORY,
) -> Tensor:
    """Neural tangent kernel of `model` between two sets of inputs (head of this file).

    Args:
        model: maps (n, ...) to (n, c) or (n,), each sample for itself; its dtype is that of the kernel.
        x1: inputs, first dimension the n1 samples.
        x2: inputs, n2 samples; None for `x1` with itself (half the work, symmetric to the last bit).
        mode: one of `MODES`.
        parameters: names as in ``model.named_parameters()`` to differentiate by; None for all that require a gradient.
        route: ``"auto"`` (what `ntk_route` says), or one of the others by name.
        memory_bytes: aim for what is held beside the model and the result: Jacobians or activations of one block of
            samples and the block's products. At least one sample and output is always taken, and autograd's own buffers
            come on top (as large again in the generic route).

    Returns:
        The kernel, shape by `mode`, dtype and device of the parameters, detached.

    Raises:
        ValueError: no parameter to differentiate by, an unknown name, inputs or outputs of the wrong shape or not
            finite, layers that mix samples or are random, or a route that the model does not have.

    Source: see the head of this file.

    Example:
        >>> line = torch.nn.Linear(2, 1)
        >>> empirical_ntk(line, torch.tensor([[1.0, 2.0], [3.0, 0.0]]), mode="trace")  # x.x' + 1
        tensor([[ 6.,  4.],
                [ 4., 10.]])
    """
    choose(mode, MODES, "mode")
    choose(route, ROUTES, "route")
    if memory_bytes <= 0:
        raise ValueError(f"memory_bytes has to be positive, got {memory_bytes}; the default is {DEFAULT_MEMORY}")
    problem = Problem.checked(model, parameters, x1, x2)
    if route in ("auto", "structured"):
        found = find_route(problem)
        if route not in ("auto", found.name):
            raise ValueError(f"this model has no structured kernel: {found.reason}; use route='auto'")
        route = found.name
    return _assemble(METHODS[route](problem), problem, mode, memory_bytes)


def ntk_route(model: nn.Module, x: Tensor, *, parameters: Iterable[str] | None = None) -> Route:
    """Which route `empirical_ntk` takes for `model` on inputs like `x`, and why; tried on at most four samples.

    Args:
        model: as in `empirical_ntk`.
        x: as `x1` in `empirical_ntk`.
        parameters: as in `empirical_ntk`.

    Returns:
        The route. The structured one is taken only if its gradients agree with autograd's on these samples.

    Raises:
        ValueError: as `empirical_ntk`.

    Example:
        >>> ntk_route(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)), torch.ones(4, 2))
        Route(name='generic', reason='1.weight belongs to LayerNorm, not to a Linear layer')
    """
    return find_route(Problem.checked(model, parameters, x, None))


def ntk_vector_product(
    model: nn.Module,
    x1: Tensor,
    vector: Tensor,
    x2: Tensor | None = None,
    *,
    parameters: Iterable[str] | None = None,
) -> Tensor:
    """Theta(x1, x2) times a vector without the kernel: sum over j and b of Theta[i, j, a, b]*vector[j, b].

    Costs about four gradients of the whole batch and its memory; works for every model that autograd can differentiate
    twice.

    Args:
        model: as in `empirical_ntk`.
        x1: inputs of the rows, n1 samples.
        vector: shape (n2, c), or (n2,) for a model with one output per sample.
        x2: inputs of the columns, n2 samples; None for `x1`.
        parameters: as in `empirical_ntk`.

    Returns:
        Shape (n1, c), or (n1,) where the model returns that.

    Raises:
        ValueError: as `empirical_ntk`; also a `vector` of the wrong shape.

    Example:
        >>> line = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> ntk_vector_product(line, x, torch.tensor([[1.0], [0.5]]))  # [[6, 4], [4, 10]] times (1, 0.5)
        tensor([[8.],
                [9.]])
    """
    problem = Problem.checked(model, parameters, x1, x2)
    other = x1 if x2 is None else x2
    outputs = (len(other), *problem.output_shape)
    if tuple(vector.shape) != outputs:
        raise ValueError(
            f"vector has shape {tuple(vector.shape)}, but the outputs have {outputs}; give one number each"
        )
    with torch.enable_grad(), plain_attention():
        theta = {name: value.detach().requires_grad_() for name, value in problem.chosen.items()}
        leaves = list(theta.values())
        gradient = torch.autograd.grad(problem.call(theta, other), leaves, vector, materialize_grads=True)
        # forward mode by two backward ones: w -> J^T w is linear, and the transpose of J^T is J
        out = problem.call(theta, problem.x1)
        dummy = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, leaves, dummy, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(pulled, dummy, gradient, materialize_grads=True)[0].detach()


# blocks


def _assemble(method: Structured | Generic, problem: Problem, mode: str, memory_bytes: int) -> Tensor:
    c, rows, symmetric = problem.outputs, problem.x1, problem.x2 is None
    columns = rows if problem.x2 is None else problem.x2
    like = next(iter(problem.chosen.values()))
    shapes = {"full": (len(rows), c, len(columns), c), "per_output": (c, len(rows), len(columns))}
    kernel = torch.zeros(shapes.get(mode, (len(rows), len(columns))), dtype=like.dtype, device=like.device)
    plan = _Plan.within(memory_bytes // like.element_size(), method, mode, c, len(rows), len(columns), symmetric)
    for some in _slices(c, plan.outputs):
        for others in _slices(c, plan.outputs) if mode == "full" else [some]:
            kept: dict[int, Any] = {}
            for i in _slices(len(rows), plan.samples):
                one = kept.get(i.start) if symmetric and some == others else None
                one = method.features(rows[i], some) if one is None else one
                for j in _slices(len(columns), plan.samples):
                    if symmetric and j.start < i.start:
                        continue
                    if symmetric and i == j and some == others:
                        kept[j.start] = one if plan.keep else None
                        other = one
                    else:
                        other = kept.get(j.start)
                        other = method.features(columns[j], others) if other is None else other
                        kept[j.start] = other if plan.keep else None
                    _add_block(method, kernel, mode, (one, other), (i, some, j, others))
    if symmetric:
        _mirror(kernel, mode, plan.samples)
    if mode == "full":
        return kernel.transpose(1, 2)
    if mode == "per_output":
        return kernel.permute(1, 2, 0)
    return kernel.div_(c) if mode == "mean" else kernel


def _add_block(
    method: Structured | Generic, kernel: Tensor, mode: str, features: tuple[Any, Any], where: tuple[slice, ...]
) -> None:
    i, some, j, others = where
    block = (
        kernel[i, some, j, others] if mode == "full" else kernel[some, i, j] if mode == "per_output" else kernel[i, j]
    )
    fresh = torch.zeros(block.shape, dtype=block.dtype, device=block.device)
    method.contract(*features, mode, fresh)
    block += fresh


def _mirror(kernel: Tensor, mode: str, samples: int) -> None:
    """Fill what lies below the diagonal of sample pairs, block by block."""
    count = len(kernel) if mode != "per_output" else kernel.shape[1]
    for i in _slices(count, samples):
        for j in _slices(count, samples):
            if j.start < i.start:
                continue
            if mode == "full":
                upper, lower = kernel[i, :, j, :], kernel[j, :, i, :]
                flipped = upper.permute(2, 3, 0, 1)
            else:
                upper, lower = kernel[..., i, j], kernel[..., j, i]
                flipped = upper.transpose(-1, -2)
            lower.copy_((flipped + lower) / 2 if i == j else flipped)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Samples and outputs per block, and whether the features of all columns are kept or worked out for every row block."""

    samples: int
    outputs: int
    keep: bool

    @classmethod
    def within(
        cls, numbers: int, method: Structured | Generic, mode: str, c: int, n1: int, n2: int, symmetric: bool
    ) -> _Plan:
        """The plan that holds at most `numbers` numbers, as far as one sample and output per block allow it."""
        outputs = c
        # features of one output at a time leave room for more samples, so fewer features are made again; where all
        # outputs are needed at once, eight samples per block at least
        if mode != "full" and isinstance(method, Generic) and 2 * method.numbers(c) * n2 > numbers:
            outputs = 1
        while outputs > 1 and 16 * method.numbers(outputs) > numbers:
            outputs = (outputs + 1) // 2
        features = method.numbers(outputs)
        keep = 2 * features * n2 <= numbers
        numbers = numbers - features * n2 if keep else numbers
        products = 2 * (outputs**2 if mode == "full" else outputs if mode == "per_output" else 1)
        # blocks of b samples: (1 or 2)*features*b + products*b^2 = numbers
        linear = features * (1 if keep else 2)
        samples = int((math.sqrt(linear**2 + 4.0 * products * numbers) - linear) / (2.0 * products))
        # half of a symmetric kernel is a mirror image, which takes several blocks to make use of; few where features
        # are made again for each
        most = max(16, -(-n1 // (8 if keep else 2))) if symmetric else max(n1, n2)
        return cls(samples=max(1, min(samples, most)), outputs=outputs, keep=keep)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
