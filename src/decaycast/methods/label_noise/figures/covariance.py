"""The stationary covariance around a minimum: many chains on a linear model beside the closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import by_seed, finals, mean_trace, number
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures.linear_chains import EIGENVALUES, SAMPLES, inputs, measured_covariance

TOLERANCE = 0.02
SIGMA = 0.3
SETTINGS = ((0.1, 0.0), (1.0, 0.0), (1.8, 0.0), (1.0, 0.9), (3.0, 0.9))
"""lr*l1 and momentum of what is judged; the limits are 2 and 3.8."""
BATCH_PRODUCT = 0.5  # lr*l1 of the true minibatches


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size: chains, steps after the burn-in, seeds, and batch sizes of the true minibatches."""

    chains: int
    steps: int
    seeds: int
    batches: tuple[int, ...]


PLANS: dict[Size, Plan] = {
    "smoke": Plan(chains=32, steps=100, seeds=2, batches=(4,)),
    "small": Plan(chains=512, steps=3000, seeds=6, batches=(64, 16, 4, 1)),
    "paper": Plan(chains=2048, steps=20_000, seeds=12, batches=(64, 32, 16, 8, 4, 2, 1)),
}


@dataclass(frozen=True, kw_only=True)
class StationaryCovariance:
    """Covariance of SGD with label noise around a linear model's minimum, up to the limit of stability."""

    name: str = "label_noise/covariance"
    title: str = "Jitter around the minimum"
    claim: str = (
        "Around a minimum, the full gradient with label noise jitters with covariance lambda*(2 - lr*H/(1+beta))^(-1), to 2 % in "
        "the Frobenius norm, at lr*l1 = 0.1, 1 and 1.8, and with momentum 0.9 at 1 and 3."
    )
    source: str = "Damian, Ma & Lee 2021, section 3 (local coupling); momentum derived"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    def runs(self, size: Size) -> list[Run]:
        """Full gradients at every setting, true minibatches at one."""
        plan = self.plans[size]
        settings = [(*each, 0) for each in SETTINGS] + [(BATCH_PRODUCT, 0.0, batch) for batch in plan.batches]
        return [_run(plan, *each, seed) for seed in range(plan.seeds) for each in settings]

    def train(self, run: Run, data: object) -> Row:
        """Run the chains on inputs of the run's seed; `data` are not used."""
        config: dict[str, Any] = dict(run.config)
        x, lr, momentum, batch = inputs(run.seed), config["lr"], config["momentum"], config["batch_size"]
        sizes = {name: config[name] for name in ("chains", "steps")}
        with np.errstate(over="ignore", invalid="ignore"):  # batches of one diverge, and the row says so
            found = measured_covariance(x, lr=lr, momentum=momentum, sigma=SIGMA, batch=batch, seed=run.seed, **sizes)
        weight = theory.strength(lr=lr, batch_size=batch or 1, noise_variance=SIGMA**2, momentum=momentum)
        hessian = x.T @ x / SAMPLES
        law = theory.stationary_covariance(hessian, lr=lr, strength=weight, momentum=momentum)
        error, naive = (_distance(each, law) for each in (found, weight / 2 * np.eye(len(hessian))))
        if not error < 10.0:
            return Row(run=run, final={"diverged": 1.0})
        vectors = np.linalg.eigh(hessian)[1]
        along = np.einsum("ia,ij,ja->a", vectors, found, vectors) / weight
        curve = {"eigenvalue": sorted(EIGENVALUES), "variance": along.tolist()}
        return Row(run=run, curve=curve, final={"error": error, "naive_error": naive, "diverged": 0.0})

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Variance along each eigenvector, the error of the covariance by setting, and that of true minibatches."""
        panels = [_variance_panel(rows), _error_panel(rows), _batch_panel(rows)]
        return [panel for panel in panels if any(trace.x for trace in panel.traces)]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when at each of the five settings the mean relative error keeps within 2 % with its 95 % interval."""
        errors = {each: finals(_of(rows, *each), "error") for each in SETTINGS}
        if min(map(len, errors.values())) < 2:
            return decide([])
        bounds = [
            Bound(name=f"error at lr*l1 = {product:g}, momentum {beta:g}", values=values, high=TOLERANCE)
            for (product, beta), values in errors.items()
        ]
        return decide(bounds, words=_words(rows))


def _run(plan: Plan, product: float, momentum: float, batch: int, seed: int) -> Run:
    config: dict[str, Scalar] = {
        "experiment": "label_noise/covariance",
        "data": "digits",  # not looked at; the lab wants a data set
        "product": product,
        "lr": product / max(EIGENVALUES),
        "momentum": momentum,
        "batch_size": batch,
        "chains": plan.chains,
        "steps": plan.steps,
    }
    return Run(config=config, seed=seed)


def _distance(found: np.ndarray, law: Any) -> float:
    return float(np.linalg.norm(found - law) / np.linalg.norm(law))


def _of(rows: Sequence[Row], product: float, momentum: float, batch: int = 0) -> dict[int, Row]:
    return by_seed(rows, product=product, momentum=momentum, batch_size=batch)


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({int(number(row, "batch_size")) for row in rows} - {0})


def _words(rows: Sequence[Row]) -> str:
    found = []
    for batch in reversed(_batches(rows)):
        of_seed = _of(rows, BATCH_PRODUCT, 0.0, batch)
        errors, lost = finals(of_seed, "error"), sum(finals(of_seed, "diverged"))
        told = [f"{np.mean(errors):.2g}"] if errors else []
        told += [f"{lost:.0f} of {len(of_seed)} diverged"] if lost else []
        found.append(f"{' and '.join(told)} at {batch}")
    return (
        f"With true minibatches at lr*l1 = {BATCH_PRODUCT:g} the error is, by batch size: {', '.join(found)}"
        if found
        else ""
    )


def _variance_panel(rows: Sequence[Row]) -> Panel:
    traces = []
    for product, momentum in SETTINGS:
        of_seed = list(_of(rows, product, momentum).values())
        if of_seed:
            x = [number(of_seed[0], "lr") * each / (1 + momentum) for each in of_seed[0].curve["eigenvalue"]]
            columns = zip(*(row.curve["variance"] for row in of_seed), strict=True)
            name = f"lr*l1 = {product:g}" + (f", momentum {momentum:g}" if momentum else "")
            mean = mean_trace(name, x, [list(each) for each in columns])
            traces.append(Trace(name=name, x=mean.x, y=mean.y, mode="markers"))
    if traces:
        x = np.linspace(0.0, 1.85, 75)
        traces.append(Trace(name="1/(2 - x), theory", x=x.tolist(), y=(1 / (2 - x)).tolist()))
    return Panel(
        title="Variance along the eigenvectors of H",
        x_label="x = lr*l/(1+beta)",
        y_label="variance / lambda",
        traces=traces,
        y_log=True,
        caption="Four eigenvectors per setting, mean over seeds. For small learning rates all would be 1/2.",
    )


def _error_panel(rows: Sequence[Row]) -> Panel:
    traces = []
    for momentum in (0.0, 0.9):
        products = [p for p, beta in SETTINGS if beta == momentum and finals(_of(rows, p, beta), "error")]
        for name, words in (("error", "measured"), ("naive_error", "lambda/2 instead")):
            values = [finals(_of(rows, product, momentum), name) for product in products]
            label = words + (f", momentum {momentum:g}" if momentum else "")
            traces += [mean_trace(label, products, values)] if products else []
    ends = [p for p, beta in SETTINGS if finals(_of(rows, p, beta), "error")]
    if ends:
        traces.append(Trace(name=f"{TOLERANCE:.0%}", x=[min(ends), max(ends)], y=[TOLERANCE] * 2))
    return Panel(
        title="Error of the covariance",
        x_label="lr*l1 (limits: 2, with momentum 3.8)",
        y_label="relative Frobenius distance to theory",
        traces=traces,
        y_log=True,
        caption="Mean over seeds, band: one standard error. What is left is the chains' finite number. lambda/2 is what one "
        "would take for small learning rates.",
    )


def _batch_panel(rows: Sequence[Row]) -> Panel:
    found = {batch: finals(_of(rows, BATCH_PRODUCT, 0.0, batch), "error") for batch in _batches(rows)}
    shown = {batch: values for batch, values in found.items() if values}
    traces = [mean_trace("label noise in true minibatches", list(shown), list(shown.values()))]
    if shown:
        traces.append(Trace(name=f"{TOLERANCE:.0%}", x=[min(shown), max(shown)], y=[TOLERANCE] * 2))
    return Panel(
        title="True minibatches add noise of their own",
        x_label="batch size, drawn with replacement",
        y_label="relative Frobenius distance to theory",
        traces=traces,
        x_log=True,
        y_log=True,
        caption=f"At lr*l1 = {BATCH_PRODUCT:g}. Chains that diverged, or came ten times too far, are left out: see the verdict.",
    )
