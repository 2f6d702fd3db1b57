"""AutoL2 in the Hugging Face Trainer; conventions as in `huggingface`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decaycast.adapters import loss_as_error
from decaycast.adapters.huggingface_base import Stateful, attachable, bare, live
from decaycast.adapters.schedules import rates_ahead
from decaycast.methods.l2.autol2 import AutoL2, AutoL2Hook


def wrong_share(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong predictions of a classifier: logits (n, classes), labels (n,).

    Raises:
        ValueError: other shapes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not classify whole samples; "
            "give AutoL2Callback error=a function of (logits, labels), or error=None to let the loss alone decide"
        )
    return (logits.argmax(1) != labels).double().mean()


class AutoL2Callback(Stateful):
    """`AutoL2`, fed with the Trainer's loss, averaged over micro-batches (by `AutoL2` over ranks). Use ``.attach(trainer)``.

    Args:
        error: (logits, labels) -> share of wrong predictions in [0, 1]; None: the loss alone decides, through an error that
            rises and falls with it.
        settings: of `AutoL2`. With ``clock="efolds"``, `steps` and `lr` are by default those of the Trainer and its scheduler.

    Raises:
        TypeError, ValueError: a wrong setting (at once); an optimiser that AutoL2 refuses (when training begins).
    """

    def __init__(self, error: Callable[[Tensor, Tensor], Tensor] | None = wrong_share, **settings: Any) -> None:
        # on a stand-in, so that wrong settings show at once
        AutoL2Hook(**settings | ({"steps": 1, "lr": 1.0} if settings.get("clock") == "efolds" else {}))
        self.error, self.settings, self.arguments = error, settings, settings
        self.micro: list[Tensor] = []
        self.attached, self.before = False, {}

    def build(self, state: Any, optimizer: Any, scheduler: Any) -> AutoL2:
        """AutoL2 over the Trainer's optimiser, with the length and rates of this training where its clock needs them."""
        self.micro = []
        if self.settings.get("clock") != "efolds":
            return AutoL2(bare(optimizer), **self.settings)
        steps, groups = self.settings.get("steps") or state.max_steps, optimizer.param_groups
        ahead = rates_ahead(bare(optimizer), getattr(scheduler, "scheduler", scheduler), steps)
        decays = [(float(group["weight_decay"]), float(group["lr"])) for group in groups]
        rates = None if ahead is None else ahead[:, decays.index(max(decays))]
        if state.global_step:
            rates = 1.0  # the restored state brings its own horizon
        settings: dict[str, Any] = {"lr": rates} | self.settings | {"steps": steps}
        return AutoL2(bare(optimizer), **settings)

    def take(self, loss: Tensor, pieces: int, seen: tuple[Any, Any]) -> None:
        """Note loss (divided by the number of micro-batches, as the Trainer does) and error of a micro-batch."""
        self.attached = True
        if self.held.due:
            loss = loss.detach().double() * pieces
            error = loss_as_error(loss) if self.error is None else self.error(*seen)
            self.micro.append(torch.stack([loss, torch.as_tensor(error).to(loss)]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the weight decay of the update about to be made."""
        if not self.attached:
            raise RuntimeError(
                "AutoL2Callback does not see the loss: use AutoL2Callback(...).attach(trainer), not callbacks=[...]"
            )
        means: Any = [None, None]
        if self.held.due:
            means = torch.stack(self.micro).mean(0).tolist()
        self.before, self.micro = self.held.state_dict(), []
        self.held.step(*means)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the update back if the scaler skipped it."""
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.held.load_state_dict(self.before)

    def attach(self, trainer: Any) -> Any:
        """Add this callback to the Trainer, and go around its `training_step` and `compute_loss`; returns the Trainer.

        Raises:
            TypeError: no Trainer.
        """
        step, compute, seen = attachable(trainer, self), trainer.compute_loss, [(None, None)]

        @functools.wraps(compute)
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            now = live(trainer, self)
            if not model.training or now.error is None or now.held is None or not now.held.due:
                return compute(model, inputs, return_outputs=return_outputs, **kwargs)
            labels = inputs.get("labels")
            loss, outputs = compute(model, inputs, return_outputs=True, **kwargs)
            seen[0] = (outputs["logits"].detach(), labels)
            return (loss, outputs) if return_outputs else loss

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            live(trainer, self).take(loss, trainer.current_gradient_accumulation_steps, seen[0])
            return loss

        trainer.compute_loss, trainer.training_step = compute_loss, training_step
        return trainer
