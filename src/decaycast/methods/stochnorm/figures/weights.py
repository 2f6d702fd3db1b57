"""Pre-trained weights for the paper's size: a ResNet-50 by timm, its state read from a file that the user names.

The file holds a plain state dict with torchvision's and timm's names (both have the same for ResNet-50): `torch.save` of it, or
safetensors. Nothing in it is executed. Its head is left out: the new classes get a new one.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

ENVIRONMENT = "DECAYCAST_WEIGHTS"
HEAD = "fc."
_COUNTER = "num_batches_tracked"  # older files have none, and fine-tuning does not use it


def resnet50(classes: int, *, pretrained: bool, seed: int) -> nn.Module:
    """ResNet-50 by timm with a new head `fc` for `classes`, its backbone from the file named by ``DECAYCAST_WEIGHTS``.

    Without `pretrained` all of it is new, as timm starts it. What is new comes from `seed`; torch's own random numbers go on as
    if nothing had been drawn.

    Raises:
        ImportError: timm is not installed.
        ValueError: the variable is not set, the file is missing or unreadable, or holds another network.
    """
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the paper's size of this figure needs a ResNet-50 from timm: pip install timm") from error
    path = weights_path() if pretrained else None
    with torch.random.fork_rng(devices=[]):  # timm draws from torch's own generator
        torch.manual_seed(seed)
        model = timm.create_model("resnet50", num_classes=classes)
    if path is not None:
        load_backbone(model, read_weights(path), path)
    return model


def weights_path() -> Path:
    """The file that the environment variable ``DECAYCAST_WEIGHTS`` names.

    Raises:
        ValueError: it is not set, or there is no such file.
    """
    named = os.environ.get(ENVIRONMENT)
    if not named:
        raise ValueError(
            f"pre-trained weights are needed: set {ENVIRONMENT} to a file with the state dict of a ResNet-50 (.pth or "
            ".safetensors, for example timm's resnet50 for ImageNet)"
        )
    if not Path(named).is_file():
        raise ValueError(f"{ENVIRONMENT} names {named}, which is no file; correct the path")
    return Path(named)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file: safetensors by its suffix, else as `torch.save` writes it, read without running code.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is damaged, or holds more than tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(f"reading {path.name} needs safetensors: pip install safetensors") from error
        read: Any = load_file
    else:
        read = _load
    try:
        state = read(path)
    except pickle.UnpicklingError as error:  # torch's own message advises to read it with code
        raise ValueError(
            f"{path} is damaged, or holds objects that would run code; fetch it again, or save a model's state_dict() alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as weights ({error}); fetch it again") from error
    except Exception as error:  # safetensors has an exception class of its own
        if type(error).__module__.partition(".")[0] != "safetensors":
            raise
        raise ValueError(f"{path} cannot be read as safetensors ({error}); fetch it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        inside = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path} holds no state dict but {inside:.200}; save the model's state_dict() alone")
    return dict(state)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_backbone(model: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load everything but the head `fc` into `model`, in place, and insist that all of it fits.

    Raises:
        ValueError: entries are missing, unknown or of another shape; the message names the first of them. The model is
            unchanged then.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(HEAD)}
    given = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    needed = {name for name in own if not name.endswith(_COUNTER)}
    wrong = {
        "missing": sorted(needed - set(given)),
        "unknown": sorted(set(given) - set(own)),
        "of another shape": sorted(name for name in set(own) & set(given) if own[name].shape != given[name].shape),
    }
    words = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names]
    if words:
        raise ValueError(
            f"{path} does not fit this network: {'; '.join(words)}; give the weights of the same architecture"
        )
    model.load_state_dict(given, strict=False)
