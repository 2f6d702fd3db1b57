"""The exact trace of the Gauss-Newton matrix of a softmax network: one backward pass per class, whatever the number of weights.

The cross-entropy's curvature at logits with probabilities q is diag(q) - q q^T = sum over the classes c of q_c g_c g_c^T, where
g_c is the gradient of the loss for the label c. So

    tr G = mean over the samples of sum over c of q_c*||gradient of the loss of (x_i, c)||^2

and the sum is over squared per-sample gradients. In a linear layer z = W a + b the per-sample gradient is delta a^T, of squared
length ||delta||^2*(||a||^2 + 1), which hooks see for all samples at once. Estimates for other networks are in `core.trace`.

Source: per-sample gradient norms, Goodfellow 2015 (arXiv 1510.01799); the decomposition is that of the Fisher matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def trace(model: nn.Module, inputs: Tensor) -> float:
    """The trace of G for the mean cross-entropy over `inputs`; labels do not matter to it.

    Args:
        model: maps (n, ...) to logits (n, C), each sample for itself, with all its weights in `torch.nn.Linear` layers that
            see one vector per sample, each once.
        inputs: all training samples.

    Returns:
        tr G, exact up to rounding, >= 0.

    Raises:
        ValueError: a layer of another kind has weights.

    >>> model = nn.Linear(1, 2)
    >>> _ = [nn.init.zeros_(each) for each in model.parameters()]
    >>> trace(model, torch.tensor([[1.0], [3.0]]))  # tr(diag(q) - q q^T) = 1/2, times the mean of x^2 + 1
    3.0
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in model.modules():
        if not isinstance(module, nn.Linear) and next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"the exact trace knows linear layers alone, not {type(module).__name__}; use hessian_trace for this network"
            )
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen.append((given[0], made))

    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        with torch.enable_grad():
            logits = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    lengths = [
        given.detach().square().sum(1) + (layer.bias is not None)
        for layer, (given, _) in zip(layers, seen, strict=True)
    ]
    made = [output for _, output in seen]
    shares, total = functional.softmax(logits.detach(), 1), torch.zeros((), dtype=logits.dtype, device=logits.device)
    for label in range(logits.shape[1]):
        targets = torch.full((len(logits),), label, device=logits.device)
        loss = functional.cross_entropy(logits, targets, reduction="sum")
        deltas = torch.autograd.grad(loss, made, retain_graph=True)
        squares = [delta.square().sum(1) * length for delta, length in zip(deltas, lengths, strict=True)]
        total += (torch.stack(squares).sum(0) * shares[:, label]).sum()
    return float(total) / len(logits)
