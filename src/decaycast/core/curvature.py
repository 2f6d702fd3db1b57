"""Curvature of the training loss as products with vectors: the Hessian or the generalised Gauss-Newton matrix (GGN).

Conventions of this file. L(theta) is the mean loss over all samples of `batches`: `loss_fn` averages within a batch, and
batches of unequal size count by their number of samples (first dimension of the inputs). theta are the parameters that
require a gradient, flattened and joined in the order of ``model.named_parameters()``; a parameter shared by several layers
is there once. With p numbers in theta and f the outputs of the model,

    hessian   H = d^2 L/d theta^2                        ggn   G = mean over samples of (df/d theta)^T (d^2 l/d f^2) (df/d theta)

G is H without the term of the model's own second derivative: never negative for a convex loss, and equal to H where the loss
has zero gradient at the outputs, that is, at zero loss.

Products are exact, by differentiating twice. The GGN takes the forward derivative J v as the gradient of u -> J^T u, which is
linear; torch's forward mode was measured and is no faster here, and knows fewer layers. Several vectors at a time go
through one pass over the batches.

The model is read in evaluation mode, so batch norm uses its running statistics and dropout is off; the mode of each module is
put back. Buffers, gradients and weights of the model stay as they are.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.names import choose
from decaycast.core.reading import Loss, Reader, reusable

MATRICES = ("hessian", "ggn")

# vectors differentiated at once: as many as keep vectors x parameters x samples below this. Small networks gain a factor of
# ten (a product costs little more than calling torch), large ones nothing, and they would hold every activation many times
_TOGETHER = {"cpu": 2**22, "cuda": 2**30}


class Curvature:
    """The Hessian or GGN of a model's mean loss, at the weights the model has now.

    With a single batch, its graph is made once and kept for all products (and memory with it, as long as this object lives);
    with several, each pass over the batches makes one graph at a time. Change no weight in between.

    Args:
        model: any torch module; called as ``model(inputs)``, ``model(*inputs)`` for a tuple, ``model(**inputs)`` for a dict.
        loss_fn: (output, target) -> scalar, the mean over the batch; gets what the model returns.
        batches: pairs (inputs, target) or dicts with an entry ``"labels"``; gone through once per block of products, so a
            list or a loader. A one-time iterator is put into a list. Tensors are moved to the model's device. A loader that
            yields other samples each time (augmentation, ``drop_last`` with shuffling) is another matrix each time.
        matrix: one of `MATRICES`. For the GGN the outputs are a tensor, or have one as ``output.logits``.

    Attributes:
        size: p, the number of parameters.
        shapes: name -> shape of each parameter, in the order of the flat vector.

    Raises:
        ValueError: no parameter requires a gradient, parameters on several devices, an unknown matrix, no batch. Later, from
            products: an empty batch, a loss that is no scalar or has no gradient, labels out of range.

    Source: Pearlmutter 1994 for the Hessian; Schraudolph 2002 for the GGN.

    Example:
        >>> line = torch.nn.Linear(1, 1)
        >>> batch = (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))
        >>> Curvature(line, torch.nn.functional.mse_loss, [batch]).dense()  # 2*mean of (x, 1) times its transpose
        tensor([[10.,  4.],
                [ 4.,  2.]])
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, batches: Iterable[Any], matrix: str = "hessian") -> None:
        self.matrix = choose(matrix, MATRICES, "matrix")
        self.loss_fn = loss_fn
        self._reader = Reader(model)
        self._batches = reusable(batches)
        self._theta, self.device, self.dtype = self._reader.theta, self._reader.device, self._reader.dtype
        self.shapes = {name: value.shape for name, value in self._theta.items()}
        self._sizes = [value.numel() for value in self._theta.values()]
        self.size = sum(self._sizes)
        self._single: _Graph | None = None
        self._batched = True

    def products(self, vectors: Tensor) -> Tensor:
        """The matrix times each row of `vectors`.

        Args:
            vectors: shape (k, p), in the dtype and on the device of the parameters.

        Returns:
            Shape (k, p), detached.

        Raises:
            ValueError: a wrong shape; for the rest see the class.
            FloatingPointError: a product is not finite.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ValueError(
                f"vectors have shape {tuple(vectors.shape)}, but each row has to hold the {self.size} parameters; give (k, p)"
            )
        total, samples = torch.zeros_like(vectors), 0
        for graph in self._graphs():
            total.add_(self._through(graph, vectors), alpha=graph.count)
            samples += graph.count
        total /= samples
        if not bool(torch.isfinite(total.sum())):
            raise FloatingPointError(
                f"a product with the {self.matrix} of {self.size} parameters is not finite; the loss may have an infinite "
                "second derivative there (a square root or logarithm of 0), or the dtype too small a range: try float64"
            )
        return total

    def gradient(self) -> Tensor:
        """Gradient of the mean loss, shape (p,)."""
        total, samples = torch.zeros(self.size, dtype=self.dtype, device=self.device), 0
        for graph in self._graphs():
            total.add_(self._join(graph.gradient(), 0), alpha=graph.count)
            samples += graph.count
        return total / samples

    def dense(self) -> Tensor:
        """The whole matrix, shape (p, p): p products, made symmetric. For small p."""
        rows = self.products(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return (rows + rows.T) / 2

    def parts(self, vectors: Tensor) -> list[Tensor]:
        """`vectors` (..., p) cut into one view (..., numbers) per parameter, in the order of `shapes`."""
        return list(vectors.split(self._sizes, -1))

    def _graphs(self) -> Iterator[_Graph]:
        if self._single is not None:
            yield self._single
            return
        built, before = 0, None
        for batch in self._batches:
            before, built = self._build(batch), built + 1
            yield before
        if not built:
            raise ValueError("batches is empty: there is no sample to average over; give at least one batch")
        if built == 1 and isinstance(self._batches, Sequence):
            self._single = before

    def _build(self, batch: Any) -> _Graph:
        leaves = list(self._theta.values())
        output, target, count = self._reader.output(batch)
        with torch.enable_grad():
            if self.matrix == "ggn":
                return _GaussNewton.of(output, target, self.loss_fn, leaves, count)
            return _Hessian.of(_scalar(self.loss_fn(output, target)), leaves, count)

    def _through(self, graph: _Graph, vectors: Tensor) -> Tensor:
        work = max(1, self.size * graph.count)
        width = max(1, _TOGETHER.get(self.device.type, 2**22) // work)
        if width > 1 and self._batched and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    # of layers that torch can only batch slowly; the loop below is as fast then
                    warnings.simplefilter("error")
                    blocks = [self._join(graph.products(self._cut(some), True), 1) for some in vectors.split(width)]
                    return torch.cat(blocks)
            except (RuntimeError, ValueError, UserWarning) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._batched = False  # recurrent layers, say: one by one, for good
        return torch.stack([self._join(graph.products(self._cut(vector), False), 0) for vector in vectors])

    def _cut(self, vectors: Tensor) -> list[Tensor]:
        return [
            part.reshape(*vectors.shape[:-1], *leaf.shape).to(leaf.dtype)
            for part, leaf in zip(self.parts(vectors), self._theta.values(), strict=True)
        ]

    def _join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        return torch.cat([part.detach().flatten(dim).to(self.dtype) for part in parts], dim)


# one batch, differentiated once and ready to be differentiated again


@dataclass(frozen=True, kw_only=True)
class _Graph(ABC):
    leaves: list[Tensor]
    count: int  # samples

    @abstractmethod
    def gradient(self) -> list[Tensor]: ...

    @abstractmethod
    def products(self, vectors: list[Tensor], batched: bool) -> Sequence[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class _Hessian(_Graph):
    gradients: list[Tensor]

    @classmethod
    def of(cls, loss: Tensor, leaves: list[Tensor], count: int) -> _Hessian:
        return cls(leaves=leaves, count=count, gradients=_once(loss, leaves))

    def gradient(self) -> list[Tensor]:
        return self.gradients

    def products(self, vectors: list[Tensor], batched: bool) -> Sequence[Tensor]:
        return _again(self.gradients, self.leaves, vectors, batched)


@dataclass(frozen=True, kw_only=True)
class _GaussNewton(_Graph):
    output: Tensor
    free: Tensor  # the output as a variable of its own
    slope: Tensor  # dl/df at it, with its graph
    dummy: Tensor
    pulled: list[Tensor]  # J^T dummy

    @classmethod
    def of(cls, output: Any, target: Any, loss_fn: Loss, leaves: list[Tensor], count: int) -> _GaussNewton:
        """From what a model returned; `loss_fn` is taken at its outputs alone."""
        scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(scores, Tensor):
            raise ValueError(
                f"the model returns {type(output).__name__}, but the ggn needs a tensor of outputs or one called logits; "
                "use matrix='hessian' or wrap the model"
            )
        if not scores.requires_grad:
            raise ValueError(_NO_GRADIENT.format(what="output"))
        free = scores.detach().requires_grad_()
        seen = free if output is scores else copy(output)
        if seen is not free:
            seen.logits = free  # type: ignore[union-attr]
        loss = _scalar(loss_fn(seen, target))
        if torch.autograd.grad(loss, free, retain_graph=True, allow_unused=True)[0] is None:
            raise ValueError(
                "the loss does not use the model's outputs (was it worked out inside the model?), and the ggn needs its "
                "derivatives by them; compute it from the outputs in loss_fn, or use matrix='hessian'"
            )
        slope = _once(loss, [free])[0]
        dummy = torch.zeros_like(scores, requires_grad=True)
        pulled = _once(scores, leaves, dummy)
        return cls(leaves=leaves, count=count, output=scores, free=free, slope=slope, dummy=dummy, pulled=pulled)

    def gradient(self) -> list[Tensor]:
        return _again([self.output], self.leaves, [self.slope.detach()], False)

    def products(self, vectors: list[Tensor], batched: bool) -> Sequence[Tensor]:
        forward = _again(self.pulled, [self.dummy], vectors, batched)
        bent = _again([self.slope], [self.free], forward, batched)
        return _again([self.output], self.leaves, bent, batched)


_NO_GRADIENT = (
    "the {what} does not depend on any parameter in a way that can be differentiated (arg-max, rounding, detach or no_grad on "
    "the way?); there is no curvature to measure"
)
_ONCE = "a layer or the loss cannot be differentiated twice ({text}); write it with plain torch operations"


def _once(output: Tensor, inputs: list[Tensor], vector: Tensor | None = None) -> list[Tensor]:
    """First derivatives with their graph, zeros for inputs that are not used."""
    with _explained():
        found = torch.autograd.grad(output, inputs, vector, create_graph=True, materialize_grads=True)
    # a layer marked once_differentiable is a dead end that torch would leave out: its share would silently be 0
    seen, todo = set(), [value.grad_fn for value in found]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            if node.name() == "torch::autograd::Error":
                raise ValueError(_ONCE.format(text="marked with once_differentiable"))
            seen.add(node)
            todo.extend(after for after, _ in node.next_functions)
    return list(found)


def _again(outputs: list[Tensor], inputs: list[Tensor], vectors: Sequence[Tensor], batched: bool) -> list[Tensor]:
    """Differentiate a kept graph; outputs that depend on none of the inputs (linear in them) contribute nothing."""
    kept = [(output, vector) for output, vector in zip(outputs, vectors, strict=True) if output.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if kept:
        live, weights = zip(*kept, strict=True)
        with _explained():
            found = torch.autograd.grad(
                live, inputs, weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
    # not materialize_grads: with is_grads_batched its zeros lack the dimension of the vectors
    count = vectors[0].shape[:1] if batched else ()
    return [
        value.new_zeros(*count, *value.shape) if part is None else part
        for value, part in zip(inputs, found, strict=True)
    ]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what a failing second derivative means."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().partition("\n")[0]
        if any(
            word in text for word in ("derivative for", "differentiate twice", "not differentiable", "double backward")
        ):
            raise ValueError(_ONCE.format(text=text)) from error
        raise


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn has to return one number, the mean over the batch, got {got}; use reduction='mean'")
    if not loss.requires_grad:
        raise ValueError(_NO_GRADIENT.format(what="loss"))
    if not math.isfinite(float(loss.detach())):
        raise FloatingPointError(
            f"the loss is {float(loss.detach())}, so no product with its curvature is finite; check data and weights"
        )
    return loss.reshape(())
