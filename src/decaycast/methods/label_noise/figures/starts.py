"""Where the escape figures start: from random weights, or from an adversarial minimum that fits every label and tests badly.

The adversarial start, after Liu, Papailiopoulos & Achlioptas: the network memorises random labels of several copies of the
images with a tenth of the pixels set to zero, is trained on the true labels until it fits them, and then goes down the
smoothed loss by gradient descent with momentum. What it learnt from noise stays in it.

A start is made once per process and seed, on data and weights that follow from seeds alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.schedule import step_decay
from decaycast.core.train import train
from decaycast.methods.label_noise.figures.networks import build
from decaycast.methods.label_noise.flips import smoothed_loss

Part = tuple[Tensor, Tensor]
SETTLE_MOMENTUM = 0.9
_AT_ONCE = 512  # batches whose places are drawn at a time


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """How a start is made; equal settings give equal starts. A batch size of 0 is the full batch."""

    data: str
    train_size: int | None
    network: str
    classes: int
    seed: int
    flip: float
    copies: int
    zeroed: float
    memorise_steps: int
    memorise_lr: float
    memorise_momentum: float
    memorise_batch: int
    relabel_steps: int
    relabel_lr: float
    settle_steps: int
    settle_lr: float
    full_batch: int
    images: Part = field(compare=False, repr=False)  # the training part; what is above says which it is


def starting_network(config: dict[str, Any], images: Part, classes: int, seed: int) -> nn.Module:
    """A network to train, from the start that `config` names, on the device of the images."""
    if config["start"] == "random":
        model = build(config["network"], images[0].shape[1:], classes, torch.Generator().manual_seed(seed))
        return model.to(images[0].device)
    names = [name for name in Adversarial.__dataclass_fields__ if name not in ("classes", "seed", "images")]
    shared = {name: config[name] for name in names}
    return copy.deepcopy(adversarial(Adversarial(**shared, classes=classes, seed=seed, images=images)))


@lru_cache(maxsize=8)
def adversarial(task: Adversarial) -> nn.Module:
    """The network at the bad minimum. It is kept and handed out again: copy it, do not train it."""
    generator = torch.Generator().manual_seed(task.seed)
    images, labels = task.images
    model = build(task.network, images.shape[1:], task.classes, generator).to(images.device)
    noisy = _corrupted(task, generator)
    memorising = _optimizer(model, task.memorise_lr, task.memorise_momentum)
    batches = sampled(noisy, task.memorise_batch, generator)
    drops = step_decay(task.memorise_steps, (0.7,), 0.1)
    train(model, batches, functional.cross_entropy, memorising, stop=task.memorise_steps, lr_schedule=drops)
    batches, relabelling = (
        sampled((images, labels), task.full_batch, generator),
        _optimizer(model, task.relabel_lr, 0.0),
    )
    train(model, batches, functional.cross_entropy, relabelling, stop=task.relabel_steps)
    settling, loss = _optimizer(model, task.settle_lr, SETTLE_MOMENTUM), partial(smoothed_loss, flip=task.flip)
    train(model, batches, loss, settling, stop=task.settle_steps)
    return model


def sampled(part: Part, batch_size: int, generator: torch.Generator) -> Iterator[Part]:
    """Endless batches drawn with replacement, as the paper's algorithms have them; 0 gives all samples each time."""
    images, labels = part
    while True:
        if not batch_size:
            yield part
            continue
        for index in torch.randint(len(labels), (_AT_ONCE, batch_size), generator=generator).to(labels.device):
            yield images[index], labels[index]


def _corrupted(task: Adversarial, generator: torch.Generator) -> Part:
    """Copies of the images with pixels set to zero (all channels alike) and labels that say nothing."""
    images, labels = task.images
    many = images.repeat(task.copies, 1, 1, 1)
    kept = torch.rand((len(many), 1, *many.shape[2:]), generator=generator) >= task.zeroed
    random = torch.randint(task.classes, (len(many),), generator=generator)
    return many * kept.to(many.device), random.to(labels.device)


def _optimizer(model: nn.Module, lr: float, momentum: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
