"""Judges of the plateau, of no decay, of the narrow network: on rows of known flatness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tests.methods.l2.figure_rows import failed, made_up, seed_noise

from decaycast.core.experiment import Row
from decaycast.methods.l2.figures.narrow import Narrow
from decaycast.methods.l2.figures.plateau import FcPlateau, Plateau, ZeroDecay, lower_half, slope
from decaycast.methods.l2.figures.shared import Ladder, rates

LADDER = Ladder(config={"model": "mlp-9x9"}, lrs=(0.2, 0.1), rates=rates(0.02, 2e-5, 7), efolds=2.0, seeds=5)
LADDERS = {"smoke": LADDER, "small": LADDER, "paper": LADDER}
PLATEAU = Plateau(name="l2/p", title="Plateau", ladders=LADDERS, figure="fig. 0")
NARROW = Narrow(ladders=LADDERS)
ZERO = ZeroDecay(name="l2/z", title="Zero", ladders=LADDERS, figure="fig. 0")
DECAYS = tuple(0.02 / 0.2 * 10**-exponent for exponent in (0, 0.5, 1, 1.5, 2, 2.5, 3))


def rows(
    best: Callable[[float], float],
    *,
    noise: float = 0.001,
    seeds: int = 5,
    lrs: Sequence[float] = (0.2,),
    fit: float = 1.0,
    draw: int = 0,
    figure: Plateau | Narrow = PLATEAU,
) -> list[Row]:
    """Runs of the figure with best accuracy best(weight decay) plus noise; each seed has a shift of its own."""
    found = []
    for run in figure.runs("small"):
        decay, lr = float(run.config["weight_decay"]), float(run.config["lr"])  # type: ignore[arg-type]
        if run.seed < seeds and lr in lrs:
            top = best(decay) + 0.01 * seed_noise(run.seed) + noise * seed_noise(run.seed, decay, lr, draw)
            found.append(
                made_up(run, lambda step, top=top: np.minimum(top, 0.3 * np.log10(step)), points=40, train_accuracy=fit)
            )
    return found


def flat(decay: float) -> float:
    return 0.2 if decay == 0 else 0.3 if decay < 0.05 else 0.1


def tilted(decay: float) -> float:
    return 0.2 if decay == 0 else 0.3 + 0.02 * np.log10(decay / 0.001)


def test_ladder_and_lower_half():
    found = {float(f"{d:.6g}"): {} for d in DECAYS}
    assert sorted(lower_half(found)) == pytest.approx(sorted(DECAYS)[:4])
    assert lower_half({}) == {} and list(lower_half({0.3: {}})) == [0.3]
    assert {run.config["weight_decay"] for run in PLATEAU.runs("small")} >= {0.0, 0.1, 0.001, 0.0001}


def test_a_plateau_is_held_whatever_happens_above_it():
    verdict = PLATEAU.judge(rows(flat))
    assert verdict.outcome == "held" and verdict.numbers["decades"] == pytest.approx(1.5)
    assert verdict.numbers["change"] == pytest.approx(0, abs=0.003) and verdict.numbers["spread"] < 0.003
    assert verdict.numbers["best"] == pytest.approx(0.3, abs=0.01)


def test_a_tilt_is_not_held_and_its_slope_is_found():
    found = rows(tilted, noise=0.0)
    verdict = PLATEAU.judge(found)
    assert verdict.outcome == "not held" and verdict.numbers["change"] == pytest.approx(0.03, rel=1e-6)
    ladder = {
        float(row.run.config["weight_decay"]): {3: row}
        for row in found
        if row.run.seed == 3 and row.run.config["weight_decay"]
    }  # type: ignore[arg-type]
    assert slope(lower_half(dict(sorted(ladder.items()))), 3) == pytest.approx(0.02, rel=1e-6)


def test_a_tilt_within_the_tolerance_is_flat_also_where_it_is_certain():
    verdict = PLATEAU.judge(rows(lambda decay: 0.3 + 0.004 * np.log10(max(decay, 1e-4)), noise=1e-5))
    assert verdict.outcome == "held" and verdict.numbers["change_low"] > 0


@pytest.mark.parametrize(
    "few",
    [
        rows(flat, noise=0.03, draw=1),
        rows(flat, seeds=4),
        rows(tilted, seeds=4),
        rows(flat)[:9],
        failed(rows(flat)),
        [],
    ],
    ids=["noisy", "four seeds", "four seeds, tilted", "two decays", "failed", "none"],
)
def test_too_little_is_no_verdict(few: list[Row]):
    assert PLATEAU.judge(few).outcome == "not enough data"


def test_the_first_learning_rate_is_judged_and_all_are_drawn():
    both = rows(flat, lrs=(0.2, 0.1))
    assert PLATEAU.judge(both) == PLATEAU.judge(rows(flat))
    ladder, efolds, steps = PLATEAU.draw(both)
    assert [trace.name for trace in ladder.traces] == ["lr = 0.1", "lr = 0.2", "λ = 0, lr = 0.2"]
    assert ladder.traces[2].y == pytest.approx([0.2, 0.2], abs=0.02)
    assert len(efolds.traces) == 7 and len(steps.traces) == 8
    low, high = ladder.traces[1].low, ladder.traces[1].high
    assert low and high and all(a <= y <= b for a, y, b in zip(low, ladder.traces[1].y, high))


@pytest.mark.parametrize("figure", [PLATEAU, ZERO])
def test_parts_are_drawn(figure: Plateau):
    assert figure.draw([]) == [] and figure.draw(failed(rows(flat))) == []
    for part in (rows(flat)[:1], rows(flat)[-1:], rows(flat)[:7]):
        assert all(panel.traces for panel in figure.draw(part))


def test_zero_decay_stays_below():
    verdict = ZERO.judge(rows(flat, figure=ZERO))
    assert verdict.outcome == "held" and verdict.numbers["gap"] == pytest.approx(0.1, abs=0.005)
    assert verdict.numbers["gap_low"] > 0.09  # in pairs: the seeds' own shifts of a point cancel


@pytest.mark.parametrize("height", [0.3, 0.35])
def test_zero_decay_that_comes_up_is_not_held(height: float):
    assert ZERO.judge(rows(lambda decay: height if decay == 0 else 0.3, figure=ZERO, noise=0.003)).outcome == "not held"


@pytest.mark.parametrize("draw", range(6))
def test_the_interval_decides_and_not_the_mean(draw: int):
    verdict = ZERO.judge(rows(lambda decay: 0.296 if decay == 0 else 0.3, figure=ZERO, noise=0.005, draw=draw))
    assert verdict.outcome == ("held" if verdict.numbers["gap_low"] > 0 else "not held")
    found = rows(lambda decay: 0.3 - 0.004 * (decay < 2e-4), figure=NARROW, noise=0.005, fit=0.6, draw=draw)
    verdict = NARROW.judge(found)
    assert "loss" not in verdict.numbers or verdict.outcome == (
        "held" if verdict.numbers["loss_low"] > 0 else "not held"
    )


def test_zero_decay_wants_five_seeds_and_both_sides():
    assert "5 are needed" in ZERO.judge(rows(flat, seeds=4)).reason
    without = [row for row in rows(flat) if row.run.config["weight_decay"]]
    for few in (rows(flat, seeds=4), without, [], failed(rows(flat))):
        assert ZERO.judge(few).outcome == "not enough data"


def test_the_record_never_falls():
    (panel,) = ZERO.draw(rows(flat, figure=ZERO))
    assert [trace.name for trace in panel.traces] == ["λ = 0", "λ = 0.0001", "λ = 0.000316", "λ = 0.001", "λ = 0.00316"]
    assert all(np.diff(trace.y).min() >= 0 for trace in panel.traces)


def test_figures_of_one_network_share_their_runs():
    assert {run.key for run in ZERO.runs("small")} <= {run.key for run in PLATEAU.runs("small")}
    assert FcPlateau.train is not None and not hasattr(Plateau, "train")


# the narrow network


def peaked(decay: float) -> float:
    return 0.25 if decay == 0 else 0.3 - 0.02 * np.log10(decay / 0.01) ** 2


def test_a_narrow_network_with_a_finite_optimum_is_held():
    verdict = NARROW.judge(rows(peaked, fit=0.6, figure=NARROW))
    assert verdict.outcome == "held" and verdict.numbers["best"] == pytest.approx(0.01)
    assert verdict.numbers["loss"] == pytest.approx(0.08, abs=0.004)
    assert verdict.numbers["gap to zero"] == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize("best", [lambda decay: 0.3 - decay, lambda decay: 0.3], ids=["smallest is best", "flat"])
def test_a_narrow_network_without_one_is_not_held(best: Callable[[float], float]):
    noise = 0.0 if best(1.0) < 0.3 else 0.002
    assert NARROW.judge(rows(best, fit=0.6, noise=noise, figure=NARROW)).outcome == "not held"


def test_a_network_that_fits_says_nothing_here():
    verdict = NARROW.judge(rows(peaked, fit=0.97, figure=NARROW))
    assert verdict.outcome == "not enough data" and "can fit its data" in verdict.reason


@pytest.mark.parametrize(
    "few", [rows(peaked, seeds=4, fit=0.6, figure=NARROW), rows(peaked, fit=0.6, figure=NARROW)[:8], []]
)
def test_a_narrow_network_wants_five_seeds(few: list[Row]):
    assert NARROW.judge(few).outcome == "not enough data"


def test_the_narrow_network_is_drawn():
    ladder, fit = NARROW.draw(rows(peaked, fit=0.6, figure=NARROW))
    assert "λ = 0, lr = 0.2" in [trace.name for trace in ladder.traces]
    assert fit.traces[0].y == pytest.approx([0.6] * 7) and fit.traces[-1].y == pytest.approx([0.6, 0.6])
    assert NARROW.draw([]) == [] == NARROW.draw(rows(peaked, figure=NARROW)[:5])  # no decay alone
