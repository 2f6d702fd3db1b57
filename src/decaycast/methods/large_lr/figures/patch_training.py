"""One training of the patch figures, with the paper's optimiser, and what is read from its row.

SGD with Nesterov momentum, no augmentation. On the way the clean accuracy is that on validation images; in `final` it is that
of the test images, read once. Nothing is chosen on either.

Source: Li, Wei & Ma, "Towards explaining the regularization effect of initial large learning rate in training neural networks",
NeurIPS 2019, section 5, and the authors' published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from decaycast.core.experiment import Row, Run
from decaycast.core.hook import Hook
from decaycast.core.measure import evaluate
from decaycast.core.seeds import common_seeds, number
from decaycast.methods.large_lr.figures.patch_networks import network
from decaycast.methods.large_lr.figures.patch_runs import LARGE, NOISE
from decaycast.methods.large_lr.insert import insert_activation_noise
from decaycast.methods.large_lr.noise import NoiseSchedule
from decaycast.methods.large_lr.patch import Shares, draw_patch
from decaycast.methods.large_lr.planted import Course, Part, Task, generator_for, train_planted

Found = dict[tuple[str, bool], dict[int, Row]]
"""Finished rows by arm and whether they had the patch, and by seed."""
_AT_ONCE = 500


def train_patch(self: object, run: Run, data: Any) -> Row:
    """Train as `run` says on `data`; `train` of the patch figures.

    Returns:
        A row with a curve of `planted.COLUMNS`, and in `final` patch-only and clean accuracy before annealing, patch-only
        accuracy at the end, and clean accuracy and loss at the end on test images.
    """
    config: dict[str, Any] = dict(run.config)
    device = _device(config.get("device", "cpu"))
    train, validation, test = (_placed(part, device) for part in (data.train, data.validation, data.test))
    patch = draw_patch(
        train[0],
        data.classes,
        generator=generator_for("patch", run.seed),
        size=config["patch_size"],
        separation=config["separation"],
        scale=config["scale"],
    )
    clean, alone = config["clean_share"], config["alone_share"]
    shares = Shares(clean=clean, alone=alone, both=1 - clean - alone)
    course = course_of(config)
    model = network(config["network"], data.shape[0], data.classes, generator_for("network", run.seed))
    model = model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=course.lr,
        momentum=config["momentum"],
        nesterov=True,
        weight_decay=config["weight_decay"],
    )
    curve = train_planted(
        model,
        optimizer,
        Task(train=train, held_out=validation, shortcut=patch, shares=shares),
        course,
        planted=config["patch"],
        seed=run.seed,
        hooks=_noise(model, config, course, run.seed, device),
    )
    before = course.measured_at().index(course.anneal_at)
    pairs = zip(test[0].split(_AT_ONCE), test[1].split(_AT_ONCE), strict=True)
    loss, accuracy = evaluate(model, pairs, functional.cross_entropy)
    final = {f"{name}_before": curve[f"{name}_accuracy"][before] for name in ("alone", "clean")}
    final |= {"alone": curve["alone_accuracy"][-1], "accuracy": accuracy, "loss": loss}
    return Row(run=run, curve=curve, final=final)


def course_of(config: Mapping[str, Any]) -> Course:
    """Rates and steps of a run; all arms end at the small rate, and only "large" starts above it."""
    return Course(
        lr=config["lr"] if config["arm"] == LARGE else config["small_lr"],
        small=config["small_lr"],
        steps=config["steps"],
        anneal_at=config["anneal_at"],
        batch_size=config["batch_size"],
        points=config["points"],
    )


def _noise(model: nn.Module, config: Mapping[str, Any], course: Course, seed: int, device: torch.device) -> list[Hook]:
    """In the arm "noise": noise in front of every activation, none from the step on at which the others anneal."""
    if config["arm"] != NOISE:
        return []
    generator = torch.Generator(device).manual_seed(generator_for("noise", seed).initial_seed())
    insert_activation_noise(model, config["noise"], generator=generator, report=None)
    return [NoiseSchedule(model, lambda step: 1.0 if step < course.anneal_at else 0.0)]


def _placed(part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images in the memory format that convolutions on a CPU are fastest in."""
    return part[0].to(device, memory_format=torch.channels_last), part[1].to(device)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this size of the figure trains on a GPU, which torch does not find here; take --size small")
    return torch.device(name)


# reading rows


def by_arm(rows: Iterable[Row]) -> Found:
    """Finished rows by arm and patch, and by seed, rising."""
    found: Found = {}
    for row in sorted(rows, key=lambda row: row.run.seed):
        if row.status == "done":
            found.setdefault((str(row.run.config["arm"]), bool(row.run.config["patch"])), {})[row.run.seed] = row
    return found


def finals(found: Found, arm: str, name: str, *, patch: bool = True) -> dict[int, float]:
    """One of the final numbers by seed; empty where there are no such rows."""
    return {seed: row.final[name] for seed, row in found.get((arm, patch), {}).items()}


def end_accuracy(row: Row) -> float:
    """Clean accuracy on test images after the last step."""
    return row.final["accuracy"]


def late_accuracy(row: Row) -> float:
    """Clean accuracy on validation images, mean over the measurements after annealing: less at the mercy of the last step."""
    pairs = zip(row.curve["step"], row.curve["clean_accuracy"], strict=True)
    late = [accuracy for step, accuracy in pairs if step > number(row, "anneal_at")]
    return sum(late) / len(late)


def spared(found: Found, arm: str, over: str, read: Callable[[Row], float] = end_accuracy) -> dict[int, float]:
    """Difference in differences by seed: what the patch takes from `over` minus what it takes from `arm`.

    (with - without) in `arm` minus (with - without) in `over`, for the seeds that have all four, each `read` from its row.
    Positive: the patch costs `arm` less.

    >>> four = {("large", True): 5.0, ("large", False): 6.0, ("small", True): 1.0, ("small", False): 4.0}
    >>> runs = [Run(config={"arm": arm, "patch": patch}) for arm, patch in four]
    >>> rows = [Row(run=run, final={"accuracy": value}) for run, value in zip(runs, four.values())]
    >>> spared(by_arm(rows), "large", "small")
    {0: 2.0}
    """
    cells = [found.get((each, patch), {}) for each in (arm, over) for patch in (True, False)]
    differences = {}
    for seed in common_seeds(cells):
        with_, without, other_with, other_without = (read(cell[seed]) for cell in cells)
        differences[seed] = with_ - without - (other_with - other_without)
    return differences
