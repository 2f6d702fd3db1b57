"""Rows of fine-tunings by arm, fraction and seed, differences in pairs, and the traces that show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from decaycast.core.experiment import Row, Trace
from decaycast.core.seeds import group, interval, number
from decaycast.methods.stochnorm.figures.runs import PLAIN, PROBABILITIES, stochnorm

BySeed = Mapping[int, Row]
ByFraction = Mapping[float, BySeed]
Arms = Mapping[str, ByFraction]
Gains = dict[float, dict[int, float]]


def by_arm(rows: Iterable[Row]) -> dict[str, ByFraction]:
    """Finished rows by the name of their arm, by fraction (rising) and by seed."""
    apart: dict[str, list[Row]] = {}
    for row in rows:
        arm = str(row.run.config["arm"])
        apart.setdefault(stochnorm(number(row, "p")) if arm == "stochnorm" else arm, []).append(row)
    found = {arm: group(own, "fraction") for arm, own in apart.items()}
    return {arm: fractions for arm, fractions in found.items() if fractions}


def probabilities(arms: Arms) -> list[float]:
    """The p that there are rows of, rising; 1 is plain fine-tuning."""
    return [p for p in (*PROBABILITIES, 1.0) if stochnorm(p) in arms]


def gains(arms: Arms, arm: str, over: str = PLAIN) -> Gains:
    """Accuracy of an arm minus that of another, by fraction and seed, where both have a row; no fraction without any."""
    own, other = arms.get(arm, {}), arms.get(over, {})
    found = {
        fraction: {
            seed: row.final["accuracy"] - other[fraction][seed].final["accuracy"]
            for seed, row in own[fraction].items()
            if seed in other[fraction]
        }
        for fraction in own
        if fraction in other
    }
    return {fraction: values for fraction, values in found.items() if values}


def finals(of_seed: BySeed, name: str) -> list[float]:
    """One of the final numbers of every seed that has it."""
    return [row.final[name] for row in of_seed.values() if name in row.final]


def mean(values: Sequence[float]) -> float:
    """Mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def interval_trace(name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Trace:
    """Mean over seeds at each x with its 95 % interval as band; the mean alone where there is a single seed."""
    found = [interval(each) if len(each) > 1 else None for each in values]
    means = [mean(each) for each in values]
    return Trace(
        name=name,
        x=list(x),
        y=means,
        low=[one.low if one else value for one, value in zip(found, means, strict=True)],
        high=[one.high if one else value for one, value in zip(found, means, strict=True)],
        mode="lines+markers",
    )


def in_points(values: Mapping[int, float]) -> list[float]:
    """Differences of accuracies as points of a percent."""
    return [100 * value for value in values.values()]


def setup(rows: Iterable[Row]) -> str:
    """A caption's sentence on network, data and recipe; nothing of no rows."""
    for row in rows:
        config = row.run.config
        size = f"{number(row, 'target_size'):,.0f} images" if config.get("target_size") else "all training images"
        source = "weights from a file"
        if number(row, "source_classes"):
            source = f"pre-trained on the first {number(row, 'source_classes'):.0f} classes"
        pooled = f", pooled by {number(row, 'pool'):.0f}" if number(row, "pool") > 1 else ""
        return (
            f"{config['network']} on {config['data']}{pooled}, {source}, fine-tuned on the others; 100 % are {size}; "
            f"{number(row, 'steps'):,.0f} steps of {number(row, 'batch_size'):.0f} images at every fraction."
        )
    return ""
