"""The networks that fine-tuning starts from: pre-trained here on a part of the classes, or read from a file.

Pre-training happens once per process and configuration, in one thread, so that every process on a machine starts from the
same weights to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from decaycast.core.schedule import cosine
from decaycast.core.train import train
from decaycast.methods.stochnorm.figures.images import Part, generator_for, of_classes, shuffled
from decaycast.methods.stochnorm.figures.network import new_head, resnet
from decaycast.methods.stochnorm.figures.weights import resnet50

BATCH_SIZE = 128
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Training from nothing on the first classes of a data set: SGD, Nesterov momentum 0.9, cosine learning rate."""

    data: str
    train_size: int | None
    pool: int
    network: str
    classes: int
    steps: int
    lr: float
    flip: bool
    shift: int
    images: Part = field(compare=False, repr=False)  # all of the training part; what is above says which it is


@lru_cache(maxsize=2)
def pretrained(task: Pretraining) -> nn.Module:
    """The network after pre-training, in evaluation mode. It is kept and handed out again: copy it, do not train it."""
    source = of_classes(task.images, 0, task.classes)
    model = resnet(task.network, source[0].shape[1], task.classes, generator_for("pre-training: weights", 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    order = generator_for("pre-training: order", 0)
    batches = shuffled(source, BATCH_SIZE, order, flip=task.flip, shift=task.shift)
    with _one_thread():
        train(model, batches, functional.cross_entropy, optimizer, stop=task.steps, lr_schedule=cosine(task.steps))
    return model.eval()


def starting_network(config: Mapping[str, Any], images: Part, classes: int, seed: int) -> nn.Module:
    """The network a run starts from: pre-trained, or new for the arm "scratch"; its head `fc` for `classes` new from `seed`.

    Args:
        config: of the run, `decaycast.methods.stochnorm.figures.runs`.
        images: the whole training part, with the classes to pre-train on first.
        classes: to fine-tune on.
        seed: of the head (and of the whole network, from scratch).
    """
    head = generator_for("head", seed)
    if config["network"] == "resnet50":
        model = resnet50(classes, pretrained=config["arm"] != "scratch", seed=seed)
    elif config["arm"] == "scratch":
        model = resnet(config["network"], images[0].shape[1], classes, generator_for("weights", seed))
    else:
        model = copy.deepcopy(pretrained(_task(config, images)))
        model.fc = nn.Linear(model.fc.in_features, classes)  # type: ignore[union-attr]
    new_head(model.fc, head)  # type: ignore[arg-type]
    return model


def _task(config: Mapping[str, Any], images: Part) -> Pretraining:
    return Pretraining(
        **{name: config[name] for name in ("data", "train_size", "pool", "network", "flip", "shift")},
        classes=config["source_classes"],
        steps=config["pretrain_steps"],
        lr=config["pretrain_lr"],
        images=images,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    # sums over threads are added in an order of their own, and the last bits with it
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
