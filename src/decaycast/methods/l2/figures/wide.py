"""Infinite width against networks of finite width: kernel, outputs and accuracy under L2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decaycast.core.experiment import Panel, Row, Run, Scalar, Size, Trace, Verdict
from decaycast.core.measure import measuring_steps
from decaycast.methods.l2 import theory
from decaycast.methods.l2.figures import wide_net

DECAY = 0.05  # what is judged; in the spectrum of 64 samples it shows both the fast phase and the collapse
TOLERANCE = 0.03
WIDE = 2048  # the claim is about networks of at least this width
ERRORS = ("kernel", "outputs")


@dataclass(frozen=True)
class _Sweep:
    """Widths and seeds at one learning rate and weight decay."""

    widths: tuple[int, ...]
    seeds: int
    lr: float
    weight_decay: float = DECAY


# Half the learning rate shows what finite steps cost; less decay, what a longer life of the kernel costs.
SWEEPS: dict[str, tuple[_Sweep, ...]] = {
    "smoke": (_Sweep((16, 32, 64), 2, 0.1), _Sweep((32,), 2, 0.05)),
    "small": (
        _Sweep((128, 256, 512, 1024, 2048), 3, 0.025),
        _Sweep((512,), 3, 0.0125),
        _Sweep((128, 256, 512, 1024), 3, 0.025, 0.02),
    ),
    "paper": (
        _Sweep((128, 256, 512, 1024, 2048, 4096, 8192), 5, 0.0125),
        _Sweep((512, 2048), 5, 0.00625),
        _Sweep((128, 256, 512, 1024, 2048, 4096, 8192), 5, 0.0125, 0.02),
    ),
}
DATA: dict[str, dict[str, Scalar]] = {
    "smoke": {"data": "digits", "train_size": 320, "validation_size": 300, "test_size": 1, "samples": 32},
    "small": {"data": "mnist", "train_size": 512, "validation_size": 1000, "test_size": 1, "samples": 64},
    "paper": {"data": "mnist", "train_size": 4096, "validation_size": 5000, "test_size": 1, "samples": 512},
}


@dataclass(frozen=True)
class WideNetwork:
    """Theorems 1 and 2 beside networks with two hidden layers, over widths, up to one e-fold of decay."""

    name: str = "l2/wide-network"
    title: str = "Infinite width against wide networks"
    claim: str = (
        "Up to lambda*t = 1, a two-hidden-layer ReLU network of width 2,048 or more follows infinite width: its kernel norm "
        "and its outputs on the training set stay within 3 % of theorems 1 and 2, and both errors fall with the width."
    )
    source: str = "Lewkowycz & Gur-Ari 2020, theorems 1 and 2, and their comparison with a wide network"

    def runs(self, size: Size) -> list[Run]:
        """One run per width, seed, learning rate and decay, each one e-fold long."""
        return [
            Run(
                config={
                    "experiment": "wide-network",
                    **DATA[size],
                    "class_minus": 2,
                    "class_plus": 7,
                    "width": width,
                    "lr": part.lr,
                    "weight_decay": part.weight_decay,
                    "steps": round(1 / (part.lr * part.weight_decay)),
                    "points": 50,
                },
                seed=seed,
            )
            for part in SWEEPS[size]
            for width in part.widths
            for seed in range(part.seeds)
        ]

    def train(self, run: Run, data: Any) -> Row:
        """Full-batch gradient descent on two classes of `data.train`; see `wide_net.compare` for columns and errors."""
        config: dict[str, Any] = dict(run.config)
        classes = config["class_minus"], config["class_plus"]
        curve = wide_net.compare(
            wide_net.two_classes(data.train, *classes, config["samples"]),
            wide_net.two_classes(data.validation, *classes),
            width=config["width"],
            seed=run.seed,
            lr=config["lr"],
            weight_decay=config["weight_decay"],
            at=[0, *measuring_steps(config["steps"], config["points"])],
        )
        return Row(run=run, curve=curve, final=errors(curve))

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        """Kernel norm, single modes, errors over the widths, loss and accuracy."""
        groups = _groups(rows)
        if not groups:
            return []
        by_width = groups[_judged(groups)]
        widest = by_width[max(by_width)]
        return [
            _kernel_panel(by_width),
            _mode_panel(widest[0]),
            *(_error_panel(name, groups) for name in ERRORS),
            _loss_panel(widest[0]),
            _accuracy_panel(by_width),
        ]

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """Held: at every width >= 2,048 both errors' seed means are <= 3 %, and both slopes' intervals lie below 0."""
        groups = _groups(rows)
        by_width = groups[_judged(groups)] if groups else {}
        wide = {width: group for width, group in by_width.items() if width >= WIDE}
        if len(by_width) < 3 or not wide or min(map(len, by_width.values())) < 2:
            reason = f"needs three widths, one of them at least {WIDE:,}, with two seeds each"
            return Verdict(outcome="not enough data", reason=reason)
        numbers, words, held = {}, [], True
        for name in ERRORS:
            slope, low, high = slope_with_interval(
                [(width, row.final[name]) for width, group in by_width.items() for row in group]
            )
            means = {width: _mean(row.final[name] for row in group) for width, group in wide.items()}
            held = held and high < 0 and max(means.values()) <= TOLERANCE
            numbers |= {f"{name}_error_{width}": value for width, value in means.items()}
            numbers |= {f"{name}_slope": slope, f"{name}_slope_low": low, f"{name}_slope_high": high}
            listed = ", ".join(f"{value:.2%} at width {width:,}" for width, value in means.items())
            words.append(f"{name}: {listed}, slope against width {slope:.2f} ({low:.2f} to {high:.2f})")
        numbers |= _step_cost(groups) | _less_decay(groups)
        return Verdict(outcome="held" if held else "not held", reason="; ".join(words), numbers=numbers)


def errors(curve: Any) -> dict[str, float]:
    """Largest error over the run: of the kernel's norm, |measured/theory - 1|, and of the outputs, ||f - f_th||/||f_th||."""
    ratio = np.array(curve["kernel_norm"]) / np.array(curve["kernel_norm_theory"])
    return {"kernel": float(np.abs(ratio - 1).max()), "outputs": float(np.max(curve["output_error"]))}


def slope_with_interval(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope of log y on log x by least squares, and its 95 % interval (Student's t)."""
    x, y = np.log(np.array(points, float).T)
    slope, offset = np.polyfit(x, y, 1)
    free = len(x) - 2
    spread = math.sqrt(float(((y - slope * x - offset) ** 2).sum()) / free / float(((x - x.mean()) ** 2).sum()))
    z = 1.959964  # Student's 97.5 % quantile by its expansion in 1/free: within 0.5 % from free = 4 on
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return float(slope), float(slope - quantile * spread), float(slope + quantile * spread)


Setting = tuple[float, float]  # weight decay, learning rate
ByWidth = dict[int, list[Row]]


def _groups(rows: Sequence[Row]) -> dict[Setting, ByWidth]:
    found: dict[Setting, ByWidth] = {}
    for row in rows:
        if row.status == "done":
            config: dict[str, Any] = dict(row.run.config)
            group = found.setdefault((config["weight_decay"], config["lr"]), {})
            group.setdefault(config["width"], []).append(row)
    return {setting: dict(sorted(group.items())) for setting, group in sorted(found.items(), reverse=True)}


def _judged(groups: dict[Setting, ByWidth]) -> Setting:
    """The largest decay, at the learning rate with the most widths."""
    decay = max(groups)[0]
    return max(
        (setting for setting in groups if setting[0] == decay), key=lambda setting: (len(groups[setting]), setting[1])
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _step_cost(groups: dict[Setting, ByWidth]) -> dict[str, float]:
    """How much the errors change when the learning rate is halved, at the widest width that has both."""
    decay, lr = _judged(groups)
    halved = groups.get((decay, lr / 2), {})
    width = max(set(halved) & set(groups[decay, lr]), default=None)
    if width is None:
        return {}
    change = {
        name: abs(_mean(r.final[name] for r in groups[decay, lr][width]) - _mean(r.final[name] for r in halved[width]))
        for name in ERRORS
    }
    return {f"{name}_error_from_step_size_{width}": value for name, value in change.items()}


def _less_decay(groups: dict[Setting, ByWidth]) -> dict[str, float]:
    """Errors at smaller decays than the judged one, each at its widest width."""
    found = {}
    for (decay, lr), by_width in groups.items():
        if decay < max(groups)[0]:
            width = max(by_width)
            mean = {name: _mean(row.final[name] for row in by_width[width]) for name in ERRORS}
            found |= {f"{name}_error_{width}_decay_{decay:g}_lr_{lr:g}": value for name, value in mean.items()}
    return found


def _column(row: Row, name: str) -> list[float]:
    return list(row.curve[name])


def _kernel_panel(by_width: ByWidth) -> Panel:
    traces = []
    for width, group in by_width.items():
        norms = np.array([row.curve["kernel_norm"] for row in group])
        traces.append(
            Trace(
                name=f"width {width:,}",
                x=_column(group[0], "efolds"),
                y=norms.mean(0).tolist(),
                low=norms.min(0).tolist(),
                high=norms.max(0).tolist(),
            )
        )
    efolds = np.linspace(0.0, 1.0, 41)
    law = theory.kernel_scale(efolds, 1.0, wide_net.DEGREE)
    traces.append(Trace(name="exp(-4 λt), theorem 1", x=efolds.tolist(), y=law.tolist(), mode="markers"))
    return Panel(
        title="Kernel norm",
        x_label="λt, e-folds of decay",
        y_label="‖Θ_t‖ / ‖Θ_0‖",
        traces=traces,
        y_log=True,
        caption="Frobenius norm of the empirical kernel on the training samples; mean and range over seeds. The lines of the "
        "wider networks lie on the theory's markers.",
    )


def _mode_panel(row: Row) -> Panel:
    efolds, traces = _column(row, "efolds"), []
    for i in range(1, wide_net.MODES + 1):
        measured, law = (_column(row, f"mode_{i}{suffix}") for suffix in ("", "_theory"))
        traces.append(Trace(name=f"mode {i}, network", x=efolds, y=measured, mode="markers"))
        traces.append(Trace(name=f"mode {i}, theorem 2", x=efolds, y=law))
    return Panel(
        title=f"Single modes at width {row.run.config['width']:,}",
        x_label="λt, e-folds of decay",
        y_label="f_a(t)",
        traces=traces,
        caption="Outputs on the training samples along the three eigenvectors of Θ_0 that carry most of the labels. They are "
        "learnt in t ~ 1/γ_a and then lost with the kernel. First seed; theory from this network's own Θ_0 and f_0.",
    )


def _error_panel(name: str, groups: dict[Setting, ByWidth]) -> Panel:
    traces = []
    for (decay, lr), by_width in groups.items():
        values = [[row.final[name] for row in group] for group in by_width.values()]
        traces.append(
            Trace(
                name=f"λ = {decay:g}, lr = {lr:g}",
                x=list(by_width),
                y=[float(np.mean(each)) for each in values],
                low=[min(each) for each in values],
                high=[max(each) for each in values],
                mode="lines+markers",
            )
        )
    judged = traces[list(groups).index(_judged(groups))]
    scale = float(np.exp(np.mean(np.log(judged.y) + np.log(judged.x))))
    widths = [min(judged.x), max(judged.x)]
    traces.append(Trace(name="1/width", x=widths, y=[scale / width for width in widths]))
    traces.append(Trace(name=f"{TOLERANCE:.0%}", x=widths, y=[TOLERANCE] * 2))
    what = (
        "|‖Θ_t‖/‖Θ_0‖ / exp(-4 λt) - 1|" if name == "kernel" else "‖f - f_theory‖ / ‖f_theory‖ on the training samples"
    )
    return Panel(
        title=f"Error of the {'kernel norm' if name == 'kernel' else 'outputs'} against width",
        x_label="width",
        y_label="largest relative error up to λt = 1",
        traces=traces,
        x_log=True,
        y_log=True,
        caption=f"{what}, its maximum over the run; mean and range over seeds. Half the learning rate shows the share of "
        "finite steps; less decay leaves the kernel more time to change.",
    )


def _loss_panel(row: Row) -> Panel:
    efolds = _column(row, "efolds")
    return Panel(
        title=f"Training loss without penalty at width {row.run.config['width']:,}",
        x_label="λt, e-folds of decay",
        y_label="mean of (f - y)²/2",
        traces=[
            Trace(name="network", x=efolds, y=_column(row, "train_loss"), mode="markers"),
            Trace(name="theorem 2", x=efolds, y=_column(row, "train_loss_theory")),
        ],
        caption="It falls while modes are learnt and rises again as the kernel shrinks. First seed.",
    )


def _accuracy_panel(by_width: ByWidth) -> Panel:
    traces = []
    for width in dict.fromkeys((min(by_width), max(by_width))):
        row = by_width[width][0]
        efolds, name = _column(row, "efolds"), f"width {width:,}"
        measured, law = (_column(row, f"validation_accuracy{suffix}") for suffix in ("", "_theory"))
        traces.append(Trace(name=f"{name}, network", x=efolds, y=measured, mode="markers"))
        traces.append(Trace(name=f"{name}, theorem 2", x=efolds, y=law))
    return Panel(
        title="Validation accuracy",
        x_label="λt, e-folds of decay",
        y_label="accuracy",
        traces=traces,
        caption="Sign of the output on held-out samples of the two classes; theory through Θ_0 between them and the training "
        "samples. Narrowest and widest network, first seed.",
    )
