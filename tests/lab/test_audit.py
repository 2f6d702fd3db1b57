"""Audits: numbers a person can check, advice by range, and who decays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from decaycast.core.timescale import efolds
from decaycast.lab.audit import audit, parameter_table
from decaycast.lab.models import build
from decaycast.methods.l2.forecast import PRIOR_EFOLDS


def test_the_usual_resnet_recipe():
    found = audit(lr=0.1, weight_decay=5e-4, steps=10_000, momentum=0.9)
    assert found.efolds == pytest.approx(5.0) and found.tau == pytest.approx(0.2)
    assert found.advice.startswith("strong")
    assert found.usual_weight_decay == pytest.approx(5e-4 * PRIOR_EFOLDS / 5)
    assert found.to_dict() == {
        "efolds": found.efolds, "tau": found.tau, "advice": found.advice, "usual_weight_decay": found.usual_weight_decay
    }  # fmt: skip


def test_conventions_and_schedules_count():
    assert audit(lr=1e-3, weight_decay=0.1, steps=1000, convention="decoupled").efolds == pytest.approx(0.1)
    falling = audit(lr=lambda step: 0.1 * (1 - step / 99), weight_decay=0.02, steps=100)
    assert falling.efolds == pytest.approx(0.1)
    spent = efolds(lr=lambda s: 0.1 * (1 - s / 99), weight_decay=falling.usual_weight_decay, steps=100)  # type: ignore[arg-type]
    assert spent == pytest.approx(PRIOR_EFOLDS)


@pytest.mark.parametrize(
    ("spent", "advice"),
    [
        (0.0, "no decay at all"),
        (0.05, "hardly any"),
        (0.3, "light"),
        (2.0, "usual"),
        (10.0, "strong"),
        (50.0, "very strong"),
    ],
)
def test_the_advice_follows_the_efolds(spent: float, advice: str):
    found = audit(lr=0.1, weight_decay=spent / 100, steps=1000)
    assert found.efolds == pytest.approx(spent) and found.advice.startswith(advice)
    assert (found.tau is None) == (spent == 0)


def test_momentum_that_cannot_shrink_so_fast_leaves_no_guess():
    """Twenty steps at momentum 0.9 shrink by at most 20 * 0.0527 = 1.05 e-folds: the audit itself must not fail."""
    found = audit(lr=0.1, weight_decay=5e-4, steps=20, momentum=0.9)
    assert found.usual_weight_decay is None and found.efolds == pytest.approx(0.01)
    assert audit(lr=0.1, weight_decay=5e-4, steps=30, momentum=0.9).usual_weight_decay is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "the learning rate is zero at every step"),
        ({"lr": -0.1}, "lr must be finite and >= 0 at every step, got -0.1"),
        ({"lr": math.nan}, "lr must be finite and >= 0 at every step, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and >= 0, got inf"),
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"convention": "decouple"}, "unknown convention 'decouple'; did you mean 'decoupled'"),
    ],
    ids=str,
)
def test_recipes_are_checked(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        audit(**{"lr": 0.1, "weight_decay": 5e-4, "steps": 100, **changes})


def test_parameters_are_listed_with_their_kind_and_decay():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    first, norm, layer, _ = model
    optimizer = torch.optim.SGD(
        [{"params": [first.weight, norm.weight], "weight_decay": 0.1}, {"params": [first.bias, *layer.parameters()]}],
        lr=0.1,
    )
    table = parameter_table(model, optimizer)
    assert [(row.name, row.shape, row.kind) for row in table] == [
        ("0.weight", (3, 4), "weight"),
        ("0.bias", (3,), "bias"),
        ("1.weight", (3,), "normalisation"),
        ("1.bias", (3,), "normalisation"),
        ("2.weight", (3,), "normalisation"),
        ("2.bias", (3,), "normalisation"),
        ("3.weight", (2, 3), "weight"),
    ]
    held = [row.weight_decay for row in table]
    assert held[:3] == [0.1, 0.0, 0.1] and held[4:6] == [0.0, 0.0]
    assert math.isnan(held[3]) and math.isnan(held[6]), "not in the optimiser: not trained"


def test_the_labs_networks_can_be_listed():
    model = build("cnn-bn-4", (3, 32, 32), 10, seed=0)
    kinds = {row.kind for row in parameter_table(model, torch.optim.AdamW(model.parameters(), weight_decay=0.2))}
    assert kinds == {"weight", "bias", "normalisation"}
