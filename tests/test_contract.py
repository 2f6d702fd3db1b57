"""What every room under methods/ and every figure in it promises; rooms and figures are discovered, never listed."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

import decaycast.methods
from decaycast.core.experiment import SIZES, Figure, Panel, Row, Run, Size, Trace, Verdict
from decaycast.lab.figures import run_figure
from decaycast.lab.store import Store

ROOMS = [info.name for info in pkgutil.iter_modules(decaycast.methods.__path__, "decaycast.methods.")]
MODULES = [
    info.name for info in pkgutil.walk_packages(decaycast.methods.__path__, "decaycast.methods.") if not info.ispkg
]
OUTCOMES = ("held", "not held", "not enough data")


def figures_of(room: str) -> list[Figure]:
    if importlib.util.find_spec(f"{room}.figures") is None:
        return []
    return list(importlib.import_module(f"{room}.figures").FIGURES)


FIGURES = [figure for room in ROOMS for figure in figures_of(room)]


def module_gaps(module: ModuleType) -> list[str]:
    """What is not explained in a module: itself, and the functions and classes defined there under a public name."""
    gaps = [] if len((module.__doc__ or "").strip()) >= 40 else [f"{module.__name__}: no docstring"]
    for name, value in vars(module).items():
        if name.startswith("_") or not callable(value) or getattr(value, "__module__", "") != module.__name__:
            continue
        words = (value.__doc__ or "").strip()
        if not words or words.startswith(f"{name}("):  # what @dataclass writes where nobody did
            gaps.append(f"{module.__name__}.{name}: no docstring")
    return gaps


def figure_gaps(figure: Figure) -> list[str]:
    """What a figure lacks that can be seen without training."""
    gaps = [f"no {what}" for what in ("name", "title", "claim", "source") if not getattr(figure, what, "").strip()]
    counts = []
    for size in SIZES:
        keys = [run.key for run in figure.runs(size)]
        counts.append(len(keys))
        gaps += [f"no runs at {size}"] * (not keys) + [f"a run twice at {size}"] * (len(set(keys)) < len(keys))
    if counts[0] > 12 or counts != sorted(counts):
        gaps.append(f"smoke has to be small and sizes have to rise, got {counts} runs")
    if not all(isinstance(panel, Panel) for panel in figure.draw([])):
        gaps.append("draw([]) returns something that is no panel")
    if figure.judge([]).outcome != "not enough data":
        gaps.append("judges without data")
    return gaps


def smoke_gaps(figure: Figure, folder: Path) -> list[str]:
    """What goes wrong when the figure's smallest size is really trained, drawn and judged."""
    with Store(folder / "rows.sqlite") as store:
        rows = run_figure(figure, "smoke", store)
    gaps = [f"{row.run.key} failed: {row.reason}" for row in rows if row.status != "done"]
    if gaps:
        return gaps
    panels = figure.draw(rows)
    gaps += [] if panels else ["draws nothing"]
    for trace in (trace for panel in panels for trace in panel.traces):
        lengths = {len(column) for column in (trace.x, trace.y, trace.low, trace.high) if column is not None}
        gaps += [] if len(lengths) == 1 else [f"trace {trace.name} has columns of lengths {sorted(lengths)}"]
    gaps += [
        f"panel {panel.title!r} lacks words"
        for panel in panels
        if not (panel.title and panel.x_label and panel.y_label)
    ]
    verdict = figure.judge(rows)
    return gaps if verdict.outcome in OUTCOMES and verdict.reason else [*gaps, f"verdict {verdict}"]


# every room


def test_there_are_rooms():
    assert "decaycast.methods.l2" in ROOMS


@pytest.mark.parametrize("name", MODULES)
def test_a_rooms_modules_explain_themselves(name: str):
    assert module_gaps(importlib.import_module(name)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_theory_or_a_method(room: str):
    assert [name for name in MODULES if name.startswith(f"{room}.") and not name.endswith(".figures")]


def test_figures_have_their_own_names():
    names = [figure.name for figure in FIGURES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figure_is_complete(figure: Figure):
    assert figure_gaps(figure) == []


@pytest.mark.slow
@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figures_smallest_size_trains_draws_and_judges(figure: Figure, tmp_path: Path):
    assert smoke_gaps(figure, tmp_path) == []


# the contract itself, on figures made up for it


@dataclass(frozen=True)
class Example:
    """A figure as it should be."""

    name: str = "example"
    title: str = "Two decays"
    claim: str = "Both networks learn."
    source: str = "this test"
    copies: int = 1
    broken: str = ""

    def runs(self, size: Size) -> list[Run]:
        steps = {"smoke": 30, "small": 300, "paper": 3000}[size]
        config = {
            "data": "digits",
            "train_size": 60,
            "model": "mlp-16x1",
            "steps": steps,
            "batch_size": 20,
            "points": 4,
        }
        decays = [] if self.broken == "runs" else [0.0, 0.01] * self.copies
        if self.broken == "many":
            decays = [0.001 * i for i in range(20)]
        rate = 1e12 if self.broken == "diverges" else 0.1
        return [Run(config={**config, "lr": rate, "weight_decay": weight_decay}) for weight_decay in decays]

    def draw(self, rows: Sequence[Row]) -> list[Panel]:
        if self.broken == "draw":
            return ["a picture"]  # type: ignore[list-item]
        traces = [
            Trace(name=row.run.key, x=row.curve["step"], y=row.curve["validation_loss"][self.broken == "lengths" :])
            for row in rows
        ]
        label = "" if self.broken == "words" else "validation loss"
        return [Panel(title="Loss", x_label="step", y_label=label, traces=traces)] if rows else []

    def judge(self, rows: Sequence[Row]) -> Verdict:
        if not rows and self.broken != "judge":
            return Verdict(outcome="not enough data", reason="no rows")
        learnt = all(row.curve["validation_loss"][-1] < row.curve["validation_loss"][0] for row in rows)
        return Verdict(outcome="held" if learnt else "not held", reason="" if self.broken == "reason" else "they do")


def test_the_contract_passes_a_good_figure(tmp_path: Path):
    assert figure_gaps(Example()) == []
    assert smoke_gaps(Example(), tmp_path) == []


@pytest.mark.parametrize(
    ("figure", "gap"),
    [
        (replace(Example(), claim=" "), "no claim"),
        (Example(copies=2), "a run twice at small"),
        (Example(broken="runs"), "no runs at smoke"),
        (Example(broken="many"), "smoke has to be small"),
        (Example(broken="draw"), "no panel"),
        (Example(broken="judge"), "judges without data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_contract_sees_what_is_missing(figure: Example, gap: str):
    assert gap in "\n".join(figure_gaps(figure))


@pytest.mark.parametrize(
    ("broken", "gap"),
    [("lengths", "columns of lengths"), ("words", "lacks words"), ("reason", "verdict"), ("diverges", "failed")],
)
def test_the_contract_sees_what_goes_wrong(broken: str, gap: str, tmp_path: Path):
    assert gap in "\n".join(smoke_gaps(Example(broken=broken), tmp_path))


def test_the_contract_sees_a_module_without_words():
    module = ModuleType("bare")
    exec("from dataclasses import dataclass\ndef f(): pass\n@dataclass\nclass C: pass\ndef _g(): pass", vars(module))
    assert module_gaps(module) == ["bare: no docstring", "bare.f: no docstring", "bare.C: no docstring"]
