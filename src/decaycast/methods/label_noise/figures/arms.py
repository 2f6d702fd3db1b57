"""One training of the escape figures: the start, the arm's loss and noise, and what is measured on the way.

Arms, all on the same images from the same start: "label noise" (fresh flips in every batch), "smoothing" (the loss that those
flips have on average, no sampling), "clean" (cross-entropy of the true labels), "sam" (sharpness-aware minimisation of the
smoothed loss, by pytorch_optimizer). Batches are drawn with replacement; arms of one seed see the same images in the same order.

The accuracy is that on validation and test images together, which were seen by none of the trainings. The trace is that of
the Gauss-Newton matrix over the training images, at the network's own softmax: where "clean" sends its outputs to certainty
it vanishes, so it tells of flatness only between the other arms.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.experiment import Row, Run
from decaycast.core.measure import evaluate
from decaycast.core.train import train
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures.networks import trace
from decaycast.methods.label_noise.figures.starts import Part, sampled, starting_network
from decaycast.methods.label_noise.flips import smoothed_loss
from decaycast.methods.label_noise.method import LabelNoise

NOISE, SMOOTHING, CLEAN, SAM = ARMS = ("label noise", "smoothing", "clean", "sam")
LATE = 2 / 3  # of the run: from there on traces are averaged, since a single one fluctuates
EVALUATED_AT_ONCE = 1000
REPEAT = 1000  # between the random numbers of a seed's repetitions


def train_arm(self: object, run: Run, data: Any) -> Row:
    """Train as `run` says; `train` of the escape figures.

    Returns:
        A row with, over the steps from 0 on: drift time, held-out accuracy, trace, and the smoothed loss on all training images.
        In `final` the last accuracy, that of the start, and the mean trace over the last third of the run.
    """
    config: dict[str, Any] = dict(run.config)
    device = _device(str(config.get("device", "cpu")))
    images = _on(device, data.train)
    held_out = _on(device, _joined(data.validation, data.test))
    model = starting_network(config, images, data.classes, run.seed)
    curve: dict[str, list[float]] = {name: [] for name in ("step", "drift", "accuracy", "trace", "loss")}
    steps, optimizer = [0, *_measured_at(config)], make_optimizer(model, config)
    luck = run.seed + REPEAT * int(config.get("repeat", 0))  # of batches and flips; the start is the seed's own
    batches = sampled(images, config["batch_size"], torch.Generator().manual_seed(luck + 1))
    noise = _noise(config, data.classes, luck, device)
    for before, now in zip([0, *steps], steps, strict=False):
        if now > before:
            advance(model, optimizer, batches, noise, config, before, now)
        measured = _measured(model, images, held_out, config)
        for name, value in {"step": float(now), "drift": _drift(config, now), **measured}.items():
            curve[name].append(value)
    late = [value for step, value in zip(curve["step"], curve["trace"], strict=True) if step > LATE * steps[-1]]
    final = {"accuracy": curve["accuracy"][-1], "start_accuracy": curve["accuracy"][0], "trace": float(np.mean(late))}
    final |= {"start_trace": curve["trace"][0], "loss": curve["loss"][-1], "drift": curve["drift"][-1]}
    return Row(run=run, curve=curve, final=final)


def make_optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD, for the arm "sam" inside pytorch_optimizer's SAM.

    Raises:
        ImportError: pytorch_optimizer is not installed.
    """
    settings = {"lr": config["lr"], "momentum": config.get("momentum", 0.0)}
    if config["arm"] != SAM:
        return torch.optim.SGD(model.parameters(), **settings)
    try:
        library = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise ImportError(
            "this figure compares with SAM from another library: pip install --no-deps pytorch_optimizer"
        ) from error
    return library.SAM(model.parameters(), torch.optim.SGD, rho=config["rho"], **settings)


def advance(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    noise: LabelNoise | None,
    config: dict[str, Any],
    start: int,
    stop: int,
) -> None:
    """Make the optimiser steps `start`, ..., `stop` - 1 of one arm, in place."""
    hooks = [] if noise is None else [noise]
    if config["arm"] != SAM:
        sampled_loss = config["arm"] in (NOISE, CLEAN)
        loss = functional.cross_entropy if sampled_loss else _smoothed(config)
        train(model, batches, loss, optimizer, start=start, stop=stop, hooks=hooks)
        return
    loss = _smoothed(config)
    for _ in range(start, stop):
        inputs, target = next(batches)
        closure: Any = partial(_backward, model, optimizer, loss, inputs, target)
        closure()
        optimizer.step(closure)


def _backward(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, inputs: Tensor, target: Tensor) -> Tensor:
    optimizer.zero_grad()
    value = loss(model(inputs), target)
    value.backward()
    return value


def _noise(config: dict[str, Any], classes: int, luck: int, device: torch.device) -> LabelNoise | None:
    if config["arm"] != NOISE:
        return None
    return LabelNoise(config["flip"], classes, torch.Generator(device).manual_seed(luck + 2))


def _smoothed(config: dict[str, Any]) -> Any:
    return partial(smoothed_loss, flip=config["flip"])


def _measured(model: nn.Module, images: Part, held_out: Part, config: dict[str, Any]) -> dict[str, float]:
    loss, known = _smoothed(config), []
    for part in (held_out, images):
        pairs = zip(part[0].split(EVALUATED_AT_ONCE), part[1].split(EVALUATED_AT_ONCE), strict=True)
        known.append(evaluate(model, pairs, loss))
    found = trace(model, images[0], loss)
    if not math.isfinite(known[1][0] + found):
        raise FloatingPointError(f"the loss is {known[1][0]} and the trace {found}; lower the learning rate")
    return {"accuracy": known[0][1], "trace": found, "loss": known[1][0]}


def _drift(config: dict[str, Any], steps: int) -> float:
    """Drift time that label noise has, or would have in the other arms."""
    if not steps:
        return 0.0
    settings = {"lr": config["lr"], "batch_size": config["batch_size"], "momentum": config.get("momentum", 0.0)}
    return theory.drift_time(steps=steps, noise_variance=1.0, **settings)


def _measured_at(config: dict[str, Any]) -> list[int]:
    points = config["points"]
    return sorted({round(config["steps"] * (i + 1) / points) for i in range(points)} - {0})


def _joined(first: Part, second: Part) -> Part:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _on(device: torch.device, part: Part) -> Part:
    return part[0].to(device), part[1].to(device)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this size of the figure trains on a GPU, which torch does not find here; take --size small")
    return torch.device(name)
