"""Runs of equal strength: learning rate, batch size and momentum may differ where lambda is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decaycast.core.bounds import Bound, decide
from decaycast.core.experiment import Panel, Row, Run, Size, Trace, Verdict
from decaycast.core.seeds import interval, mean_trace, number
from decaycast.methods.label_noise import theory
from decaycast.methods.label_noise.figures.arms import train_arm
from decaycast.methods.label_noise.figures.runs import PLANS, Plan

TOLERANCE = 0.05
_Settings = tuple[float, float, float]
_BySeed = Mapping[int, list[Row]]
_Groups = dict[float, dict[_Settings, _BySeed]]


@dataclass(frozen=True, kw_only=True)
class EqualStrength:
    """Trace over drift time from one start, at several learning rates, batch sizes and momenta of the same lambda."""

    name: str = "label_noise/equal-strength"
    title: str = "Equal strength, equal trace"
    claim: str = (
        "Runs of equal lambda = lr/(B(1-beta)) have the same trace at equal drift time, within 5 % over the last third of the "
        "way, whatever learning rate, batch size and momentum it is made of."
    )
    source: str = "Damian, Ma & Lee 2021, dependence on lambda alone; momentum and drift time derived"
    plans: Mapping[Size, Plan] = field(default_factory=lambda: PLANS)

    train = train_arm

    def runs(self, size: Size) -> list[Run]:
        """Every setting at every seed."""
        return self.plans[size].equal_strength()

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Trace over drift time by strength, the ratios that are judged, and accuracy over drift time."""
        groups = _groups(rows)
        if not groups:
            return []
        ways = [_way_panel(strength, settings) for strength, settings in groups.items()]
        return [*ways, *[panel for panel in [_ratio_panel(groups)] if panel.traces]]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held when every ratio of traces keeps within 5 % of 1 with its 95 % interval, not held when one lies outside.

        A trace is the mean over the last third of a run, and over a seed's repetitions. The ratio is in pairs of seed, to the
        setting with the largest learning rate of the same strength.
        """
        bounds = [
            Bound(name=name, values=values, low=1 - TOLERANCE, high=1 + TOLERANCE)
            for ratios in _ratios(_groups(rows)).values()
            for name, values in ratios.items()
        ]
        if not bounds or min(len(bound.values) for bound in bounds) < 2:
            return decide([])
        return decide(bounds, words=_words(_groups(rows)))


def _groups(rows: Sequence[Row]) -> _Groups:
    """Finished rows by strength (rising), by settings (largest learning rate first) and by seed, with its repetitions."""
    apart: dict[_Settings, dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda each: (each.run.seed, number(each, "repeat"))):
        if row.status == "done":
            settings = number(row, "lr"), number(row, "batch_size"), number(row, "momentum")
            apart.setdefault(settings, {}).setdefault(row.run.seed, []).append(row)
    found: _Groups = {}
    for settings, of_seed in sorted(apart.items(), reverse=True):
        lr, batch_size, momentum = settings
        strength = theory.strength(lr=lr, batch_size=batch_size, noise_variance=1.0, momentum=momentum)
        found.setdefault(float(f"{strength:.4g}"), {})[settings] = of_seed
    return dict(sorted(found.items()))


def _late_traces(of_seed: _BySeed) -> dict[int, float]:
    """The trace that is judged, by seed: of the last third of each run, meaned over repetitions."""
    return {seed: float(np.mean([row.final["trace"] for row in rows])) for seed, rows in of_seed.items()}


def _ratios(groups: _Groups) -> dict[float, dict[str, list[float]]]:
    """By strength and words: trace of each other setting over that of the reference, one per seed that both have."""
    found: dict[float, dict[str, list[float]]] = {}
    for strength, settings in groups.items():
        (_, first), *others = settings.items()
        reference = _late_traces(first)
        for setting, of_seed in others:
            traces = _late_traces(of_seed)
            values = [traces[seed] / reference[seed] for seed in traces if seed in reference]
            found.setdefault(strength, {})[f"lambda {strength:g}, {_named(setting)}"] = values
    return found


def _named(setting: _Settings) -> str:
    lr, batch_size, momentum = setting
    return f"lr {lr:g}, batch {batch_size:.0f}" + (f", momentum {momentum:g}" if momentum else "")


def _words(groups: _Groups) -> str:
    told = []
    for strength, settings in groups.items():
        setting, of_seed = next(iter(settings.items()))
        traces = list(_late_traces(of_seed).values())
        told.append(f"{np.mean(traces):.3g} at lambda {strength:g} ({_named(setting)})")
    return f"Ratios are to the largest learning rate, whose trace is {', '.join(told)}"


def _way_panel(strength: float, settings: Mapping[_Settings, _BySeed]) -> Panel:
    traces = []
    for setting, of_seed in settings.items():
        ways = [np.mean([row.curve["trace"] for row in rows], axis=0) for rows in of_seed.values()]
        first = next(iter(of_seed.values()))[0]
        traces.append(mean_trace(_named(setting), list(first.curve["drift"]), np.stack(ways, axis=1).tolist()))
    steps = ", ".join(f"{number(next(iter(of_seed.values()))[0], 'steps'):,.0f}" for of_seed in settings.values())
    return Panel(
        title=f"Trace at lambda = {strength:g}",
        x_label="drift time",
        y_label="trace of the Gauss-Newton matrix",
        traces=traces,
        y_log=True,
        caption=f"Mean over seeds, band: one standard error. The runs have {steps} steps.",
    )


def _ratio_panel(groups: _Groups) -> Panel:
    traces = []
    for strength, ratios in _ratios(groups).items():
        shown = {name: interval(values) for name, values in ratios.items() if len(values) > 1}
        if shown:
            x = [_lr_of(name) for name in shown]
            found = list(shown.values())
            traces.append(
                Trace(
                    name=f"lambda = {strength:g}",
                    x=x,
                    y=[each.mean for each in found],
                    low=[each.low for each in found],
                    high=[each.high for each in found],
                    mode="lines+markers",
                )
            )
    if traces:
        ends = [min(min(each.x) for each in traces), max(max(each.x) for each in traces)]
        traces += [Trace(name=f"{bound:g}", x=ends, y=[bound] * 2) for bound in (1 - TOLERANCE, 1 + TOLERANCE)]
    return Panel(
        title="Trace against that at the largest learning rate",
        x_label="learning rate",
        y_label="ratio of traces",
        traces=traces,
        x_log=True,
        caption="At equal strength and drift time, over the last third of the runs, in pairs of seed; bands: 95 % intervals.",
    )


def _lr_of(name: str) -> float:
    return float(name.partition("lr ")[2].partition(",")[0])
