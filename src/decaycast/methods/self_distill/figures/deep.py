"""One distillation of a small network on images with flipped labels, and what the diagnostic said of it.

A run is one seed and one share of flipped labels: each such training label is replaced by another class, all others alike. The
network is trained by plain SGD with momentum on the squared distance to one-hot labels (as in the paper's main text, and as
kernels do), `rounds` times, each time from new weights, by `decaycast.methods.self_distill.distill.distill`. Test images keep
their true labels, and choose nothing.

The prediction comes from the tangent kernel of the network at the teacher's start, with the training labels as they are, in two
ways: "matched", with the ridge whose training error is the teacher's (measured once the teacher is trained), and "tuned", with
the ridge that leave-one-out likes best (before any training). Errors left out count against flipped labels. With a share q of
flips among C classes, an accuracy of a on true labels is one of a(1 - q) + (1 - a)q/(C - 1) on those, so that a change there is
divided by 1 - qC/(C - 1) to be comparable with one on test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decaycast.core.experiment import Row, Run
from decaycast.core.seeds import number
from decaycast.methods.self_distill.diagnostic import Prospect, does_it_help, network_kernel
from decaycast.methods.self_distill.distill import distill

ANSWERS = {"yes": 1.0, "cannot tell": 0.0, "no": -1.0}
PREDICTIONS = ("matched", "tuned")
_AT_ONCE = 1000  # images in one evaluation


def train_rounds(self: object, run: Run, data: Any) -> Row:
    """Distil as `run` says, and predict it; `train` of both figures on images.

    Returns:
        A row with one entry per round: accuracies on training labels as given and as they were, on test images, and the mean
        squared training error over images and classes; for both predictions the change of test accuracy since the teacher,
        with the ends of its interval. In `final` the answers (1 yes, 0 cannot tell, -1 no) and ridges.
    """
    config: dict[str, Any] = dict(run.config)
    device = _device(str(config.get("device", "cpu")))
    (inputs, labels), (test_inputs, test_labels) = (_on(device, part) for part in (data.train, data.test))
    noisy = flipped(labels, config["flips"], data.classes, run.seed)
    one_hot = nn.functional.one_hot(noisy, data.classes).to(inputs)

    def measure(predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        outputs, seen = predict(inputs), predict(test_inputs)
        return {
            "train_accuracy": _accuracy(outputs, noisy),
            "clean_accuracy": _accuracy(outputs, labels),
            "test_accuracy": _accuracy(seen, test_labels),
            "train_error": float(((outputs - one_hot) ** 2).mean()),
        }

    def fit(x: Tensor, targets: Tensor, round: int) -> Callable[[Tensor], Tensor]:
        return _trained(config, x, targets, _seed_of(run.seed, round))

    done = distill(fit, inputs, one_hot, config["rounds"], measure=measure)
    curve: dict[str, list[float]] = {"round": [float(t) for t in range(config["rounds"])]}
    curve |= {name: [each[name] for each in done.measured] for name in done.measured[0]}
    start = network(inputs.shape[1:], data.classes, config["channels"], _seed_of(run.seed, 0)).to(device)
    kernel = network_kernel(start, inputs)
    final = {"test_accuracy": curve["test_accuracy"][-1]}
    for name in PREDICTIONS:
        teacher = curve["train_error"][0] if name == "matched" else None
        found = does_it_help(kernel, noisy.cpu(), rounds=config["rounds"], tolerance=teacher)
        curve |= _predicted(name, found, config["flips"], data.classes)
        final |= {f"{name}_answer": ANSWERS[found.answer], f"{name}_ridge": found.shift}
        final[f"{name}_accuracy"] = _on_true_labels(1.0 - found.errors[0], config["flips"], data.classes)
    return Row(run=run, curve=curve, final=final)


def flipped(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Labels of which each is replaced, with probability `share`, by one of the other classes.

    >>> flipped(torch.zeros(3, dtype=torch.int64), 0.0, 10, 0)
    tensor([0, 0, 0])
    >>> bool((flipped(torch.zeros(99, dtype=torch.int64), 1.0, 10, 0) > 0).all())
    True
    """
    draws = np.random.default_rng([seed, 1])
    hit = torch.from_numpy(draws.random(len(labels)) < share).to(labels.device)
    moved = torch.from_numpy(draws.integers(1, classes, len(labels))).to(labels)
    return torch.where(hit, (labels + moved) % classes, labels)


def network(shape: Sequence[int], classes: int, channels: int, seed: int) -> nn.Sequential:
    """Two 3x3 convolutions of stride 2, 64 hidden units, one output per class; weights from `seed` alone, as torch starts them.

    >>> sum(p.numel() for p in network((1, 14, 14), 10, 8, 0).parameters())
    18346
    """
    height, width = (-(-side // 4) for side in shape[1:])
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from its own generator
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(shape[0], channels, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * height * width, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )


def _trained(config: Mapping[str, Any], inputs: Tensor, targets: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    model = network(inputs.shape[1:], targets.shape[1], config["channels"], seed).to(inputs.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=config["momentum"])
    order = torch.Generator().manual_seed(seed)
    for _ in range(config["epochs"]):
        for index in torch.randperm(len(inputs), generator=order).to(inputs.device).split(config["batch_size"]):
            optimizer.zero_grad()
            loss = ((model(inputs[index]) - targets[index]) ** 2).sum(1).mean()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return torch.cat([model(part) for part in x.split(_AT_ONCE)])

    return predict


def _predicted(name: str, found: Prospect, share: float, classes: int) -> dict[str, list[float]]:
    """Changes of accuracy on true labels: an error that falls is a gain, so the ends change places."""
    scale = 1.0 - share * classes / (classes - 1)
    sides = {"": found.changes, "_low": found.high, "_high": found.low}
    return {f"{name}{side}": [-value / scale for value in values] for side, values in sides.items()}


def _on_true_labels(accuracy: float, share: float, classes: int) -> float:
    """Accuracy on true labels that gives this one on flipped ones (head of this file)."""
    other = share / (classes - 1)
    return (accuracy - other) / (1.0 - share - other)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


def _seed_of(seed: int, round: int) -> int:
    return 1000 * seed + round


def _on(device: torch.device, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return part[0].to(device), part[1].to(device)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this size of the figure trains on a GPU, which torch does not find here; take --size small")
    return torch.device(name)


# rows


def by_flips(rows: Iterable[Row]) -> dict[float, dict[int, Row]]:
    """Finished rows by share of flips, rising, and in each by seed."""
    found: dict[float, dict[int, Row]] = {}
    for row in rows:
        if row.status == "done":
            found.setdefault(number(row, "flips"), {})[row.run.seed] = row
    return {share: dict(sorted(found[share].items())) for share in sorted(found)}


def column(of_seed: Mapping[int, Row], name: str) -> np.ndarray:
    """One column of every seed, shape (seeds, rounds)."""
    return np.array([row.curve[name] for row in of_seed.values()], dtype=float)
