"""The trace of the Hessian as a TorchMetrics metric: how sharp the minimum is, beside accuracy and loss.

Conventions. As in `decaycast.core.trace`: the matrix of the mean loss, the model in evaluation mode. Batches count by their
number of samples, so the value is the trace of the mean loss over all batches given. Everything is a sum, so that ranks add
up. The model is handed over at each update and not kept: copies and checkpoints of the metric do not hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decaycast.adapters import require
from decaycast.core.curvature import MATRICES, Curvature
from decaycast.core.estimate import Estimate
from decaycast.core.names import choose
from decaycast.core.reading import Loss
from decaycast.core.schedule import whole
from decaycast.core.trace import estimate_trace

require("torchmetrics", torchmetrics=">=1.4,<2")

from torchmetrics import Metric  # noqa: E402  # pyright: ignore[reportMissingImports]


class HessianTrace(Metric):
    """Trace of the Hessian or Gauss-Newton matrix of a model's mean loss, with a standard error.

    ``metric.update(model, batch)`` for some batches, ``metric.compute()``, ``metric.reset()``. A few hundred samples will do: a
    batch takes some 20 to 50 products, each about two gradients. It works inside ``torch.no_grad`` and
    ``torch.inference_mode`` too, hence in a LightningModule's ``validation_step``.

    Args:
        loss_fn: (output, target) -> scalar mean over the batch.
        matrix: ``"ggn"`` (never negative for a convex loss) or ``"hessian"``.
        relative_error: standard error of each batch's trace as a share of it; > 0. That of the whole is smaller.
        seed: of the probes.
        settings: of ``torchmetrics.Metric``.

    Raises:
        ImportError: TorchMetrics is missing, or its version is not supported (when this file is imported).
        ValueError: an unknown matrix, a number out of range.

    Source: as `decaycast.core.trace`.

    >>> line, batch = nn.Linear(2, 1), (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.zeros(2, 1))
    >>> trace = HessianTrace(nn.functional.mse_loss)
    >>> trace.update(line, batch)
    >>> trace.compute()  # 2*mean(x.x + 1) = 2*(6 + 10)/2
    tensor(16.)
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    variance: Tensor
    samples: Tensor
    products: Tensor

    def __init__(
        self, loss_fn: Loss, matrix: str = "ggn", relative_error: float = 0.05, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not relative_error > 0:
            raise ValueError(
                f"relative_error has to be positive, got {relative_error}; 0.05 is a standard error of 5 %"
            )
        self.loss_fn, self.matrix = loss_fn, choose(matrix, MATRICES, "matrix")
        self.relative_error, self.seed = relative_error, whole("seed", seed, least=0)
        for name in ("total", "variance", "samples", "products"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, model: nn.Module, batch: Any) -> None:
        """Measure on one more batch, at the weights the model has now.

        Args:
            model: any torch module; left as it is.
            batch: (inputs, target), or a dict with ``"labels"``.

        Raises:
            ValueError: a model or batch that cannot be measured (`decaycast.core.curvature.Curvature`).
            FloatingPointError: the loss or a product is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            curvature = Curvature(model, self.loss_fn, [_usable(batch)], self.matrix)
            # other probes for every batch and rank: errors that are independent average out
            stream = (self.seed * 1_000_003 + _rank()) * 1_000_003 + int(self.samples)
            generator = torch.Generator(curvature.device).manual_seed(stream % 2**63)
            found = estimate_trace(curvature, self.relative_error, generator).total
        count = _samples(batch)
        self.total += count * found.value
        self.variance += (count * found.stderr) ** 2
        self.samples += count
        self.products += found.probes

    def compute(self) -> Tensor:
        """The trace, a scalar tensor.

        Raises:
            RuntimeError: nothing was measured yet.
        """
        if not float(self.samples):
            raise RuntimeError("no batch was measured yet; call update(model, batch) first")
        return (self.total / self.samples).to(torch.get_default_dtype())

    def estimate(self) -> Estimate:
        """The trace with its standard error and 95 % interval; of this rank's batches."""
        value, stderr = float(self.total / self.samples), math.sqrt(float(self.variance)) / float(self.samples)
        return Estimate.of(value, stderr, degrees=1e9, probes=int(self.products))


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _usable(batch: Any) -> Any:
    """Tensors made in inference mode cannot take part in a derivative; their copies can."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, Mapping):
        return {name: _usable(part) for name, part in batch.items()}
    return type(batch)(map(_usable, batch)) if type(batch) in (tuple, list) else batch


def _samples(batch: Any) -> int:
    """First dimension of the first tensor, as `Curvature` counts."""
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((_samples(part) for part in parts if isinstance(part, (Tensor, Mapping, tuple, list))), 0)
