"""Stochastic Normalization as formulas: which statistics a channel is normalised with, forward and backward.

Conventions. x has shape (n, channels, ...); every vector has shape (channels,) and n counts the values of one channel,
batch times positions. Batch variances are biased (divided by n), running variances follow the unbiased one, as in torch's
batch norm. A mask holds one boolean s per channel: True takes the batch's statistics, False the running ones.

Since s is 0 or 1, mixing the two normalised outputs is the same as mixing the *statistics* and normalising once:

    M = s mu + (1-s) m        V = s v + (1-s) r        y = gamma (x - M)/sqrt(V + eps) + beta

m and r are those from before this batch moved them, and no gradient flows into them, hence

    dx = gamma/sqrt(V + eps) (dy - s (mean(dy) + xhat mean(dy xhat)))

Source: Kou, You, Long, Wang, "Stochastic Normalization", NeurIPS 2020, algorithm 1; the one-pass form is derived from it.
"""

from __future__ import annotations

import torch

Maybe = torch.Tensor | None


def batch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of x, shape (n, channels, ...): two tensors of shape (channels,).

    >>> mean, variance = batch_statistics(torch.tensor([[1.0], [3.0]]))
    >>> mean.item(), variance.item()
    (2.0, 1.0)
    """
    variance, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    return mean, variance


def move_(
    running_mean: torch.Tensor,
    running_variance: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    count: int | torch.Tensor,
    momentum: float,
) -> None:
    """Move running statistics in place after a batch of `count` values a channel, whatever the mask was.

    m <- (1-a) m + a mu and r <- (1-a) r + a v count/(count-1); `momentum` a in [0, 1] weighs the new value, as in torch.
    """
    for running, new in ((running_mean, mean), (running_variance, variance * (count / (count - 1)))):
        if running.dtype == new.dtype:
            running.lerp_(new, momentum)
        else:
            running.copy_(torch.lerp(running.to(new.dtype), new, momentum))


def normalise(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: Maybe, bias: Maybe, eps: float
) -> torch.Tensor:
    """Per channel gamma (x - M)/sqrt(V + eps) + beta, in plain differentiable operations; a missing affine is 1 and 0."""
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight
    y = (x - along_channels(mean, x)) * along_channels(scale, x)
    return y if bias is None else y + along_channels(bias, x)


def stochastic_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    running_mean: torch.Tensor,
    running_variance: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    eps: float,
) -> torch.Tensor:
    """The training output, statistics mixed per channel and one normalisation; autograd gives its exact gradient."""
    mean, variance = batch_statistics(x)
    mean, variance = torch.where(mask, mean, running_mean), torch.where(mask, variance, running_variance)
    return normalise(x, mean, variance, weight, bias, eps)


def two_branch(
    x: torch.Tensor,
    mask: torch.Tensor,
    running_mean: torch.Tensor,
    running_variance: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    eps: float,
) -> torch.Tensor:
    """The same as the paper writes it: both branches normalised with torch's batch norm, then mixed by the mask.

    Nothing is moved; four activation-sized intermediates. The reference for tests and benchmarks.
    """
    batch = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    running = torch.nn.functional.batch_norm(x, running_mean, running_variance, weight, bias, False, 0.0, eps)
    share = along_channels(mask, x).to(x.dtype)
    return share * batch + (1 - share) * running


def gradients(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: Maybe,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias, given the *mixed* mean M and variance V of shape (channels,).

    dbeta = sum(dy), dgamma = sum(dy xhat), and dx as at the head of this file; sums over all but the channels.
    Differentiable in its tensor arguments.
    """
    dims = (0, *range(2, x.ndim))
    scale = torch.rsqrt(variance + eps)
    xhat = (x - along_channels(mean, x)) * along_channels(scale, x)
    grad_bias, grad_weight = grad_output.sum(dims), (grad_output * xhat).sum(dims)
    share = mask.to(x.dtype) / (x.numel() // x.shape[1])
    corrections = along_channels(share * grad_bias, x) + xhat * along_channels(share * grad_weight, x)
    scale = scale if weight is None else scale * weight
    return (grad_output - corrections) * along_channels(scale, x), grad_weight, grad_bias


def input_gradient_coefficients(
    mask: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    count: int | torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B, D of shape (channels,) with dx = A dy + B x + D: the same gradient for a kernel that reads x and dy once.

    With k = s gamma/(count sqrt(V + eps)): A = gamma/sqrt(V + eps), B = -k dgamma/sqrt(V + eps), D = -k dbeta - B M.
    """
    scale = torch.rsqrt(variance + eps)
    a = weight * scale
    k = a * (mask.to(a.dtype) / count)
    b = -k * grad_weight * scale
    return a, b, -k * grad_bias - b * mean


def along_channels(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`vector` of shape (channels,) as a view that broadcasts against x of shape (n, channels, ...)."""
    return vector.view(-1, *[1] * (x.ndim - 2))
