"""Verification: the numbers against hand calculation, and the grid it trains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from decaycast.core.experiment import Row, Run
from decaycast.lab.store import Store
from decaycast.lab.verify import FRESH_SEEDS, SEEDS, compare, verification_runs, verify

LOSSES = {(0.01, 1): 0.50, (0.01, 2): 0.54, (0.1, 1): 0.40, (0.1, 2): 0.36, (1.0, 1): 0.9, (1.0, 2): 1.1}


def rows(table: dict[tuple[float, int], float], metric: str = "validation_loss", failed: tuple = ()) -> list[Row]:
    return [
        Row(
            run=Run(config={"weight_decay": decay}, seed=seed),
            status="failed" if (decay, seed) in failed else "done",
            curve={} if (decay, seed) in failed else {metric: [9.9, value]},
        )
        for (decay, seed), value in table.items()
    ]


def test_regret_is_paired_over_seeds():
    found = compare(rows(LOSSES), 0.01, "validation_loss")
    assert found.weight_decays == (0.01, 0.1, 1.0) and found.seeds == 2 and found.cost == 6
    assert found.means == pytest.approx((0.52, 0.38, 1.0))
    # two seeds: standard deviation |a - b|/sqrt(2), standard error |a - b|/2
    assert found.stderrs == pytest.approx((0.02, 0.02, 0.1))
    # per seed 0.10 and 0.18: mean 0.14, standard error 0.04 (unpaired it would be 0.028)
    assert found.regret == pytest.approx(0.14) and found.regret_stderr == pytest.approx(0.04)
    assert found.metric == "validation_loss"


def test_the_best_of_the_grid_has_no_regret():
    found = compare(rows(LOSSES), 0.1, "validation_loss")
    assert found.regret == 0 and found.regret_stderr == 0


def test_accuracy_is_better_when_larger_and_reported_as_it_is():
    found = compare(rows(LOSSES, "validation_accuracy"), 0.01, "validation_accuracy")
    assert found.means == pytest.approx((0.52, 0.38, 1.0))
    assert found.regret == pytest.approx(0.48) and found.regret_stderr == pytest.approx(0.08)


def test_one_seed_has_no_spread():
    found = compare(rows({key: value for key, value in LOSSES.items() if key[1] == 1}), 0.01, "validation_loss")
    assert found.seeds == 1 and found.regret == pytest.approx(0.1) and found.regret_stderr == 0


def test_a_failed_run_leaves_its_decay_without_a_mean():
    found = compare(rows(LOSSES, failed=((1.0, 2),)), 0.01, "validation_loss")
    assert math.isnan(found.means[2]) and math.isnan(found.stderrs[2])
    assert found.regret == pytest.approx(0.14) and found.cost == 6
    found = compare(rows(LOSSES, failed=((0.1, 1),)), 0.01, "validation_loss")
    assert math.isnan(found.means[1]) and found.regret == 0, "the best that did not fail"
    assert math.isnan(compare(rows(LOSSES, failed=((0.01, 1),)), 0.01, "validation_loss").regret)


def test_when_all_failed_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="every verification run failed; see the failed rows' reasons in the store"):
        compare(rows(LOSSES, failed=tuple(LOSSES)), 0.01, "validation_loss")


def test_the_grid_spans_two_decades_and_holds_the_default():
    runs = verification_runs({"model": "mlp"}, 0.01, default=5e-4)
    decays = [run.config["weight_decay"] for run in runs if run.seed == FRESH_SEEDS[0]]
    assert decays == pytest.approx([0.0005, 0.001, 0.01 / math.sqrt(10), 0.01, 0.01 * math.sqrt(10), 0.1], rel=1e-5)
    assert 0.01 in decays and len(runs) == len(decays) * SEEDS
    assert all(run.config["model"] == "mlp" for run in runs) and 0 not in FRESH_SEEDS
    assert len(verification_runs({}, 0.01, default=0.01)) == 5 * SEEDS, "a default on the grid is trained once"


def test_the_forecasts_own_seed_is_not_fresh():
    seeds = {run.seed for run in verification_runs({}, 0.01, default=5e-4, forecast_seed=FRESH_SEEDS[0])}
    assert FRESH_SEEDS[0] not in seeds and len(seeds) == SEEDS


def test_verify_trains_what_the_store_lacks(tmp_path: Path):
    trained: list[Run] = []

    def train(run: Run) -> Row:
        trained.append(run)
        distance = math.log10(float(run.config["weight_decay"]) / 0.02)  # type: ignore[arg-type]
        return Row(run=run, curve={"validation_loss": [1.0, distance**2 + 0.001 * run.seed]})

    seen: list[Row] = []
    answer = 0.0123456789  # the grid holds six digits of it
    with Store(tmp_path / "rows.sqlite") as store:
        found = verify({}, answer, store, default=5e-4, train=train, on_row=seen.append)
        assert len(trained) == len(seen) == found.cost == 12
        assert verify({}, answer, store, default=5e-4, train=train) == found and len(trained) == 12
    best = min(found.means)
    assert found.regret == pytest.approx(found.means[found.weight_decays.index(0.0123457)] - best)
    assert found.regret_stderr == pytest.approx(0, abs=1e-12), "a seed's offset is common to all decays"
