"""The paper's toy: noisy samples of a sine, a spline kernel, a fixed tolerance; the error of every fit, and its collapse.

Conventions of this file. Target sin(2 pi x) on [0, 1], Gaussian noise of deviation sigma, samples at x = k/(samples + 1),
k = 1..samples: the kernel vanishes at 0 and 1, so that samples there could not be fitted. The kernel is the Green's function of
the regulariser (integral of f'' squared, f = f'' = 0 at the ends). The error of a fit is its mean squared distance to the sine
without noise on 101 points. Fit 1 is the teacher. Draws of a run share nothing but the samples' places.

Source: Mobahi, Farajtabar & Bartlett 2020 (arXiv 2002.05715), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.seeds import number
from decaycast.methods.self_distill.bounds import paper_bound, paper_rounds, rounds_at_least, rounds_at_most
from decaycast.methods.self_distill.theory import constrained_rounds

FITS = 9
ROUNDING = 1e-9  # of a ratio r_t, in the comparisons with bounds
FAR = 4.0  # standard errors: about one in a thousand for the ~50 numbers of the table together
PAPER = "Mobahi, Farajtabar & Bartlett 2020"

Setting = tuple[int, float, float]
"""Samples, sigma, tolerance."""
JUDGED: Setting = (11, 0.5, 0.045)

# Mean errors of fits 1, 2, ... over 400 draws by another implementation, to three digits; its scatter is allowed for.
REFERENCE: dict[Setting, tuple[float, ...]] = {
    JUDGED: (0.116, 0.074, 0.120, 0.245, 0.391, 0.475, 0.494, 0.495),
    (11, 0.5, 0.02): (0.142, 0.098, 0.073, 0.086, 0.139, 0.225, 0.327, 0.415, 0.468),
    (11, 0.3, 0.02): (0.039, 0.031, 0.066, 0.140, 0.249, 0.375),
    (51, 0.5, 0.045): (0.127, 0.057, 0.028, 0.100, 0.262, 0.445, 0.494),
    (101, 0.5, 0.045): (0.129, 0.059, 0.017, 0.068, 0.214, 0.421, 0.494),
}
REFERENCE_DRAWS, REFERENCE_DIGIT = 400, 0.0005
FIRST_IS_BEST: dict[Setting, float] = {(11, 0.5, 0.1): 0.66, (11, 0.5, 0.2): 0.96}
"""Share of draws whose first fit is the best, by the same implementation: the tolerance is too near the noise's variance."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One size: which settings, and how many draws in how many runs."""

    settings: tuple[Setting, ...]
    draws: int
    seeds: int


_ALL = (*REFERENCE, *FIRST_IS_BEST)
PLANS: dict[Size, Plan] = {
    "smoke": Plan(settings=(JUDGED, (11, 0.5, 0.2)), draws=20, seeds=1),
    "small": Plan(settings=_ALL, draws=400, seeds=4),
    "paper": Plan(settings=_ALL, draws=4000, seeds=10),
}


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Error by fit, the filters B_t, and collapse against its bounds."""

    name: str = "self_distill/toy"
    title: str = "The toy problem: better, sparser, gone"
    claim: str = (
        "With 11 samples, sigma = 0.5 and a tolerance of 0.045, the second fit has the smallest mean error and later fits "
        "collapse to zero; in no draw of any setting is a bound on the rounds broken, and the table of errors is found again."
    )
    source: str = f"{PAPER}, section 4; the table: an independent implementation of it"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    def runs(self, size: Size) -> list[Run]:
        """Every setting at every seed; a run holds many draws."""
        plan = self.plans[size]
        return [_run(setting, plan.draws, seed) for seed in range(plan.seeds) for setting in plan.settings]

    def train(self, run: Run, data: object) -> Row:
        """Draw noise, distil every draw, and compare with the bounds; `data` are not used."""
        config: dict[str, Any] = dict(run.config)
        samples, sigma, eps = config["samples"], config["sigma"], config["tolerance"]
        x = np.arange(1, samples + 1) / (samples + 1)
        noise = np.random.default_rng([run.seed, samples]).normal(0.0, sigma, (samples, config["draws"]))
        labels = np.sin(2 * np.pi * x)[:, None] + noise
        curve, final = distilled(x, labels, eps)
        return Row(run=run, curve=curve, final=final)

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Errors by fit in every setting, filters and bounds in the judged one."""
        groups = by_setting(rows)
        if not groups:
            return []
        panels = [_error_panel(groups)]
        if JUDGED in groups:
            panels += [_filter_panel(groups[JUDGED]), _bounds_panel(groups[JUDGED])]
        return panels

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when the second fit is best by more than 4 standard errors, no bound is broken, and the table agrees.

        The table agrees when every mean lies within 4 standard errors (of both implementations together) and rounding of it.
        """
        groups = by_setting(rows)
        if set(_ALL) - set(groups) or min(pooled(group)["draws"] for group in groups.values()) < REFERENCE_DRAWS:
            return Verdict(outcome="not enough data", reason=f"needs {REFERENCE_DRAWS} draws of every setting")
        own = groups[JUDGED]
        errors, second, last = _errors(own), *_gap(own)
        broken = sum(pooled(group)["broken"] for group in groups.values())
        off = {setting: _worst(groups[setting]) for setting in _ALL}
        best = int(np.argmin(errors))
        held = best == 1 and second > FAR and last > FAR and broken == 0 and max(off.values()) <= 1.0
        draws = int(sum(pooled(group)["draws"] for group in groups.values()))
        fits = pooled(own)
        reason = (
            f"Errors by fit {', '.join(f'{error:.3f}' for error in errors)}: fit {best + 1} is best, {second:.0f} standard "
            f"errors below fit 1. {broken:.0f} bounds broken in {draws:,} draws; collapse after {fits['live_mean']:.2f} fits "
            f"({fits['live_min']:.0f} to {fits['live_max']:.0f}), bounds on average {fits['least']:.2f} and "
            f"{fits['most']:.2f}, the paper's {fits['paper']:.2g}. Largest deviation from the table: "
            f"{max(off.values()):.2f} of what is allowed"
        )
        numbers = {f"error of fit {t + 1}": error for t, error in enumerate(errors)}
        numbers |= {"broken bounds": broken, "draws": float(draws), "largest deviation": max(off.values())}
        return Verdict(outcome="held" if held else "not held", reason=reason, numbers=numbers)


def spline_kernel(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Green's function of the fourth derivative on [0, 1] with f = f'' = 0 at the ends, shape (len(x), len(t)).

    Source: Mobahi et al. 2020, section 4; eigenvalues 1/(k pi)^4.

    >>> round(float(spline_kernel(np.array([0.5]), np.array([0.5]))[0, 0]) * 48, 12)
    1.0
    """
    x, t = x[:, None], t[None]
    return np.maximum(x - t, 0.0) ** 3 / 6 - x * (1 - t) * (x**2 - 2 * t + t**2) / 6


def distilled(x: np.ndarray, labels: np.ndarray, eps: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """All draws of a run at once: columns over the fits, and numbers of the run.

    Args:
        x: places of the samples, shape (samples,).
        labels: shape (samples, draws).
        eps: tolerance.
    """
    d, v = np.linalg.eigh(spline_kernel(x, x))
    grid = np.linspace(0.0, 1.0, 101)
    z = v.T @ labels
    found = constrained_rounds(d, z, eps, FITS)
    across, truth = spline_kernel(grid, x) @ v, np.sin(2 * np.pi * grid)
    errors = np.array([((across @ (dual * z) - truth[:, None]) ** 2).mean(0) for dual in found.duals])  # (fits, draws)
    missed = np.array([(((1.0 - kept) * z) ** 2).sum(0) / len(x) for kept in found.filters])
    curve = {
        "fit": [float(t + 1) for t in range(FITS)],
        "error": errors.mean(1).tolist(),
        "error_deviation": errors.std(1).tolist(),
        "gap": (errors - errors[1]).mean(1).tolist(),
        "gap_deviation": (errors - errors[1]).std(1).tolist(),
        "train_error": missed.mean(1).tolist(),
        "live": np.isfinite(found.shifts).mean(1).tolist(),
        "norm": found.norms[:-1].mean(1).tolist(),
    }
    # at most 11 directions, the smoothest first
    curve |= {f"filter_{k + 1}": found.filters[:, -1 - k].mean(1).tolist() for k in range(min(len(x), 11))}
    live = until_collapse(d, z, eps)
    return curve, {**_bounds(d, found.norms, live), "first_is_best": float((errors.argmin(0) == 0).mean())}


def until_collapse(d: np.ndarray, z: np.ndarray, eps: float) -> np.ndarray:
    """Fits that are not zero, of every draw; rounds are added until all draws have collapsed."""
    rounds = 16
    while True:
        norms = constrained_rounds(d, z, eps, rounds).norms
        if np.all(norms[-1] <= 1.0):
            return (norms <= 1.0).argmax(0)
        rounds *= 2


def _bounds(d: np.ndarray, norms: np.ndarray, live: np.ndarray) -> dict[str, float]:
    """Numbers of the bounds, and how often one is broken: those on the count, and on each r_t while nothing has collapsed."""
    r0, kappa, t = norms[0], float(d.max() / d[d > 0].min()), np.arange(len(norms))
    inside = t[:, None] <= live  # labels of rounds up to the first that are within the tolerance
    least, most = np.array([rounds_at_least(r) for r in r0]), np.array([rounds_at_most(r) for r in r0])
    paper = np.array([paper_bound(r, kappa, t) if r > 1 else np.zeros(len(t)) for r in r0]).T
    broken = [
        live < least,
        live > most,
        inside & (norms < r0 - t[:, None] - ROUNDING),
        inside & (norms**2 > r0**2 - t[:, None] + ROUNDING),
        inside & (norms < paper - ROUNDING),
    ]
    return {
        "draws": float(len(r0)),
        "broken": float(sum(each.sum() for each in broken)),
        "live_mean": float(live.mean()),
        "live_min": float(live.min()),
        "live_max": float(live.max()),
        "least": float((r0 - 1).mean()),
        "most": float((r0**2 - 1).mean()),
        "paper": float(np.mean([paper_rounds(max(r, 1.0), kappa) for r in r0])),
        "condition": kappa,
    }


def _run(setting: Setting, draws: int, seed: int) -> Run:
    samples, sigma, tolerance = setting
    config: dict[str, Scalar] = {
        "experiment": "self_distill/toy",
        "data": "digits",  # not looked at; the lab wants a data set
        "samples": samples,
        "sigma": sigma,
        "tolerance": tolerance,
        "draws": draws,
    }
    return Run(config=config, seed=seed)


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Finished rows by their setting."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        if row.status == "done":
            setting = (int(number(row, "samples")), number(row, "sigma"), number(row, "tolerance"))
            found.setdefault(setting, []).append(row)
    return dict(sorted(found.items()))


_SUMMED, _LEAST, _LARGEST = ("draws", "broken"), ("live_min",), ("live_max",)


def pooled(rows: Sequence[Row]) -> dict[str, float]:
    """Final numbers of several runs of one setting together, as if they were one."""
    draws = np.array([row.final["draws"] for row in rows])
    found = {}
    for name in rows[0].final:
        values = np.array([row.final[name] for row in rows])
        if name in _SUMMED:
            found[name] = float(values.sum())
        elif name in (*_LEAST, *_LARGEST):
            found[name] = float(values.min() if name in _LEAST else values.max())
        else:
            found[name] = float(values @ draws / draws.sum())
    return found


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    draws = np.array([row.final["draws"] for row in rows])
    return draws @ np.array([row.curve[name] for row in rows]) / draws.sum()


def _errors(rows: Sequence[Row]) -> np.ndarray:
    return _column(rows, "error")


def _deviation(rows: Sequence[Row], name: str) -> np.ndarray:
    """Standard deviation over the draws of all runs, by fit: that within runs, and that of their means."""
    draws = np.array([row.final["draws"] for row in rows])
    inside = np.array([row.curve[f"{name}_deviation"] for row in rows]) ** 2
    apart = (np.array([row.curve[name] for row in rows]) - _column(rows, name)) ** 2
    return np.sqrt(draws @ (inside + apart) / draws.sum())


def _gap(rows: Sequence[Row]) -> tuple[float, float]:
    """How far the first and the last fit lie above the second, in standard errors of the paired difference."""
    draws, gaps, spread = pooled(rows)["draws"], _column(rows, "gap"), _deviation(rows, "gap")
    first, last = (gaps[t] / max(spread[t] / math.sqrt(draws), 1e-12) for t in (0, -1))
    return float(first), float(last)


def _worst(rows: Sequence[Row]) -> float:
    """Largest deviation from the reference, in units of what is allowed."""
    (setting,) = by_setting(rows)
    draws = pooled(rows)["draws"]
    scatter = math.sqrt(1.0 / draws + 1.0 / REFERENCE_DRAWS)
    if setting in FIRST_IS_BEST:
        wanted = FIRST_IS_BEST[setting]
        allowed = FAR * scatter * math.sqrt(wanted * (1 - wanted)) + 10 * REFERENCE_DIGIT  # given in whole percent
        return abs(pooled(rows)["first_is_best"] - wanted) / allowed
    wanted = np.array(REFERENCE[setting])
    count = len(wanted)
    allowed = FAR * scatter * _deviation(rows, "error")[:count] + REFERENCE_DIGIT
    return float(np.max(np.abs(_errors(rows)[:count] - wanted) / allowed))


# panels


def _error_panel(groups: Mapping[Setting, Sequence[Row]]) -> Panel:
    traces = []
    for (samples, sigma, tolerance), rows in groups.items():
        mean = _errors(rows)
        error = _deviation(rows, "error") / math.sqrt(pooled(rows)["draws"])
        traces.append(
            Trace(
                name=f"{samples} samples, sigma {sigma:g}, eps {tolerance:g}",
                x=list(rows[0].curve["fit"]),
                y=mean.tolist(),
                low=(mean - error).tolist(),
                high=(mean + error).tolist(),
                mode="lines+markers",
            )
        )
    return Panel(
        title="Error by fit",
        x_label="fit",
        y_label="mean squared distance to the sine",
        traces=traces,
        y_log=True,
        caption="Mean over draws of the noise, band: one standard error. Zero everywhere has an error of 0.495. Where the "
        "tolerance is near the noise's variance, sigma^2, the first fit is already the best.",
    )


def _filter_panel(rows: Sequence[Row]) -> Panel:
    names = [name for name in rows[0].curve if name.startswith("filter_")]
    table = np.array([_column(rows, name) for name in names])
    return Panel(
        title="The filters B_t",
        x_label="direction, the smoothest first",
        y_label="diagonal of B_t",
        traces=[
            Trace(
                name=f"fit {t + 1}",
                x=[float(k + 1) for k in range(len(names))],
                y=table[:, t].tolist(),
                mode="lines+markers",
            )
            for t in range(5)
        ],
        caption=f"Mean over {pooled(rows)['draws']:,.0f} draws. Each fit multiplies every direction by d/(d + lambda_t), so the "
        "rough ones go first: the solution gets sparser, then it is gone.",
    )


def _bounds_panel(rows: Sequence[Row]) -> Panel:
    fits, numbers = list(rows[0].curve["fit"]), pooled(rows)
    r0 = float(_column(rows, "norm")[0])
    bound = paper_bound(r0, numbers["condition"], np.array(fits) - 1.0)
    traces = [
        Trace(name="share of draws not yet zero", x=fits, y=_column(rows, "live").tolist(), mode="lines+markers"),
        Trace(name="r_t", x=fits, y=_column(rows, "norm").tolist(), mode="lines+markers"),
        Trace(name="r_0 - t", x=fits, y=[max(r0 - fit + 1.0, 0.0) for fit in fits]),
        Trace(name="the paper's bound on r_t", x=fits, y=np.maximum(bound, 0.0).tolist()),
        Trace(name="sqrt(r_0^2 - t)", x=fits, y=[math.sqrt(max(r0**2 - fit + 1.0, 0.0)) for fit in fits]),
    ]
    return Panel(
        title="Collapse and its bounds",
        x_label="fit t + 1",
        y_label="norm of the labels over the tolerance's, r_t",
        traces=traces,
        caption="Means over draws; a fit is zero once r_t <= 1. Bounds at the mean r_0. Nothing collapses before r_0 - 1 fits, "
        "nor lives after r_0^2 - 1.",
    )
