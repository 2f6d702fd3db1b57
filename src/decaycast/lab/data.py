"""Real data sets as tensors: read from files, checked, split.

`digits` comes with scikit-learn. The others are read from a folder (argument or ``DECAYCAST_DATA``) in their published
layouts, and downloaded through scikit-learn's OpenML client when they are not there and the machine is online (but for
`flowers89` and texts, which have to be there). Splits are fixed by `split_seed`, never by the training seed: two runs that
differ in their seed see the same data.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as functional

from decaycast.core.names import choose
from decaycast.lab import image_files, text
from decaycast.lab.image_files import Arrays, DataError

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "flowers89", *text.FILES)
ENVIRONMENT = "DECAYCAST_DATA"
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion_mnist": ("fashion-mnist", "FashionMNIST/raw"),
    "cifar10": ("cifar-10-batches-bin",),
    "flowers89": ("flowers89",),
}
_PROBES = {"cifar10": "test_batch.bin", "flowers89": image_files.FLOWERS_FILE}
"""The file that shows that a folder holds the data set; for those not named here, the test labels in IDX format."""
_OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR_10"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training, validation and test samples: float32 images of shape (n, channels, height, width), int64 labels (n,).

    Images are standardised by the training part's mean and standard deviation per channel. A text has windows of character
    numbers instead, int64 of shape (n, context), and as labels the next characters, of the same shape.
    """

    name: str
    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train[0].shape[1:])


@lru_cache(maxsize=8)
def load(
    name: str,
    *,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    pool: int = 1,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
) -> Split:
    """Read a data set and split it. The tensors are kept and handed out again: read them, do not write into them.

    Args:
        name: one of `NAMES`.
        train_size: samples to train on; None leaves what validation does not need.
        validation_size: samples held out of the training file; None for min(2,000, a fifth of what is left or so), of a
            text for all windows of its validation part.
        test_size: samples of the test file; None for all.
        pool: average-pool images by this factor (2 turns 32x32 into 16x16); 1 for a text.
        split_seed: chooses which samples; not the training seed.
        data_dir: folder of the files; default the environment variable ``DECAYCAST_DATA``.

    Raises:
        DataError: missing or damaged files, or sizes the data set does not have.
        ValueError: unknown name.
    """
    choose(name, NAMES, "data set")
    if name in text.FILES:
        return _load_text(name, train_size, validation_size, test_size, pool, split_seed, data_dir)
    (images, labels), (test_images, test_labels) = _read(name, data_dir)
    order = np.random.default_rng(split_seed).permutation(len(images))
    train_size, validation_size = _sizes(name, len(images), train_size, validation_size)
    chosen, held_out = order[:train_size], order[len(order) - validation_size :]
    test_count = len(test_images) if test_size is None else min(test_size, len(test_images))
    train_images = _to_tensor(images[chosen], pool)
    dims = (0, 2, 3)
    mean, std = train_images.mean(dims, keepdim=True), train_images.std(dims, keepdim=True).clamp_min(1e-6)

    def part(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return (_to_tensor(x, pool) - mean) / std, torch.from_numpy(y.astype(np.int64))

    return Split(
        name=name,
        train=part(images[chosen], labels[chosen]),
        validation=part(images[held_out], labels[held_out]),
        test=part(test_images[:test_count], test_labels[:test_count]),
        classes=int(max(labels.max(), test_labels.max())) + 1,
    )


def _load_text(
    name: str,
    train_size: int | None,
    validation_size: int | None,
    test_size: int | None,
    pool: int,
    split_seed: int,
    data_dir: str | Path | None,
) -> Split:
    """A text: each part is cut from its own stretch, and `split_seed` chooses among its windows."""
    if pool != 1:
        raise DataError(f"{name} is text, which cannot be pooled; leave pool at 1, got {pool}")
    codes, alphabet = _read_text(name, data_dir)
    wanted = {"train": train_size, "validation": validation_size, "test": test_size}
    parts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for part, size in wanted.items():
        inputs, target = text.windows(codes, part)
        size = len(inputs) if size is None else min(size, len(inputs)) if part == "test" else size
        if not 1 <= size <= len(inputs):
            raise DataError(f"{name} has {len(inputs)} {part} windows, but {size} were asked for; lower {part}_size")
        chosen = np.random.default_rng(split_seed).permutation(len(inputs))[:size]
        parts[part] = torch.from_numpy(inputs[chosen]), torch.from_numpy(target[chosen])
    return Split(name=name, classes=len(alphabet), **parts)


def batches(
    inputs: torch.Tensor,
    target: torch.Tensor,
    batch_size: int,
    seed: int,
    *,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
):
    """Endless shuffled mini-batches, each epoch in a fresh order; an incomplete last batch is skipped.

    A batch size of at least the number of samples gives full-batch training. `skip` leaves out that many batches at the
    beginning. Of `share` = (rank, ranks) the rank gets its part of each batch, all parts equally large.

    Raises:
        DataError: no samples, or a batch that the ranks cannot share equally.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(inputs)
    if count == 0:
        raise DataError("there are no training samples; ask for at least one")
    part = _part(min(batch_size, count), *share)
    if batch_size >= count:
        whole = (inputs, target) if share[1] == 1 else (inputs[part], target[part])
        while True:
            yield whole
    epochs, skip = divmod(skip, count // batch_size)
    for _ in range(epochs):
        torch.randperm(count, generator=generator)
    while True:
        order = torch.randperm(count, generator=generator).to(inputs.device)
        for start in range(skip * batch_size, count - batch_size + 1, batch_size):
            index = order[start : start + batch_size][part]
            yield inputs[index], target[index]
        skip = 0


def _part(size: int, rank: int, ranks: int) -> slice:
    if size % ranks:
        raise DataError(
            f"{ranks} ranks cannot share a batch of {size} samples equally; choose a batch size that {ranks} divides (a batch "
            "of all samples: such a train_size)"
        )
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a data set can be read here, and if not, what to do."""

    name: str
    status: Literal["embedded", "present", "missing"]
    where: str
    advice: str


def availability(data_dir: str | Path | None = None) -> list[Availability]:
    """What is there, what is missing, and how to get it; reads no data."""
    found = []
    for name in NAMES:
        if name == "digits":
            there = importlib.util.find_spec("sklearn") is not None
            status, where = ("embedded", "scikit-learn") if there else ("missing", "scikit-learn")
            advice = "" if there else "pip install 'decaycast[lab]'"
        else:
            folder = _find_folder(name, data_dir)
            status, where = ("present", str(folder)) if folder else ("missing", "")
            advice = "" if folder else _advice(name, data_dir)
        found.append(Availability(name=name, status=status, where=where, advice=advice))  # type: ignore[arg-type]
    return found


def _sizes(name: str, available: int, train_size: int | None, validation_size: int | None) -> tuple[int, int]:
    for what, value in (("train_size", train_size), ("validation_size", validation_size)):
        if value is not None and value < 1:
            raise DataError(f"{what} must be at least 1, got {value}")
    if validation_size is None:
        spare = available - (train_size or 0)
        validation_size = min(2000, max(1, spare if train_size else spare // 4))
    if train_size is None:
        train_size = available - validation_size
    if train_size < 1 or train_size + validation_size > available:
        raise DataError(
            f"{name} has {available} samples to train and validate on, but {train_size} + {validation_size} were asked "
            "for; lower train_size or validation_size"
        )
    return train_size, validation_size


@lru_cache(maxsize=1)
def _read_text(name: str, data_dir: str | Path | None) -> tuple[np.ndarray, str]:
    path = text.find(name, _roots(data_dir))
    if path is None:
        raise DataError(f"{name} was not found: {_advice(name, data_dir)}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); fetch it again") from error
    if len(content) < 100 * text.CONTEXT:
        raise DataError(f"{path} holds {len(content)} characters, too few for windows of {text.CONTEXT}: truncated?")
    return text.encode(content)


def _to_tensor(images: np.ndarray, pool: int) -> torch.Tensor:
    tensor = torch.from_numpy(images.astype(np.float32) / 255.0)
    return functional.avg_pool2d(tensor, pool) if pool > 1 else tensor


@lru_cache(maxsize=2)
def _read(name: str, data_dir: str | Path | None) -> tuple[Arrays, Arrays]:
    """uint8 images (n, channels, height, width) and labels: (train, test)."""
    if name == "digits":
        return image_files.digits()
    folder = _find_folder(name, data_dir)
    if folder is None:
        return _download(name, data_dir)
    if name == "flowers89":
        return image_files.flowers(folder / image_files.FLOWERS_FILE)
    if name == "cifar10":
        return image_files.cifar(folder)
    return image_files.idx_pair(folder, "train"), image_files.idx_pair(folder, "test")


def _roots(data_dir: str | Path | None) -> list[Path]:
    if data_dir is not None:
        return [Path(data_dir)]
    return [Path(os.environ[ENVIRONMENT])] if os.environ.get(ENVIRONMENT) else []


def _find_folder(name: str, data_dir: str | Path | None) -> Path | None:
    if name in text.FILES:
        file = text.find(name, _roots(data_dir))
        return file.parent if file else None
    for root in _roots(data_dir):
        probe = _PROBES.get(name, image_files.IDX_FILES["test"][1])
        for folder in _FOLDERS[name]:
            if (root / folder / probe).is_file() or (root / folder / f"{probe}.gz").is_file():
                return root / folder
    return None


def _packed_folders(data_dir: str | Path | None) -> list[Path]:
    return [root for root in _roots(data_dir) if (root / "prepare.py").is_file()]


def _advice(name: str, data_dir: str | Path | None) -> str:
    roots = ", ".join(str(root) for root in _roots(data_dir)) or f"no folder given (--data-dir or {ENVIRONMENT})"
    if name in text.FILES:
        return f"looked in {roots}; put the text into <data folder>/{text.FILES[name][0]}"
    layout = _FOLDERS[name][0]
    if name == "flowers89":
        return (
            f"looked in {roots}; put {image_files.FLOWERS_FILE} into <data folder>/{layout}/: it cannot be downloaded"
        )
    packed = _packed_folders(data_dir)
    if name == "cifar10" and packed:
        return (
            f"looked in {roots}: the images are there in packed form; unpack them once with "
            f"'python {packed[0] / 'prepare.py'} OUT' and give OUT as the data folder"
        )
    return f"looked in {roots}; put the published files into <data folder>/{layout}/, or go online for a download"


def _download(name: str, data_dir: str | Path | None) -> tuple[Arrays, Arrays]:
    if name not in _OPENML or (name == "cifar10" and _packed_folders(data_dir)):
        raise DataError(f"{name} was not found: {_advice(name, data_dir)}")
    try:
        from sklearn.datasets import fetch_openml

        fetched: Any = fetch_openml(_OPENML[name], version=1, as_frame=False, parser="liac-arff")
    except ImportError as error:
        raise DataError(f"{name} was not found: {_advice(name, data_dir)} (pip install 'decaycast[lab]')") from error
    except OSError as error:
        raise DataError(
            f"{name} was not found and could not be downloaded ({error}); {_advice(name, data_dir)}"
        ) from error
    channels, side = (3, 32) if name == "cifar10" else (1, 28)
    images = fetched.data.astype(np.uint8).reshape(-1, channels, side, side)
    labels = fetched.target.astype(np.int64)
    cut = len(images) - 10_000
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
