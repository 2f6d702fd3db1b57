"""The figures of the L2 room trained at their smallest size, as the lab does it."""

from __future__ import annotations

from pathlib import Path

import pytest

from decaycast.core.experiment import Figure
from decaycast.lab.figures import run_figures
from decaycast.lab.store import Store
from decaycast.methods.l2.figures import FIGURES
from decaycast.methods.l2.figures.budget import FixedBudget
from decaycast.methods.l2.figures.narrow import Narrow
from decaycast.methods.l2.figures.plateau import FcPlateau, FcZeroDecay
from decaycast.methods.l2.figures.time_to_best import TimeToBest

OWN = [figure for figure in FIGURES if isinstance(figure, (TimeToBest, FcPlateau, FcZeroDecay, FixedBudget, Narrow))]


def test_the_hand_trained_figures_share_one_sweep_and_draw(tmp_path: Path):
    assert len(OWN) == 5
    with Store(tmp_path / "rows.sqlite") as store:
        rows = run_figures(OWN, "smoke", store)
        trained = len(store.read())
    assert trained == len({run.key for figure in OWN for run in figure.runs("smoke")})
    assert trained < sum(len(figure.runs("smoke")) for figure in OWN)  # three figures look at one ladder
    for figure in OWN:
        assert all(row.status == "done" and row.provenance for row in rows[figure.name])
        assert figure.draw(rows[figure.name]) and figure.judge(rows[figure.name]).reason


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_names_are_the_rooms_and_sizes_rise_in_steps(figure: Figure):
    assert figure.name.startswith("l2/") and figure.source.startswith("Lewkowycz & Gur-Ari 2020")
    lengths = [sum(int(run.config["steps"]) for run in figure.runs(size)) for size in ("smoke", "small", "paper")]  # type: ignore[arg-type]
    assert lengths == sorted(lengths) and lengths[0] < 30_000
