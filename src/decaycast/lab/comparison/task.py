"""What all arms of a comparison share: the samples, split once, and the model, built anew for every training.

A model is a name of `decaycast.lab.models`, a factory named ``package.module:function``, or a callable. Factories are called with
torch's generator seeded, and with ``seed=`` where they have such an argument. What they return is copied: weights or layers that
it shares with the next model (a network trained before, say) are then not those that an arm has changed. Runs name a model of
one's own by what it is (its layers with their plain attributes, its classes and its weights of seed 0), so that a changed model
is not taken for the one that a store has rows of, and the same one is known again whatever the seeds.
"""

from __future__ import annotations

import copy
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
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

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
            ValueError: an unknown name, or one that does not fit the samples; a factory that fails, or makes no module.
        """
        if isinstance(self.model, str) and ":" not in self.model:
            return models.build(self.model, split.shape, split.classes, seed=seed)
        factory = factory_of(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                made: Any = factory(seed=seed) if _takes_seed(factory) else factory()
            except Exception as error:  # whatever a factory's own code raises
                raise ValueError(
                    f"{_name(self.model)} failed to make a model ({type(error).__name__}: {error}); it is called without "
                    "arguments, or with seed= where it has one"
                ) from error
        if not isinstance(made, nn.Module):
            raise ValueError(f"{_name(self.model)} must make a torch.nn.Module, it made {type(made).__name__}")
        try:
            return copy.deepcopy(made)
        except Exception as error:  # whatever a module's own copying raises
            raise ValueError(
                f"the model of {_name(self.model)} cannot be copied ({type(error).__name__}: {error}), which keeps one arm's "
                "changes from the next; let copy.deepcopy work on it"
            ) from error

    def described(self, split: Split) -> str:
        """The model's name in runs.

        Raises:
            ValueError: it does not fit the samples (`check_model`), or is not made anew and alike for equal seeds.
        """
        check_model(self.network(split, 0), split)
        if isinstance(self.model, str) and ":" not in self.model:
            return self.model
        model, other = self.network(split, 0), self.network(split, 0)
        if _weights(model) != _weights(other):
            raise ValueError(
                f"{_name(self.model)} makes other weights at each call with the same seed, so that arms would not start alike; "
                "draw them by torch's generator, or give the function an argument seed"
            )
        return f"{_name(self.model)}#{_fingerprint(model, other)}"

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
    labels = arrays["train"][1]
    if labels.min() == labels.max():
        raise ValueError(
            f"all labels to train on are {labels.min()}, so there is nothing to tell apart; y needs at least two classes"
        )
    return Task(data=f"own samples #{_digest(arrays, classes)}", arrays=arrays, classes=classes, **own)


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
    except Exception as error:  # whatever a module's own code raises
        raise ValueError(
            f"importing {module_name!r} failed ({type(error).__name__}: {error}); mend it first"
        ) from error
    if isinstance(found, nn.Module) or not callable(found):
        raise ValueError(f"{model!r} is a {type(found).__name__}; name a function that makes a new model")
    return found


@torch.no_grad()
def check_model(model: nn.Module, split: Split) -> None:
    """Refuse a model that cannot be trained, or whose outputs on two samples are no scores for the classes of their labels."""
    lazy = (UninitializedParameter, UninitializedBuffer)
    if any(isinstance(value, lazy) for value in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "the model has lazy layers, whose weights are not there before a first batch; give them their sizes"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter to train; give one that has, with requires_grad")
    inputs, target = (part[:2] for part in split.train)
    was_training = model.training
    try:
        output = model.eval()(inputs)
    except Exception as error:  # whatever a forward of one's own raises
        raise ValueError(
            f"the model does not take these samples, of shape {split.shape} and {inputs.dtype} ({type(error).__name__}: "
            f"{error}); give one that does"
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
    if not x.ndim or not y.ndim:
        raise ValueError(f"X and y must hold one entry for each sample, got arrays of shape {x.shape} and {y.shape}")
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
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int64)
    if not np.isfinite(x).all():
        raise ValueError("X holds values that are not finite in 32 bits; remove, replace or rescale them")
    return x, np.ascontiguousarray(y, np.int64)


def _standardised(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train = arrays["train"][0]
    if train.dtype.kind != "f":
        return dict(arrays)  # tokens
    axes = (0, *range(2, train.ndim))
    mean, std = train.mean(axes, keepdims=True), np.maximum(train.std(axes, keepdims=True), 1e-6)
    return {part: ((x - mean) / std, y) for part, (x, y) in arrays.items()}


def _digest(arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], classes: int) -> str:
    found = hashlib.sha256(f"{classes} classes".encode())
    for part in PARTS:
        for array in arrays[part]:
            found.update(f"{part} {array.shape} {array.dtype}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:12]


def _weights(model: nn.Module) -> bytes:
    """A digest of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):  # a module may add a state of another kind
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()


def _fingerprint(model: nn.Module, other: nn.Module) -> str:
    """Of the layers, the first weights, the plain attributes that `other`, made alike, has too, and the source of classes."""
    found = hashlib.sha256(repr(model).encode() + _weights(model))
    found.update(repr(sorted(_attributes(model) & _attributes(other))).encode())
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind is not object and kind.__module__.partition(".")[0] != "torch":
            found.update(_source(kind))
    return found.hexdigest()[:12]


def _attributes(model: nn.Module) -> set[tuple[str, str, str]]:
    return {
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (str, int, float, type(None)))
    }


def _source(kind: type) -> bytes:
    try:
        return inspect.getsource(kind).encode()
    except (OSError, TypeError):  # typed into a shell: no source to read
        codes = (getattr(value, "__code__", None) for _, value in sorted(vars(kind).items(), key=lambda item: item[0]))
        return b" ".join(code.co_code + repr(code.co_names).encode() for code in codes if code is not None)


def _takes_seed(factory: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some callables have none
        return False


def _name(model: Model) -> str:
    if isinstance(model, str):
        return model
    return f"{getattr(model, '__module__', '')}:{getattr(model, '__qualname__', type(model).__name__)}".lstrip(":")
