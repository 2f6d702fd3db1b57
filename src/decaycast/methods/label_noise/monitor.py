"""Flatness along training: trace, top eigenvalue and the regulariser R of label noise, every so many steps.

Conventions. A row is measured before the update of its step, at the weights that the update starts from, on batches that
stay the same, in evaluation mode and without noise on the labels. The matrix is the Gauss-Newton matrix unless asked
otherwise: it is the one that label noise feels, and at zero loss the Hessian. R is that of `theory` at the learning rate and
momentum that torch's SGD has in that step: infinite from lr*l1 = 2(1+momentum) on, NaN with several learning rates, Nesterov
momentum, dampening or another optimiser. A row of NaN stands where a loss or product was not finite.

Without `every` the monitor keeps to a share of the time: it measures at the first step, and again once all measurements, the
next included, are within that share of the time the training itself took. A run of fewer than about 1/share measurements' time
spends more. Rows are then at steps that differ from run to run; with `every` they are the same, and so are their numbers,
which depend on seed, step and weights alone.

In torch.distributed rank 0 measures, on its own copy of the weights, and the others wait for it at their next collective
operation; their rows stay empty. Weights that are split over ranks (FSDP) cannot be read this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decaycast.core.curvature import MATRICES, Curvature
from decaycast.core.decay import check_keys
from decaycast.core.hook import Hook, StepContext
from decaycast.core.lanczos import largest_eigenvalue
from decaycast.core.names import choose
from decaycast.core.reading import Loss, reusable
from decaycast.core.schedule import whole
from decaycast.core.spectrum import sum_over_spectrum
from decaycast.core.trace import estimate_trace
from decaycast.methods.label_noise.theory import UnstableError, regularizer, stability_limit

COLUMNS = (
    "step",  # updates made when measured
    "trace",
    "trace_stderr",
    "top_eigenvalue",
    "top_residual",  # an eigenvalue lies within it
    "regularizer",  # R
    "regularizer_stderr",
    "lr",
    "momentum",
    "share_of_limit",  # lr*l1/(2(1+momentum))
    "products",  # spent on the row
    "seconds",
)
_MOST = 100  # probes of a trace


class CurvatureMonitor(Hook):
    """A hook that measures the curvature of a network while it trains (head of this file).

    Args:
        batches: list or loader of (inputs, target) to measure on, without label noise; a few hundred samples will do.
        loss_fn: (output, target) -> scalar mean over the batch; with label noise, that of the smoothed loss.
        every: measure in steps that it divides; None for what `share` allows.
        share: of the training's time that measuring may take, in (0, 1); the default 0.05.
        matrix: ``"ggn"`` or ``"hessian"``.
        relative_error: standard error, as a share of the value, at which trace and R are good enough; > 0.
        with_regularizer: measure R, which costs several times as much as trace and eigenvalue together, unless lr*l1 is so far
            below the limit that R of the Gauss-Newton matrix is tr/4 within a tenth of `relative_error`.
        seed: of the probes.

    Attributes:
        rows: one dict per measurement, with the keys `COLUMNS`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> line, batch = nn.Linear(1, 1), (torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))  # Hessian [[10, 4], [4, 2]]
        >>> monitor = CurvatureMonitor([batch], nn.functional.mse_loss, every=100)
        >>> line = monitor.prepare(line)
        >>> row = monitor.measure(0, torch.optim.SGD(line.parameters(), lr=0.1))
        >>> [round(row[name], 3) for name in ("trace", "top_eigenvalue", "share_of_limit", "regularizer")]
        [12.0, 11.657, 0.583, 4.458]
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: Loss,
        *,
        every: int | None = None,
        share: float = 0.05,
        matrix: str = "ggn",
        relative_error: float = 0.1,
        with_regularizer: bool = True,
        seed: int = 0,
    ) -> None:
        self.batches, self.loss_fn = reusable(batches), loss_fn
        self.every = None if every is None else whole("every", every, least=1)
        if not 0 < share < 1:
            raise ValueError(f"share is of the training's time and has to be in (0, 1), got {share}; 0.05 is 5 %")
        if not relative_error > 0:
            raise ValueError(
                f"relative_error has to be positive, got {relative_error}; 0.1 is a standard error of 10 %"
            )
        self.share, self.relative_error = share, relative_error
        self.matrix = choose(matrix, MATRICES, "matrix")
        self.with_regularizer, self.seed = with_regularizer, whole("seed", seed, least=0)
        self.rows: list[dict[str, float]] = []
        self._model: nn.Module | None = None
        self._spent, self._trained = 0.0, 0.0  # seconds
        self._left: float | None = None  # when the last call ended: from there on it is training

    def prepare(self, model: nn.Module) -> nn.Module:
        """Remember the model. In a chain, stand behind hooks that convert it."""
        self._model = model
        return model

    def on_step(self, step: int, context: StepContext) -> None:
        """Measure if it is time.

        Raises:
            RuntimeError: `prepare` was not called.
            ValueError: batches or model that cannot be measured (`decaycast.core.curvature.Curvature`).
        """
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        if self._left is not None:
            self._trained += perf_counter() - self._left
        if self._due(step):
            self.measure(step, context.optimizer)
        self._left = perf_counter()

    def measure(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Measure now, whatever the cadence says, and return the new row."""
        if self._model is None:
            raise RuntimeError("the monitor does not know the model; call prepare(model) before training")
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what training has queued is not the monitor's time
        began = perf_counter()
        lr, momentum = _sgd(optimizer)
        row = dict.fromkeys(COLUMNS, math.nan) | {"step": float(step), "lr": lr, "momentum": momentum, "products": 0.0}
        try:
            self._fill(row, torch.Generator(device).manual_seed((self.seed * 1_000_003 + step) % 2**63))
        except FloatingPointError:
            pass  # the row keeps its NaN; that the run diverged is the training loop's to say
        row["seconds"] = perf_counter() - began
        self._spent += row["seconds"]
        self.rows.append(row)
        return row

    def cost(self) -> str:
        """What measuring cost so far, in words."""
        share = f" ({100 * self._spent / self._trained:.1f} %)" if self._trained > 0 else ""
        products = sum(row["products"] for row in self.rows)
        return (
            f"curvature: {len(self.rows)} measurements of {products / max(1, len(self.rows)):.0f} products took "
            f"{self._spent:.2f} s beside {self._trained:.2f} s of training{share}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The rows and the time spent."""
        rows = [dict(row) for row in self.rows]
        return {"rows": rows, "measuring_seconds": self._spent, "training_seconds": self._trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved rows; the settings stay those of this object.

        Raises:
            ValueError: keys of something else.
        """
        check_keys(dict(state), self.state_dict(), type(self).__name__)
        self.rows = [dict(row) for row in state["rows"]]
        self._spent, self._trained = float(state["measuring_seconds"]), float(state["training_seconds"])
        self._left = None

    def _due(self, step: int) -> bool:
        if self.every is not None:
            return step % self.every == 0
        if not self.rows:
            return True
        return self._spent + self.rows[-1]["seconds"] <= self.share * self._trained

    def _fill(self, row: dict[str, float], generator: torch.Generator) -> None:
        assert self._model is not None
        curvature = Curvature(self._model, self.loss_fn, self.batches, self.matrix)
        trace = estimate_trace(curvature, self.relative_error, generator, _MOST).total
        row["trace"], row["trace_stderr"] = trace.value, trace.stderr
        top = largest_eigenvalue(curvature, 0.01, generator)
        row["top_eigenvalue"], row["top_residual"] = top.value, top.residual
        row["products"] = float(trace.probes + top.iterations)
        lr, momentum = row["lr"], row["momentum"]
        row["share_of_limit"] = lr * top.value / float(stability_limit(momentum)) if momentum == momentum else math.nan
        if not self.with_regularizer or not lr > 0 or math.isnan(momentum):
            return
        if row["share_of_limit"] >= 1:
            row["regularizer"] = math.inf
            return
        # R of an eigenvalue l is l/4 to l/4*steepest; far from the limit that is as good as measured
        steepest = (
            -math.log1p(-row["share_of_limit"]) / row["share_of_limit"] if row["share_of_limit"] > 0 else math.inf
        )
        if self.matrix == "ggn" and steepest - 1 <= self.relative_error / 5:
            middle = (1 + steepest) / 8
            row["regularizer"], row["regularizer_stderr"] = middle * trace.value, middle * trace.stderr
            return

        def each(eigenvalues: Tensor) -> Tensor:
            return regularizer(eigenvalues.unsqueeze(-1), lr, momentum)

        try:
            found = sum_over_spectrum(curvature, each, self.relative_error, generator, _MOST)
        except UnstableError:
            row["regularizer"] = math.inf
            return
        except ArithmeticError:
            return  # so close to the limit that it cannot be told
        row["regularizer"], row["regularizer_stderr"] = found.value, found.stderr
        row["products"] += found.probes


def _sgd(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Learning rate and heavy-ball momentum, NaN where there is no single one."""
    groups = optimizer.param_groups
    rates, momenta = ({float(group.get(name, math.nan)) for group in groups} for name in ("lr", "momentum"))
    plain = not any(group.get("nesterov") or group.get("dampening") for group in groups)
    lr = rates.pop() if len(rates) == 1 else math.nan
    return lr, momenta.pop() if plain and len(momenta) == 1 else math.nan
