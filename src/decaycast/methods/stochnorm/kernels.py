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

# |mu| (|mu| + |mu - m|) <= this * v bounds what shifted sums lose to a few units in the last place
_SAFE_SHIFT = 16.0
_FEW = 1 / 8  # of the channels: sums made again for these alone
_LARGE = 2**18  # values from which fewer passes pay for more calls
_LONGEST_SUM = 8192  # values of a channel
_STRETCH = 2**18  # values that stay in a core's cache


class Statistics(NamedTuple):
    """Per channel: what a batch has seen (mean, biased variance, number of values), the mask, and the mixture it chose."""

    mean: torch.Tensor
    variance: torch.Tensor
    count: int | torch.Tensor
    mask: torch.Tensor
    mixed_mean: torch.Tensor
    mixed_variance: torch.Tensor


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

    Raises:
        RuntimeError: under vmap, or asked for a forward-mode derivative.
        ValueError: one value per channel in the whole group.
    """
    x = _dense(x)
    # the engine's way through functorch costs a tenth of a millisecond a call, which small layers would feel
    function = _TransformedMixedNorm if torch._C._are_functorch_transforms_active() else _MixedNorm
    output, mixed_mean, mixed_variance, mean, variance, count, mask = function.apply(
        x, weight, bias, mask, running_mean, running_variance, eps, group
    )
    return output, Statistics(mean, variance, count, mask, mixed_mean, mixed_variance)


def _forward(x, weight, bias, mask, running_mean, running_variance, eps, group) -> tuple[Any, ...]:
    """The output, and what backward and the caller need: the mixed statistics, then the parts of `Statistics`."""
    work = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    running_mean, running_variance = running_mean.to(work), running_variance.to(work)
    mean, variance, count, mask = measured(x, mask, running_mean, group)
    mixed_mean = torch.where(mask, mean, running_mean)
    mixed_variance = torch.where(mask, variance, running_variance)
    scale, shift = (None if vector is None else vector.to(work) for vector in (weight, bias))
    output = _normalised(x, mixed_mean, mixed_variance, scale, shift, eps)
    return output, mixed_mean, mixed_variance, mean, variance, count, mask.clone()


class _MixedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[override]
        output = _forward(*inputs)
        _MixedNorm.keep(ctx, inputs, output)
        return output

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save for backward; statistics carry no gradient of their own, since dx holds it."""
        x, weight, bias, _, _, _, ctx.eps, ctx.group = inputs
        _, mixed_mean, mixed_variance, mean, variance, ctx.count, mask = output
        ctx.mark_non_differentiable(mixed_mean, mixed_variance, mean, variance)
        ctx.affine = [None if vector is None else vector.dtype for vector in (weight, bias)]
        ctx.save_for_backward(x, weight, mixed_mean, mixed_variance, mask)

    @staticmethod
    def backward(ctx, grad_output, *_):  # type: ignore[override]
        # the engine records backward itself only if someone asked for a graph of it (create_graph)
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        grad_x, *of_affine = gradients(ctx, grad_output)
        of_affine = [
            None if dtype is None else grad.to(dtype) for grad, dtype in zip(of_affine, ctx.affine, strict=True)
        ]
        return grad_x, *of_affine, None, None, None, None, None

    @staticmethod
    def jvp(ctx, *_):  # type: ignore[override]
        raise RuntimeError(
            "StochNorm in training mode has no forward-mode derivative; use reverse mode (torch.func.vjp or grad), or eval()"
        )


class _TransformedMixedNorm(_MixedNorm):
    """The same under the transforms of torch.func, which ask for another shape of forward."""

    @staticmethod
    def forward(*inputs):  # type: ignore[override]
        return _forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _MixedNorm.keep(ctx, inputs, output)

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(NO_VMAP)


NO_VMAP = (
    "StochNorm in training mode cannot be vmapped: each sample would need running statistics of its own; call eval() first, "
    "or map over the batch with an ordinary forward pass"
)


def measured(
    x: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor, torch.Tensor]:
    """Mean, biased variance, values per channel and mask: of x, or of what all ranks of `group` hold together."""
    mean, variance = statistics(x, shift)
    count = x.numel() // x.shape[1]
    return (mean, variance, count, mask) if group is None else _of_the_group(mean, variance, count, mask, group)


def statistics(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel, accumulated in at least float32.

    On CPU, of large inputs, both come from one pass of sums over x and x (x - shift), where torch's own kernel takes two.
    This loses digits in channels whose mean, or its distance from `shift` (the running mean), is many deviations; torch's
    kernel does those.
    """
    if x.numel() == 0:  # a rank without samples; torch's kernels would divide by zero
        return torch.zeros_like(shift), torch.zeros_like(shift)
    if x.device.type != "cpu" or x.numel() < _LARGE:
        return _torchs_statistics(x, shift)
    total, cross = _shifted_sums(x, shift)
    count = x.numel() // x.shape[1]
    mean = total / count
    drift = mean - shift
    variance = cross / count - mean * drift
    doubtful = ~(mean.abs() * (mean.abs() + drift.abs()) <= _SAFE_SHIFT * variance)
    many = int(doubtful.sum())
    if many > _FEW * len(mean):
        return _torchs_statistics(x, shift)
    if many:
        mean[doubtful], variance[doubtful] = _torchs_statistics(x[:, doubtful].contiguous(), shift[doubtful])
    return mean, variance


def _torchs_statistics(x: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # the kernel gives statistics in the dtype of the buffers it would move, or of x without any
    return torch.batch_norm_update_stats(x, torch.zeros_like(like), torch.ones_like(like), 0.0)


def _shifted_sums(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of x and of x (x - shift) per channel: what batch norm's backward makes of dy = x."""
    one = torch.ones_like(shift)
    # channels-last kernels add up row by row in the input's precision: short stretches, added up in double, keep digits
    stretch = max(1, _LONGEST_SUM * x.shape[1] // x[:1].numel()) if _channels_last(x) else len(x)
    parts = [_reduced(part, part, shift, one, 0.0)[1:] for part in x.split(stretch)]
    if len(parts) == 1:
        cross, total = parts[0]
        return total, cross
    cross, total = (torch.stack(each).sum(0, dtype=torch.float64).to(shift.dtype) for each in zip(*parts, strict=True))
    return total, cross


def _reduced(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    weight: torch.Tensor | None = None,
    scaled: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """An evaluating batch norm's gradients: gamma/sqrt(V + eps) dy if `scaled`, sums of dy xhat and of dy per channel."""
    if weight is None:
        weight = torch.ones_like(mean)
    # the kernel of CPU reads mean and variance, that of CUDA asks for mean and 1/deviation
    saved = mean, torch.rsqrt(variance + eps)
    return torch.ops.aten.native_batch_norm_backward(
        grad_output, x, weight, mean, variance, *saved, False, eps, [scaled, True, True]
    )


def _normalised(x, mean, variance, weight, bias, eps) -> torch.Tensor:
    """`theory.normalise` in one pass: batch norm's evaluation."""
    if x.numel() == 0:
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]


def _gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    x, weight, mean, variance, mask = ctx.saved_tensors
    weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    grad_output = grad_output.contiguous(memory_format=_memory_format(x))
    wanted = ctx.needs_input_grad[0]
    # elementwise kernels are slow on mixed dtypes, batch norm's are not: those scale dy as well then
    mixed = wanted and x.dtype != mean.dtype
    if x.numel() == 0:
        grad_x, grad_weight, grad_bias = grad_output, torch.zeros_like(mean), torch.zeros_like(mean)
    else:
        grad_x, grad_weight, grad_bias = _reduced(grad_output, x, mean, variance, ctx.eps, weight, mixed)
    if not wanted:
        return None, grad_weight, grad_bias
    sums = torch.stack([grad_weight, grad_bias])
    if ctx.group is not None:
        dist.all_reduce(sums, group=ctx.group)
    a, b, d = theory.input_gradient_coefficients(mask, mean, variance, weight, sums[0], sums[1], ctx.count, ctx.eps)
    if not mixed or grad_x is None:
        return _combined(grad_output, x, a, b, d), grad_weight, grad_bias
    stretch = max(1, _STRETCH // max(1, x[:1].numel()))
    for part_of_grad, part in zip(grad_x.split(stretch), x.split(stretch), strict=True):
        part_of_grad += _scaled(part, b, d)
    return grad_x, grad_weight, grad_bias


def _combined(
    grad_output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """A dy + B x + D with one temporary, the result."""
    a, b_view, d_view = (theory.along_channels(each, x) for each in (a, b, d))
    grad_x = torch.addcmul(d_view, x, b_view) if _channels_last(x) else _scaled(x, b, d)
    return grad_x.addcmul_(grad_output, a)


def _scaled(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Scale x + shift per channel, in x's dtype."""
    return _normalised(x, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, 0.0)


def _differentiable_gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For double backward: the same in plain operations, batch statistics being functions of x again."""
    if ctx.group is not None:
        raise RuntimeError(
            "the synchronised StochNorm has no double backward; use StochNorm2d, or one process, for second derivatives"
        )
    x, weight, mixed_mean, mixed_variance, mask = ctx.saved_tensors
    wide = x.to(mixed_mean.dtype)
    mean, variance = theory.batch_statistics(wide)
    mean, variance = torch.where(mask, mean, mixed_mean), torch.where(mask, variance, mixed_variance)
    grads = theory.gradients(grad_output.to(wide.dtype), wide, mask, mean, variance, weight, ctx.eps)
    return grads[0].to(x.dtype), *grads[1:]


def _of_the_group(mean, variance, count, mask, group):
    """Statistics of the whole group's batch from one exchange, and its first rank's mask."""
    packed = torch.cat([mean, variance, mask.to(mean.dtype), mean.new_tensor([count])])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    all_of = torch.stack(gathered)
    means, variances, masks = all_of[:, :-1].chunk(3, dim=1)
    counts = all_of[:, -1:]
    total = counts.sum()
    if count < 2 and float(total) < 2:
        raise ValueError(
            f"training needs more than one value per channel, and {len(masks)} ranks have {int(total)} together; use "
            "larger batches"
        )
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, variance, total, masks[0] > 0.5


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, or a copy without gaps in the layout nearest to its own."""
    if x.is_contiguous() or _channels_last(x):
        return x
    if x.ndim in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1:
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    return x.contiguous()


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    if not _channels_last(x):
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _channels_last(x: torch.Tensor) -> bool:
    """Whether x is dense with channels innermost and not contiguous as well."""
    if x.ndim not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
