"""Sharpness-aware minimisation (SAM) as a training hook: an outside yardstick for `decaycast.lab.compare`, none of our methods.

One step with radius rho: with the batch's gradient g at the weights w, climb to w + rho*g/||g||, take the gradient of the same
batch there, go back to w, and let the optimiser step with that gradient. So every step costs two gradients.

Conventions. The climb follows the data loss alone: weight decay stays the optimiser's matter, at w. One norm over all
parameters. Buffers (batch norm's running statistics) are those of the first pass.

Source: Foret, Kleiner, Mobahi & Neyshabur 2021, "Sharpness-aware minimization for efficiently improving generalization" (arXiv
2010.01412), eq. 2 and 3 with p = 2; rho = 0.05 is their default.
"""

from __future__ import annotations

from typing import Any

import torch

from decaycast.core.hook import Hook, StepContext
from decaycast.core.measure import Loss
from decaycast.core.schedule import check_multiplier

GRADIENTS_PER_STEP = 2
_SMALLEST_NORM = 1e-12  # a gradient of zero stays where it is, and does not divide by zero


class SharpnessAware(Hook):
    """Replaces each step's gradients by those at the climbed weights (head of this file); one hook per model.

    Args:
        model: the model that is trained, as the training loop calls it.
        loss_fn: the data loss, as the training loop has it.
        rho: radius of the climb in units of the weights, finite and >= 0; 0 is plain training at twice the price.

    Raises:
        ValueError: `rho` out of range.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> sam = SharpnessAware(model, lambda output, target: (output**2).mean() / 2, rho=0.5)
    >>> batch = sam.on_batch(0, (torch.ones(1, 1), torch.zeros(1, 1)))
    >>> (model(batch[0]) ** 2).mean().div(2).backward()
    >>> sam.climb(batch[1])
    >>> model.weight.item(), model.weight.grad.item()  # the gradient of w^2/2 at 2 + 0.5
    (2.0, 2.5)
    """

    def __init__(self, model: torch.nn.Module, loss_fn: Loss, rho: float = 0.05) -> None:
        self.model, self.loss_fn, self.rho = model, loss_fn, check_multiplier("rho", rho)
        self._inputs: Any = None

    def on_batch(self, step: int, batch: Any) -> Any:
        """Keep the inputs for the second gradient; the batch is passed on."""
        self._inputs = batch[0]
        return batch

    def on_step(self, step: int, context: StepContext) -> None:
        """Put the gradients at the climbed weights in place of those at the weights."""
        self.climb(context.target)

    def climb(self, target: torch.Tensor) -> None:
        """Go up along the gradients that the parameters have, take new ones, and come back."""
        climbing = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        weights = [parameter.detach().clone() for parameter in climbing]
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        gradients: list[torch.Tensor] = [parameter.grad for parameter in climbing]  # type: ignore[misc]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            scale = self.rho / norm.clamp_min(_SMALLEST_NORM)
            for parameter, gradient in zip(climbing, gradients, strict=True):
                parameter.add_(gradient * scale)
        for parameter in climbing:
            parameter.grad = None
        self.loss_fn(self.model(self._inputs), target).backward()
        with torch.no_grad():
            for parameter, weight in zip(climbing, weights, strict=True):
                parameter.copy_(weight)
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])
