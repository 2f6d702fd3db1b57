"""A realistic forecast, verification and figure for the tests of the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from decaycast.core.experiment import Panel, Row, Run, Scalar, Trace, Verdict
from decaycast.lab.pages.sweep import write_sweep_page
from decaycast.lab.report import write_figure_page, write_forecast_page, write_probe_page, write_report
from decaycast.lab.shortcuts import probe_panels
from decaycast.methods.l2.forecast import Arm, Forecast
from decaycast.methods.large_lr.probe_report import Arm as ProbeArm
from decaycast.methods.large_lr.probe_report import ProbeReport

DECAYS = (1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2)
RATE = 0.05 * 20_000  # summed learning rate: e-folds = RATE * weight_decay
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\""
RECIPE = """optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1.25e-3)
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
# train for 20,000 steps"""
SETTINGS = {
    "data": "mnist",
    "model": "mlp",
    "train_size": 512,
    "optimizer": "sgd",
    "lr": 0.05,
    "momentum": 0.0,
    "schedule": "constant",
    "steps": 20_000,
    "batch_size": 128,
    "rule": None,
}
PROVENANCE = {
    "decaycast": "0.1.0",
    "torch": "2.13.0+cpu",
    "python": "3.11.9",
    "platform": "Linux",
    "device": "cpu",
    "git": "0123456789abcdef0123456789abcdef01234567-dirty",
    "time": "2026-11-20T05:40:00Z",
    "processor": "",
}
COMMAND = "decaycast find --data mnist --train-size 512 --model mlp --lr 0.05 --budget 20000 --verify"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The fields of `decaycast.lab.verify.Verification`."""

    weight_decays: tuple[float, ...] = (0.0, 1e-4, 4e-4, 1.25e-3, 4e-3, 1.2e-2)
    means: tuple[float, ...] = (1.02, 0.93, 0.74, 0.647, 0.655, 0.91)
    stderrs: tuple[float, ...] = (0.012, 0.011, 0.008, 0.006, 0.007, math.nan)
    seeds: int = 3
    regret: float = 0.0021
    regret_stderr: float = 0.0009
    metric: str = "validation_loss"
    cost: float = 18.0


def curve(weight_decay: float, points: int = 50, last: float = 4000.0) -> dict[str, list[float]]:
    """Columns shaped like a training: the loss falls, and rises again where the decay is too weak or too strong."""
    steps = [last * i / (points - 1) for i in range(points)]
    miss = abs(math.log(weight_decay / 4e-3)) if weight_decay else 3.0
    loss = [0.62 + 1.68 * math.exp(-step / 300) + 0.05 * miss * (step / last) ** 1.5 for step in steps]
    wobble = [0.006 * math.sin(17 * i + 5 * miss) for i in range(points)]
    return {
        "step": steps,
        "efolds": [RATE / 20_000 * weight_decay * step for step in steps],
        "validation_loss": [value + noise for value, noise in zip(loss, wobble, strict=True)],
        "validation_accuracy": [
            0.845 - 0.75 * math.exp(-step / 250) - 0.006 * miss - noise
            for step, noise in zip(steps, wobble, strict=True)
        ],
    }


def curves() -> dict[float, dict[str, list[float]]]:
    """Five arms; one has a hole in its loss, and one that diverged stops early."""
    arms = {decay: curve(decay) for decay in DECAYS}
    arms[DECAYS[1]]["validation_loss"][20] = math.nan
    arms[0.41] = {name: values[:4] for name, values in curve(0.41).items()}
    return arms


def forecast(**changes: object) -> Forecast:
    """A trusted forecast from `curves`, with one failed arm."""
    arms = tuple(
        Arm(weight_decay=decay, steps=tuple(columns["step"]), values=tuple(columns["validation_loss"]))
        for decay, columns in curves().items()
    )
    arms = (*arms[:-1], replace(arms[-1], status="failed", reason="loss became infinite at step 312"))
    sample = Forecast(
        weight_decay=1.25e-3,
        interval=(7.1e-4, 2.3e-3),
        verdict="trust",
        reason="five arms agree on their order over the last third of the probe, and the best one is not at the edge.",
        efolds=RATE * 1.25e-3,
        cost=0.28,
        budget_steps=20_000,
        metric="validation loss",
        higher_is_better=False,
        arms=arms,
        rate_per_decay=RATE,
    )
    return replace(sample, **changes)  # pyright: ignore[reportArgumentType]


class SampleFigure:
    """A figure with a banded family, loose markers and a log axis; it needs two runs."""

    name = "l2/time-to-best"
    title = "Time to the best accuracy is inverse in the weight decay"
    claim = "The step at which validation accuracy peaks falls as 1/λ over two decades."
    source = "Lewkowycz & Gur-Ari 2020, section 2"

    def __init__(self, outcome: str = "held", panels: list[Panel] | None = None) -> None:
        self.outcome, self.panels = outcome, panels

    def runs(self, size: str) -> list[Run]:
        """Two runs at every size."""
        return [Run(config={"weight_decay": decay, "model": "mlp"}, seed=3) for decay in (0.01, 0.1)]

    def rows(self, reason: str = "loss became NaN at step 40") -> list[Row]:
        """One finished and one failed row."""
        done, failed = self.runs("small")
        stamps = ({**PROVENANCE, "time": "2026-11-20T05:41:00Z"}, PROVENANCE)
        return [
            Row(run=done, provenance=stamps[0]),
            Row(run=failed, status="failed", reason=reason, provenance=stamps[1]),
        ]

    def draw(self, rows: list[Row]) -> list[Panel]:
        """A log-log panel with a gap and an empty-bounded trace, and a linear one with bars."""
        if self.panels is not None:
            return self.panels
        x = [10 ** (-3 + i / 4) for i in range(9)]
        y = [3 / value for value in x]
        holed = [math.nan if i == 4 else value for i, value in enumerate(y)]
        band = Trace(name="SGD", x=x, y=holed, low=[v / 1.5 for v in holed], high=[v * 1.5 for v in holed])
        law = Trace(name="c/λ", x=x, y=[2.6 / value for value in x])
        loose = Trace(
            name="5 seeds",
            x=[1, 2, 3],
            y=[0.8, 0.83, 0.81],
            low=[0.79, 0.8, 0.8],
            high=[0.82, 0.85, 0.83],
            mode="markers",
        )
        return [
            Panel(
                title="Step of best accuracy",
                x_label="weight decay λ",
                y_label="step",
                traces=[band, law],
                x_log=True,
                y_log=True,
                caption="Band: a factor 1.5 either way.",
            ),
            Panel(title="Best accuracy", x_label="arm", y_label="validation accuracy", traces=[loose]),
        ]

    def judge(self, rows: list[Row]) -> Verdict:
        """The outcome it was made with."""
        return Verdict(outcome=self.outcome, reason="slope -0.97 ± 0.04", numbers={"slope": -0.97, "r2": math.nan})  # pyright: ignore[reportArgumentType]


def other_figure(name: str = "l2/other", claim: str = EVIL) -> SampleFigure:
    """A figure whose claim does not hold and is hostile, and whose one run is missing."""
    figure = SampleFigure("not held")
    figure.name, figure.claim = name, claim
    figure.runs = lambda size: [Run(config={"size": size}, seed=9)]
    return figure


def probe_report() -> ProbeReport:
    """Two rates, two seeds: the small one memorises the shortcut before it learns the rest."""
    curves = {
        "step": (1.0, 500.0, 1000.0),
        "alone": (0.1, 0.5, 0.9),
        "clean": (0.1, 0.3, 0.4),
        "control": (0.1, 0.3, 0.5),
    }
    arms = [
        ProbeArm(
            lr=lr,
            alone_before=alone,
            alone_after=(0.9, 0.88),
            clean_before=(0.4, 0.5),
            clean_after=(0.5, 0.6),
            control_alone=(0.1, 0.11),
            control_clean=(0.55, 0.66),
            curves=curves,
        )
        for lr, alone in ((0.3, (0.12, 0.1)), (0.01, (0.9, 0.91)))
    ]
    words = {"what": f"patch {EVIL}", "difficulty": "separation 1, tuned"}
    numbers = {
        "small": 0.01,
        "steps": 1000,
        "anneal_at": 500,
        "chance": 0.1,
        "seeds": 2,
        "trainings": 8,
        "seconds": 1.0,
    }
    return ProbeReport(**words, **numbers, learnable=True, arms=arms)  # pyright: ignore[reportArgumentType]


def sweep_rows(
    rates: int = 5,
    decays: int = 4,
    seeds: int = 2,
    *,
    model: str = "mlp",
    optimizers: tuple[str, ...] = ("sgd", "adamw"),
) -> list[Row]:
    """A grid of trainings whose best setting is the middle rate with the last decay but one, under the first optimiser.

    The largest rate with the largest decay fails. Weight decay starts at 0.
    """
    rows = []
    for seed in range(seeds):
        for optimizer in optimizers:
            for i in range(rates):
                for j in range(decays):
                    config: dict[str, Scalar] = {"model": model, "lr": round(0.01 * 2**i, 6), "optimizer": optimizer}
                    config["weight_decay"] = round(1e-5 * 10**j, 9) if j else 0.0
                    rows.append(_sweep_row(Run(config=config, seed=seed), (i, j), (rates, decays), optimizers))
    return rows


def _sweep_row(run: Run, at: tuple[int, int], ends: tuple[int, int], optimizers: tuple[str, ...]) -> Row:
    (i, j), (rates, decays) = at, ends
    if (i, j) == (rates - 1, decays - 1):
        return Row(run=run, status="failed", reason=f"loss became infinite {EVIL}", provenance=PROVENANCE)
    loss = 0.3 + 0.05 * abs(i - rates // 2) + 0.07 * abs(j - (decays - 2)) + 0.001 * run.seed
    loss += 0.02 * optimizers.index(str(run.config["optimizer"]))
    curve = {"step": (0.0, 100.0), "validation_loss": (2.3, loss), "validation_accuracy": (0.1, 1 - loss)}
    return Row(run=run, curve=curve, final={"test_loss": loss + 0.1}, seconds=2.0, provenance=PROVENANCE)


def every_page(folder: Path, rows: list[Row] | None = None) -> dict[str, Path]:
    """One page of each kind below `folder`, by kind; a good part of their texts is hostile."""
    forecast_page = write_forecast_page(
        folder / "forecast.html", forecast(), curves=curves(), verification=Grid(), recipe=RECIPE, settings=SETTINGS,
        command=COMMAND, provenance=PROVENANCE,
    )  # fmt: skip
    figure = SampleFigure()
    report = probe_report()
    probe_page = write_probe_page(
        folder / "probe.html",
        report,
        panels=probe_panels(report),
        settings=SETTINGS,
        command=COMMAND,
        provenance=PROVENANCE,
    )
    write_report(folder / "report", [figure, other_figure()], figure.rows(EVIL), "small")
    sweep_page = write_sweep_page(
        folder / "sweep.html", sweep_rows(model=EVIL, optimizers=("sgd", EVIL)) if rows is None else rows,
        settings={"model": EVIL, "data": "digits"}, command=COMMAND,
    )  # fmt: skip
    return {
        "forecast": forecast_page,
        "figure": write_figure_page(folder / "figure.html", figure, figure.rows(EVIL), "small"),
        "probe": probe_page,
        "index": folder / "report" / "index.html",
        "sweep": sweep_page,
    }
