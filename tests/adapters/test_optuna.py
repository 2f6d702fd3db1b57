"""The forecast as a search's prior: ranges by verdict, a real study on digits, and what missing packages say (timm's, too)."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import decaycast as dc
from decaycast.adapters.finding import FoundWeightDecay

REASON = "Optuna is not installed: pip install 'decaycast[optuna]'"
adapter = pytest.importorskip("decaycast.adapters.optuna", reason=REASON, exc_type=ImportError)
optuna = pytest.importorskip("optuna", reason=REASON)

FOUND = dc.Forecast(
    weight_decay=0.02,
    interval=(0.01, 0.05),
    verdict="trust",
    reason="because",
    efolds=None,
    cost=0.3,
    budget_steps=1000,
    metric="loss",
    higher_is_better=False,
    arms=(),
    rate_per_decay=None,
)
WEAK, REFUSED = replace(FOUND, verdict="weak"), replace(FOUND, verdict="refuse")


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def a_study(seed: int = 0) -> Any:
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))


@pytest.mark.parametrize(
    ("forecast", "full_range", "expected"),
    [
        (FOUND, None, (0.005, 0.1, 0.02)),
        (WEAK, None, (0.0025, 0.2, 0.02)),
        (WEAK, (0.015, 0.9), (0.015, 0.2, 0.02)),
        (WEAK, (1e-4, 0.03), (0.0025, 0.03, 0.02)),
        (REFUSED, None, (1e-6, 1.0, None)),
        (REFUSED, (1e-4, 0.5), (1e-4, 0.5, None)),
        (replace(REFUSED, rate_per_decay=50.0), None, (2e-5, 2.0, None)),  # 0.001 and 100 e-folds
        (replace(REFUSED, interval=(1e-7, 3.0)), None, (1e-7, 3.0, None)),
    ],
)
def test_range_and_first_trial_by_verdict(forecast: Any, full_range: Any, expected: tuple[float, ...]):
    prior = adapter.prior_from_forecast(forecast, full_range)
    assert (prior.low, prior.high) == pytest.approx(expected[:2])
    assert prior.enqueued == expected[2]
    assert "because" in prior.reason
    assert adapter.prior_from_forecast(FoundWeightDecay(forecast=forecast), full_range) == prior


@given(
    decay=st.floats(1e-8, 1e2),
    below=st.floats(1, 1e4),
    above=st.floats(1, 1e4),
    verdict=st.sampled_from(["trust", "weak", "refuse"]),
    rate=st.none() | st.floats(1e-3, 1e6),
)
def test_the_first_trial_lies_in_the_range_and_doubt_widens_it(
    decay: float, below: float, above: float, verdict: str, rate: float | None
):
    forecast = replace(
        FOUND, weight_decay=decay, interval=(decay / below, decay * above), verdict=verdict, rate_per_decay=rate
    )
    prior = adapter.prior_from_forecast(forecast)
    assert 0 < prior.low <= forecast.interval[0] and forecast.interval[1] <= prior.high < math.inf
    assert (prior.enqueued is None) == (verdict == "refuse")
    assert prior.enqueued is None or prior.low <= prior.enqueued <= prior.high
    if verdict == "weak":
        trusted = adapter.prior_from_forecast(replace(forecast, verdict="trust"))
        assert prior.low < trusted.low and trusted.high < prior.high


def test_a_study_begins_at_the_forecast_and_stays_in_the_range():
    study = a_study()

    def objective(trial: Any) -> float:
        return abs(math.log(adapter.suggest_weight_decay(trial, WEAK) / 0.03)) + 0 * trial.suggest_float("lr", 0.1, 1)

    assert adapter.enqueue(study, WEAK).enqueued == 0.02
    adapter.enqueue(study, WEAK)  # a script started again
    study.optimize(objective, n_trials=25)
    tried = [trial.params["weight_decay"] for trial in study.trials]
    assert len(tried) == 25 and tried[0] == 0.02 and tried[1] != 0.02
    assert all(0.0025 <= value <= 0.2 for value in tried)
    assert study.trials[0].distributions["weight_decay"] == optuna.distributions.FloatDistribution(
        0.0025, 0.2, log=True
    )
    assert study.best_params["weight_decay"] == pytest.approx(0.03, rel=0.2)
    assert np.mean(np.log(tried[1:]) > math.log(0.02236)) == pytest.approx(
        0.5, abs=0.35
    )  # log-uniform at first, not uniform


def test_a_refused_forecast_says_that_it_adds_nothing():
    study = a_study()
    with pytest.warns(UserWarning, match="nothing was enqueued, and the search goes over the full range, .*: because"):
        prior = adapter.enqueue(study, REFUSED, full_range=(1e-4, 1.0), name="wd")
    assert prior.enqueued is None and not study.trials
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study.optimize(
            lambda t: adapter.suggest_weight_decay(t, REFUSED, full_range=(1e-4, 1.0), name="wd"), n_trials=5
        )
    assert all(1e-4 <= trial.params["wd"] <= 1.0 for trial in study.trials)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: adapter.prior_from_forecast(0.02), TypeError, "expected a Forecast .*, got float"),
        (lambda: adapter.suggest_weight_decay(a_study(), FOUND), TypeError, "the trial .*, got Study"),
        (lambda: adapter.enqueue(FOUND, a_study()), TypeError, "expected an Optuna study, got Forecast"),
        (
            lambda: adapter.prior_from_forecast(FOUND, (1e-6, 1e-2)),
            ValueError,
            "full_range 1e-06 to 0.01 leaves out the weight decay forecast, 0.02",
        ),
        (lambda: adapter.prior_from_forecast(FOUND, (0.0, 1.0)), ValueError, "two weight decays, 0 < low < high, got"),
        (lambda: adapter.prior_from_forecast(REFUSED, (1.0, 0.1)), ValueError, "0 < low < high"),
        (lambda: adapter.prior_from_forecast(FOUND, (1e-3,)), ValueError, "two weight decays"),
        (lambda: adapter.prior_from_forecast(FOUND, 1.0), ValueError, "two weight decays"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        call()


# a real study


def digits() -> tuple[TensorDataset, TensorDataset]:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(data.target))
    inputs, labels = torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])
    wrong = torch.tensor(rng.integers(0, 10, 64))
    trained = torch.cat([wrong, labels[64:256]])  # a quarter of the labels are guesses, so that decay matters
    return TensorDataset(inputs[:256], trained), TensorDataset(inputs[256:656], labels[256:656])


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(dc.decay_groups(model, weight_decay), lr=1e-2)


def test_a_real_study_on_digits():
    train_set, held_out = digits()
    steps = 160

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

    def batches() -> DataLoader:
        return DataLoader(train_set, 64, shuffle=True, generator=torch.Generator().manual_seed(0))

    found = dc.find(
        network(), make_optimizer, functional.cross_entropy, batches(), DataLoader(held_out, 400), budget_steps=steps
    )

    def objective(trial: Any) -> float:
        return loss_with(adapter.suggest_weight_decay(trial, found))

    def loss_with(weight_decay: float) -> float:
        model = network()
        optimizer = make_optimizer(model, weight_decay)
        for _ in range(steps // 4):
            for inputs, labels in batches():
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        with torch.no_grad():
            return float(functional.cross_entropy(model(held_out.tensors[0]), held_out.tensors[1]))

    study = a_study()
    prior = adapter.enqueue(study, found)
    study.optimize(objective, n_trials=5)
    assert study.trials[0].params["weight_decay"] == prior.enqueued == found.weight_decay
    assert all(prior.low <= trial.params["weight_decay"] <= prior.high for trial in study.trials)
    assert study.best_value < 0.93 * loss_with(0.01)  # AdamW's default


# missing and unsupported packages


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("decaycast.adapters.version", version)


@pytest.mark.parametrize(
    ("module", "extra", "versions", "says"),
    [
        ("optuna", "optuna", {}, "needs optuna, which is not installed"),
        (
            "optuna",
            "optuna",
            {"optuna": "3.6.1"},
            "optuna 3.6.1 is installed, and this adapter works with optuna>=4.0,<6",
        ),
        ("optuna", "optuna", {"optuna": "6.0.0"}, "optuna 6.0.0 is installed"),
        ("timm", "timm", {}, "needs timm, which is not installed"),
        ("timm_finder", "timm", {}, "needs timm, which is not installed"),
        ("timm", "timm", {"timm": "0.9.16"}, "timm 0.9.16 is installed, and this adapter works with timm>=1.0.20,<2"),
    ],
)
def test_a_missing_or_wrong_package(monkeypatch: pytest.MonkeyPatch, module: str, extra: str, versions: Any, says: str):
    pretend(monkeypatch, **versions)
    for name in [name for name in sys.modules if name.startswith(f"decaycast.adapters.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=says) as caught:
        importlib.import_module(f"decaycast.adapters.{module}")
    assert f"'decaycast[{extra}]'" in str(caught.value)
