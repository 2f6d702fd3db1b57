"""L2-SP: weight decay towards the starting point, for fine-tuning from pre-trained weights.

Conventions. The penalty is (lambda/2)*||w - w0||^2 on pre-trained parameters and (lambda/2)*||w||^2 on new ones, with lambda
the optimiser's own ``weight_decay``: nothing is added to it, it is only recentred from zero to w0. So lambda keeps its
units, and r = `decaycast.effective_rate` keeps its meaning, with the distance w - w0 in place of w: where there is no
gradient the distance shrinks by r per step, and after E e-folds exp(-E) of it is left.

How it is done. Coupled decay (SGD) adds lambda*w to the gradient, so -lambda*w0 is added to it before the step, and it goes
through momentum, dampening and Nesterov as lambda*w does. Decoupled decay (AdamW) takes r*w off, so r*w0 is put back
after the step. In exact arithmetic both are the same as running the optimiser on w - w0.

Source: Li, Grandvalet, Davoine, "Explicit inductive bias for transfer learning with convolutional networks", ICML 2018,
arXiv 1802.01483 (the penalty); decoupled form and rates derived here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from decaycast.core.decay import check_keys
from decaycast.core.timescale import effective_rate, group_convention

_RECENTRED: weakref.WeakSet[torch.optim.Optimizer] = (
    weakref.WeakSet()
)  # a second pull on top of the first would overshoot


class L2SP:
    """Recentre an optimiser's weight decay on the weights it has now: they are pulled back to where they started.

    Build it once the pre-trained weights are in place, and train as before; `optimizer.step` does the rest. Learning rate and
    weight decay are read at every step, so schedules of either work (`WeightDecayScheduler`, `AutoL2`), and a group whose
    weight decay is 0 is left alone. A parameter without gradient is skipped, as torch skips it. The weights after a step are
    those of torch's own update with (lambda/2)*||w - w0||^2 as penalty; ``.grad`` is after the step what it was before.

    The paper's two coefficients are two groups: the backbone's weight decay pulls to w0, the new head's, in `free`, to zero.

    * Memory: one copy of every parameter not in `free`; SGD also takes one gradient's worth during a step.
    * A parameter that joins by `optimizer.add_param_group` is held to the value that it has when first seen: at the next step,
      or at a call of `distance` or `state_dict`. For a new head this is not wanted; then build a new `L2SP`.
    * Closures work, and so does `torch.amp.GradScaler`, with fused optimisers too.
    * Other step hooks: those registered later see, before an SGD step, gradients with the pull to w0 in them; those registered
      earlier see, after an AdamW step, weights without it.
    * A distance d with r*d below half the spacing of the weight's numbers is not shrunk further, as in any decay: it matters in
      bfloat16, hardly in float32.
    * A copy of the optimiser, by deepcopy or pickle, has no hooks in torch, so its decay goes to zero: wrap the copy anew.

    Args:
        optimizer: torch optimiser in which weight decay has a fixed shrink rate (SGD, AdamW, Muon, ...), with at least one
            group that decays.
        free: parameters that keep decaying to zero, e.g. ``model.head.parameters()``.

    Raises:
        TypeError: not a torch optimiser; `free` is not made of tensors.
        ValueError: nothing decays, or only what is free; a free parameter is not the optimiser's; weight decay coupled into
            an adaptive step (Adam) or of unknown meaning; an optimiser that is recentred already.

    Source: Li, Grandvalet, Davoine 2018, arXiv 1802.01483.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    >>> decay = L2SP(optimizer)
    >>> _ = weight.data.add_(torch.tensor([0.0, 1.0]))
    >>> round(decay.distance(), 6)
    0.2
    >>> weight.grad = torch.zeros(2)
    >>> optimizer.step()
    >>> round(decay.distance(), 6)  # times 1 - 0.1*0.5
    0.19
    """

    def __init__(self, optimizer: torch.optim.Optimizer, free: Iterable[torch.Tensor] | torch.Tensor = ()) -> None:
        self._free = _checked_free(optimizer, free)
        _check_decay(optimizer, self._free)
        self.optimizer = optimizer
        self._start: dict[torch.Tensor, torch.Tensor] = {}
        self._lent: list[
            tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        ] = []  # parameter, its gradient, ours in its place
        self._see_new()
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        _RECENTRED.add(optimizer)

    @torch.no_grad()
    def distance(self) -> float:
        """How far the weights are from their start: ||w - w0|| / ||w0|| over all parameters that are not free.

        Those of groups without weight decay count as well. Infinite where w0 is zero and w is not. It waits for the device:
        ask when logging, not at each step.
        """
        self._see_new()
        moved = math.hypot(*(_norm(weight - self._start_of(weight)) for weight in self._held()))
        size = math.hypot(*(_norm(self._start_of(weight)) for weight in self._held()))
        return moved / size if size else (math.inf if moved else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """w0 of each of the optimiser's parameters in their order, None for a free one; a state for `load_state_dict`."""
        self._see_new()
        return {"start": [self._start.get(weight) for weight in _weights(self.optimizer)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take w0 from a saved state: a resumed run is pulled to where the first one started.

        Raises:
            ValueError: the state does not belong here (keys, number, shapes, which are free); nothing is changed then.
        """
        check_keys(state, ("start",), type(self).__name__)
        weights, saved = list(_weights(self.optimizer)), state["start"]
        if len(saved) != len(weights):
            raise ValueError(
                f"the state holds {len(saved)} parameters but the optimizer has {len(weights)}; "
                "build the optimizer with the same parameters as when the state was saved"
            )
        for index, (weight, start) in enumerate(zip(weights, saved, strict=True)):
            if (start is None) != (weight in self._free):
                raise ValueError(
                    f"parameter {index} is {'free' if start is None else 'held'} in the state but not here; "
                    "build L2SP with the same free parameters as when the state was saved"
                )
            if start is not None and start.shape != weight.shape:
                raise ValueError(
                    f"parameter {index} has shape {tuple(weight.shape)} but shape {tuple(start.shape)} in the state; "
                    "load the state of the same model"
                )
        pairs = [(weight, start) for weight, start in zip(weights, saved, strict=True) if start is not None]
        self._start = {weight: start.detach().to(weight, copy=True) for weight, start in pairs}

    def remove(self) -> None:
        """Take the hooks off: from now on the optimiser decays to zero again. Removing twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._return_gradients()
        _RECENTRED.discard(self.optimizer)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._see_new()
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimiser
            return (args[0], self._wrapped(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._wrapped(kwargs["closure"])}
        self._lend_gradients()
        return None

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the pull in the gradients that it leaves behind."""

        def with_pull() -> Any:
            self._return_gradients()  # a second call of one step, which may add to the gradients
            loss = closure()
            self._lend_gradients()
            return loss

        return with_pull

    @torch.no_grad()
    def _lend_gradients(self) -> None:
        """Coupled groups: put grad - lambda*w0 in the place of the gradient, until `_return_gradients`."""
        self._return_gradients()  # of a step that broke off
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused step divides the gradients by it itself
        for group, weights in self._pulled("sgd"):
            # with maximize, torch turns the gradient's sign before it adds lambda*w
            rate = _scalar(group["weight_decay"]) * (1.0 if group.get("maximize") else -1.0)
            grads = [weight.grad for weight in weights if weight.grad is not None]
            pulls = self._times_start(weights, rate if scale is None else rate * _scalar(scale))
            torch._foreach_add_(pulls, grads)  # pyright: ignore[reportPrivateImportUsage]
            for weight, grad, pull in zip(weights, grads, pulls, strict=True):
                weight.grad = pull
                self._lent.append((weight, grad, pull))

    def _return_gradients(self) -> None:
        for weight, grad, ours in self._lent:
            if weight.grad is ours:
                weight.grad = grad
        self._lent = []

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._return_gradients()
        found_inf = getattr(self.optimizer, "found_inf", None)  # a fused step after an overflow changes nothing
        for group, weights in self._pulled("decoupled"):
            rate = _scalar(group["lr"]) * _scalar(group["weight_decay"])
            if found_inf is not None:
                rate = rate * (_scalar(found_inf) == 0)
            pulls = self._times_start(weights, rate)
            torch._foreach_add_(weights, pulls)  # pyright: ignore[reportPrivateImportUsage]

    def _pulled(self, convention: str) -> Iterator[tuple[dict[str, Any], list[torch.Tensor]]]:
        """Groups that decay by this convention, with those of their parameters that the step moves and w0 holds."""
        for group in self.optimizer.param_groups:
            decay = group.get("weight_decay", 0.0)
            # asking a tensor whether it is zero would wait for the device
            if (isinstance(decay, torch.Tensor) or decay != 0) and group_convention(
                self.optimizer, group
            ) == convention:
                weights = [weight for weight in group["params"] if weight.grad is not None and weight in self._start]
                if weights:
                    yield group, weights

    def _times_start(self, weights: list[torch.Tensor], rate: float | torch.Tensor) -> list[torch.Tensor]:
        return list(torch._foreach_mul([self._start_of(weight) for weight in weights], rate))  # type: ignore[arg-type]

    def _start_of(self, weight: torch.Tensor) -> torch.Tensor:
        start = self._start[weight]
        if start.device != weight.device or start.dtype != weight.dtype:  # the model was moved since
            start = self._start[weight] = start.to(weight)
        return start

    def _held(self) -> Iterator[torch.Tensor]:
        return (weight for weight in _weights(self.optimizer) if weight not in self._free)

    def _see_new(self) -> None:
        for weight in self._held():
            if weight not in self._start:
                self._start[weight] = weight.detach().clone()


def _weights(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])


def _checked_free(optimizer: torch.optim.Optimizer, free: Iterable[torch.Tensor] | torch.Tensor) -> set[torch.Tensor]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"L2SP needs a torch optimizer, got {type(optimizer).__name__}")
    if isinstance(free, torch.nn.Module):
        raise TypeError(f"free takes parameters, got the module {type(free).__name__}; give its .parameters()")
    members = [free] if isinstance(free, torch.Tensor) else list(free)
    known = set(_weights(optimizer))
    for index, weight in enumerate(members):
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"free takes parameters, got {type(weight).__name__} at position {index}")
        if weight not in known:
            raise ValueError(
                f"the free parameter at position {index}, of shape {tuple(weight.shape)}, is not in the optimizer; "
                "build the optimizer over the model's present parameters, the new head's included"
            )
    return set(members)


def _check_decay(optimizer: torch.optim.Optimizer, free: set[torch.Tensor]) -> None:
    if optimizer in _RECENTRED:
        raise ValueError("this optimizer's weight decay is recentred already; call remove() of the first L2SP")
    effective_rate(optimizer)  # refuses an optimiser in which weight decay has no rate
    decaying = [group for group in optimizer.param_groups if float(group.get("weight_decay", 0.0)) != 0]
    if not decaying:
        raise ValueError(
            f"no parameter group of this {type(optimizer).__name__} has a weight decay, and L2SP only recentres the one that "
            "is there; set weight_decay first"
        )
    if all(weight in free for group in decaying for weight in group["params"]):
        raise ValueError(
            "every parameter that decays is free, so there is nothing to recentre; leave the pre-trained ones out of free"
        )


def _scalar(value: Any) -> Any:
    """A tensor of one element without dimensions, which takes part without changing dtypes; a number as it is."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _norm(tensor: torch.Tensor) -> float:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=wide).item()
