"""What all arms of a comparison share: the samples, split once, and the model, built anew for every training.

A model is a name of `decaycast.lab.models`, a factory named ``package.module:function``, or a callable. Factories are called with
torch's generator seeded, and with ``seed=`` where they have such an argument. Runs name a model of one's own by what it is (its
layers, first weights and forwards), so that a changed model is never taken for the one that a store has rows of.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from decaycast.lab import data, models
from decaycast.lab.data import Split
from decaycast.lab.image_files import DataError

Model = str | Callable[..., nn.Module]
PARTS = ("train", "validation", "test")
SHARES = (0.6, 0.2)  # of the samples of one's own: to train and to validate on; the rest is test data
_LEAST_SAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """Samples and model, as every process that trains gets them."""

    model: Model
    data: str
    """A data set's name, or what samples of one's own are called in runs."""
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = field(default=None, repr=False)
    """Samples of one's own by part; numpy, because tensors travel between processes through shared memory that may be scarce."""
    classes: int = 0
    train_size: int | None = None
    data_dir: str | None = None
    device: str = "cpu"

    def split(self) -> Split:
        """The samples.

        Raises:
            DataError: a data set that is missing, or too small for `train_size`.
            ValueError: an unknown data set.
        """
        if self.arrays is None:
            return data.load(self.data, train_size=self.train_size, data_dir=self.data_dir)
        parts: dict[str, Any] = {part: tuple(torch.from_numpy(array) for array in self.arrays[part]) for part in PARTS}
        return Split(name=self.data, classes=self.classes, **parts)

    def network(self, split: Split, seed: int) -> nn.Module:
        """A new model, its first weights drawn from `seed`.

        Raises:
            ValueError: an unknown name, or one that does not fit the samples.
            TypeError: a factory that makes no module.
        """
        if isinstance(self.model, str) and ":" not in self.model:
            return models.build(self.model, split.shape, split.classes, seed=seed)
        factory = factory_of(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: Any = factory(seed=seed) if _takes_seed(factory) else factory()
        if not isinstance(made, nn.Module):
            raise TypeError(f"{_name(self.model)} must make a torch.nn.Module, it made {type(made).__name__}")
        return made

    def described(self, split: Split, seed: int) -> str:
        """The model's name in runs; raises where it does not fit the samples (`check_model`)."""
        model = self.network(split, seed)
        check_model(model, split)
        if isinstance(self.model, str) and ":" not in self.model:
            return self.model
        if self.network(split, seed) is model:
            raise ValueError(
                f"{_name(self.model)} returns the same model each time, which would go on from the weights of the arm before; "
                "let it make a new one at each call"
            )
        return f"{_name(self.model)}#{_fingerprint(self.network(split, seed))}"

    def check_travels(self) -> None:
        """Refuse a model that other processes cannot be given."""
        try:
            pickle.dumps(self.model)
        except Exception as error:  # whatever a callable's own pickling raises
            raise TypeError(
                f"{_name(self.model)} cannot be given to other processes; name it as 'package.module:function', or train in "
                "this one (workers 1, execute=in_process)"
            ) from error


def task(
    model: Model,
    samples: Any,
    *,
    train_size: int | None = None,
    data_dir: str | None = None,
    device: str = "cpu",
    standardise: bool = False,
) -> Task:
    """The task that `compare` was given; arguments as there.

    With `standardise` images of one's own get mean 0 and standard deviation 1 per channel, by the training part alone.

    Raises:
        TypeError: a model that is neither a name nor a function that makes one; samples of an unknown kind.
        ValueError, DataError: samples that no arm could be trained on.
    """
    if isinstance(model, nn.Module) or not (isinstance(model, str) or callable(model)):
        got = f"a {type(model).__name__}"
        raise TypeError(
            f"make_model must be a function that makes a new model for every training, or its name, got {got}; write "
            "lambda: MyModel()"
        )
    own: dict[str, Any] = {"model": model, "data_dir": data_dir, "device": device}
    if isinstance(samples, str):
        return Task(data=samples, train_size=train_size, **own)
    arrays = _arrays(samples, train_size)
    if standardise:
        arrays = _standardised(arrays)
    classes = samples.classes if isinstance(samples, Split) else 1 + max(int(y.max()) for _, y in arrays.values())
    if classes < 2:
        raise ValueError("all labels are 0, so there is nothing to tell apart; y needs at least two classes")
    return Task(data=f"own samples #{_digest(arrays)}", arrays=arrays, classes=classes, **own)


def factory_of(model: Model) -> Callable[..., Any]:
    """The function that makes the model.

    Raises:
        ValueError: a name that leads to no function.
    """
    if not isinstance(model, str):
        return model
    module_name, _, path = model.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot find the model {model!r} ({error}); name a function that makes it as package.module:function, in a "
            "package that can be imported from here"
        ) from error
    if isinstance(found, nn.Module) or not callable(found):
        raise ValueError(f"{model!r} is a {type(found).__name__}; name a function that makes a new model")
    return found


@torch.no_grad()
def check_model(model: nn.Module, split: Split) -> None:
    """Refuse a model whose outputs on two samples are no scores for the classes of their labels."""
    inputs, target = (part[:2] for part in split.train)
    was_training = model.training
    try:
        output = model.eval()(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the model does not take these samples, of shape {split.shape} and {inputs.dtype} ({error}); give one that does"
        ) from error
    finally:
        model.train(was_training)
    wanted = (len(target), split.classes, *target.shape[1:])
    if not isinstance(output, torch.Tensor) or output.shape[:1] + output.shape[2:] != target.shape:
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"the model must return scores of shape {wanted} for {len(target)} samples, got {got}")
    if output.shape[1] < split.classes:
        raise ValueError(f"the model has {output.shape[1]} outputs for {split.classes} classes; give it one per class")


def _arrays(samples: Any, train_size: int | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if isinstance(samples, Split):
        found = {part: _checked(*getattr(samples, part)) for part in PARTS}
        cut = found["train"][1].shape[0] if train_size is None else train_size
        return {**found, "train": _first(found["train"], cut)}
    if not isinstance(samples, (tuple, list)) or len(samples) != 2:
        raise TypeError(
            f"data must be a data set's name, a pair (X, y) or a decaycast.lab.data.Split, got {type(samples).__name__}"
        )
    inputs, labels = _checked(*samples)
    order = np.random.default_rng(0).permutation(len(labels))  # the split is no matter of the training seed
    ends = [0, *(round(sum(SHARES[: i + 1]) * len(labels)) for i in range(2)), len(labels)]
    index = {part: order[ends[i] : ends[i + 1]] for i, part in enumerate(PARTS)}
    found = {part: (inputs[at], labels[at]) for part, at in index.items()}
    return {**found, "train": _first(found["train"], len(index["train"]) if train_size is None else train_size)}


def _first(part: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    if not 1 <= count <= len(part[1]):
        raise DataError(f"there are {len(part[1])} samples to train on, but {count} were asked for; change train_size")
    return part[0][:count], part[1][:count]


def _checked(inputs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Samples as arrays: floats in 32 bits, whole numbers in 64."""
    x, y = (
        each.detach().cpu().numpy() if isinstance(each, torch.Tensor) else np.asarray(each) for each in (inputs, labels)
    )
    if x.dtype.kind not in "iuf" or y.dtype.kind not in "iu":
        raise ValueError(
            f"X must hold numbers and y class numbers, got {x.dtype} and {y.dtype}; a comparison is for classification, with "
            "classes numbered from 0"
        )
    if len(x) != len(y):
        raise ValueError(f"X has {len(x)} samples and y has {len(y)} labels; give one label to each sample")
    if len(y) < _LEAST_SAMPLES:
        raise ValueError(f"{len(y)} samples are too few to train, validate and test on; give at least {_LEAST_SAMPLES}")
    if y.min() < 0:
        raise ValueError(f"y must number the classes from 0, got {int(y.min())}")
    if not np.isfinite(x).all():
        raise ValueError("X holds values that are not finite; remove or replace them")
    return np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int64), np.ascontiguousarray(y, np.int64)


def _standardised(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train = arrays["train"][0]
    if train.dtype.kind != "f":
        return dict(arrays)  # tokens
    axes = (0, *range(2, train.ndim))
    mean, std = train.mean(axes, keepdims=True), np.maximum(train.std(axes, keepdims=True), 1e-6)
    return {part: ((x - mean) / std, y) for part, (x, y) in arrays.items()}


def _digest(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    found = hashlib.sha256()
    for part in PARTS:
        for array in arrays[part]:
            found.update(f"{part} {array.shape} {array.dtype}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:12]


def _fingerprint(model: nn.Module) -> str:
    """Of the layers, the first weights, and the source of forwards that are not torch's."""
    found = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
        try:
            found.update(inspect.getsource(kind.forward).encode())
        except (OSError, TypeError):  # typed into a shell: no source to read
            found.update(kind.forward.__code__.co_code)
    return found.hexdigest()[:12]


def _takes_seed(factory: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables have none
        return False


def _name(model: Model) -> str:
    if isinstance(model, str):
        return model
    return f"{getattr(model, '__module__', '')}:{getattr(model, '__qualname__', type(model).__name__)}".lstrip(":")
