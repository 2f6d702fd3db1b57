"""Sparse recovery in the quadratic model: label noise against descent without noise and with spherical noise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import by_seed, finals, mean_trace, number
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures.quadratic import KINDS, descend, problem

NONE, LABEL, SPHERICAL, EQUAL = KINDS
RECOVERED, FAR = 0.03, 60.0  # test errors; at the start it is 95
SAMPLES, LR = 40, 0.02
LENGTHS = {"none": 1.0, "label": 1.0, "spherical": 0.01, "spherical of equal variance": 1.0}
"""Standard deviation of the noise by kind; 0.01 is the source's for spherical noise."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size: drift times (of label noise, before the learning rate drops), sample counts, and seeds."""

    drift: float
    seeds: int
    other_drifts: tuple[float, ...]
    other_samples: tuple[int, ...]
    other_seeds: int


PLANS: dict[Size, Plan] = {
    "smoke": Plan(drift=0.4, seeds=2, other_drifts=(0.2,), other_samples=(20,), other_seeds=1),
    "small": Plan(
        drift=6.0, seeds=20, other_drifts=(0.25, 0.5, 1.0, 2.0, 3.0, 4.0), other_samples=(20, 30, 60), other_seeds=10
    ),
    "paper": Plan(
        drift=6.0,
        seeds=60,
        other_drifts=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
        other_samples=(15, 20, 25, 30, 35, 50, 60),
        other_seeds=30,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SparseRecovery:
    """Test error in the quadratic model of HaoChen et al. by kind of noise, drift time and number of samples."""

    name: str = "label_noise/sparse-recovery"
    title: str = "Sparse recovery in the quadratic model"
    claim: str = (
        "From v = 1, label noise finds the five sparse weights of 100 from 40 samples (test error at most 0.03), while gradient "
        "descent without noise or with spherical noise stays above 60."
    )
    source: str = "HaoChen, Wei, Lee & Ma 2021, quadratic model; drift time from Damian, Ma & Lee 2021"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    def runs(self, size: Size) -> list[Run]:
        """Every kind of noise at the judged setting; label noise at other drift times and sample counts."""
        plan = self.plans[size]
        found = [_run(kind, SAMPLES, plan.drift, seed) for seed in range(plan.seeds) for kind in KINDS]
        for seed in range(plan.other_seeds):
            found += [_run(LABEL, SAMPLES, drift, seed) for drift in plan.other_drifts]
            found += [_run(LABEL, samples, plan.drift, seed) for samples in plan.other_samples]
        return found

    def train(self, run: Run, data: object) -> Row:
        """Descend on Gaussian data of the run's seed; `data` are not used."""
        config: dict[str, Any] = dict(run.config)
        constant, dropped = config["steps"], config["dropped_steps"]
        rates = np.concatenate([np.full(constant, LR), np.full(dropped, LR / 10), np.full(dropped, LR / 100)])
        at = sorted({*np.linspace(0, constant, 16).astype(int).tolist(), len(rates)})
        began = time.process_time()
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges ends, and its row says so
            curve = descend(
                problem(config["samples"], run.seed),
                rates,
                kind=config["kind"],
                delta=config["delta"],
                seed=run.seed,
                at=at,
            )
        cpu = time.process_time() - began
        if len(curve["step"]) < len(at) or not np.isfinite(curve["error"][-1]):
            return Row(run=run, status="failed", reason="the weights are no longer finite")
        final = {name: curve[name][-1] for name in ("error", "trace", "train_loss")}
        kept = {name: curve[name] for name in ("step", "error", "trace")}
        return Row(run=run, curve=kept, final={**final, "processor_seconds": cpu})

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Test error on the way, by drift time and by number of samples; trace of H on the way."""
        if not _main(rows, LABEL):
            return []
        return [_way_panel(rows, "error"), _drift_panel(rows), _samples_panel(rows), _way_panel(rows, "trace")]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when three means over the seeds keep their bounds with their 95 % intervals (`bounds`).

        The test error with label noise is at most 0.03; without noise, and with the source's spherical noise, at least 60.
        """
        arms = {kind: _main(rows, kind) for kind in (LABEL, NONE, SPHERICAL)}
        errors = {kind: finals(of_seed, "error") for kind, of_seed in arms.items()}
        if min(map(len, errors.values())) < 2:
            return decide([])
        bounds = [
            Bound(name="test error with label noise", values=errors[LABEL], high=RECOVERED),
            Bound(name="without noise", values=errors[NONE], low=FAR),
            Bound(name="with spherical noise", values=errors[SPHERICAL], low=FAR),
        ]
        return decide(bounds, words=_words(rows), numbers=_numbers(rows))


def _run(kind: str, samples: int, drift: float, seed: int) -> Run:
    per_step = LR * theory.strength(lr=LR, batch_size=1, noise_variance=0.5)
    config: dict[str, Scalar] = {
        "experiment": "label_noise/sparse-recovery",
        "data": "digits",  # not looked at; the lab wants a data set
        "kind": kind,
        "delta": LENGTHS[kind],
        "samples": samples,
        "lr": LR,
        "drift": drift,
        "steps": round(drift / per_step),
        "dropped_steps": round(min(1.0, drift) / per_step),
    }
    return Run(config=config, seed=seed)


def _main(rows: Sequence[Row], kind: str) -> dict[int, Row]:
    """Rows of one kind with 40 samples at the judged drift time, which every kind has."""
    drifts = [number(row, "drift") for row in rows if row.run.config["kind"] == NONE]
    return by_seed(rows, kind=kind, samples=SAMPLES, drift=max(drifts)) if drifts else {}


def _label(rows: Sequence[Row], **wanted: float) -> dict[int, Row]:
    return by_seed(rows, kind=LABEL, **wanted)


def _drifts(rows: Sequence[Row]) -> list[float]:
    return sorted({number(row, "drift") for row in rows if row.run.config["kind"] == LABEL})


def _counts(rows: Sequence[Row]) -> list[int]:
    return sorted({int(number(row, "samples")) for row in rows if row.run.config["kind"] == LABEL})


def _by_drift(rows: Sequence[Row]) -> dict[float, list[float]]:
    found = {drift: finals(_label(rows, samples=SAMPLES, drift=drift), "error") for drift in _drifts(rows)}
    return {drift: values for drift, values in found.items() if values}


def _by_samples(rows: Sequence[Row]) -> dict[int, list[float]]:
    judged = next(iter(_main(rows, LABEL).values())).run.config["drift"]
    found = {n: finals(_label(rows, samples=n, drift=float(judged or 0)), "error") for n in _counts(rows)}
    return {n: values for n, values in found.items() if values}


def _words(rows: Sequence[Row]) -> str:
    seconds = finals(_main(rows, LABEL), "processor_seconds")
    worst = max(finals(_main(rows, LABEL), "error"))
    drifts = ", ".join(f"{np.mean(v):.2g} at {drift:g}" for drift, v in _by_drift(rows).items())
    counts = ", ".join(f"{np.mean(v):.2g} from {n}" for n, v in _by_samples(rows).items())
    return (
        f"Worst seed with label noise {worst:.3g}; a run takes {np.median(seconds):.2g} s of one processor. Mean error by drift "
        f"time: {drifts}; by samples: {counts}"
    )


def _numbers(rows: Sequence[Row]) -> dict[str, float]:
    numbers = {f"error at drift {drift:g}": float(np.mean(v)) for drift, v in _by_drift(rows).items()}
    numbers |= {f"error from {n} samples": float(np.mean(v)) for n, v in _by_samples(rows).items()}
    for kind in KINDS:
        numbers |= {f"trace, {kind}": float(np.mean(v)) for v in [finals(_main(rows, kind), "trace")] if v}
    for value in [finals(_main(rows, EQUAL), "error")]:
        numbers |= {f"error, {EQUAL}": float(np.mean(value))} if value else {}
    return numbers


_WAY_WORDS = (
    "Mean over seeds, band: one standard error. The other kinds make as many steps; no noise and spherical noise of 0.01 lie on "
    "each other. Before the learning rate drops, label noise keeps a jitter that the drop takes away."
)
_TRACE_WORDS = (
    "Mean over seeds, band: one standard error. Spherical noise of the label noise's total variance moves v away from flat "
    "minima; the source's is a hundred times shorter and does little."
)


def _way_panel(rows: Sequence[Row], column: str) -> Panel:
    traces = []
    for kind in KINDS:
        of_seed = list(_main(rows, kind).values())
        if of_seed:
            x = [step / number(of_seed[0], "steps") * number(of_seed[0], "drift") for step in of_seed[0].curve["step"]]
            kept = [i for i, place in enumerate(x) if place <= number(of_seed[0], "drift")]
            values = [[row.curve[column][i] for row in of_seed] for i in kept]
            traces.append(mean_trace(_kind_words(kind), [x[i] for i in kept], values))
    what = "test error ||v*v - w||²" if column == "error" else "tr H"
    return Panel(
        title="Test error on the way" if column == "error" else "Flatness on the way",
        x_label="drift time of the label noise, at constant learning rate",
        y_label=what,
        traces=traces,
        y_log=True,
        caption=_WAY_WORDS if column == "error" else _TRACE_WORDS,
    )


def _kind_words(kind: str) -> str:
    return {NONE: "no noise", LABEL: "label noise", SPHERICAL: "spherical noise 0.01"}.get(kind, kind)


def _drift_panel(rows: Sequence[Row]) -> Panel:
    found = _by_drift(rows)
    ends = [min(found), max(found)]
    return Panel(
        title="Where it fails: too little drift",
        x_label="drift time before the learning rate drops",
        y_label="final test error",
        traces=[
            mean_trace(f"label noise, {SAMPLES} samples", list(found), list(found.values())),
            Trace(name=f"{RECOVERED:g}", x=ends, y=[RECOVERED] * 2),
        ],
        x_log=True,
        y_log=True,
        caption="Each point: runs of that length at a constant learning rate, then two drops by 10. Off the five true weights "
        "v² shrinks like exp(-2 times the drift time).",
    )


def _samples_panel(rows: Sequence[Row]) -> Panel:
    found = _by_samples(rows)
    ends = [min(found), max(found)]
    return Panel(
        title="Where it fails: too few samples",
        x_label="samples, for 100 weights of which 5 are not zero",
        y_label="final test error",
        traces=[
            mean_trace("label noise", list(found), list(found.values())),
            Trace(name=f"{RECOVERED:g}", x=[float(n) for n in ends], y=[RECOVERED] * 2),
        ],
        y_log=True,
        caption="At the judged drift time. With too few samples the flattest interpolation is not the sparse one that made the "
        "labels.",
    )
