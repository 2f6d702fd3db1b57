"""Fixed budgets, the forecast and AutoL2 against constants: judges on rows with a known optimum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.methods.l2.figure_rows import failed, made_up, seed_noise

from decaycast.core.experiment import Row, Run
from decaycast.core.seeds import group
from decaycast.methods.l2.figures.budget import FixedBudget, optimum
from decaycast.methods.l2.figures.constants import Grid
from decaycast.methods.l2.figures.controller import AgainstConstant, steps_to
from decaycast.methods.l2.figures.prediction import Prediction, between, measured_constant
from decaycast.methods.l2.figures.shared import rates

STEPS = 8000
GRID = Grid(config={"lr": 0.02, "momentum": 0.9, "steps": STEPS}, rates=rates(0.03, 3e-5, 13), seeds=5)
GRIDS = {"smoke": GRID, "small": GRID, "paper": GRID}
BUDGET, FORECAST = FixedBudget(), Prediction(grids=GRIDS)
Top = Callable[[float, np.ndarray], np.ndarray]


def rows(top: Top, *, noise: float = 5e-4, seeds: int = 5) -> list[Row]:
    """Grid runs whose accuracy is top(weight decay, step) plus noise of the seed and the run."""
    found = []
    for run in GRID.runs():
        decay = float(run.config["weight_decay"])  # type: ignore[arg-type]
        if run.seed < seeds:
            shift = 0.01 * seed_noise(run.seed) + noise * seed_noise(run.seed, decay)
            found.append(made_up(run, lambda step, d=decay, s=shift: top(d, step) + s, points=200))
    return found


def inverse(constant: float, fall: float = 0.02) -> Top:
    """At every step, the best decay so far is constant/step; the further from it, the worse."""

    def top(decay: float, step: np.ndarray) -> np.ndarray:
        if decay == 0:
            return 0.3 + 0.0 * step
        return 0.4 + 0.02 * np.log10(step) - fall * np.log10(decay * step / constant) ** 2

    return top


def fixed(best: float) -> Top:
    def top(decay: float, step: np.ndarray) -> np.ndarray:
        return 0.4 - 0.02 * (np.log10(decay / best) ** 2 if decay else 4.0) + 0.02 * np.log10(step)

    return top


# fixed budget


def test_an_optimum_inverse_to_the_budget_is_held():
    verdict = BUDGET.judge(rows(inverse(20.0)))
    assert verdict.outcome == "held"
    # records, not values at T: a decay's best is kept after its time, which moves all three optima alike
    assert verdict.numbers["slope"] == pytest.approx(-1, abs=0.1)
    assert verdict.numbers["slope of the loss"] == pytest.approx(
        verdict.numbers["slope"]
    )  # the loss made up is 1 - accuracy


def test_an_optimum_that_stays_is_not_held():
    verdict = BUDGET.judge(rows(fixed(0.01)))
    assert verdict.outcome == "not held" and verdict.numbers["slope"] == pytest.approx(0, abs=0.1)
    assert verdict.numbers["best at 8000"] == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("best", [1e-9, 10.0], ids=["smallest", "largest"])
def test_an_optimum_at_the_end_is_not_held(best: float):
    assert BUDGET.judge(rows(fixed(best))).outcome == "not held"


def test_an_optimum_at_the_largest_of_a_budget_is_not_held_though_it_follows_the_law():
    verdict = BUDGET.judge(rows(inverse(max(GRID.decays()) * 500), noise=1e-4))
    assert verdict.numbers["slope_low"] <= -1 <= verdict.numbers["slope_high"]
    assert verdict.numbers["best at 500"] == max(GRID.decays()) and verdict.outcome == "not held"


def test_a_parabola_has_its_vertex_where_it_is():
    groups = group(rows(fixed(0.0123), noise=0.0), "weight_decay")
    assert optimum(groups, 2, STEPS) == pytest.approx(0.0123, rel=1e-6)
    assert optimum(groups, 2, STEPS, "validation_loss") == pytest.approx(0.0123, rel=1e-6)
    assert optimum(group(rows(fixed(1e-9)), "weight_decay"), 0, STEPS) == pytest.approx(min(GRID.decays()[1:]))
    level = group(rows(lambda decay, step: 0.5 + 0 * step, noise=0.0), "weight_decay")
    assert optimum(level, 0, STEPS) in GRID.decays()


@pytest.mark.parametrize("figure", [BUDGET, FORECAST], ids=lambda figure: figure.name)
def test_too_few_rows_are_no_verdict_and_draw_what_there_is(figure: FixedBudget | Prediction):
    whole = rows(inverse(20.0))
    for few in ([], failed(whole), rows(inverse(20.0), seeds=2), whole[:12]):
        assert figure.judge(few).outcome == "not enough data"
        assert all(panel.traces for panel in figure.draw(few))
    assert figure.draw([]) == []


def test_fixed_budgets_are_drawn():
    accuracy, loss, best = BUDGET.draw(rows(inverse(20.0)))
    assert [trace.name for trace in accuracy.traces][:2] == ["T = 500", "λ = 0, T = 500"]
    assert loss.y_log and min(loss.traces[0].y) == pytest.approx(1 - max(accuracy.traces[0].y))
    assert [trace.name for trace in best.traces] == ["best by accuracy", "best by loss", "c/T"]
    assert best.traces[0].y[0] / best.traces[0].y[2] == pytest.approx(16, rel=0.25)


# forecast


def test_a_good_forecast_is_held():
    found = rows(inverse(20.0, fall=0.005))
    verdict = FORECAST.judge(found)
    assert verdict.outcome == "held"
    assert verdict.numbers["predicted at 1000"] == pytest.approx(8 * verdict.numbers["predicted at 8000"])
    assert verdict.numbers["lost at 8000"] < 0.01


def test_a_forecast_that_misses_is_not_held():
    # the best decay is 3e-3/0.2 whatever the budget; the short run stops rising late, so c/T lies far above it
    verdict = FORECAST.judge(rows(fixed(3e-4)))
    assert verdict.outcome == "not held" and verdict.numbers["lost at 1000"] > 0.01


def test_noise_alone_decides_nothing():
    verdict = FORECAST.judge(rows(inverse(20.0, fall=0.005), noise=0.005))
    lost = [value for name, value in verdict.numbers.items() if name.startswith("lost at")]
    assert len(lost) == 4 and max(lost) < 0.01 and verdict.outcome == "not enough data"


def test_the_constant_is_that_of_the_short_run():
    grid = group(rows(lambda decay, step: np.minimum(0.5, 0.1 * np.log10(step)), noise=0.0), "weight_decay")
    probe = sorted(GRID.decays())[-2]
    # the short run ends after 3 e-folds, before its accuracy is level; half a percent below its end
    end = 3 * 0.1 / (0.02 * probe)
    assert measured_constant(grid, range(5)) == pytest.approx(probe * end * 10**-0.05, rel=0.1)


def test_between_the_grid_accuracy_is_linear_in_the_logarithm():
    grid = group(rows(lambda decay, step: 0.5 + 0.1 * np.log10(max(decay, 1e-9)) + 0 * step, noise=0.0), "weight_decay")
    low, high = sorted(GRID.decays())[4:6]
    middle = between(grid, 1, STEPS, float(np.sqrt(low * high)))
    assert middle == pytest.approx((between(grid, 1, STEPS, low) + between(grid, 1, STEPS, high)) / 2, rel=1e-9)
    assert between(grid, 1, STEPS, 1e-9) == between(grid, 1, STEPS, min(GRID.decays()[1:]))


def test_the_forecast_is_drawn():
    accuracy, decay, grid = FORECAST.draw(rows(inverse(20.0)))
    assert [trace.name for trace in accuracy.traces] == ["predicted λ = c/T", "tuned constant", "λ = 0"]
    assert len(decay.traces[0].x) == 4 and len(grid.traces) == 4


# AutoL2 against constants


def against(better: bool) -> AgainstConstant:
    return AgainstConstant(name="l2/a", title="A", claim="c", better=better, grids=GRIDS)


def with_autol2(height: float, *, noise: float = 5e-4, seeds: int = 5, other: float = 0.3) -> list[Row]:
    """Constants that reach 0.02*log10(8000) + 0.4 at best, and AutoL2 that reaches `height` above it at step 100."""
    auto = []
    for run in against(True).runs("small"):
        if run.config.get("rule") and run.seed < seeds:
            top = 0.4 + 0.02 * np.log10(STEPS) + (height if run.config["weight_decay"] == 2.0 else other)
            shift = 0.01 * seed_noise(run.seed) + noise * seed_noise(run.seed, run.config["weight_decay"], "auto")
            auto.append(made_up(run, lambda step, t=top + shift: np.where(step < 100, 0.1, t), points=200))
    return auto + rows(fixed(0.01), noise=noise, seeds=seeds)


def test_a_lead_is_held_where_the_claim_says_so():
    verdict = against(True).judge(with_autol2(0.02))
    assert verdict.outcome == "held" and verdict.numbers["lead of AutoL2"] == pytest.approx(0.02, abs=0.004)
    assert (
        verdict.numbers["tuned constant"] == pytest.approx(0.01, rel=0.5) and verdict.numbers["reached by AutoL2"] == 5
    )
    assert against(False).judge(with_autol2(0.02)).outcome == "not held"


def test_a_lag_is_held_where_the_claim_says_so():
    assert against(False).judge(with_autol2(-0.02)).outcome == "held"
    verdict = against(True).judge(with_autol2(-0.02))
    assert verdict.outcome == "not held" and "never" in verdict.reason and verdict.numbers["reached by AutoL2"] == 0


@pytest.mark.parametrize(
    "few",
    [
        with_autol2(0.0, noise=0.01),
        with_autol2(0.02, seeds=4),
        with_autol2(0.02, seeds=1),
        [row for row in with_autol2(0.02) if not row.run.config.get("rule")],
        [row for row in with_autol2(0.02) if row.run.config.get("rule")],
        failed(with_autol2(0.02)),
        [],
    ],
    ids=["level", "four seeds", "one seed", "no AutoL2", "no constants", "failed", "none"],
)
def test_a_lead_needs_five_seeds_and_both_sides(few: list[Row]):
    assert against(True).judge(few).outcome == "not enough data"
    assert all(panel.traces for panel in against(True).draw(few))


def test_steps_to_an_accuracy():
    row = made_up(Run(config={"lr": 0.1, "weight_decay": 0.1, "steps": 1000}), lambda step: step / 1000, points=4)
    assert steps_to(row, 0.05) == 100.0 and steps_to(row, 2.0) == np.inf


def test_the_comparison_is_drawn():
    accuracy, decay, grid = against(True).draw(with_autol2(0.02))
    assert [trace.name for trace in accuracy.traces][:3] == ["AutoL2", "AutoL2 from 0.1", "AutoL2 on e-folds"]
    assert accuracy.traces[3].name.startswith("constant λ = 0.0")
    assert len(decay.traces) == 4 and decay.y_log
    assert [trace.name for trace in grid.traces] == [
        "constants",
        "AutoL2",
        "AutoL2 from 0.1",
        "AutoL2 on e-folds",
        "λ = 0",
    ]
