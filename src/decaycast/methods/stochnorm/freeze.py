"""Frozen batch norm, layer by layer: the statistics of pre-training stay, whatever mode the model is in.

`model.train()` puts every layer into training mode, the frozen ones too, so that calling `eval()` on them once does not last.
Here a hook puts a frozen layer back into evaluation mode just before each of its calls. The hook is a function of this module,
so models with frozen layers can be copied and pickled, and the copies stay frozen.

With StochNorm this is the other end of the scale: p = 1 is batch norm, p = 0 normalises with the running statistics but goes
on moving them, and a frozen layer does not move them either.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy


class FrozenBatchNorm:
    """What `freeze_batch_norm` froze in one call, and the way back.

    Attributes:
        names: qualified name of each layer that was frozen; of one used in several places, the first.
    """

    def __init__(self, model: nn.Module, layers: dict[str, _BatchNorm], affine: bool) -> None:
        self.names = tuple(layers)
        self._model, self._layers = model, tuple(layers.values())
        self._affine = [
            (parameter, parameter.requires_grad) for layer in self._layers if affine for parameter in _own(layer)
        ]
        self._hooks = [layer.register_forward_pre_hook(stay_in_evaluation) for layer in self._layers]
        for layer in self._layers:
            layer.training = False
        for parameter, _ in self._affine:
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser would still use, and decay, a parameter that has one

    def remove(self) -> None:
        """Let the layers train again: in the model's mode, with gradients where they had them. Twice does nothing more."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers if self._hooks else ():
            layer.training = self._model.training
        for parameter, required in self._affine:
            parameter.requires_grad_(required)
        self._hooks, self._affine = [], []


def freeze_batch_norm(model: nn.Module, layers: str | Sequence[str] = "*", affine: bool = True) -> FrozenBatchNorm:
    """Keep batch norms in evaluation mode whatever `model.train()` does, and their affine parameters as they are.

    Frozen layers normalise with the running statistics they have now, and do not move them. Every subclass of torch's batch
    norm can be frozen: 1 to 3 dimensions, SyncBatchNorm, StochNorm, timm's norm-and-activation (its inner layers keep their
    mode).

    Args:
        model: changed in place.
        layers: a pattern, or several, for qualified names as in ``model.named_modules()``: ``"layer1.*"`` is all below layer1
            (* matches dots, too), ``"*"`` all batch norms. A layer used in several places is meant by any of its names.
        affine: whether gamma and beta are frozen as well; their gradients are dropped, so that no optimiser moves them.

    Returns:
        A handle with the `names` of the layers and `remove`. A copy of the model is frozen as well, but the handle is not its.

    Raises:
        TypeError: `model` is no module.
        ValueError: no batch norm in the model; a pattern that matches none; a layer that has no running statistics to freeze, or
            is frozen already. Nothing is changed then.

    Source: common practice in detection and fine-tuning; it has no paper of its own.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> frozen = freeze_batch_norm(model)
    >>> frozen.names
    ('1',)
    >>> _ = model.train()(torch.ones(4, 2))
    >>> model[1].training, model[1].num_batches_tracked.item()
    (False, 0)
    """
    chosen = _matching(_batch_norms(model), [layers] if isinstance(layers, str) else list(layers))
    bare = [name for name, layer in chosen.items() if layer.running_mean is None or is_lazy(layer.running_mean)]
    if bare:
        raise ValueError(
            f"no running statistics to freeze in {_listed(bare)}: built with track_running_stats=False, or lazy and without "
            "data so far; name the other layers in `layers`, or call a lazy model once"
        )
    twice = [name for name, layer in chosen.items() if is_frozen(layer)]
    if twice:
        raise ValueError(
            f"frozen already: {_listed(twice)}; call remove() of the handle that froze them, or name the others"
        )
    return FrozenBatchNorm(model, chosen, affine)


def stay_in_evaluation(module: nn.Module, args: Any) -> None:
    """The forward pre-hook of a frozen layer: evaluation mode for itself, not for what it may contain."""
    module.training = False


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze_batch_norm` keeps this layer in evaluation mode (also as a copy of a frozen one)."""
    return stay_in_evaluation in module._forward_pre_hooks.values()


def _own(layer: _BatchNorm) -> list[nn.Parameter]:
    return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]


def _batch_norms(model: nn.Module) -> dict[_BatchNorm, list[str]]:
    """Every batch norm once, with all its names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze_batch_norm needs a torch module, got {type(model).__name__}")
    found: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            found.setdefault(module, []).append(name)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no batch norm to freeze (layers of a class of their own, such as FrozenBatchNorm2d "
            "or LayerNorm, have no statistics that move)"
        )
    return found


def _matching(found: dict[_BatchNorm, list[str]], patterns: list[str]) -> dict[str, _BatchNorm]:
    known = [name for names in found.values() for name in names]
    meant: set[str] = set()
    for pattern in patterns:
        matches = {name for name in known if fnmatch.fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"{pattern!r} matches no batch norm; their names: {_listed(known)}")
        meant |= matches
    if not meant:
        raise ValueError('layers names no pattern; give at least one, "*" for all batch norms')
    return {names[0]: layer for layer, names in found.items() if meant.intersection(names)}


def _listed(names: list[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
