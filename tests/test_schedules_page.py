"""The numbers in docs/schedules.md are those of the code, and its table names every schedule."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

from decaycast.core.schedule import LR_NAMES, WEIGHT_DECAY_NAMES, by_name, cosine
from decaycast.core.timescale import efolds

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "schedules.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("| `")]


def test_the_table_lists_every_schedule_once_and_learning_rates_first():
    assert [row[0].strip("`") for row in ROWS] == list(WEIGHT_DECAY_NAMES)
    assert WEIGHT_DECAY_NAMES[:6] == LR_NAMES and "The first six" in TEXT


def test_the_table_is_what_the_block_prints():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "block", "exec"), {})
    assert [line.split() for line in printed.getvalue().splitlines()] == [[r[0].strip("`"), r[3], r[4]] for r in ROWS]


FORMULAS = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "step_decay": lambda t: 0.2 ** sum(t >= m for m in (0.3, 0.6, 0.9)),
    "exponential": lambda t: 0.01**t,
    "wsd": lambda t: min(1.0, t / 0.01, (1 - t) / 0.2),
    "off_in_cooldown": lambda t: float(t < 0.8),
    "linear_up": lambda t: 1 + 9 * t,
    "cosine_up": lambda t: 1 + 9 * (1 - math.cos(math.pi * t)) / 2,
    "inverse_time": lambda t: 0.1 / (0.1 + t),
    "lr_proportional": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


@pytest.mark.parametrize("name", WEIGHT_DECAY_NAMES)
def test_the_formulas_of_the_table_give_its_numbers_by_integration(name: str):
    """A second route: midpoints of the formula in t, not the schedule's own steps."""
    formula, points = FORMULAS[name], 20_000
    shares = [(i + 0.5) / points for i in range(points)]
    rate = [(1 + math.cos(math.pi * t)) / 2 for t in shares]
    under_cosine = sum(r * formula(t) for r, t in zip(rate, shares, strict=True)) / sum(rate)
    under_constant = 1.0 if name == "lr_proportional" else sum(map(formula, shares)) / points
    (row,) = [row for row in ROWS if row[0] == f"`{name}`"]
    assert [float(row[3]), float(row[4])] == pytest.approx([under_constant, under_cosine], abs=6e-4)


def test_other_numbers_of_the_page():
    total = 100_000
    assert f"ω · log(11) = {math.log(11):.1f} ω" in TEXT and f"{4 * math.log(11):.1f} for ω = 4" in TEXT
    both = cosine(total)
    spent = [efolds(lr=lambda s: both(s) ** 2, weight_decay=1, steps=steps) for steps in (total // 5, total)]
    assert spent[0] / spent[1] == pytest.approx(0.5, abs=0.03) and "in the first fifth of the run" in TEXT
    assert by_name("inverse_time", total)(total) == pytest.approx(1 / 11)
