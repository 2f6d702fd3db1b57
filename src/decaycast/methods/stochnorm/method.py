"""Drop-in layers: batch norm that, in training, normalises each channel with the running statistics at random.

Conventions. `p` is the probability of the *batch's* statistics: p = 1 is batch norm, p = 0 always uses the running ones (which
still move). One mask per layer and training call, shared by all samples and positions. Parameters, buffers, state_dict and
evaluation are those of batch norm, so state loads both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
import torch.fx
import torch.nn.functional as functional
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from decaycast.methods.stochnorm import theory
from decaycast.methods.stochnorm.kernels import NO_VMAP, measured, mixed_norm
from decaycast.methods.stochnorm.recomputation import Calls, recomputing

REMEMBERED = "_remembered_calls"  # entry of a layer that has been called in training


@torch.library.custom_op("decaycast::snapshot", mutates_args=(), schema="(Tensor vector) -> Tensor")
def snapshot(vector: torch.Tensor) -> torch.Tensor:
    """A copy that compilers keep for backward, since they do not see into it."""
    return vector.clone()


snapshot.register_fake(torch.empty_like)


class StochNorm(_BatchNorm):
    """What the layers for 1, 2 and 3 dimensions share, and the conversion of whole models.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> type(StochNorm.convert(model, p=0.5, report=None)[1]).__name__
    'StochNorm2d'
    >>> type(StochNorm.revert(model, report=None)[1]).__name__
    'BatchNorm2d'
    """

    _p: float
    generator: torch.Generator | None

    def __init__(
        self,
        num_features: int,
        p: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        generator: torch.Generator | None = None,
        *,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if type(self) is StochNorm:
            raise TypeError("StochNorm is what the layers share; make a StochNorm1d, StochNorm2d or StochNorm3d")
        p = probability(p)
        if p < 1 and not track_running_stats:
            raise ValueError(f"p = {p:g} needs running statistics; set track_running_stats=True, or p=1 for batch norm")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._p, self.generator = p, generator

    @property
    def p(self) -> float:
        """Probability, in [0, 1], that a channel is normalised with the batch's statistics; may be set at any time."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = probability(value)

    @staticmethod
    def convert(
        model: nn.Module,
        p: float = 0.5,
        skip: str | Iterable[str] | None = (),
        generator: torch.Generator | None = None,
        report: Callable[[str], object] | None = print,
    ) -> nn.Module:
        """Turn the batch norms of `model` into StochNorm, in place; see `decaycast.methods.stochnorm.convert.convert`."""
        from decaycast.methods.stochnorm.convert import convert

        return convert(model, p, skip, generator, report)

    @staticmethod
    def revert(model: nn.Module, report: Callable[[str], object] | None = print) -> nn.Module:
        """Turn every StochNorm of `model` back into what it was; see `decaycast.methods.stochnorm.convert.revert`."""
        from decaycast.methods.stochnorm.convert import revert

        return revert(model, report)

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise `input` of shape (n, num_features, ...).

        Args:
            input: floating; dtype and memory format are kept. In training, more than one value per channel.
            mask: booleans of shape (num_features,), True for the batch's statistics; None draws them with probability p.
                Evaluation, which is that of batch norm, does not look at it.

        Raises:
            TypeError: an input that is not floating.
            ValueError: wrong dimensions or channels, a single value per channel in training, a mask of another kind.
            RuntimeError: symbolic tracing, vmap or forward-mode derivatives in training mode; a forward during a backward
                pass that repeats none of the layer's last ones.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._symbolic(input)
        self._check(input)
        group = self._group() if self.training else None
        if not self.training or (self._p == 1 and mask is None and group is None):
            return self._batch_norm(input)
        self._check_training(input, group)
        if mask is not None:
            mask = self._checked(mask, input)
        if group is None and (torch.compiler.is_compiling() or not _plain(input)):
            return self._traceable(input, self._drawn(input) if mask is None else mask)
        if recomputing():
            return self._again(input, mask, group)
        mask = self._drawn(input) if mask is None else mask
        output, seen = mixed_norm(input, mask, *self._running(), self.weight, self.bias, self.eps, group)
        self._move(seen.mean, seen.variance, seen.count)
        if not torch._C._are_functorch_transforms_active():
            self._calls().remember(seen)
        return output

    def extra_repr(self) -> str:
        """The arguments of batch norm, and p."""
        return f"{super().extra_repr()}, p={self._p:g}"

    def _batch_norm(self, input: torch.Tensor) -> torch.Tensor:
        """Batch norm as torch does it: evaluation, and training at p = 1 to the bit."""
        tracked = self.track_running_stats or not self.training
        mean, variance = (self.running_mean, self.running_var) if tracked else (None, None)
        in_batch = self.training or (mean is None and variance is None)
        weight = self._weight_of_new() if self.training and self.track_running_stats else 0.0
        return functional.batch_norm(input, mean, variance, self.weight, self.bias, in_batch, weight, self.eps)

    def _symbolic(self, input: Any) -> Any:
        """`torch.fx.symbolic_trace`: a batch norm in the graph."""
        if self.training:
            raise RuntimeError(
                "StochNorm cannot be traced symbolically in training mode; call eval() on the model first"
            )
        return self._batch_norm(input)

    def _check(self, input: torch.Tensor) -> None:
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got an input of shape {tuple(input.shape)}")
        if not input.is_floating_point():
            raise TypeError(f"expected a floating input, got {input.dtype}; convert it first")

    def _check_training(self, input: torch.Tensor, group: Any) -> None:
        self._running()
        if group is None and input.numel() // max(1, self.num_features) < 2:
            raise ValueError(
                f"training needs more than one value per channel, got an input of shape {tuple(input.shape)}; use a "
                "larger batch, or call eval() on the layer"
            )
        if _mapped(input):
            raise RuntimeError(NO_VMAP)

    def _traceable(self, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """In plain operations: for a compiler that fuses them, for devices without kernels of batch norm, for subclasses."""
        wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        mean, variance = theory.batch_statistics(wide)
        # a compiler may compute in backward again what it has not saved, from buffers that have moved by then
        m, r = (snapshot(old) if torch.compiler.is_compiling() else old.clone() for old in self._running())
        mixed_mean = torch.where(mask, mean, m.to(wide.dtype))
        mixed_variance = torch.where(mask, variance, r.to(wide.dtype))
        output = theory.normalise(wide, mixed_mean, mixed_variance, self.weight, self.bias, self.eps).to(input.dtype)
        self._move(mean.detach(), variance.detach(), input.numel() // self.num_features)
        return output

    def _again(self, input: torch.Tensor, mask: torch.Tensor | None, group: Any) -> torch.Tensor:
        """The same call once more, for a checkpoint: what it saw then, and nothing moves."""
        if mask is None and self.generator is None:
            self._drawn(input)  # torch's own generator was put back to where it stood; it has to come out alike
        with torch.no_grad():
            nothing = torch.zeros(self.num_features, dtype=torch.bool, device=input.device)
            wide = self._running()[0].to(torch.promote_types(input.dtype, torch.float32))
            mean, variance, *_ = measured(input.detach(), nothing, wide, group)
        seen = self._calls().find(mean, variance)
        return mixed_norm(
            input, seen.mask, seen.mixed_mean, seen.mixed_variance, self.weight, self.bias, self.eps, group
        )[0]

    def _calls(self) -> Calls:
        return self.__dict__.setdefault(REMEMBERED, Calls())

    def __getstate__(self) -> dict[str, Any]:
        """Without the calls remembered: a copy has had none."""
        return {name: value for name, value in self.__dict__.items() if name != REMEMBERED}

    def _drawn(self, input: torch.Tensor) -> torch.Tensor:
        if self.generator is not None and self.generator.device.type != input.device.type:
            raise ValueError(
                f"the generator is on {self.generator.device} and the input on {input.device}; give one on the same device"
            )
        options: Any = {"device": input.device, "dtype": torch.float32}
        return torch.rand(self.num_features, generator=self.generator, **options) < self._p

    def _checked(self, mask: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        if mask.dtype != torch.bool or mask.shape != (self.num_features,) or mask.device != input.device:
            raise ValueError(
                f"a mask holds booleans of shape ({self.num_features},) on {input.device}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)} on {mask.device}"
            )
        return mask

    def _weight_of_new(self) -> float:
        """Counts this batch, and returns the weight its statistics get: the momentum, or 1/batches without one."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def _running(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            raise ValueError(f"p = {self._p:g} needs running statistics, which this layer does not track; set p = 1")
        return self.running_mean, self.running_var

    def _move(self, mean: torch.Tensor, variance: torch.Tensor, count: int | torch.Tensor) -> None:
        """Move the running statistics of every channel towards the batch's, whatever its mask was."""
        with torch.no_grad():
            theory.move_(*self._running(), mean, variance, count, self._weight_of_new())

    def _group(self) -> Any:
        """The process group whose statistics are shared; None for this process alone."""
        return None


class StochNorm1d(StochNorm, nn.BatchNorm1d):
    """Stochastic normalisation of (n, num_features) or (n, num_features, length); arguments as `StochNorm2d`."""


class StochNorm2d(StochNorm, nn.BatchNorm2d):
    """Batch norm that normalises each channel with the batch's statistics with probability p, else with the running ones.

    For channel c, in training, with s ~ Bernoulli(p): y = gamma (x - M)/sqrt(V + eps) + beta, M = s mu + (1-s) m and
    V = s v + (1-s) r; mu, v the batch's, m, r the running statistics before this batch moved them. In evaluation it is
    batch norm. Meant for fine-tuning a pre-trained network on few data; costs what batch norm costs.

    Args:
        num_features: channels of the input, (n, num_features, height, width).
        p: probability of the batch's statistics, in [0, 1]; the paper's 0.5. p = 1 is batch norm to the bit.
        eps: added to the variance.
        momentum: weight in [0, 1] of a batch in the running statistics; None for the plain average over batches.
        generator: where masks are drawn from, on the input's device; None for torch's own (`torch.manual_seed`). Its state
            is not part of the state_dict, and `torch.compile(fullgraph=True)` does not take it.
        affine: whether to learn gamma and beta.
        track_running_stats: False needs p = 1.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        TypeError: p is no number.
        ValueError: p outside [0, 1]; no running statistics with p < 1.

    Source: Kou, You, Long, Wang, "Stochastic Normalization", NeurIPS 2020, algorithm 1.

    >>> norm = StochNorm2d(2)
    >>> x = torch.tensor([[[[1.0]], [[1.0]]], [[[3.0]], [[3.0]]]])  # two samples, mean 2 and deviation 1 in both channels
    >>> norm(x, mask=torch.tensor([True, False]))[:, :, 0, 0].detach().round(decimals=3)
    tensor([[-1.,  1.],
            [ 1.,  3.]])
    """


class StochNorm3d(StochNorm, nn.BatchNorm3d):
    """Stochastic normalisation of (n, num_features, depth, height, width); arguments as `StochNorm2d`."""


def probability(p: float) -> float:
    """`p` as a float in [0, 1].

    Raises:
        TypeError: no number.
        ValueError: outside [0, 1], or NaN.
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p must be a number in [0, 1], got {p!r}")
    p = float(p)
    if math.isnan(p) or not 0 <= p <= 1:
        raise ValueError(f"p is the probability of batch statistics and must lie in [0, 1], got {p}")
    return p


def _plain(input: torch.Tensor) -> bool:
    """A tensor torch's batch norm kernels take as it is."""
    return type(input) in (torch.Tensor, nn.Parameter) and input.device.type in ("cpu", "cuda")


def _mapped(input: torch.Tensor) -> bool:
    """Whether vmap is at work on it, be it below a gradient."""
    if torch.compiler.is_compiling():
        return False
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(input):
        if functorch.is_batchedtensor(input):
            return True
        input = functorch.get_unwrapped(input)
    return False
