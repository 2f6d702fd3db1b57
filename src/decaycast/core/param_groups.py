"""Which parameters an optimiser decays, which it does not, and what the usual rules would do.

Weight decay is meant for the matrices and kernels of a network. Scales and shifts of norms, biases, temperatures, position and
class tokens do something else, and pulling them to zero hurts or does nothing. Libraries leave them out by rules that look at
one sign each, and each misses some:

==============  =========================================================  ==========================================
rule            decays everything but                                      misses, for example
==============  =========================================================  ==========================================
timm            tensors of one dimension or less; names that end in        ``pos_embed``, ``cls_token`` of a model without
                ``.bias``; what ``model.no_weight_decay()`` names          ``no_weight_decay``; ``nn.LayerNorm`` over images
Hugging Face    everything inside ``nn.LayerNorm``; names with ``bias``,   ``bn1.weight``, ``ln_f.weight`` of an own norm,
                ``layernorm``, ``rmsnorm``, or a part ``norm``, ``*_norm`` ``logit_scale``, ``pos_embed``
==============  =========================================================  ==========================================

The rule here looks at all signs: what the model says, the module's type, the number of dimensions, and the name. Of embedding
tables it has no opinion: timm and Hugging Face decay them, others (minGPT) do not.

Source: timm 1.0 ``param_groups_weight_decay``; transformers 5 ``Trainer.get_decay_parameter_names`` (rules re-expressed; a test
compares them with the packages).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decaycast.core.timescale import group_rate

_TOKENS = re.compile(
    r"(^|[._])(pos(ition(al)?)?_?emb\w*|\w*_tokens?|relative_position_bias_table|rel_pos\w*|logit_scale|temperature|\w*_bias)$"
)
_NORM = re.compile(r"(layer|rms|batch|group|instance)_?norm|norm(\dd)?$", re.IGNORECASE)
_HUGGING_FACE = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_SHOWN = 60  # rows of the printed table


@dataclass(frozen=True, kw_only=True)
class ParameterDecay:
    """What happens to one parameter, and what rules would do with it.

    Attributes:
        names: of the tensor in the model; more than one if it is shared.
        shape: of the tensor.
        group: of the optimiser, from 0; None if it is in none.
        weight_decay: of that group, in the optimiser's own convention; 0 outside all groups.
        rate: shrink r per optimiser step at the current learning rate; NaN where the optimiser has none (`effective_rate`).
        advised: whether it should decay; None where there is no advice (embedding tables).
        why: the reason of the advice.
        timm: whether timm's rule would decay it.
        hugging_face: whether the rule of Hugging Face's Trainer would.
        trained: whether it takes gradients.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    group: int | None
    weight_decay: float
    rate: float
    advised: bool | None
    why: str
    timm: bool
    hugging_face: bool
    trained: bool

    @property
    def decays(self) -> bool:
        """Whether the optimiser decays it."""
        return self.weight_decay != 0

    @property
    def wrong(self) -> str:
        """What speaks against the way it is treated; empty if nothing does."""
        if not self.trained:
            return ""
        if self.group is None:
            return "not in the optimiser"
        if self.decays and self.advised is False:
            return "decays, should not"
        return ""


@dataclass(frozen=True, kw_only=True)
class DecayTable:
    """All parameters of a model with their decay. `print` it, or read `rows`.

    Attributes:
        rows: one per tensor, in the model's order.
        strangers: tensors of the optimiser that the model does not have.
    """

    rows: tuple[ParameterDecay, ...]
    strangers: int

    def missed_by(self, rule: str) -> list[str]:
        """Names that should not decay but would under ``"timm"`` or ``"hugging_face"``.

        Raises:
            ValueError: another rule.
        """
        if rule not in ("timm", "hugging_face"):
            raise ValueError(f"rule has to be 'timm' or 'hugging_face', got {rule!r}")
        return [row.names[0] for row in self.rows if row.advised is False and getattr(row, rule) and row.trained]

    def wrong(self) -> list[ParameterDecay]:
        """Parameters whose treatment something speaks against: decays and should not, or in no group."""
        return [row for row in self.rows if row.wrong]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain_param_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, no_decay: Sequence[str] = ()
) -> DecayTable:
    """What decays, what does not, and why, as a table to print.

    Args:
        model: wrappers of `torch.compile` and of DistributedDataParallel are looked through. A method or attribute
            ``no_weight_decay`` of it or of its modules (names relative to the module, wildcards allowed) is honoured.
        optimizer: over its parameters.
        no_decay: more names that should not decay, wildcards allowed (``"blocks.*.gamma"``).

    Returns:
        The table.

    Raises:
        ValueError: the model has no parameters, or the optimiser has none of them.

    Source: head of this file.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> print(explain_param_groups(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1)))
        parameter  shape  group  weight_decay  r per step  should  why                 note
        0.weight   3x4        0           0.1      0.0001  yes     a matrix or kernel
        0.bias     3          0           0.1      0.0001  no      one dimension       decays, should not
        1.weight   3          0           0.1      0.0001  no      a norm (LayerNorm)  decays, should not
        1.bias     3          0           0.1      0.0001  no      a norm (LayerNorm)  decays, should not
        <BLANKLINE>
        decayed: 4 tensors, 21 values; not decayed: 0 tensors, 0 values
        3 decay and should not: dc.decay_groups(model, weight_decay) makes the groups
    """
    model = _unwrapped(model)
    named = _named(model)
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters")
    groups = {id(tensor): i for i, group in enumerate(optimizer.param_groups) for tensor in group["params"]}
    if not any(id(tensor) in groups for tensor, _ in named):
        raise ValueError(
            "the optimiser has no parameter of this model; build it over model.parameters(), and after moving or converting it"
        )
    said = [*_said_by(model), *no_decay]
    by_timm = _root_says(model)
    owners = {id(tensor): module for module in model.modules() for tensor in module.parameters(recurse=False)}
    rows = []
    for tensor, names in named:
        group = groups.get(id(tensor))
        options = None if group is None else optimizer.param_groups[group]
        advised, why = _advice(tensor, names, owners[id(tensor)], said)
        rows.append(
            ParameterDecay(
                names=names,
                shape=tuple(tensor.shape),
                group=group,
                weight_decay=0.0 if options is None else float(options.get("weight_decay", 0.0)),
                rate=0.0 if options is None else _rate(optimizer, options),
                advised=advised,
                why=why,
                timm=_timm_decays(tensor, names[0], by_timm),
                hugging_face=_hugging_face_decays(names[0], owners[id(tensor)]),
                trained=tensor.requires_grad,
            )
        )
    known = {id(tensor) for tensor, _ in named}
    return DecayTable(rows=tuple(rows), strangers=sum(key not in known for key in groups))


def assert_no_decay(model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None) -> None:
    """For a test of your own training code: nothing decays that should not.

    Args:
        model: as in `explain_param_groups`.
        optimizer: over its parameters.
        names: what must not decay, wildcards allowed; None for everything the rule at the head of this file names.

    Raises:
        AssertionError: something decays; the message lists it with the reasons.
        ValueError: as `explain_param_groups`; or a name of `names` fits no parameter.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> assert_no_decay(model, torch.optim.AdamW(decay_groups(model, 0.1)))
    """
    rows = explain_param_groups(model, optimizer).rows
    if names is None:
        found = [row for row in rows if row.decays and row.advised is False]
    else:
        for pattern in names:
            if not any(_fits(name, [pattern]) for row in rows for name in row.names):
                raise ValueError(
                    f"{pattern!r} fits no parameter of {type(model).__name__}; for example {rows[0].names[0]!r}"
                )
        found = [row for row in rows if row.decays and any(_fits(name, names) for name in row.names)]
    if found:
        listed = "".join(f"\n  {row.names[0]}: weight_decay {row.weight_decay:g} ({row.why})" for row in found)
        raise AssertionError(f"{len(found)} parameters decay and should not:{listed}")


def decay_groups(model: nn.Module, weight_decay: float, *, no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: what should decay, and what should not.

    Args:
        model: as in `explain_param_groups`. Embedding tables decay; name them in `no_decay` if they should not.
        weight_decay: of the first group, >= 0, in the optimiser's own convention.
        no_decay: more names that should not decay, wildcards allowed.

    Returns:
        One or two groups, without empty ones; frozen parameters are in none.

    Raises:
        ValueError: weight_decay is negative or not finite, or nothing in the model is trained.

    Example:
        >>> groups = decay_groups(nn.Linear(4, 3), 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (1, 0.0)]
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay has to be finite and >= 0, got {weight_decay}")
    model = _unwrapped(model)
    said = [*_said_by(model), *no_decay]
    owners = {id(tensor): module for module in model.modules() for tensor in module.parameters(recurse=False)}
    decayed, left = [], []
    for tensor, names in _named(model):
        if tensor.requires_grad:
            advised, _ = _advice(tensor, names, owners[id(tensor)], said)
            (left if advised is False else decayed).append(tensor)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": left, "weight_decay": 0.0}]
    if not decayed and not left:
        raise ValueError(f"{type(model).__name__} has no parameter that takes gradients; unfreeze some first")
    return [group for group in groups if group["params"]]


# rules


def _advice(tensor: Tensor, names: Sequence[str], module: nn.Module, said: Sequence[str]) -> tuple[bool | None, str]:
    """Whether it should decay, and why; a shared tensor goes by any of its names."""
    kind = type(module).__name__
    if any(_fits(name, said) for name in names):
        return False, "no_weight_decay names it"
    if _is_norm(module):
        return False, f"a norm ({kind})"
    if _is_table(tensor, names, module):
        return None, "an embedding table"
    if any(_TOKENS.search(_stem(name)) for name in names):
        return False, "by its name: a token, position, bias or temperature"
    if tensor.ndim <= 1:
        return False, "one dimension" if tensor.ndim else "a single number"
    return True, "a matrix or kernel"


def _timm_decays(tensor: Tensor, name: str, said: Sequence[str]) -> bool:
    return not (tensor.ndim <= 1 or name.endswith(".bias") or _fits(name, said))


def _hugging_face_decays(name: str, module: nn.Module) -> bool:
    return not (isinstance(module, nn.LayerNorm) or _HUGGING_FACE.search(name.lower()))


def _is_norm(module: nn.Module) -> bool:
    """By type: torch's norms, and whatever calls itself one."""
    return any(_NORM.search(cls.__name__) for cls in type(module).__mro__)


def _is_table(tensor: Tensor, names: Sequence[str], module: nn.Module) -> bool:
    """The weight of a module that looks rows up; a module of embeddings may also hold tokens, which are not called weight."""
    looked_up = any("Embedding" in cls.__name__ for cls in type(module).__mro__)
    return looked_up and tensor.ndim == 2 and any(name.rpartition(".")[2] == "weight" for name in names)


def _stem(name: str) -> str:
    """`pos_embed.weight` goes by `pos_embed`."""
    return name.removesuffix(".weight")


# what a model says


def _root_says(model: nn.Module) -> list[str]:
    said = getattr(model, "no_weight_decay", None)
    found: Any = said() if callable(said) else said
    return [found] if isinstance(found, str) else [str(name) for name in found or ()]


def _said_by(model: nn.Module) -> Iterator[str]:
    """Names from every module's ``no_weight_decay``, as seen from the root."""
    for prefix, module in model.named_modules():
        for name in _root_says(module):
            yield f"{prefix}.{name}" if prefix else name


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _named(model: nn.Module) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Each tensor once, with all names it goes by."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return [(tensor, tuple(names)) for tensor, names in found.values()]


def _rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    try:
        return group_rate(optimizer, group)
    except ValueError:  # no fixed shrink
        return math.nan


# the printed table


def _lines(table: DecayTable) -> list[str]:
    head = ("parameter", "shape", "group", "weight_decay", "r per step", "should", "why", "note")
    folded = _folded(table.rows)
    cells = [head, *(_cells(row, name) for row, name in folded[:_SHOWN])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    right = {2, 3, 4}
    lines = ["  ".join(_padded(text, widths[i], i in right) for i, text in enumerate(line)) for line in cells]
    if len(folded) > _SHOWN:
        lines.append(f"... and {len(folded) - _SHOWN} more lines; `rows` has all")
    return [*(line.rstrip() for line in lines), "", *_summary(table)]


def _padded(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _summary(table: DecayTable) -> Iterator[str]:
    parts = []
    for word, decays in (("decayed", True), ("not decayed", False)):
        shapes = [row.shape for row in table.rows if row.decays is decays]
        parts.append(f"{word}: {len(shapes)} tensors, {sum(map(math.prod, shapes)):,} values")
    yield "; ".join(parts)
    wrong = [row for row in table.rows if row.decays and row.wrong]
    if wrong:
        yield f"{len(wrong)} decay and should not: dc.decay_groups(model, weight_decay) makes the groups"
    outside = [row.names[0] for row in table.rows if row.trained and row.group is None]
    if outside:
        yield f"{len(outside)} take gradients but are not in the optimiser: {', '.join(outside[:3])}"
    if table.strangers:
        yield f"{table.strangers} tensors of the optimiser are not in the model"
    for rule, word in (("timm", "timm's"), ("hugging_face", "Hugging Face's")):
        missed = table.missed_by(rule)
        if missed:
            more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
            yield f"{word} rule would decay {', '.join(missed[:4])}{more}"


def _cells(row: ParameterDecay, name: str) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "()"
    group = "-" if row.group is None else str(row.group)
    should = {True: "yes", False: "no", None: "either"}[row.advised]
    note = row.wrong or ("" if row.trained else "frozen")
    return name, shape, group, f"{row.weight_decay:g}", f"{row.rate:.3g}", should, row.why, note


def _folded(rows: Sequence[ParameterDecay]) -> list[tuple[ParameterDecay, str]]:
    """Rows that differ in a number of their name only become one line, at the place of the first."""
    alike: dict[tuple, list[ParameterDecay]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.names[0])
        alike.setdefault((pattern, row.shape, row.group, row.weight_decay, row.why, row.trained), []).append(row)
    lines = []
    for (pattern, *_), found in alike.items():
        name = f"{pattern} ({len(found)})" if len(found) > 1 else " = ".join(found[0].names)
        lines.append((found[0], name))
    return lines
