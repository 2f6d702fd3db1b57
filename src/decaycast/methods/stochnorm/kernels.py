"""The mixed normalisation at batch norm's price: one pass forward and backward out of torch's own kernels.

Forward reads x for its statistics and once more to normalise, like batch norm; backward reduces dy and x once and writes
dx = A dy + B x + D. Saved for backward: x and a few vectors over channels. Reduced-precision inputs (bfloat16, float16) keep
their dtype; statistics, sums and coefficients are float32 then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from decaycast.methods.stochnorm import theory

# |mu (mu - m)| <= this * v bounds the cancellation of the shifted sums to a few units in the last place
_SAFE_SHIFT = 4.0


class Statistics(NamedTuple):
    """What a batch has seen per channel: mean, biased variance, the number of values, and the mask in force."""

    mean: torch.Tensor
    variance: torch.Tensor
    count: int | torch.Tensor
    mask: torch.Tensor


def mixed_norm(
    x: torch.Tensor,
    mask: torch.Tensor,
    running_mean: torch.Tensor,
    running_variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group: Any = None,
) -> tuple[torch.Tensor, Statistics]:
    """Normalise x of shape (n, channels, ...) with statistics mixed by `mask`; differentiable twice in x, weight and bias.

    Args:
        x: at least one value per channel, any memory format, which the output keeps.
        mask: booleans of shape (channels,), True for the batch's statistics.
        running_mean: shape (channels,), read only, as the other buffer.
        running_variance: positive or zero.
        weight: gamma, or None for 1.
        bias: beta, or None for 0.
        eps: added to variances.
        group: process group over which statistics and the sums of backward are those of the whole batch; its first
            rank's mask holds for all. None stays in this process.

    Returns:
        The output, and the batch's statistics (of the whole group's batch), without gradient.
    """
    if not (x.is_contiguous() or _channels_last(x)):
        x = x.contiguous()
    output, *_, mean, variance, count, mask = _MixedNorm.apply(
        x, weight, bias, mask, running_mean, running_variance, eps, group
    )
    return output, Statistics(mean, variance, x.numel() // x.shape[1] if group is None else count, mask)


class _MixedNorm(torch.autograd.Function):
    """Returns more than the output so that autograd can save it: the mixed statistics, then those of `Statistics`."""

    @staticmethod
    def forward(x, weight, bias, mask, running_mean, running_variance, eps, group):
        work = _work_dtype(x)
        running_mean, running_variance = running_mean.to(work), running_variance.to(work)
        mean, variance = statistics(x, running_mean)
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64)
        if group is not None:
            mean, variance, count, mask = _of_the_group(mean, variance, count, mask, group)
        mixed_mean = torch.where(mask, mean, running_mean)
        mixed_variance = torch.where(mask, variance, running_variance)
        scale, shift = (None if vector is None else vector.to(work) for vector in (weight, bias))
        output = torch.native_batch_norm(x, scale, shift, mixed_mean, mixed_variance, False, 0.0, eps)[0]
        return output, mixed_mean, mixed_variance, mean, variance, count, mask.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, _, _, ctx.eps, ctx.group = inputs
        _, mixed_mean, mixed_variance, mean, variance, count, mask = output
        ctx.mark_non_differentiable(mixed_mean, mixed_variance, mean, variance, count)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, mixed_mean, mixed_variance, mask, count)

    @staticmethod
    def backward(ctx, grad_output, *_):  # type: ignore[override]
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(ctx, grad_output)
        else:
            grads = _gradients(ctx, grad_output)
        grad_x, grad_weight, grad_bias = grads
        weight = ctx.saved_tensors[1]
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = grad_bias.to(grad_weight.dtype if grad_weight is not None else grad_bias.dtype)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "StochNorm in training mode cannot be vmapped: each sample would need running statistics of its own; call "
            "eval() first, or map over the batch with an ordinary forward pass"
        )


def statistics(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel, accumulated in at least float32.

    On CPU both come from one pass of sums over x and x (x - shift), half the time of torch's own kernel or less. This loses
    digits where `shift` (the running mean) is far from the mean in units of the deviation; torch's kernel takes over then.
    """
    count = x.numel() // x.shape[1]
    if x.device.type == "cpu" and not x.is_complex():
        one, zero = torch.ones_like(shift), torch.zeros_like(shift)
        _, cross, total = torch.ops.aten.native_batch_norm_backward(
            x, x, one, shift, one, zero, one, False, 0.0, [False, True, True]
        )
        mean = total / count
        drift = mean * (mean - shift)
        variance = cross / count - drift
        if bool((drift.abs() <= _SAFE_SHIFT * variance).all()):
            return mean, variance
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, variance


def _gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    x, weight, mean, variance, mask, count = ctx.saved_tensors
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    grad_output = grad_output.contiguous(memory_format=_memory_format(x))
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad_output, x, weight, mean, variance, mean, variance, False, ctx.eps, [False, True, True]
    )
    if not ctx.needs_input_grad[0]:
        return None, grad_weight, grad_bias
    sums = grad_weight, grad_bias
    if ctx.group is not None:
        both = torch.cat(sums)
        dist.all_reduce(both, group=ctx.group)
        sums = both.chunk(2)
    a, b, d = theory.input_gradient_coefficients(mask, mean, variance, weight, *sums, count.to(mean), ctx.eps)
    return _combine(grad_output, x, a, b, d), grad_weight, grad_bias


def _combine(grad_output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor):
    """A dy + B x + D with one temporary, the result."""
    if _channels_last(x) and x.dtype == a.dtype:
        grad_x = torch.addcmul(theory.along_channels(d, x), x, theory.along_channels(b, x))
    else:
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        grad_x = torch.native_batch_norm(x, b, d, zero, one, False, 0.0, 0.0)[0]
    return grad_x.addcmul_(grad_output, theory.along_channels(a, x))


def _differentiable_gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For double backward: the same in plain operations, batch statistics being functions of x again."""
    if ctx.group is not None:
        raise RuntimeError(
            "the synchronised StochNorm has no double backward; use StochNorm2d, or one process, for second derivatives"
        )
    x, weight, mixed_mean, mixed_variance, mask, _ = ctx.saved_tensors
    wide = x.to(mixed_mean.dtype)
    mean, variance = theory.batch_statistics(wide)
    mean, variance = torch.where(mask, mean, mixed_mean), torch.where(mask, variance, mixed_variance)
    grads = theory.gradients(grad_output.to(wide.dtype), wide, mask, mean, variance, weight, ctx.eps)
    return grads[0].to(x.dtype), *grads[1:]


def _of_the_group(mean, variance, count, mask, group):
    """Statistics of the whole group's batch from one exchange, and its first rank's mask."""
    if count == 0:
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
    packed = torch.cat([mean, variance, mask.to(mean.dtype), count.to(mean).view(1)])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    all_of = torch.stack(gathered)
    means, variances, masks = all_of[:, :-1].chunk(3, dim=1)
    counts = all_of[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total, masks[0] > 0.5


def _work_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    if not _channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _channels_last(x: torch.Tensor) -> bool:
    """Whether x is dense with channels innermost and not contiguous as well."""
    if x.ndim not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
