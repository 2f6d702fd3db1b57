"""Rows made up for the judges of the label-noise figures, with known answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from decaycast.core.experiment import Row, Run
from decaycast.methods.label_noise.figures.covariance import StationaryCovariance
from decaycast.methods.label_noise.figures.equal_strength import EqualStrength
from decaycast.methods.label_noise.figures.escape import Escape
from decaycast.methods.label_noise.figures.random_start import RandomStart
from decaycast.methods.label_noise.figures.sparse import SparseRecovery
from decaycast.methods.label_noise.figures.trajectory import DISTANCES, Trajectory

SPARSE, TRAJECTORY, COVARIANCE = SparseRecovery(), Trajectory(), StationaryCovariance()
ESCAPE, EQUAL, RANDOM = Escape(), EqualStrength(), RandomStart()
Config = dict[str, Any]


def seed_noise(*names: object) -> float:
    """A standard normal number that depends on the names alone."""
    return float(np.random.default_rng(list(repr(names).encode())).standard_normal())


def _made(runs: Iterable[Run], make: Callable[[Run, Config], tuple[dict[str, Any], dict[str, float]]]) -> list[Row]:
    rows = []
    for run in runs:
        curve, final = make(run, dict(run.config))
        rows.append(Row(run=run, curve=curve, final=final))
    return rows


def sparse(error: Callable[[Config], float], noise: float = 0.05) -> list[Row]:
    """Test errors error(config), times what a seed's luck makes of them."""

    def make(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, float]]:
        value = error(config) * float(np.exp(noise * seed_noise(run.seed, *config.values())))
        steps = [
            0.0,
            float(config["steps"] // 2),
            float(config["steps"]),
            config["steps"] + 2.0 * config["dropped_steps"],
        ]
        curve = {
            "step": steps,
            "error": [95.0, (95.0 * value) ** 0.5, 2 * value, value],
            "trace": [200.0, 90.0, 12.0, 10.0],
        }
        return curve, {"error": value, "trace": 10.0, "train_loss": 1e-4, "processor_seconds": 0.5}

    return _made(SPARSE.runs("small"), make)


def sparse_as_claimed(config: Config) -> float:
    if config["kind"] != "label":
        return 75.0
    return 30.0 * float(np.exp(-1.5 * config["drift"])) * (40 / config["samples"]) ** 2


def covariance(error: float, naive: float = 0.3, batches_diverge: bool = True) -> list[Row]:
    """Relative errors around `error` at every setting; batches of one have all diverged."""

    def make(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, float]]:
        if config["batch_size"] == 1 and batches_diverge:
            return {}, {"diverged": 1.0}
        value = error * (1.0 + 0.1 * seed_noise(run.seed, *config.values())) * (1 + config["batch_size"])
        curve = {"eigenvalue": [0.4, 1.0, 2.0, 4.0], "variance": [0.5, 0.6, 0.7, 1.0]}
        return curve, {"error": value, "naive_error": naive, "diverged": 0.0}

    return _made(COVARIANCE.runs("small"), make)


def trajectory(to_r: float, to_trace: float, moved: float) -> list[Row]:
    """End points around these distances; on the way they grow in proportion to the drift time."""

    def make(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, float]]:
        drifts = [float(each) for each in config["drifts"].split()]
        ends = dict.fromkeys(DISTANCES, 0.2) | {"to_r": to_r, "to_trace": to_trace, "moved": moved}
        luck = 1.0 + 0.1 * seed_noise(run.seed, config["product"])
        curve = {name: [luck * value * drift / drifts[-1] for drift in drifts] for name, value in ends.items()}
        curve |= {name: [9.0 - 0.1 * drift for drift in drifts] for name in ("trace", "trace_r", "trace_trace")}
        return {"drift": drifts, **curve}, {**{n: v[-1] for n, v in curve.items()}, "start_trace": 15.0, "lr": 0.1}

    return _made(TRAJECTORY.runs("small"), make)


def trained(runs: Iterable[Run], end: Callable[[Config], tuple[float, float]], noise: float = 0.004) -> list[Row]:
    """Trainings from accuracy 0.67 and trace 130 to end(config) = (accuracy, trace), in twelve steps."""

    def make(run: Run, config: Config) -> tuple[dict[str, Any], dict[str, float]]:
        accuracy, trace = end(config)
        accuracy += noise * seed_noise(run.seed, *config.values())
        trace *= 1.0 + noise * seed_noise(run.seed, "trace", *config.values())
        share = np.linspace(0.0, 1.0, 13)
        curve = {
            "step": (config["steps"] * share).tolist(),
            "drift": (4.0 * share).tolist(),
            "accuracy": (0.67 + (accuracy - 0.67) * share).tolist(),
            "trace": (130.0 * (trace / 130.0) ** share).tolist(),
            "loss": np.full(13, 0.01).tolist(),
        }
        final = {"accuracy": accuracy, "start_accuracy": 0.67, "trace": trace, "start_trace": 130.0, "loss": 0.01}
        return curve, final

    return _made(runs, make)


def escaped(config: Config) -> tuple[float, float]:
    return {"label noise": (0.92, 18.0), "smoothing": (0.68, 125.0), "clean": (0.86, 0.1), "sam": (0.9, 21.0)}[
        config["arm"]
    ]


def failed(rows: Iterable[Row]) -> list[Row]:
    """The same runs, all failed."""
    return [replace(row, status="failed", reason="made up", curve={}, final={}) for row in rows]


def of_seeds(rows: Iterable[Row], count: int) -> list[Row]:
    """Rows of the first seeds."""
    return [row for row in rows if row.run.seed < count]
