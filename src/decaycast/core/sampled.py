"""The trace of the Gauss-Newton matrix from gradients alone, by noise on the labels: cheaper than products, where it applies.

Conventions of this file. The loss is a mean over N labels. Where noise on label k puts noise of covariance C_k into the gradient
of that label's own loss, independent for each, the gradient g of the mean loss has, for two draws g and g' on a batch,

    E[(N/2)*||g - g'||^2] = mean over k of tr C_k

and g - g' takes one backward pass, of the difference of the two losses. Whatever the labels do not change drops out.

* Labels drawn from the model's own probabilities q, under softmax cross-entropy: C_k = J_k^T (diag q - q q^T) J_k, and the sum
  is the trace of the Gauss-Newton matrix, anywhere. Where the model is sure, hardly any label differs from one draw to the
  next, and the mean rests on rare events (of 100 runs on a trained network, 76 missed by more than their interval). So noise
  of the same covariance is put on the outputs instead: with random signs s, u = sqrt(q)*s - q*(sqrt(q).s), and N*||J^T u/N||^2
  is one backward pass just the same.
* Noise of your own on the given labels, of variance sigma^2 by the output: sigma^2/alpha times that trace, with alpha the loss'
  second derivative, once the weights are at the minimum of the expected loss (for the squared loss (f - y)^2/2, alpha = 1,
  everywhere). Elsewhere it is the strength of the noise only.

The standard error is that of a mean over draws, which scatter about as much as Hutchinson's probes. At a few dozen draws it is
small when the value is too small, and the interval covers about 92 % instead of 95 (measured): `hessian_trace` knows its
error better.

Source: Damian, Ma & Lee 2021, whose published code takes noisy minus clean squared norms; the forms here are derived.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.estimate import Estimate
from decaycast.core.measure import is_classification
from decaycast.core.reading import Loss, Reader, reusable

Labels = Callable[[Any, Any], Any]

FIRST = 30  # draws before a standard error is looked at, over all batches; `_LEAST` in each
_LEAST = 4


def sampled_trace(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    labels: Labels | None = None,
    relative_error: float = 0.05,
    generator: torch.Generator | None = None,
    max_draws: int = 1000,
) -> Estimate:
    """Mean over the labels of the trace of their gradient noise (head of this file: when that is the trace of the GGN).

    Args:
        model: any torch module, read as in `decaycast.core.curvature.Curvature`.
        loss_fn: (output, target) -> scalar, the mean over the batch's labels (those that are not -100).
        batches: list or loader of (inputs, target), or of dicts with ``"labels"``, in the same order each time.
        labels: (output, target) -> new random target of the same kind, for instance ``lambda _, y: noise(y)`` with a
            `LabelNoise`; None takes the noise of labels drawn from the model's own probabilities.
        relative_error: stop when the standard error is at most this share of the value; > 0.
        generator: for ``labels=None``, on the model's device; None for torch's global one.
        max_draws: backward passes per batch after which to stop in any case (with a warning), >= `FIRST`.

    Returns:
        The estimate; its `probes` are backward passes. Batches count by their number of labels.

    Raises:
        ValueError: ``labels=None`` for another loss than the plain mean of softmax cross-entropy, an argument out of range; for
            the rest see `Curvature`.
        FloatingPointError: a gradient is not finite.

    Source: see the head of this file.

    Example:
        >>> line = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(line.weight)  # q = 1/2: tr G = tr(diag q - q q^T)*x^2 = x^2/2
        >>> batch = (torch.tensor([[2.0]]), torch.tensor([0]))
        >>> found = sampled_trace(line, torch.nn.functional.cross_entropy, [batch], generator=torch.Generator().manual_seed(0))
        >>> found.interval[0] < 2.0 < found.interval[1]
        True
    """
    if not relative_error > 0:
        raise ValueError(
            f"relative_error has to be positive, got {relative_error}; 0.05 stops at a standard error of 5 %"
        )
    if max_draws < FIRST:
        raise ValueError(
            f"max_draws is {max_draws}, but no standard error can be trusted before {FIRST} draws; give more"
        )
    batches, reader = reusable(batches), Reader(model)
    source = _OwnNoise(loss_fn, generator) if labels is None else _GivenNoise(loss_fn, labels)
    many = len(batches) if isinstance(batches, Sized) else 1
    strata: dict[int, tuple[int, list[float]]] = {}
    wanted, made = max(_LEAST, math.ceil(FIRST / max(1, many))), 0
    while True:
        for place, batch in enumerate(batches):
            count, found = _draws(reader, source, batch, wanted - made)
            strata.setdefault(place, (count, []))[1].extend(found)
        estimate, made = _combined(list(strata.values())), wanted
        allowed = relative_error * abs(estimate.value)
        # draws that changed no label know nothing of how far the others scatter
        live = sum(value > 0 for _, values in strata.values() for value in values)
        if wanted >= max_draws or (live >= FIRST and estimate.stderr <= allowed):
            break
        more = wanted * (estimate.stderr / allowed) ** 2 if allowed else max_draws
        wanted = min(max_draws, max(wanted + 1, math.ceil(min(more, max_draws)), 2 * wanted if live < FIRST else 0))
    if live < FIRST or estimate.stderr > allowed:
        warnings.warn(
            f"stopped after max_draws = {max_draws} draws at {estimate.value:.4g} with a standard error of "
            f"{estimate.stderr:.2g}, {live} of them with any noise; more than {relative_error:g} of the value, or too few to "
            "tell: raise max_draws",
            RuntimeWarning,
            stacklevel=2,
        )
    return estimate


def _draws(reader: Reader, source: _OwnNoise | _GivenNoise, batch: Any, number: int) -> tuple[int, list[float]]:
    """Labels N in the batch, and `number` draws of N times the squared length of the gradient's noise."""
    output, target, count = reader.output(batch)
    if isinstance(target, Tensor) and not target.is_floating_point():
        count = int((target != -100).sum())
    leaves, found = list(reader.theta.values()), []
    for _ in range(number if count else 0):
        with torch.enable_grad():
            noisy = source(output, target, count)
        if not noisy.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter in a way that can be differentiated, so labels put no noise into "
                "its gradient"
            )
        parts = torch.autograd.grad(noisy, leaves, retain_graph=True, allow_unused=True)
        squares = [part.square().sum(dtype=torch.float64) for part in parts if part is not None]
        found.append(count * float(torch.stack(squares).sum()))
    if not all(math.isfinite(value) for value in found):
        raise FloatingPointError("a gradient with noise on the labels is not finite; check data and weights")
    return count, found


def _combined(strata: list[tuple[int, list[float]]]) -> Estimate:
    """Mean over batches, weighted by their labels; Satterthwaite's degrees of freedom."""
    if not strata:
        raise ValueError("batches is empty: there is no sample to average over; give at least one batch")
    labels = sum(count for count, _ in strata)
    if not labels:
        raise ValueError("no label counts: all of them are -100; check the data")
    value, variance, fourth = 0.0, 0.0, 0.0
    for count, values in strata:
        if not count:
            continue
        weight, number = count / labels, len(values)
        mean = math.fsum(values) / number
        share = weight**2 * math.fsum((each - mean) ** 2 for each in values) / ((number - 1) * number)
        value, variance, fourth = value + weight * mean, variance + share, fourth + share**2 / (number - 1)
    degrees = variance**2 / fourth if fourth > 0 else 1e6
    spent = sum(len(values) for _, values in strata)
    return Estimate.of(value, math.sqrt(variance), degrees=degrees, probes=spent)


class _GivenNoise:
    """The difference of the losses of two draws, over sqrt(2)."""

    def __init__(self, loss_fn: Loss, labels: Labels) -> None:
        self.loss_fn, self.labels = loss_fn, labels

    def __call__(self, output: Any, target: Any, count: int) -> Tensor:
        one, other = (self.loss_fn(output, self.labels(output, target)) for _ in range(2))
        return (one - other) / math.sqrt(2.0)


class _OwnNoise:
    """The outputs times noise that has the covariance of labels drawn from their softmax (along the second dimension)."""

    def __init__(self, loss_fn: Loss, generator: torch.Generator | None) -> None:
        self.loss_fn, self.generator = loss_fn, generator
        self._fits = False

    def __call__(self, output: Any, target: Any, count: int) -> Tensor:
        if not (isinstance(output, Tensor) and isinstance(target, Tensor) and is_classification(output, target)):
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                "the noise of drawn labels is known for scores (n, classes, ...) with class targets (n, ...) alone, and the "
                f"model returns {got}; give a function as labels"
            )
        shares = torch.softmax(output.detach(), 1) * (target != -100).unsqueeze(1)
        if not self._fits:
            self._check(output.detach(), target, shares, count)
            self._fits = True
        signs = torch.empty_like(shares).bernoulli_(0.5, generator=self.generator).mul_(2).sub_(1)
        root = shares.sqrt()
        noise = root * signs - shares * (root * signs).sum(1, keepdim=True)
        return (output * (noise / count)).sum()

    def _check(self, scores: Tensor, target: Tensor, shares: Tensor, count: int) -> None:
        """Whether the loss' second derivative is (diag q - q q^T)/N, along one direction."""
        free = scores.clone().requires_grad_()
        direction = torch.linspace(-1.0, 1.0, scores.numel(), dtype=scores.dtype, device=scores.device).view_as(scores)
        direction = direction.sin() * 2
        slope = torch.autograd.grad(self.loss_fn(free, target), free, create_graph=True)[0]
        found = (
            torch.autograd.grad((slope * direction).sum(), free)[0] if slope.requires_grad else torch.zeros_like(free)
        )
        expected = shares * (direction - (shares * direction).sum(1, keepdim=True)) / count
        if float((found - expected).norm()) > 1e-2 * float(expected.norm()) + torch.finfo(scores.dtype).eps / count:
            raise ValueError(
                "the loss is not the plain mean of softmax cross-entropy over the labels (class weights, another loss or "
                "another mean?), so drawn labels do not have its curvature; use hessian_trace, or give a function as labels"
            )
