"""Label noise in the Hugging Face Trainer; conventions as in `huggingface`.

The data collator is the wrong place, though the obvious one: the Trainer uses one collator for training *and* evaluation, so
that evaluation would be noisy too; worker processes (``dataloader_num_workers > 0``) repeat each other's flips, which
`LabelNoise` refuses; and batches are collated ahead of their use, so that a resumed run would go on with other flips. So
the noise goes in front of `Trainer.training_step`.
"""

from __future__ import annotations

import functools
from typing import Any

from decaycast.adapters.huggingface_base import Stateful, attachable, live
from decaycast.methods.label_noise.method import LabelNoise


class LabelNoiseCallback(Stateful):
    """Fresh label noise on every training batch's ``"labels"``; evaluation stays clean. Use ``.attach(trainer)``.

    Args:
        flip, num_classes, settings: of `LabelNoise`.
    """

    def __init__(self, flip: float, num_classes: int, **settings: Any) -> None:
        self.arguments = {"flip": flip, "num_classes": num_classes}
        self.noise = LabelNoise(flip, num_classes, **settings)

    def build(self, state: Any, optimizer: Any, scheduler: Any) -> LabelNoise:
        """The noise."""
        return self.noise

    def attach(self, trainer: Any) -> Any:
        """Add this callback to the Trainer, and the noise in front of its `training_step`; returns the Trainer.

        Raises:
            TypeError: no Trainer.
        """
        step = attachable(trainer, self)

        @functools.wraps(step)
        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            noise = live(trainer, self).noise
            return step(model, noise.on_batch(trainer.state.global_step, inputs), *args, **kwargs)

        trainer.training_step = training_step
        return trainer
