"""From request to page on real digits: resumes, verifies, and says what it cannot write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decaycast.core.schedule import by_name
from decaycast.lab import probe as probing
from decaycast.lab.forecasting import Request, Result, effective_rates, find_weight_decay, recipe, recipe_config
from decaycast.lab.store import Store, StoreError
from decaycast.lab.trial import Trial

STEPS = 300


def request(out: Path, *, config: dict[str, Any] | None = None, **changes: Any) -> Request:
    settings = {
        "data": "digits", "train_size": 300, "model": "mlp-16x1", "optimizer": "sgd", "lr": 0.05, "momentum": 0.9,
        "schedule": "cosine", "steps": STEPS, "batch_size": 32, **(config or {}),
    }  # fmt: skip
    return Request(config=recipe_config(**settings), out=out, command="decaycast find --data digits", **changes)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return find_weight_decay(request(tmp_path_factory.mktemp("out")))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, int]]:
    """(weight decay, from step, to step) of all training done by probes."""
    pieces: list[tuple[float, int, int]] = []

    class Counting(Trial):
        def advance(self, stop: int, on_row: Any = None) -> None:
            pieces.append((self.config["weight_decay"], self.step, stop))
            super().advance(stop, on_row)

    monkeypatch.setattr(probing, "Trial", Counting)
    return pieces


def test_a_request_ends_in_a_forecast_and_a_page(result: Result):
    found = result.forecast
    assert found.verdict in ("trust", "weak", "refuse") and found.metric == "validation loss"
    assert 0.2 < found.cost <= 0.3 and not found.higher_is_better and len(found.arms) >= 3
    assert result.verification is None
    page = result.page.read_text(encoding="utf-8")
    assert result.page.name == "forecast.html" and page.lstrip().lower().startswith("<!doctype html>")
    assert found.verdict in page and "torch.optim.SGD" in page and "decaycast find --data digits" in page
    with Store(result.page.parent / "rows.sqlite") as store:
        rows = store.read()
    assert sum(row.run.config["stop"] > 0 for row in rows) == len(rows) >= len(found.arms)  # type: ignore[operator]


def test_the_result_is_json(result: Result):
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["weight_decay"] == result.forecast.weight_decay and read["verification"] is None
    assert read["page"] == str(result.page) and len(read["arms"]) == len(result.forecast.arms)


def test_asked_again_nothing_is_trained(result: Result, trained: list):
    again = find_weight_decay(request(result.page.parent))
    assert trained == [] and again.forecast == result.forecast


def test_an_interrupted_request_trains_only_the_rest(tmp_path: Path, result: Result, trained: list):
    seen: list[float] = []

    def interrupt(weight_decay: float, row: dict[str, float]) -> None:
        seen.append(weight_decay)
        if len(set(seen)) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_weight_decay(request(tmp_path), on_row=interrupt)
    first = {decay for decay, _, _ in trained[:2]}
    assert len(trained) == 3 and not (tmp_path / "forecast.html").exists()
    trained.clear()
    resumed = find_weight_decay(request(tmp_path))
    horizon = min(stop for _, _, stop in trained)
    assert all(decay not in first for decay, _, stop in trained if stop == horizon), (
        "finished arms are not trained again"
    )
    assert resumed.forecast == result.forecast and resumed.page.exists()


def test_verification_is_part_of_the_result(tmp_path: Path):
    said: list[str] = []
    found = find_weight_decay(request(tmp_path, verify=True, config={"steps": 40, "optimizer": "adamw", "lr": 0.01,
                                                                     "momentum": 0.0}), say=said.append)  # fmt: skip
    check = found.verification
    assert (
        said[0] == "verifying"
        and said[-1].startswith("verifying (")
        and check is not None
        and check.regret >= 0
        and check.seeds == 2
    )
    assert 0.01 in check.weight_decays and float(f"{found.forecast.weight_decay:.6g}") in check.weight_decays
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["verification"]["regret"] == check.regret
    assert "AdamW" in found.page.read_text(encoding="utf-8")


def test_accuracy_can_be_asked_for(tmp_path: Path):
    found = find_weight_decay(request(tmp_path, metric="accuracy", config={"steps": 40}))
    assert found.forecast.higher_is_better and found.forecast.metric == "validation accuracy"


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path, trained: list):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot make the output folder .*file.*; choose one you can write to"):
            find_weight_decay(request(out))
    assert trained == []


def test_a_store_that_is_no_database_is_named_and_kept(tmp_path: Path, trained: list):
    (tmp_path / "rows.sqlite").write_bytes(b"weight,decay\n" * 200)
    with pytest.raises(StoreError, match=r"rows.sqlite is not a decaycast store \(not a SQLite database\)"):
        find_weight_decay(request(tmp_path))
    assert trained == [] and (tmp_path / "rows.sqlite").read_bytes().startswith(b"weight,decay")


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        ({"schedule": "constant", "momentum": 0.0}, 0.05),
        ({"schedule": "constant", "momentum": 0.9}, 0.5),
        ({"schedule": "constant", "optimizer": "adamw"}, 0.05),
    ],
    ids=str,
)
def test_effective_rates_are_per_unit_of_decay(tmp_path: Path, config: dict[str, Any], rate: float):
    rates = effective_rates(request(tmp_path, config=config).config, None)
    assert rates.shape == (STEPS,) and rates == pytest.approx(rate)
    falling = effective_rates(request(tmp_path, config={**config, "schedule": "cosine"}).config, None)
    assert falling == pytest.approx([rate * by_name("cosine", STEPS)(step) for step in range(STEPS)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step_decay"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_recipe_runs_as_it_stands(tmp_path: Path, result: Result, schedule: str, optimizer: str):
    import decaycast

    momentum = 0.9 if optimizer == "sgd" else 0.0
    config = request(tmp_path, config={"schedule": schedule, "optimizer": optimizer, "momentum": momentum}).config
    text = recipe(config, replace(result.forecast, weight_decay=0.0123456))
    scope: dict[str, Any] = {"torch": torch, "decaycast": decaycast, "model": torch.nn.Linear(2, 2)}
    exec(text, scope)
    (group,) = scope["optimizer"].param_groups
    assert group["weight_decay"] == 0.0123 and group["lr"] == pytest.approx(0.05)
    assert group.get("momentum", 0.0) == momentum and type(scope["optimizer"]).__name__.lower() == optimizer
    if schedule != "constant":
        for _ in range(STEPS // 2):
            scope["optimizer"].step()
            scope["scheduler"].step()
        assert group["lr"] == pytest.approx(0.05 * by_name(schedule, STEPS)(STEPS // 2))
    assert f"over {STEPS} steps of batch size 32" in text and result.forecast.verdict in text


def test_settings_of_a_recipe_are_checked():
    for steps in (9, -1, 10.5, None, "100"):
        with pytest.raises(
            ValueError, match=f"the budget must be a whole number of at least 10 optimiser steps, got {steps}"
        ):
            recipe_config(steps=steps)
    for size in (0, -3, 1.5):
        with pytest.raises(ValueError, match=f"the batch size must be a whole number >= 1, got {size}"):
            recipe_config(steps=100, batch_size=size)
    assert recipe_config(steps=100, train_size=None, lr=0.1) == {"steps": 100, "lr": 0.1}
