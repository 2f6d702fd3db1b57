"""Sweeps: axes as people write them, plans, prices, summaries, and which arms a forecast lets train on."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.experiment import Row, Run
from decaycast.lab import sweeps
from decaycast.lab.execute import in_process, together
from decaycast.lab.promising import choose_runs, forecasts_for, train_forecast
from decaycast.lab.store import Store
from decaycast.lab.sweep import sweep, train_missing
from decaycast.lab.sweeps import Cell, Plan, Price, axis, full_runs, keep_rows, price_runs, seeds, summarise, time_run
from decaycast.lab.trial import train_run
from decaycast.lab.where import cores, executor

TINY = {"data": ("digits",), "model": ("mlp-8x1",), "train_size": (64,), "batch_size": (16,), "steps": (40,)}


# axes


def test_ranges_have_both_ends_and_equal_ratios_or_steps():
    assert axis("lr", "0.01:1:log3") == (0.01, 0.1, 1.0)
    decays = axis("weight_decay", "1e-5:1e-1:log13")
    np.testing.assert_allclose(decays, np.geomspace(1e-5, 1e-1, 13), rtol=5e-6)
    assert len(decays) == 13 and decays[0] == 1e-5 and decays[-1] == 0.1 and decays[3] == 1e-4
    assert axis("momentum", "0:0.9:lin4") == (0.0, 0.3, 0.6, 0.9)
    assert axis("steps", "100:1000:log3") == (100, 316, 1000)
    assert axis("lr", "2:2:log4") == (2.0,)


def test_lists_may_hold_ranges_and_keep_each_value_once():
    assert axis("lr", "0.5, 0.01:1:log3,0.1") == (0.5, 0.01, 0.1, 1.0)
    assert axis("model", "mlp-8x1,cnn-16,mlp-8x1") == ("mlp-8x1", "cnn-16")
    assert axis("rule", "constant,autol2") == ("constant", "autol2")
    assert [type(value) for value in (*axis("lr", "1"), *axis("batch_size", "1"))] == [float, int]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(1e-9, 1e3).map(lambda x: float(f"{x:.6g}")), st.floats(1.001, 1e6), st.integers(2, 40), st.booleans())
def test_any_range_rises_from_its_start_to_its_end(start, ratio, count, log):
    end = float(f"{start * ratio:.6g}")
    values = axis("lr", f"{start!r}:{end!r}:{'log' if log else 'lin'}{count}")
    exact = (np.geomspace if log else np.linspace)(start, end, count)
    assert values[0] == start and values[-1] == end and len(values) <= count
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(values, exact if len(values) == count else sorted({*values}), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "1:0:log5", "lr '1:0:log5' ends below its start; write 0:1:lin5, or start from a positive number"),
        ("lr", "1:0.1:log5", "lr '1:0.1:log5' ends below its start; write 0.1:1:log5"),
        ("lr", "0.1:1:log0", "lr '0.1:1:log0' has no values; ask for 2 to 1,000,000, or write a value alone"),
        ("lr", "0.1:1:log1", "lr '0.1:1:log1' has two ends and one value; ask for 2 to"),
        ("lr", "0.1:1:lin99999999", "has too many values; ask for 2 to 1,000,000"),
        ("lr", "0:1:log5", "lr '0:1:log5' has equal ratios only from a positive start, got 0; or use lin"),
        ("lr", "0.1:1", "lr '0.1:1' is no range; write START:END:logN or START:END:linN with N values, as in"),
        ("lr", "0.1:1:5", "is no range; write START:END:logN"),
        ("lr", "0.1:1:log-5", "is no range; write START:END:logN"),
        ("lr", "0.1:1:log5:2", "is no range; write START:END:logN"),
        ("lr", "log0", "lr must be a finite number, got 'log0'"),
        ("lr", "1:inf:log3", "lr must be a finite number, got 'inf'"),
        ("lr", "0.1,,1", "lr '0.1,,1' has an empty value; write values between commas, as in 0.1,0.2"),
        ("lr", "", "lr '' has an empty value"),
        ("lr", "0", "lr must be > 0, got 0"),
        ("weight_decay", "-0.1", "weight_decay must be >= 0, got -0.1"),
        ("momentum", "0.5,1", "momentum must be below 1, got 1"),
        ("steps", "5", "steps must be >= 10, got 5"),
        ("batch_size", "2.5", "batch_size must be a whole number, got 2.5"),
        ("optimizer", "sgd,adam", "unknown optimizer 'adam'; did you mean 'adamw'?"),
        ("schedule", "cosin", "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ("learning_rate", "1", "unknown run setting 'learning_rate'"),
    ],
)
def test_malformed_axes_are_refused(name, text, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        axis(name, text)
    assert message in str(refused.value)


def test_seeds_are_a_count_or_a_list():
    assert seeds("3") == (0, 1, 2) and seeds("3,") == (3,) and seeds("5, 3,5") == (5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "0 seeds are no runs; give at least 1"),
        ("-1", "seeds are a count, as in 5, or a list of whole numbers, as in 3,5,7; got '-1'"),
        ("many", "got 'many'"),
        (",", "got ','"),
        ("10000000", "a sweep has at most 1,000,000 runs, got 10000000 seeds"),
    ],
)
def test_malformed_seeds_are_refused(text, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        seeds(text)
    assert message in str(refused.value)


# plans


def test_a_plan_is_the_product_with_each_seed():
    plan = Plan(axes={**TINY, "lr": (0.1, 0.2), "weight_decay": (0.0, 0.1, 0.2)}, seeds=(4, 5))
    assert plan.varied == ("lr", "weight_decay") and len(plan.cells) == 6 and len(plan.runs) == 12
    assert [run.seed for run in plan.runs] == [4] * 6 + [5] * 6
    assert {run.key for run in plan.runs} == {
        Run(config={**{name: values[0] for name, values in TINY.items()}, "lr": lr, "weight_decay": decay}, seed=seed).key
        for lr in (0.1, 0.2) for decay in (0.0, 0.1, 0.2) for seed in (4, 5)
    }  # fmt: skip


def test_what_does_not_concern_an_optimiser_makes_no_runs_of_its_own():
    plan = Plan(axes={**TINY, "optimizer": ("sgd", "adamw"), "momentum": (0.0, 0.9)})
    assert [(cell["optimizer"], cell["momentum"], cell["lr"]) for cell in plan.cells] == [
        ("sgd", 0.0, 0.02), ("sgd", 0.9, 0.02), ("adamw", 0.0, 0.001)
    ]  # fmt: skip


def test_plans_without_runs_and_plans_without_end_are_refused():
    with pytest.raises(
        ValueError, match="this sweep has no runs: give every axis at least one value, and at least one"
    ):
        Plan(axes={"lr": ()})
    with pytest.raises(ValueError, match="this sweep has no runs"):
        Plan(axes=TINY, seeds=())
    many = tuple(float(k) for k in range(1, 1002))
    with pytest.raises(
        ValueError, match=r"at most 1,000,000 runs, got 1,002,001 \(1001 lr x 1001 weight_decay x 1 seeds\)"
    ):
        Plan(axes={"lr": many, "weight_decay": many})
    with pytest.raises(ValueError, match="unknown run setting 'learn'"):
        Plan(axes={"learn": (1.0,)})


# prices


def test_rows_of_the_store_price_what_is_like_them(tmp_path):
    plan = Plan(axes={**TINY, "steps": (40, 80), "lr": (0.1,)})
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=Run(config={**plan.cells[0], "lr": 0.7}), seconds=2.0))
        price = price_runs(plan.runs, store, probe=False)
        assert price.seconds == (2.0, 4.0) and price.unknown == 0
        assert price.fre == full_runs(plan.runs) == 1.5
        other = Plan(axes={**TINY, "model": ("mlp-9x1",)})
        assert price_runs(other.runs, store, probe=False).unknown == 1


def test_what_is_not_known_is_timed_once_per_kind(monkeypatch):
    timed: list[Run] = []
    monkeypatch.setattr(sweeps, "time_run", lambda run, data_dir: timed.append(run) or float(len(timed)))
    plan = Plan(axes={**TINY, "model": ("mlp-8x1", "mlp-9x1"), "lr": (0.1, 0.2)})
    assert price_runs(plan.runs, None).seconds == (1.0, 1.0, 2.0, 2.0)
    assert [run.config["model"] for run in timed] == ["mlp-8x1", "mlp-9x1"]
    many = Plan(axes={**TINY, "model": tuple(f"mlp-{width}x1" for width in range(8, 14))})
    assert price_runs(many.runs, None).unknown == 2, "no more than four kinds are timed"


def test_a_probe_is_near_the_truth_and_finds_what_cannot_start():
    run = Plan(axes={**TINY, "steps": (400,)}).runs[0]
    train_run(run)
    row = train_run(run)
    assert 0.2 < time_run(run) / row.seconds < 5  # a factor of a few: others use this machine, too
    with pytest.raises(ValueError, match="unknown model 'mpl'"):
        price_runs(Plan(axes={**TINY, "model": ("mpl",)}).runs, None)


def test_a_run_that_diverges_has_a_price():
    run = Plan(axes={**TINY, "lr": (1e30,), "steps": (400,)}).runs[0]
    assert train_run(run).status == "failed"
    assert 0 < time_run(run) < 60


def test_workers_share_the_price_but_not_a_run():
    nan = math.nan
    assert Price(seconds=(1.0, 2.0, 3.0), fre=3.0).wall_seconds(2) == 3.0
    assert Price(seconds=(2.0,) * 10, fre=10.0).wall_seconds(4) == 5.0
    assert Price(seconds=(2.0, nan, nan), fre=3.0).wall_seconds(1) == 6.0
    assert (
        math.isnan(Price(seconds=(nan,), fre=1.0).wall_seconds(1)) and Price(seconds=(), fre=0.0).wall_seconds(3) == 0
    )


# summing up


def fake(run: Run) -> Row:
    """A training whose loss is known: lowest at lr 0.2, one seed worse than the next; at lr 0.2 seed 1 fails."""
    if (run.config["lr"], run.seed) == (0.2, 1):
        raise FloatingPointError("loss is nan")
    loss = abs(float(run.config["lr"]) - 0.2) + run.seed / 10  # type: ignore[arg-type]
    return Row(run=run, curve={"step": [1.0, 2.0], "validation_loss": [9.0, loss], "validation_accuracy": [0.1, -loss]})


def test_cells_are_means_over_seeds_best_first(tmp_path):
    plan = Plan(axes={**TINY, "lr": (0.1, 0.2, 0.4, 0.8)}, seeds=(0, 1))
    with Store(tmp_path / "rows.db") as store:
        store.append(Row(run=Run(config={"lr": 7.0})))  # another's
        train_missing([run for run in plan.runs if run.config["lr"] != 0.8], store, train=fake)
        table = store.table()
    for metric, sign in (("validation_loss", 1), ("validation_accuracy", -1)):
        cells = summarise(plan, plan.runs, table, metric)
        assert [cell.settings["lr"] for cell in cells] == [0.1, 0.4, 0.2, 0.8], "those with failures come later"
        assert [(cell.done, cell.failed) for cell in cells] == [(2, 0), (2, 0), (1, 1), (0, 0)]
        assert cells[0].mean == pytest.approx(sign * 0.15) and cells[0].stderr == pytest.approx(0.05)
        assert math.isnan(cells[2].stderr) and math.isnan(cells[3].mean)
    kept = keep_rows(table, plan.runs)
    assert len(kept) == 6 and kept["lr"].tolist() == [0.1, 0.2, 0.4] * 2 and kept["seed"].tolist() == [0] * 3 + [1] * 3
    with Store(tmp_path / "none.db") as store:
        assert summarise(plan, plan.runs, store.table())[0] == Cell(
            settings={"lr": 0.1}, mean=pytest.approx(math.nan, nan_ok=True), stderr=pytest.approx(math.nan, nan_ok=True),
            done=0, failed=0, keys=(plan.runs[0].key, plan.runs[4].key),
        )  # fmt: skip


# budget-aware


def test_only_grids_over_weight_decay_have_forecasts():
    decays = axis("weight_decay", "1e-4:1:log5")
    plan = Plan(
        axes={**TINY, "lr": (0.1, 0.2), "weight_decay": (0.0, *decays), "rule": ("constant", "autol2")}, seeds=(3, 4)
    )
    asked = forecasts_for(plan.runs, max_cost=0.2)
    assert [(run.config["lr"], run.config["rule"], run.seed) for run in asked] == [
        (0.1, "constant", 3),
        (0.2, "constant", 3),
    ]
    assert asked[0].config["candidates"] == "0.0001,0.001,0.01,0.1,1.0" and "weight_decay" not in asked[0].config
    few = Plan(axes={**TINY, "weight_decay": decays[:3]})
    assert forecasts_for(few.runs) == []
    with pytest.raises(ValueError, match=r"max_cost must be in \(0, 1\] full-run equivalents, got 0"):
        forecasts_for(plan.runs, max_cost=0)
    with pytest.raises(ValueError, match="unknown metric 'loss'"):
        forecasts_for(plan.runs, metric="loss")


def test_arms_outside_the_interval_are_stopped_and_doubt_stops_none():
    decays = axis("weight_decay", "1e-4:1:log5")
    plan = Plan(axes={**TINY, "lr": (0.1, 0.2, 0.3), "weight_decay": (0.0, *decays)}, seeds=(0, 1))
    asked = forecasts_for(plan.runs)
    final = {"weight_decay": 0.02, "low": 0.005, "high": 0.1, "cost": 0.25}
    narrow = {"weight_decay": 0.04, "low": 0.03, "high": 0.05, "cost": 0.25}
    rows = [
        Row(run=asked[0], reason="trust: it is so", final=final),
        Row(run=asked[1], reason="refuse: nothing to see", final=final),
        Row(run=asked[2], reason="weak: near", final=narrow),
    ]
    choice = choose_runs(plan.runs, rows)
    kept = {(run.config["lr"], run.config["weight_decay"]) for run in choice.kept}
    assert kept == {(0.1, 0.0), (0.1, 0.01), (0.1, 0.1)} | {(0.2, decay) for decay in (0.0, *decays)} | {
        (0.3, 0.0),
        (0.3, 0.1),
    }
    assert len(choice.kept) + len(choice.stopped) == len(plan.runs) and choice.spent == 0.75
    assert [run for run in plan.runs if run in choice.kept] == list(choice.kept)
    failed = [Row(run=asked[0], status="failed", reason="DataError")]
    assert choose_runs(plan.runs, failed).stopped == () and choose_runs(plan.runs, []).kept == tuple(plan.runs)


@pytest.mark.slow
def test_a_pruned_sweep_finds_the_best_of_the_whole_one_for_less(tmp_path):
    whole = {"data": ("digits",), "model": ("mlp-64x2",), "train_size": (256,), "batch_size": (32,), "steps": (1200,)}
    plan = Plan(axes={**whole, "lr": (0.05,), "momentum": (0.9,), "weight_decay": axis("weight_decay", "1e-6:1:log7")})
    with Store(tmp_path / "rows.db") as store:
        rows = sweep(forecasts_for(plan.runs), store, train=train_forecast)
        choice = choose_runs(plan.runs, rows)
        train_missing(plan.runs, store, train=train_run)
        cells = summarise(plan, plan.runs, store.table())
    assert rows[0].status == "done" and 0 < choice.spent <= 0.3, rows[0].reason
    assert len(choice.stopped) >= 2 and full_runs(choice.kept) + choice.spent < 0.8 * full_runs(plan.runs)
    assert cells[0].settings["weight_decay"] in {run.config["weight_decay"] for run in choice.kept}, rows[0].reason


# one place for rows, one for executors


def test_rows_together_are_stored_at_once_and_shown_afterwards(tmp_path, monkeypatch):
    stored: list[int] = []
    real = Store.extend
    monkeypatch.setattr(Store, "extend", lambda self, rows: stored.append(len(rows)) or real(self, rows))
    shown: list[int] = []
    runs = Plan(axes={**TINY, "lr": (0.1,)}, seeds=(0, 1, 2, 3)).runs

    def execute(runs, train, on_row) -> None:
        on_row(train(runs[0]))
        with together(on_row), together(on_row):
            on_row(train(runs[1]))
            on_row(train(runs[2]))
            assert shown == [0]
        with together(print):
            pass
        with together(on_row):
            on_row(train(runs[3]))
            raise KeyboardInterrupt

    with Store(tmp_path / "rows.db") as store:
        with pytest.raises(KeyboardInterrupt):
            sweep(runs, store, train=fake, execute=execute, on_row=lambda row: shown.append(row.run.seed))
        assert stored == [1, 2, 1] and shown == [0, 1, 2, 3] and len(store.read()) == 4


def test_executors_have_names():
    assert executor("here") is in_process and executor("here", workers=1) is in_process
    rows: list[Row] = []
    executor("processes", workers=1)([], fake, rows.append)
    executor("replicas", workers=1)([], fake, rows.append)
    assert rows == [] and cores() >= 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("threads",), {}, "unknown place to train 'threads'; known: here, processes, replicas, ray"),
        (("here",), {"workers": 2}, "'here' trains one run at a time, got 2 workers; train on processes instead"),
        (("processes",), {"workers": 0}, "workers must be at least 1, got 0"),
        (
            ("processes",),
            {"address": "a:1"},
            "an address is that of a Ray cluster, got 'a:1' with 'processes'; train on ray",
        ),
    ],
)
def test_places_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        executor(*arguments, **options)
    assert message in str(refused.value)


def test_a_sweep_from_two_sizes_of_text_and_number_is_one_table(tmp_path: Path):
    plan = Plan(axes={**TINY, "rule": ("constant", "autol2"), "lr": (0.1, 0.2)})
    with Store(tmp_path / "rows.db") as store:
        train_missing(plan.runs, store, train=partial(fake))
        table = keep_rows(store.table(), plan.runs)
    assert sorted(zip(table["rule"], table["lr"])) == [
        ("autol2", 0.1),
        ("autol2", 0.2),
        ("constant", 0.1),
        ("constant", 0.2),
    ]
