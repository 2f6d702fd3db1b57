"""Other forms of the layers: synchronised over ranks, lazy, and those that keep more of the class they came from.

Conversion changes the class of a layer. Torch's own batch norms become one of the classes with a name here or in
`decaycast.methods.stochnorm.method`; for a subclass of theirs, `stochastic_class` makes one that is a subclass of both, so
that its methods, and ``isinstance`` checks of the library it comes from, go on working.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase

from decaycast.methods.stochnorm.method import StochNorm, StochNorm1d, StochNorm2d, StochNorm3d


class SyncStochNorm(StochNorm):
    """Stochastic normalisation over the batches of all ranks: statistics and masks are those of the whole batch.

    One exchange per layer forward (statistics, and the first rank's mask for all) and one backward. Comes from converting
    a model that `torch.nn.SyncBatchNorm.convert_sync_batchnorm` has prepared; unlike SyncBatchNorm it also trains on CPU.
    Parameter gradients are this rank's share, for DistributedDataParallel to average. Arguments as `StochNorm2d`;
    inputs have at least 2 dimensions.
    """

    def __init__(self, num_features: int, p: float = 0.5, *args: Any, process_group: Any = None, **named: Any) -> None:
        super().__init__(num_features, p, *args, **named)
        self.process_group = process_group

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.ndim}")

    def _group(self) -> Any:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.process_group) == 1:
            return None
        return self.process_group or dist.group.WORLD


class LazyStochNorm1d(_LazyNormBase, StochNorm1d):
    """Becomes a StochNorm1d once it has seen its channels; made by conversion from LazyBatchNorm1d."""

    cls_to_become = StochNorm1d  # type: ignore[assignment]


class LazyStochNorm2d(_LazyNormBase, StochNorm2d):
    """Becomes a StochNorm2d once it has seen its channels; made by conversion from LazyBatchNorm2d."""

    cls_to_become = StochNorm2d  # type: ignore[assignment]


class LazyStochNorm3d(_LazyNormBase, StochNorm3d):
    """Becomes a StochNorm3d once it has seen its channels; made by conversion from LazyBatchNorm3d."""

    cls_to_become = StochNorm3d  # type: ignore[assignment]


class Activated:
    """Part of a class: a norm with an activation inside, as timm has them; `drop`, if there is one, and `act` follow it."""

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise, then drop, then act; as `StochNorm.forward`."""
        hidden = super().forward(input, mask)  # type: ignore[misc]
        drop = getattr(self, "drop", None)
        return self.act(hidden if drop is None else drop(hidden))  # type: ignore[attr-defined]


class Derived:
    """Part of the classes `stochastic_class` makes, which no module holds: says how to make them again."""

    _made_of: tuple[type, type, bool]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copy and pickle: the class by what it was made of, then the state."""
        return _blank, self._made_of, self.__getstate__()  # type: ignore[attr-defined]


@functools.cache
def stochastic_class(ours: type[StochNorm], original: type[nn.Module], activated: bool) -> Any:
    """A subclass of `ours` and of `original`, a batch norm of another library; `activated` if that ends in an activation.

    >>> class Named(nn.BatchNorm2d): ...
    >>> stochastic_class(StochNorm2d, Named, False).__name__
    'StochNamed'
    """
    name = original.__name__
    name = name.replace("BatchNorm", "StochNorm") if "BatchNorm" in name else f"Stoch{name}"
    bases = (Derived, Activated, ours, original) if activated else (Derived, ours, original)
    return type(name, bases, {"_made_of": (ours, original, activated), "__module__": __name__})


def _blank(ours: type[StochNorm], original: type[nn.Module], activated: bool) -> Any:
    made = stochastic_class(ours, original, activated)
    return made.__new__(made)
