"""One fine-tuning: the pre-trained network, the arm's change to it, the paper's optimiser, and what is measured.

Recipe: SGD with Nesterov momentum 0.9, ten times the learning rate for the new head, both times 0.1 after two thirds of the
steps. Every arm of a seed has the same images, head, order and augmentation; only the arm itself differs. The accuracy is
that after the last step, on test images of the classes that are fine-tuned on; nothing is chosen on them.

Source: Kou, You, Long, Wang, "Stochastic Normalization", NeurIPS 2020, section 4, and the authors' published code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from decaycast.core.experiment import Row, Run
from decaycast.core.measure import COLUMNS, evaluate
from decaycast.core.schedule import step_decay
from decaycast.core.train import train
from decaycast.methods.stochnorm import theory
from decaycast.methods.stochnorm.figures.images import Part, generator_for, of_classes, share_of_each_class, shuffled
from decaycast.methods.stochnorm.figures.pretraining import starting_network
from decaycast.methods.stochnorm.freeze import freeze_batch_norm
from decaycast.methods.stochnorm.l2sp import L2SP
from decaycast.methods.stochnorm.method import StochNorm

MOMENTUM = 0.9
HEAD_FACTOR = 10.0  # of the head's learning rate, since it starts from nothing
DROP_AT, DROP = 6000 / 9050, 0.1  # of the learning rate, as the paper's code does after 6,000 of 9,050 steps
GAP_BATCHES = 4
EVALUATED_AT_ONCE = 250


def train_arm(self: object, run: Run, data: Any) -> Row:
    """Fine-tune as `run` says, on the target classes of `data`; `train` of the figures of this room.

    Returns:
        A row with a short curve on validation images, and in `final` accuracy and loss on the test images, and of a pre-trained
        network the gap between running and batch statistics at the start (`statistics_gap`).
    """
    config: dict[str, Any] = dict(run.config)
    first, device = config["source_classes"], _device(config.get("device", "cpu"))
    chosen = share_of_each_class(
        of_classes(data.train, first, data.classes),
        config["target_size"],
        config["fraction"],
        generator_for("subset", run.seed),
    )
    model = starting_network(config, data.train, data.classes - first, run.seed).to(device)
    final = {} if config["arm"] == "scratch" else statistics_gap(model, _gap_batches(config, chosen, run.seed, device))
    arrange(model, config, run.seed, device)
    optimizer = make_optimizer(model, config)
    validation, test = (of_classes(part, first, data.classes) for part in (data.validation, data.test))
    rows = train(
        model,
        _on(device, _batches(config, chosen, generator_for("order", run.seed))),
        functional.cross_entropy,
        optimizer,
        stop=config["steps"],
        lr_schedule=step_decay(config["steps"], (DROP_AT,), DROP),
        evaluate=lambda trained: _evaluated(trained, validation, device),
        measure_at=_measured_at(config["steps"], config["points"]),
    )
    loss, accuracy = _evaluated(model, test, device)
    final |= {"accuracy": accuracy, "loss": loss, "images": float(len(chosen[1]))}
    return Row(run=run, curve={name: [row[name] for row in rows] for name in COLUMNS}, final=final)


def arrange(model: nn.Module, config: dict[str, Any], seed: int, device: torch.device) -> None:
    """Change the layers of `model`, in place, as the run's arm wants it; most arms leave it as it is."""
    if config["arm"] == "frozen":
        freeze_batch_norm(model)
    elif config["arm"] == "stochnorm":
        masks = torch.Generator(device).manual_seed(generator_for("masks", seed).initial_seed())
        StochNorm.convert(model, p=config["p"], generator=masks, report=None)


def make_optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The paper's SGD; in the arm "l2-sp" all but the head decays towards the pre-trained weights, at that arm's strength.

    The network starts from scratch as a whole in the arm "scratch", so that its head gets no rate of its own there.
    """
    head = list(model.fc.parameters())  # type: ignore[union-attr]
    own = {id(parameter) for parameter in head}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own and parameter.requires_grad]
    anchored, lr = config["arm"] == "l2-sp", config["lr"]
    groups = [
        {"params": rest, "weight_decay": config["anchor" if anchored else "weight_decay"]},
        {"params": head, "lr": lr * (1.0 if config["arm"] == "scratch" else HEAD_FACTOR)},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=config["weight_decay"])
    if anchored:
        L2SP(optimizer, free=head)  # its hooks on the optimiser keep it alive
    return optimizer


@torch.no_grad()
def statistics_gap(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """How far batch statistics lie from the running ones, layer by layer, while the network runs in evaluation mode.

    With mu, v the mean and biased variance of a batch in one channel, and m, r the running ones:

    Returns:
        ``gap_mean``: mean over channels, layers and batches of |mu - m|/sqrt(r + eps); ``gap_variance``: of v/(r + eps).
    """
    shifts, ratios = [], []

    def look(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        mean, variance = theory.batch_statistics(inputs[0])
        running = layer.running_var + layer.eps  # type: ignore[operator]
        shifts.append((mean - layer.running_mean).abs() / running.sqrt())  # type: ignore[operator]
        ratios.append(variance / running)

    modes = [(module, module.training) for module in model.modules()]
    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, _BatchNorm)]
    model.eval()
    try:
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in modes:
            module.training = was_training
    return {name: float(torch.cat(found).mean()) for name, found in (("gap_mean", shifts), ("gap_variance", ratios))}


def _batches(config: dict[str, Any], chosen: Part, generator: torch.Generator) -> Iterable[Part]:
    return shuffled(chosen, config["batch_size"], generator, flip=config["flip"], shift=config["shift"])


def _gap_batches(config: dict[str, Any], chosen: Part, seed: int, device: torch.device) -> Iterable[torch.Tensor]:
    batches = _on(device, _batches(config, chosen, generator_for("gap", seed)))
    return (images for images, _ in itertools.islice(batches, GAP_BATCHES))


def _on(device: torch.device, batches: Iterable[Part]) -> Any:
    return ((images.to(device), labels.to(device)) for images, labels in batches)


def _evaluated(model: nn.Module, part: Part, device: torch.device) -> tuple[float, float]:
    pairs = zip(part[0].split(EVALUATED_AT_ONCE), part[1].split(EVALUATED_AT_ONCE), strict=True)
    return evaluate(model, _on(device, pairs), functional.cross_entropy)


def _measured_at(steps: int, points: int) -> list[int]:
    return sorted({math.ceil(steps * (i + 1) / points) for i in range(points)})


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this size of the figure trains on a GPU, which torch does not find here; take --size small")
    return torch.device(name)
