"""Noise into whole models: in front of every activation, and out again, with a table of what was done and what was not.

Nothing of the model is replaced. An activation *module* gets an `ActivationNoise` as its child and a hook that calls it. A module
whose own forward calls an activation as a *function* is traced with `torch.fx`, its children as black boxes, and runs the traced
forward with noise in it while it trains; in evaluation it runs its own. Modules that a trace could get wrong are left alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from decaycast.methods.large_lr import traced
from decaycast.methods.large_lr.noise import ActivationNoise

Report = Callable[[str], object] | None

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Softplus,
)
_OTHERS = ("relu", "gelu", "silu", "swish", "mish")  # in the class's name: activations of other libraries
_CHILD = "activation_noise"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an activation is: the names of its module, what it is, how often, and why it was left alone ("" if it was not)."""

    names: tuple[str, ...]
    what: str
    count: int = 1
    reason: str = ""


def insert_activation_noise(
    model: nn.Module,
    std: float,
    per_element: bool = False,
    generator: torch.Generator | None = None,
    skip: str | Iterable[str] | None = (),
    report: Report = print,
) -> nn.Module:
    """Put `ActivationNoise` in front of every ReLU, GELU and their kin, in place, and return the model.

    Modules stay the objects they are, in the places they have; state_dict, parameters and evaluation are unchanged. An
    activation used in several places draws noise of its own at each call; in front of one that works in place noise does so too.
    Sigmoid and tanh, which are gates or outputs, get none. Where there is noise already, its `std`, `per_element` and
    `generator` are set anew. `remove_activation_noise` undoes it; `NoiseSchedule` moves the level of all noises.

    Activations called as functions (functional.relu, x.relu(), ...) are found by tracing the forward of the module that calls
    them, as in training mode. Left alone, and said so: modules in `skip`, forwards that cannot be traced, or that a trace
    would not repeat faithfully (optional arguments, random numbers, own attributes changed, checks of types, contexts),
    torch's own layers with a function inside (nn.TransformerEncoderLayer), TorchScript. A traced forward keeps the numbers,
    strings and flags that the module had as attributes, and raises if one changes. nn.DataParallel does not know it: use
    DistributedDataParallel.

    Args:
        model: any module.
        std: standard deviation, finite and >= 0, in units of the activations' input.
        per_element: noise of its own for every element, instead of one map shared by batch and channels.
        generator: where all noise is drawn from; None for torch's own.
        skip: names of modules, or patterns such as ``"head.*"``, to leave alone.
        report: receives the table as text; None for silence.

    Raises:
        TypeError: `model` is no module.
        ValueError: a bad `std`, a name in `skip` that matches no place, a model without an activation that can get noise.
            Nothing was changed.

    Source: Li, Wei & Ma 2019, section 5: before every ReLU of a WRN-16-10, 0.4, shared by batch and channels.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model = insert_activation_noise(model, 0.4)
    Activation noise, std = 0.4: 1 of 1 places
         1  ReLU  [1]
    >>> remove_activation_noise(model, report=None).state_dict().keys() == model.state_dict().keys()
    True
    """
    new = ActivationNoise(std, per_element, generator)
    found = _places(model)
    skipped = _skipped([place for _, place, _ in found], skip)
    places, work = [], []
    for module, place, trace in found:
        if skipped & set(place.names):
            place = Place(names=place.names, what=place.what, count=place.count, reason="in skip")
        places.append(place)
        if not place.reason:
            work.append((module, trace))
    if not work:
        raise ValueError(_nothing(places))
    for module, trace in work:
        _insert(module, trace, new)
    if report:
        report(_table(places, f"Activation noise, std = {new.std:g}"))
    return model


def remove_activation_noise(model: nn.Module, report: Report = print) -> nn.Module:
    """Take out everything that `insert_activation_noise` put into `model`, in place, and return the model.

    Noises that stand in the model as layers of its own stay. The table goes to `report`.

    Raises:
        TypeError: `model` is no module.
    """
    places = []
    for module, names in _named(model):
        noises = _noises(module)
        if not noises:
            continue
        forward = module.__dict__.get("forward")
        if isinstance(forward, traced.NoisyForward):
            del module.__dict__["forward"]
        else:
            _unhook(module)
        for name in noises:
            del module._modules[name]
        what = type(module).__name__
        places.append(
            Place(names=names, what=what if len(noises) == 1 else f"{what}, {len(noises)} places", count=len(noises))
        )
    if report:
        table = _table(places, "Activation noise removed")
        report(table if places else "no inserted activation noise in this model: nothing was removed")
    return model


Found = tuple[nn.Module, Place, "torch.fx.Graph | None"]


def _places(model: nn.Module) -> list[Found]:
    """Every module with an activation, or that may have one, each once; with the traced graph where it is a function."""
    found: list[Found] = []
    for module, names in _named(model):
        what, own = type(module).__name__, module.__dict__.get("forward")
        if isinstance(own, traced.NoisyForward):
            found.append((module, Place(names=names, what=f"{what}: set anew", count=len(_noises(module))), None))
        elif _is_activation(module):
            is_script = isinstance(module, torch.jit.ScriptModule)
            what = f"{what}: set anew" if _noises(module) else what
            reason = "TorchScript: insert before scripting" if is_script else ""
            found.append((module, Place(names=names, what=what, reason=reason), None))
        elif isinstance(module, ActivationNoise):
            continue
        elif type(module).__module__.startswith("torch.nn."):
            if function := _function_inside(module):
                reason = f"{function} as a function inside a layer of torch; give it a module, such as nn.ReLU()"
                found.append((module, Place(names=names, what=what, reason=reason), None))
        else:
            found.extend(_functional(module, names, own))
    return found


def _functional(module: nn.Module, names: tuple[str, ...], own: Any) -> list[Found]:
    """A module with a forward of its own: the activations it calls as functions, if a trace shows them."""
    what = type(module).__name__
    try:
        if isinstance(module, torch.jit.ScriptModule):
            raise traced.CannotTraceError("TorchScript")
        if own is not None:
            raise traced.CannotTraceError("its forward was replaced on the object")
        graph = traced.trace(module)
    except traced.CannotTraceError as error:
        reason = f"activations called in it as functions, if any, get no noise ({error})"
        return [(module, Place(names=names, what=what, reason=reason), None)]
    sites = traced.sites(graph)
    if not sites:
        return []
    called = ", ".join(dict.fromkeys(traced.name_of(node) for node in sites))
    return [(module, Place(names=names, what=f"{called} called in {what}", count=len(sites)), graph)]


def _is_activation(module: nn.Module) -> bool:
    if isinstance(module, _ACTIVATIONS):
        return True
    name = str(getattr(module, "original_name", type(module).__name__)).lower()
    inner = [child for child in module.children() if not isinstance(child, ActivationNoise)]
    plain = not inner and next(module.parameters(), None) is None
    return plain and any(other in name for other in _OTHERS)


def _function_inside(module: nn.Module) -> str:
    """Name of an activation that one of torch's layers keeps as a plain function."""
    for value in vars(module).values():
        if callable(value) and traced.is_activation_function(value):
            return value.__name__
    return ""


def _insert(module: nn.Module, graph: torch.fx.Graph | None, new: ActivationNoise) -> None:
    """Put noise like `new` in front of one module's activations, or set anew what is there."""
    for name in _noises(module):
        noise: Any = module._modules[name]
        noise.std, noise.per_element, noise.generator = new.std, new.per_element, new.generator
    if _noises(module):
        return
    if graph is None:
        _add(module, _CHILD, new, bool(getattr(module, "inplace", False)))
        module.register_forward_pre_hook(_noisy_input, with_kwargs=True)
        return
    names = [f"{_CHILD}_{index}" for index in range(len(traced.sites(graph)))]
    for name, node in zip(names, traced.sites(graph), strict=True):
        _add(module, name, new, traced.works_in_place(node))
    module.__dict__["forward"] = traced.NoisyForward(module, names, graph)


def _add(module: nn.Module, name: str, new: ActivationNoise, inplace: bool) -> None:
    noise = ActivationNoise(new.std, new.per_element, new.generator, inplace)
    module.add_module(name, noise.train(module.training))


def _noisy_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an activation module."""
    noise: Any = module._modules[_CHILD]
    if args:
        return (noise(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: noise(kwargs[name])}


def _unhook(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _noisy_input]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _noises(module: nn.Module) -> list[str]:
    """Names of the children that were inserted."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, traced.NoisyForward):
        return list(forward.noises)
    return [_CHILD] if any(hook is _noisy_input for hook in module._forward_pre_hooks.values()) else []


def _named(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every module once, with all the names it has."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or "(the model)")
    return [(module, tuple(found)) for module, found in names.items()]


def _skipped(places: list[Place], skip: str | Iterable[str] | None) -> set[str]:
    known = [name for place in places for name in place.names]
    found: set[str] = set()
    for pattern in [skip] if isinstance(skip, str) else skip or ():
        matches = fnmatch.filter(known, pattern)
        if not matches:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "") or "none"
            raise ValueError(f"{pattern!r} in skip matches no module with an activation; there are: {shown}")
        found |= set(matches)
    return found


def _nothing(places: list[Place]) -> str:
    message = "no activation in this model can get noise, so nothing was changed; put ActivationNoise in front of them yourself"
    return "\n".join([message, *_lines(places)])


def _table(places: list[Place], title: str) -> str:
    """One line per kind of place, with the modules it is in."""
    changed = sum(place.count for place in places if not place.reason)
    known = sum(place.count for place in places)
    return "\n".join([f"{title}: {changed} of {known} places", *_lines(places)])


def _lines(places: list[Place]) -> list[str]:
    kinds: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        kinds.setdefault((place.what, place.reason), []).append(place)
    lines = []
    for (what, reason), same in kinds.items():
        names = [" = ".join(place.names) for place in same]
        shown = ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
        lines.append(
            f"  {sum(place.count for place in same):4d}  {what}{f': left alone, {reason}' if reason else ''}  [{shown}]"
        )
    return lines
