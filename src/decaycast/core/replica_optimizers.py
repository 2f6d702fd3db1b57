"""torch's SGD and AdamW over stacked parameters, with a learning rate, weight decay and momentum per replica.

Conventions are torch's: SGD adds weight_decay*w to the gradient, AdamW multiplies w by 1 - lr*weight_decay first. Settings are
read from torch optimisers, one per replica, each with one parameter group, so that whatever drives a torch optimiser drives a
replica. The arithmetic is that of torch's own loops but for single roundings: torch's kernels fuse some products with the sum
that follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_FREE = ("params", "lr", "weight_decay", "initial_lr", "initial_weight_decay", "foreach", "fused", "capturable")
_REFUSED = ("amsgrad", "maximize", "differentiable")
Scales = Mapping[str, Tensor]


class StackedOptimizer(ABC):
    """What SGD and AdamW share; `stacked` makes the right one."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.group = groups[0]
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._scales: dict[str, Tensor] = {}
        self._scaled_for: Any = None
        self.decays = False

    @torch.no_grad()
    def step(
        self,
        parameters: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        lr: Sequence[float],
        weight_decay: Sequence[float],
    ) -> None:
        """One update in place.

        Args:
            parameters: name -> (K, ...).
            grads: name -> (K, ...), of all parameters or of some; may be overwritten.
            lr: learning rate of each replica.
            weight_decay: of each replica.
        """
        self._begin()
        for name, grad in grads.items():
            weight = parameters[name]
            self._rescale(lr, weight_decay, weight)
            shape = (-1,) + (1,) * (weight.ndim - 1)
            scales = {key: value.view(shape) for key, value in self._scales.items()}
            self._update(weight, grad, self._buffers.setdefault(name, {}), scales)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the replicas at `places` (0-based, in this order) only."""
        for buffers in self._buffers.values():
            for key, value in buffers.items():
                buffers[key] = value[list(places)]
        self._scaled_for = None

    def _rescale(self, lr: Sequence[float], weight_decay: Sequence[float], like: Tensor) -> None:
        """Numbers per replica as tensors, made anew only when one of them changed: they have to travel to the device."""
        wanted = (list(lr), list(weight_decay), like.dtype, like.device)
        if wanted != self._scaled_for:
            self._scaled_for, self.decays = wanted, any(weight_decay)
            numbers = self._numbers(wanted[0], wanted[1])
            packed = torch.tensor(list(numbers.values()), dtype=torch.float64).to(like.dtype)
            self._scales = dict(zip(numbers, packed.to(like.device, non_blocking=True).unbind(), strict=True))

    def _begin(self) -> None:  # noqa: B027  # only an optimiser that counts its steps has something to do
        """Called once per step."""

    @abstractmethod
    def _numbers(self, lr: list[float], weight_decay: list[float]) -> dict[str, list[float]]: ...

    @abstractmethod
    def _update(self, weight: Tensor, grad: Tensor, buffers: dict[str, Tensor], scales: Scales) -> None: ...


class StackedSGD(StackedOptimizer):
    """v <- momentum*v + (1 - dampening)*g with weight_decay*w in g, w <- w - lr*v; v starts as the first g.

    Nesterov takes g + momentum*v in place of v.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(groups)
        momenta = [float(group["momentum"]) for group in groups]
        self.momenta, self.has_momentum, self.equal = momenta, any(momenta), len(set(momenta)) == 1

    def keep(self, places: Sequence[int]) -> None:
        """As in the base class."""
        super().keep(places)
        # `equal` stays as it was: with another form of the same sum the rest would round differently
        self.momenta = [self.momenta[place] for place in places]

    def _numbers(self, lr: list[float], weight_decay: list[float]) -> dict[str, list[float]]:
        # torch ignores dampening where there is no momentum
        gain = [1 - self.group["dampening"] if momentum else 1.0 for momentum in self.momenta]
        return {"lr": lr, "weight_decay": weight_decay, "momentum": self.momenta, "gain": gain}

    def _update(self, weight: Tensor, grad: Tensor, buffers: dict[str, Tensor], scales: Scales) -> None:
        if self.decays:
            grad = grad.addcmul_(weight, scales["weight_decay"])
        if self.has_momentum:
            momentum = self.momenta[0] if self.equal else scales["momentum"]
            if "momentum" not in buffers:
                buffers["momentum"] = grad.clone()
            elif self.group["dampening"]:
                buffers["momentum"].mul_(momentum).addcmul_(grad, scales["gain"])
            else:
                buffers["momentum"].mul_(momentum).add_(grad)
            grad = grad.add(buffers["momentum"] * momentum) if self.group["nesterov"] else buffers["momentum"]
        weight.addcmul_(grad, scales["lr"], value=-1)


class StackedAdamW(StackedOptimizer):
    """Loshchilov & Hutter 2019, algorithm 2, as torch writes it: w <- (1 - lr*weight_decay)*w, then Adam's step."""

    count = 0

    def _begin(self) -> None:
        self.count += 1

    def _numbers(self, lr: list[float], weight_decay: list[float]) -> dict[str, list[float]]:
        kept = [1 - rate * decay for rate, decay in zip(lr, weight_decay, strict=True)]
        return {"lr": lr, "kept": kept}

    def _update(self, weight: Tensor, grad: Tensor, buffers: dict[str, Tensor], scales: Scales) -> None:
        beta1, beta2 = self.group["betas"]
        if not buffers:
            buffers.update(mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        if self.decays:
            weight.mul_(scales["kept"])
        mean = buffers["mean"].lerp_(grad, 1 - beta1)
        square = buffers["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = square.sqrt().div_((1 - beta2**self.count) ** 0.5).add_(self.group["eps"])
        weight.addcmul_(torch.div(mean, root, out=root), scales["lr"], value=-1 / (1 - beta1**self.count))


_KNOWN = {torch.optim.SGD: StackedSGD, torch.optim.AdamW: StackedAdamW}


def stacked(optimizers: Sequence[torch.optim.Optimizer]) -> StackedOptimizer:
    """The stacked optimiser for K torch optimisers, SGD or AdamW, that differ in lr, weight decay and (SGD) momentum.

    Raises:
        ValueError: another optimiser or several kinds; several parameter groups; other settings that differ; an option
            that changes the update (``amsgrad``, ``maximize``); an optimiser that has already stepped.
    """
    kinds = {type(optimizer) for optimizer in optimizers}
    if len(kinds) != 1 or not kinds <= set(_KNOWN):
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise ValueError(f"replicas are trained by torch's SGD or AdamW, one kind per batch, got {names}")
    groups = [_only_group(optimizer) for optimizer in optimizers]
    free = (*_FREE, "momentum") if kinds == {torch.optim.SGD} else _FREE
    for name in (name for name in groups[0] if name not in free):
        values = [group.get(name) for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name} has to be the same in all replicas of a batch, got {values}; split the batch")
        if name in _REFUSED and values[0]:
            raise ValueError(f"replicas do not know the option {name} of {type(optimizers[0]).__name__}; leave it out")
    return _KNOWN[type(optimizers[0])](groups)


def _only_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"a replica's optimizer must have one parameter group, got {len(optimizer.param_groups)}; train networks with "
            "several groups one by one"
        )
    if optimizer.state:
        raise ValueError("a replica's optimizer has already made steps; start from a fresh one")
    return optimizer.param_groups[0]
