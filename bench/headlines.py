"""The few numbers of each benchmark that a reader compares first, taken from its JSON in `bench/results`.

A result whose JSON has a "headlines" list of {what, value, low, high, aim} brings its own; the older ones are read here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One number of the table."""

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    """The spread, as the benchmark's own page explains it."""
    aim: str = ""
    """Such as "<= 1.05"; empty where there is none."""

    @property
    def met(self) -> str:
        """Whether the value reaches the aim: "yes", "no", or nothing without one."""
        if not self.aim:
            return ""
        relation, number = self.aim.split()
        return "yes" if (self.value <= float(number) if relation == "<=" else self.value >= float(number)) else "no"


def headlines(name: str, result: dict[str, Any]) -> list[Headline]:
    """Those of the benchmark `name`, from its result; none where it neither brings any nor is known here.

    Raises:
        KeyError: the result has not the form that is read here.
    """
    if "headlines" in result:
        return [Headline(**each) for each in result["headlines"]]
    return list(_READERS[name](result)) if name in _READERS else []


def _overhead(result: dict) -> Iterable[Headline]:
    aims = {"core.train / bare loop": "<= 1.05", "bare loop + AutoL2 / bare loop": "<= 1.02"}
    for what in (*aims, "core.train + AutoL2 / bare loop"):
        found = result[what]
        low, high = found["quartile_low"], found["quartile_high"]
        yield Headline(what=what, value=found["median"], low=low, high=high, aim=aims.get(what, ""))
    loading = result["import decaycast after torch, s"]
    yield Headline(what="import after torch, seconds", value=loading["median"], high=loading["worst"], aim="<= 0.15")
    yield Headline(what="12 runs, one process / two", value=result["12-run grid"]["speed_up"], aim=">= 1.8")


def _kernel(result: dict) -> Iterable[Headline]:
    for what in ("x with itself / one n x n product", "x with y / one n x n product"):
        worst = max((row for row in result["closed form"] if row["what"] == what), key=lambda row: row["ratio"])
        yield Headline(
            what=f"closed-form NTK of {what}, worst case",
            value=worst["ratio"],
            low=worst["low"],
            high=worst["high"],
            aim="<= 2",
        )
    for row in result["empirical"]:
        if row["mode"] == "trace" and "textbook" in row and "structured" in row:
            what = f"empirical NTK, n = {row['n']}: whole Jacobian / ours"
            yield Headline(what=f"{what}, seconds", value=_per(row, "seconds"), aim=">= 3")
            yield Headline(what=f"{what}, peak memory", value=_per(row, "peak_bytes"), aim=">= 4")


def _per(row: dict, what: str) -> float:
    return row["textbook"][what] / row["structured"][what]


def _curvature(result: dict) -> Iterable[Headline]:
    whats = {"MLP": "trace to 2 %, MLP", "ResNet-18": "one Hessian product, ResNet-18"}
    for network, what in whats.items():
        rows = {row["side"]: row for row in result["rows"] if row["network"] == network}
        ours = rows.pop("ours")["seconds"]
        fastest = min(rows.values(), key=lambda row: row["seconds"])
        spread = [each / ours for each in fastest["rounds"]]
        yield Headline(
            what=f"{what}: fastest peer ({fastest['side']}) / ours",
            value=fastest["seconds"] / ours,
            low=min(spread),
            high=max(spread),
            aim=">= 1",
        )


def _forecast(result: dict) -> Iterable[Headline]:
    for name, found in result["live"]["methods"].items():
        if name in ("decaycast forecast", "optuna TPE, 10 FRE"):
            share, error = found["captured"], found["stderr_over_tasks"]
            yield _plus_minus(f"{name}: share of the tuning gain, at {found['cost']:.2g} full runs", share, error)


def _autol2(result: dict) -> Iterable[Headline]:
    points = [
        100 * (row["autol2"]["test accuracy"][0] - row["tuned for accuracy"]["test accuracy"][0])
        for row in result["results"]
    ]
    error = statistics.stdev(points) / len(points) ** 0.5
    yield _plus_minus("AutoL2 (paper) less tuned constant, test points", statistics.mean(points), error)


def _schedules(result: dict) -> Iterable[Headline]:
    for row in result["summary"]:
        if row["who"] in ("AutoL2, e-folds", "AutoL2, forecast's e-folds"):
            yield _plus_minus(f"{row['who']} less tuned constant, test points", row["mean difference"], row["stderr"])


def _language(result: dict) -> Iterable[Headline]:
    for each in result["results"]:
        for entry in each["entries"][1:]:
            gaps = entry["test less tuned"]
            what = f"{each['task']}: {entry['who']} less tuned constant, test loss in nats"
            yield Headline(what=what, value=statistics.mean(gaps), low=min(gaps), high=max(gaps))


def _label_noise(result: dict) -> Iterable[Headline]:
    for row in result["rows"]:
        if row["noise"] == "LabelNoise":
            yield Headline(
                what=f"step with LabelNoise / without, {row['step']}",
                value=row["ratio"],
                low=row["interval"][0],
                high=row["interval"][1],
                aim="<= 1.02",
            )


def _large_lr(result: dict) -> Iterable[Headline]:
    for noise in dict.fromkeys(row["noise"] for row in result["steps"]):
        worst = max((row for row in result["steps"] if row["noise"] == noise), key=lambda row: row["ratio"])
        low, high = worst["interval"]
        what = f"step with activation noise ({noise}) / without, worst network"
        aim = "<= 1.05" if noise.startswith("one map") else ""
        if noise != "nothing":
            yield Headline(what=what, value=worst["ratio"], low=low, high=high, aim=aim)


def _self_distill(result: dict) -> Iterable[Headline]:
    refits = min(row["seconds"]["KernelRidge"] / row["seconds"]["KernelSelfDistillation"] for row in result["constant"])
    yield Headline(what="10 rounds: refits / ours, least of the sizes", value=refits, aim=">= 12")
    roots = min(
        row["seconds"]["Cholesky in brentq"] / row["seconds"]["KernelSelfDistillation"] for row in result["tolerance"]
    )
    yield Headline(what="10 fits to a tolerance: Cholesky / ours, least", value=roots, aim=">= 10")
    grid = max(
        (row["seconds"]["eigh"] + row["seconds"]["all filters, leave-one-out"]) / row["seconds"]["eigh"]
        for row in result["grid"]
    )
    yield Headline(what="grid of 2,200 filters / one eigendecomposition, worst", value=grid, aim="<= 1.3")


def _stochnorm(result: dict) -> Iterable[Headline]:
    aims = {"contiguous": "<= 1.1", "channels-last": "<= 1"}
    for row in result["layers"]:
        if row["side"] == "StochNorm2d":
            value, low, high = row["both"]
            what = f"StochNorm2d / BatchNorm2d, {row['dtype']} {row['layout']}"
            yield Headline(what=what, value=value, low=low, high=high, aim=aims[row["layout"]])
    peaks = {(row["layout"], row["side"]): row["peak_bytes"] for row in result["memory"]}
    worst = max(peaks[layout, "StochNorm2d"] / peaks[layout, "BatchNorm2d"] for layout in aims)
    yield Headline(what="StochNorm2d / BatchNorm2d, peak memory, worst", value=worst, aim="<= 1.05")


def _replicas(result: dict) -> Iterable[Headline]:
    def width(row: dict) -> int:
        return int(row["model"].partition("-")[2].partition("x")[0])

    batched = [row for row in result["rows"] if row["at_once"] > 1]
    narrow = [row for row in batched if width(row) <= 64]
    for name, rows, aim in (
        ("width <= 64, 24 runs or more", [row for row in narrow if row["replicas"] >= 24], ">= 2.5"),
        ("width <= 64, few runs", [row for row in narrow if row["replicas"] < 24], ">= 2.5"),
        ("wider", [row for row in batched if width(row) > 64], ">= 1"),
    ):
        if rows:
            worst = min(rows, key=lambda row: row["ratio"])
            case = f"{worst['replicas']} x {worst['model']}, batch {worst['batch_size']}"
            low, high = worst["range"]
            what = f"runs one by one / batched, {name}, least where batching is chosen ({case})"
            yield Headline(what=what, value=worst["ratio"], low=low, high=high, aim=aim)


def _executors(result: dict) -> Iterable[Headline]:
    if "executors" in result:
        rounds = result["executors"]["seconds"]
        for above, below, aim in (
            ("one process", "two processes", ">= 1.9"),
            ("one process", "two plain loops (the limit)", ""),
            ("Ray, two workers", "two processes", "<= 1.1"),
        ):
            if above in rounds and below in rounds:
                pairs = zip(rounds[above], rounds[below], strict=True)
                gains = [one["training"] / other["training"] for one, other in pairs]
                value, low, high = statistics.median(gains), min(gains), max(gains)
                yield Headline(what=f"{above} / {below}, training", value=value, low=low, high=high, aim=aim)
    if "overhead" in result:
        found = result["overhead"]
        share = sum(found[part] for part in ("planning", "storing", "reading")) / found["training"]
        yield Headline(what=f"a sweep's own time over its training's, {found['runs']} runs", value=share, aim="<= 0.02")
    if "store" in result:
        found = result["store"]
        for case, each in found["appended"].items():
            if "thousand at once" in case:
                yield Headline(what=f"store, rows per second, appended {case}", value=each["rows/s"], aim=">= 20000")
        seconds = [each["seconds"] for each in found["table"]]
        what = f"store, seconds to read a sweep of {found['rows']:,} rows"
        yield Headline(what=what, value=statistics.median(seconds), low=min(seconds), high=max(seconds), aim="<= 2")


def _plus_minus(what: str, value: float, error: float) -> Headline:
    return Headline(what=what, value=value, low=value - error, high=value + error)


_READERS: dict[str, Callable[[dict], Iterable[Headline]]] = {
    "overhead": _overhead,
    "kernel": _kernel,
    "curvature": _curvature,
    "forecast": _forecast,
    "autol2": _autol2,
    "schedules": _schedules,
    "language": _language,
    "label_noise": _label_noise,
    "large_lr": _large_lr,
    "self_distill": _self_distill,
    "stochnorm": _stochnorm,
    "replicas": _replicas,
    "executors": _executors,
}
