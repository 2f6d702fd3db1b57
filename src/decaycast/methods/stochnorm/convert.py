"""Whole models: batch norm into StochNorm and back, in place, with a table of what was done and what was not.

A layer stays the object it was and changes its class alone, as torch's lazy modules and parametrizations do. So parameters,
buffers, hooks, flags, sharing between places, and whoever else holds the layer need no care, and nothing is copied.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from decaycast.core.hook import Hook
from decaycast.methods.stochnorm import method, variants
from decaycast.methods.stochnorm.freeze import is_frozen

Report = Callable[[str], object] | None

# pairs of torch's class and ours, the more special first
_LAYERS: tuple[tuple[Any, Any], ...] = (
    (nn.LazyBatchNorm1d, variants.LazyStochNorm1d),
    (nn.LazyBatchNorm2d, variants.LazyStochNorm2d),
    (nn.LazyBatchNorm3d, variants.LazyStochNorm3d),
    (nn.BatchNorm1d, method.StochNorm1d),
    (nn.BatchNorm2d, method.StochNorm2d),
    (nn.BatchNorm3d, method.StochNorm3d),
    (nn.SyncBatchNorm, variants.SyncStochNorm),
)
_OURS = {ours for _, ours in _LAYERS}
_ORIGINAL = "_converted_from"  # entry of a converted layer: the class it had


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One normalisation layer: its qualified names, its class before and after, and why it was left alone ("" if it was not)."""

    names: tuple[str, ...]
    was: str
    now: str
    reason: str = ""


class Conversion(Hook):
    """The hook of `decaycast.core.train`: converts the model before training; arguments as `convert`, silent by default."""

    def __init__(
        self,
        p: float = 0.5,
        skip: str | Iterable[str] | None = (),
        generator: torch.Generator | None = None,
        report: Report = None,
    ) -> None:
        self.p, self.skip, self.generator, self.report = method.probability(p), skip, generator, report

    def prepare(self, model: nn.Module) -> nn.Module:
        """Convert `model` in place."""
        return convert(model, self.p, self.skip, self.generator, self.report)


def convert(
    model: nn.Module,
    p: float = 0.5,
    skip: str | Iterable[str] | None = (),
    generator: torch.Generator | None = None,
    report: Report = print,
) -> nn.Module:
    """Turn every batch norm of `model` into StochNorm, in place, and return the model.

    Everything but the class of the layers stays: parameters and buffers (with their requires_grad, device and optimiser),
    `training`, hooks, layers used in several places, num_batches_tracked. SyncBatchNorm becomes SyncStochNorm, lazy layers
    stay lazy, and norms with an activation inside (timm's BatchNormAct2d) keep it. A layer of a class derived from torch's
    stays an instance of that class. Layers that already are StochNorm get the new `p` and `generator`. Run
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` before this, not after: it knows batch norm only.

    Left alone, and said so: layers in `skip`; frozen ones (FrozenBatchNorm2d and the like; `decaycast.freeze_batch_norm`; a
    layer in evaluation mode whose parameters need no gradient while others of the model do, or, without parameters, inside
    a model in training mode); layers without running statistics, if p < 1; subclasses whose forward is not known to be
    batch norm, and layers with a forward of their own; parametrized layers; TorchScript.

    Args:
        model: any module, also a single layer.
        p: probability of the batch's statistics, in [0, 1]; 0.5 in the paper, 1 is batch norm.
        skip: names of layers, or patterns such as ``"layer1.*"``, to leave alone.
        generator: where all masks are drawn from; None for torch's own.
        report: receives the table as text; None for silence.

    Raises:
        TypeError: `model` is no module, p is no number.
        ValueError: p outside [0, 1]; a name in `skip` that matches no layer. Nothing was converted.
    """
    p, layers = method.probability(p), _norms(model)
    skipped = _skipped(layers, skip)
    findings = []
    for module, names in layers:
        was = type(module).__name__
        reason = "in skip" if skipped & set(names) else _reason_to_leave(module, model, p)
        if not reason:
            _become_stochastic(module, p, generator)
        findings.append(Finding(names=names, was=was, now=type(module).__name__, reason=reason))
    if report:
        report(_table(findings, f"StochNorm, p = {p:g}", "no batch norm in this model: nothing was converted"))
    return model


def revert(model: nn.Module, report: Report = print) -> nn.Module:
    """Turn every StochNorm of `model` into the batch norm it was, in place, and return the model.

    Layers that were made as StochNorm become torch's batch norm of the same dimensions. Left alone, and said so: layers
    whose class was changed again since (parametrized ones), and subclasses of StochNorm. The table goes to `report`.

    Raises:
        TypeError: `model` is no module.
    """
    findings = []
    for module, names in _norms(model):
        if isinstance(module, method.StochNorm):
            was, reason = type(module).__name__, _reason_to_stay(module)
            if not reason:
                _become_batch_norm(module)
            findings.append(Finding(names=names, was=was, now=type(module).__name__, reason=reason))
    if report:
        report(_table(findings, "Batch norm again", "no StochNorm in this model: nothing was reverted"))
    return model


def _norms(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every module that is, or is named like, a batch norm, once, with all the names it has."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) or "BatchNorm" in _class_name(module):
            names.setdefault(module, []).append(name or "(the model)")
    return [(module, tuple(found)) for module, found in names.items()]


def _skipped(layers: list[tuple[nn.Module, tuple[str, ...]]], skip: str | Iterable[str] | None) -> set[str]:
    known = [name for _, names in layers for name in names]
    found: set[str] = set()
    for pattern in [skip] if isinstance(skip, str) else skip or ():
        matches = fnmatch.filter(known, pattern)
        if not matches:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "") or "none"
            raise ValueError(f"{pattern!r} in skip matches no batch norm of the model; there are: {shown}")
        found |= set(matches)
    return found


def _reason_to_leave(module: nn.Module, model: nn.Module, p: float) -> str:
    """Why a layer cannot or must not be converted; "" where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: convert before scripting"
    if not isinstance(module, _BatchNorm):
        return "frozen" if "Frozen" in _class_name(module) else "no subclass of torch's batch norm"
    if _frozen(module, model):
        return "frozen"
    if is_parametrized(module):
        return "parametrized: convert first, or remove the parametrization"
    if not module.track_running_stats and p < 1:
        return "no running statistics"
    if isinstance(module, method.StochNorm):
        return ""
    if isinstance(module, LazyModuleMixin) and type(module) not in {torchs for torchs, _ in _LAYERS}:
        return "lazy and a class of its own: call the model once first"
    return "" if _target(module) else "a forward of its own, not known to be batch norm"


def _frozen(module: _BatchNorm, model: nn.Module) -> bool:
    """Held in evaluation mode on purpose, as far as one can tell."""
    if is_frozen(module):
        return True
    own = list(module.parameters())
    if module.training or any(each.requires_grad for each in own):
        return False
    return model.training or (bool(own) and any(each.requires_grad for each in model.parameters()))


def _reason_to_stay(module: method.StochNorm) -> str:
    """Why a StochNorm cannot become a batch norm again; "" where it can."""
    if is_parametrized(module):
        return "parametrized: remove the parametrization first"
    if type(module) in _OURS or issubclass(type(module), variants.Derived):
        return ""
    return "a class of its own"


def _target(module: Any) -> Any:
    """The class to convert to; None for a layer that does something else."""
    torchs, ours = next((pair for pair in _LAYERS if isinstance(module, pair[0])), (None, None))
    if torchs is None or ours is None or "forward" in vars(module):
        return None
    if type(module) is torchs:
        return ours
    if type(module).forward is torchs.forward:
        return variants.stochastic_class(ours, type(module), False)
    images = ours in (method.StochNorm2d, variants.SyncStochNorm)
    if images and isinstance(getattr(module, "act", None), nn.Module) and _is_norm_and_act(module):
        return variants.stochastic_class(ours, type(module), True)
    return None


@torch.no_grad()
def _is_norm_and_act(module: Any) -> bool:
    """Whether evaluation is batch norm of one argument, then `drop` if there is one, then `act`: tried on numbers."""
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.num_features, 3, 3, generator=generator)
    x = x.to(module.running_mean) if module.running_mean is not None else x
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        normed = nn.BatchNorm2d.forward(module, x)
        drop = getattr(module, "drop", None)
        expected = module.act(normed if drop is None else drop(normed))
        return torch.equal(type(module).forward(module, x.clone()), expected)
    except (RuntimeError, ValueError, TypeError):  # a forward that wants other inputs is not batch norm's
        return False
    finally:
        for each, mode in modes:
            each.training = mode


def _become_stochastic(module: Any, p: float, generator: torch.Generator | None) -> None:
    if not isinstance(module, method.StochNorm):
        target: Any = _target(module)
        module.__dict__[_ORIGINAL] = type(module)
        module.__class__ = target
    module.__dict__.update(_p=p, generator=generator)


def _become_batch_norm(module: Any) -> None:
    original = module.__dict__.pop(_ORIGINAL, None)
    ours = type(module)
    if original is None or (issubclass(original, LazyModuleMixin) and not hasattr(ours, "cls_to_become")):
        original = next(torchs for torchs, own in _LAYERS if isinstance(module, own))
    module.__class__ = original
    for name in ("_p", "generator", method.REMEMBERED):
        module.__dict__.pop(name, None)


def _table(findings: list[Finding], title: str, nothing: str) -> str:
    """One line per kind of change, with the layers it happened to."""
    if not findings:
        return nothing
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for found in findings:
        kinds.setdefault((found.was, found.now, found.reason), []).append(" = ".join(found.names))
    changed = sum(not found.reason for found in findings)
    lines = [f"{title}: {changed} of {len(findings)} layers"]
    for (was, now, reason), names in kinds.items():
        what = (
            f"{was}: left alone, {reason}"
            if reason
            else f"{was} -> {now}"
            if was != now
            else f"{was}: p and generator set"
        )
        shown = ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
        lines.append(f"  {len(names):4d}  {what}  [{shown}]")
    return "\n".join(lines)


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))
