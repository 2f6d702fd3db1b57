"""`decaycast find` from request to page: probe, forecast, verify, report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Run, Scalar, jsonable
from decaycast.core.schedule import lr_by_name
from decaycast.core.timescale import group_rate
from decaycast.lab.execute import Execute, in_process, processes
from decaycast.lab.probe import TrialProbe
from decaycast.lab.provenance import provenance
from decaycast.lab.report import write_forecast_page
from decaycast.lab.store import Store
from decaycast.lab.trial import Trial, train_run
from decaycast.lab.verify import Verification, verify
from decaycast.methods.l2.forecast import Forecast, forecast

USUAL_DEFAULTS = {"sgd": 5e-4, "adamw": 1e-2}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `decaycast find` was asked."""

    config: dict[str, Scalar]
    metric: str = "loss"
    max_cost: float = 0.3
    seed: int = 0
    verify: bool = False
    workers: int = 1
    data_dir: str | None = None
    out: Path = Path("decaycast-out")
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What it answered, and where the page is."""

    forecast: Forecast
    verification: Verification | None
    page: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        checked = None if self.verification is None else asdict(self.verification)
        return {**self.forecast.to_dict(), "verification": jsonable(checked), "page": str(self.page)}


def recipe_config(**settings: Scalar) -> dict[str, Scalar]:
    """A run's config from settings, without those that are None."""
    steps = settings.get("steps")
    if not isinstance(steps, int) or steps < 10:
        raise ValueError(f"the budget must be a whole number of at least 10 optimiser steps, got {steps}")
    batch_size = settings.get("batch_size", 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"the batch size must be a whole number >= 1, got {batch_size}")
    return {name: value for name, value in settings.items() if value is not None}


def find_weight_decay(
    request: Request,
    *,
    on_row: Callable[[float, dict[str, float]], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Forecast, verify when asked, write the page. Interrupted, it resumes from the store in `request.out`."""
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the output folder {request.out}: {error.strerror}; choose one you can write to (--out)"
        ) from error
    metric = f"validation_{request.metric}"
    rates = effective_rates(request.config, request.data_dir)
    with Store(request.out / "rows.sqlite") as store:
        probe = TrialProbe(
            request.config, seed=request.seed, metric=metric, store=store, data_dir=request.data_dir, on_row=on_row
        )
        found = forecast(
            probe,
            int(request.config["steps"]),  # type: ignore[arg-type]
            lr=rates,
            higher_is_better=request.metric == "accuracy",
            max_cost=request.max_cost,
            metric=metric.replace("_", " "),
        )
        checked = _verify(request, found, store, say) if request.verify else None
    page = write_forecast_page(
        request.out / "forecast.html",
        found,
        curves=probe.curves,
        verification=checked,
        recipe=recipe(request.config, found),
        settings={**request.config, "metric": request.metric, "max_cost": request.max_cost, "seed": request.seed},
        command=request.command,
        provenance=provenance(),
    )
    return Result(forecast=found, verification=checked, page=page)


def effective_rates(config: dict[str, Scalar], data_dir: str | None) -> np.ndarray:
    """Shrink per step and unit of weight decay over the budget, as `forecast` wants it; also checks the config."""
    trial = Trial(Run(config={**config, "weight_decay": 1e-6}), data_dir=data_dir)
    group = trial.optimizer.param_groups[0]
    rate = group_rate(trial.optimizer, group) / float(group["weight_decay"])
    steps = int(trial.config["steps"])
    schedule = lr_by_name(str(trial.config["schedule"]), steps)
    return rate * np.array([schedule(step) for step in range(steps)])


def recipe(config: dict[str, Scalar], found: Forecast) -> str:
    """Lines of torch to copy: optimiser, schedule, and what the numbers mean."""
    lr, decay, steps = config["lr"], float(f"{found.weight_decay:.3g}"), config["steps"]
    momentum = f"momentum={config['momentum']}, " if config.get("momentum") else ""
    name = "AdamW" if config["optimizer"] == "adamw" else "SGD"
    lines = [f"optimizer = torch.optim.{name}(model.parameters(), lr={lr}, {momentum}weight_decay={decay})"]
    if config["schedule"] == "cosine":
        lines.append(f"scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max={steps})")
    elif config["schedule"] != "constant":
        lines.insert(0, "import decaycast.core.schedule")
        lines.append(f"multiplier = decaycast.core.schedule.lr_by_name({config['schedule']!r}, {steps})")
        lines.append("scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)")
    lines.append(
        f"# {found.efolds:.3g} e-folds over {steps} steps of batch size {config['batch_size']}; verdict: {found.verdict}"
    )
    return "\n".join(lines)


def _verify(request: Request, found: Forecast, store: Store, say: Callable[[str], None]) -> Verification:
    done = 0

    def report(row: Row) -> None:
        nonlocal done
        done += 1
        say(f"verifying ({done} runs done)")

    say("verifying")
    execute: Execute = in_process if request.workers <= 1 else processes(request.workers)
    return verify(
        request.config,
        found.weight_decay,
        store,
        default=USUAL_DEFAULTS[str(request.config["optimizer"])],
        forecast_seed=request.seed,
        metric=f"validation_{request.metric}",
        train=functools.partial(train_run, data_dir=request.data_dir),
        execute=execute,
        on_row=report,
    )
