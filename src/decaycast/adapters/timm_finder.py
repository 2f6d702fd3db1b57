"""The forecast in a timm training script: from the model, the arguments, the loaders and the learning-rate scheduler it has."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from decaycast.adapters.finding import FoundWeightDecay
from decaycast.adapters.timm_script import learning_rates
from decaycast.core.reading import Loss
from decaycast.core.schedule import whole
from decaycast.methods.l2.find import find

from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader  # isort: skip  # pyright: ignore[reportMissingImports]
from timm.optim import create_optimizer_v2  # isort: skip  # pyright: ignore[reportMissingImports]


def find_weight_decay(
    model: torch.nn.Module,
    optimizer_options: Mapping[str, Any],
    loader_train: Any,
    loader_eval: Any,
    lr_scheduler: Any,
    *,
    epochs: int,
    loss_fn: Loss = torch.nn.functional.cross_entropy,
    metric: Literal["loss", "accuracy"] = "loss",
    candidates: Sequence[float] | None = None,
    max_cost: float = 0.3,
    amp_dtype: torch.dtype | None = None,
) -> FoundWeightDecay:
    """Forecast the best weight decay for the training that a timm script is set up to make.

    In timm's ``train.py``, once loaders and scheduler are made::

        from decaycast.adapters.timm_finder import find_weight_decay
        found = find_weight_decay(model, optimizer_kwargs(cfg=args), loader_train, loader_eval, lr_scheduler, epochs=num_epochs)
        print(found.suggestion(), found.verdict, found.forecast.reason)

    Model, loaders and random generators come out as they went in. Mixup that the script applies in its loop (with
    ``--no-prefetcher``), its moving average and its clipping are not part of the arms; one batch of the loader is one update.

    Args:
        model: at its initial weights, on its device.
        optimizer_options: of ``create_optimizer_v2``: `opt`, `lr` and so on; its weight decay is replaced.
        loader_train: timm's, with or without prefetcher, or any of torch's.
        loader_eval: held-out data, never the test set; labels are classes.
        lr_scheduler: timm's, over an optimiser with the same `lr`; None for a constant rate.
        epochs: of the whole training, >= 1.
        loss_fn: (output, target) -> scalar mean; by default the cross-entropy, of classes or (mixup) of probabilities.
        metric: what should be best at the end, of the held-out data: ``"loss"`` or ``"accuracy"``.
        candidates: weight decays to choose from; None for any.
        max_cost: most full-run equivalents to spend, in (0, 1].
        amp_dtype: torch.float16 or torch.bfloat16 for mixed precision.

    Returns:
        `FoundWeightDecay`: ``suggestion()``, ``interval()``, `verdict`, ``plot()``.

    Raises:
        ImportError: timm is missing, or its version is not supported (when this file is imported).
        TypeError, ValueError: as `learning_rates` and `decaycast.find`.
    """
    updates_per_epoch = len(loader_train)
    budget = whole("epochs", epochs, least=1) * updates_per_epoch
    schedule = None
    if lr_scheduler is not None:
        rates = learning_rates(lr_scheduler, budget, updates_per_epoch)[:, 0]
        peak = float(lr_scheduler.base_values[0]) * float(lr_scheduler.optimizer.param_groups[0].get("lr_scale", 1.0))
        schedule = (rates / peak).__getitem__

    def make_optimizer(net: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
        optimizer = create_optimizer_v2(net, **{**optimizer_options, "weight_decay": weight_decay})
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_scale", 1.0)  # timm's schedulers do that
        return optimizer

    forecast = find(
        model,
        make_optimizer,
        loss_fn,
        _apart(loader_train),
        loader_eval,
        budget_steps=budget,
        lr_schedule=schedule,
        metric=metric,
        candidates=candidates,
        max_cost=max_cost,
        amp_dtype=amp_dtype,
    )
    return FoundWeightDecay(forecast=forecast)


def _apart(loader: Any) -> Any:
    return _Apart(loader) if isinstance(loader, (PrefetchLoader, MultiEpochsDataLoader)) else loader


class _Apart:
    """A loader of timm's whose every pass has worker processes of its own, where arms that take turns would share them."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        inner = getattr(loader, "loader", loader)
        self.generator, self.sampler = getattr(inner, "generator", None), getattr(inner, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        outer = copy.copy(self.loader)
        inner = copy.copy(outer.loader) if isinstance(outer, PrefetchLoader) else outer
        inner._iterator = None
        if isinstance(inner, MultiEpochsDataLoader):
            inner.iterator = torch.utils.data.DataLoader.__iter__(inner)
        if outer is not inner:
            outer.loader = inner
        return iter(outer)
