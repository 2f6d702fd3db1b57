"""Audits: numbers a person can check, advice by range, what each rule says, and who decays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from decaycast.core.timescale import efolds
from decaycast.lab.audit import MOST_STEPS, Report, audit, audit_facts, parameter_table
from decaycast.lab.models import build
from decaycast.lab.recipes.recipe import Facts, with_options
from decaycast.lab.recipes.rules import Plan, Said, disagreements, rules
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


# the rules

GPT = {"lr": 6e-4, "weight_decay": 0.1, "steps": 20_000, "optimizer": "adamw", "schedule": "linear", "batch_size": 512}
TEXT = {"parameters": 124e6, "sequence_length": 1024.0}


def report(counts: dict[str, float] | None = None, **changes) -> Report:
    return audit_facts(with_options(Facts(), **{**GPT, **changes}), **(counts or {}))


def said(found: Report, rule: str) -> Said:
    (one,) = [item for item in found.rules if item.rule == rule]
    return one


def test_the_l2_papers_efolds_are_always_there():
    one = said(report(), "L2 paper")
    assert one.efolds == pytest.approx(PRIOR_EFOLDS) and one.about == "this run"
    assert one.times_yours == pytest.approx(PRIOR_EFOLDS / 0.6, rel=1e-3)
    short = said(report(steps=20, optimizer="sgd", momentum=0.9), "L2 paper")
    assert short.weight_decay is None and "heavy ball cannot shrink weights that much" in short.why


def test_power_lines_by_hand():
    found = report(TEXT)
    one, tokens = said(found, "Power Lines"), 20_000 * 512 * 1024
    expected = 512 * 1024 * (tokens / 124e6) ** 0.527 / (1.084 * 6e-4 * tokens)
    assert one.weight_decay == pytest.approx(expected)
    assert one.efolds == pytest.approx(
        efolds(lr=found.plan.lr, weight_decay=expected, steps=20_000, convention="decoupled")
    )
    assert "84.6 tokens per parameter (yours is 0.833)" in one.why and "schedule" not in one.why
    assert found.batch == {
        "tokens": 512 * 1024,
        "optimal_tokens": pytest.approx(2048 * 0.0306 * tokens**0.383),
        "critical_tokens": pytest.approx(2048 * 0.0471 * tokens**0.462),
    }
    given = report({"parameters": 124e6, "tokens": float(tokens)}, batch_size=None)
    assert said(given, "Power Lines").weight_decay == pytest.approx(expected) and given.batch is None


@pytest.mark.parametrize(
    ("counts", "changes", "why"),
    [
        ({}, {}, "for language models; needs --parameters"),
        ({"parameters": 1e8}, {}, "needs --tokens, or --sequence-length and --batch-size"),
        (TEXT, {"optimizer": "sgd"}, "fitted for AdamW's decoupled decay; this recipe's is 'sgd'"),
        (
            {**TEXT, "tokens": 20_000 * 512.0},
            {},
            r"are 1.05e\+10 tokens, not 1.02e\+07: a unit is wrong, or data repeat",
        ),
    ],
)
def test_why_power_lines_are_silent(counts: dict, changes: dict, why: str):
    found = report(counts, **changes)
    assert said(found, "Power Lines").weight_decay is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(said(found, "Power Lines").why)


def test_power_lines_out_of_range_or_under_another_schedule_say_so():
    one = said(report({**TEXT, "parameters": 1e5}, schedule="cosine"), "Power Lines")
    assert one.weight_decay is not None
    assert "this schedule is cosine" in one.why and "outside the fitted range, 1 to 1000" in one.why


NAMES = ("equal e-folds", "equal tau in epochs", "normalised decay", "nanochat")


@pytest.mark.parametrize(
    ("counts", "factors", "efolds_kept"),
    [
        # twice the batch, epochs kept: half the steps
        ({"new_batch_size": 1024.0}, (2, 2, 2**0.5, 2**0.5), (1, 1, 2**-0.5, 1)),
        # twice the epochs
        ({"new_steps": 40_000.0}, (1 / 2, 1, 2**-0.5, 1 / 2), (1, 2, 2**0.5, 1)),
        # four times the data, epochs kept
        ({"samples": 1e6, "new_samples": 4e6}, (1 / 4, 1 / 4, 1 / 2, 1 / 4), (1, 1, 2, 1)),
        # four times the data in the same number of steps
        ({"samples": 1e6, "new_samples": 4e6, "new_steps": 20_000.0}, (1, 1 / 4, 1, 1), (1, 1 / 4, 1, 1)),
        # twice as wide; only muP's rule looks at it, and halves the lr
        ({"width_factor": 2.0}, (1, 2, 1, 1), (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_rules_that_carry_a_decay_over(counts: dict, factors: tuple, efolds_kept: tuple):
    found = report(counts)
    carried = [said(found, name) for name in NAMES]
    assert [one.times_yours for one in carried] == pytest.approx(factors)
    assert [one.weight_decay for one in carried] == pytest.approx([0.1 * factor for factor in factors])
    assert [one.efolds for one in carried] == pytest.approx([found.audit.efolds * kept for kept in efolds_kept])
    assert {one.about for one in carried} == {"the new run"}


@pytest.mark.parametrize(
    ("counts", "changes", "why"),
    [
        ({}, {}, "needs the run to carry the weight decay to: --new-steps, --new-batch-size"),
        ({"new_batch_size": 8.0}, {"batch_size": None}, "needs this run's --batch-size"),
        ({"new_samples": 8.0}, {}, "needs this run's --samples"),
        ({"new_steps": 8.0}, {"weight_decay": 0.0}, "there is no weight decay to carry over"),
    ],
)
def test_why_nothing_is_carried_over(counts: dict, changes: dict, why: str):
    found = report(counts, **changes)
    assert all(why in said(found, name).why and said(found, name).weight_decay is None for name in NAMES)


def test_coupled_decay_is_carried_by_efolds_alone():
    found = report({"new_steps": 40_000.0}, optimizer="sgd", momentum=0.9)
    assert said(found, "equal e-folds").times_yours == pytest.approx(0.5)
    assert all("stated for decoupled decay" in said(found, name).why for name in NAMES[1:])


def test_disagreements_are_put_into_words():
    apart = report({**TEXT, "new_steps": 40_000.0}).disagreements
    assert apart[0] == (
        "on this run the rules disagree: L2 paper with 1.3 e-folds and Power Lines with 4.78 e-folds, a factor of 3.7"
    )
    assert apart[1].startswith("on the new run the rules disagree: ") and apart[1].endswith("a factor of 2")
    (near,) = report({"new_batch_size": 1024.0}).disagreements
    assert "the rules differ little: normalised decay with 0.424" in near
    (same,) = report({"width_factor": 2.0}).disagreements
    assert same == "on the new run the rules agree: 0.6 e-folds"
    assert disagreements([]) == [] == report().disagreements


def test_time_scale_in_epochs():
    found = report({"samples": 1_024_000.0})
    assert found.tau_epochs == pytest.approx(1 / (6e-4 * 0.1 * 2000))
    assert report().tau_epochs is None
    assert report({"samples": 1e6}, optimizer="sgd").tau_epochs is None
    assert report({"samples": 1e6}, weight_decay=0.0).tau_epochs is None


def test_steps_may_come_from_epochs():
    found = report({"samples": 1000.0}, steps=None, epochs=2.5, batch_size=300)
    assert found.plan.steps == 10 and found.plan.steps_per_epoch == 4


def test_a_convention_may_be_given():
    assert audit_facts(Facts(lr=0.1, weight_decay=0.1, steps=10), convention="decoupled").audit.efolds == pytest.approx(
        0.1
    )
    with pytest.raises(ValueError, match="unknown convention 'decouple'; did you mean 'decoupled'"):
        audit_facts(Facts(lr=0.1, weight_decay=0.1, steps=10), convention="decouple")


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        (
            {"lr": None, "weight_decay": None, "steps": None},
            {},
            r"\(options\) lacks the learning rate: --lr; the weight decay: --weight-decay; the length of the run: --steps",
        ),
        ({"steps": None, "epochs": 3}, {}, r"lacks the steps of its 3 epochs: --samples \(per epoch\), or --steps"),
        (
            {"steps": None, "epochs": 3, "batch_size": None},
            {"samples": 9.0},
            r"\(per epoch\) and --batch-size, or --steps",
        ),
        ({"steps": 0}, {}, "steps must be a whole number >= 1, got 0"),
        ({"steps": MOST_STEPS + 1}, {}, "are more than 50,000,000: are these samples or tokens"),
        ({"lr": math.nan}, {}, "lr must be finite and >= 0 at every step, got nan"),
        ({}, {"parameters": -1.0}, "--parameters must be a finite number > 0, got -1.0"),
        ({}, {"new_batch_size": math.nan}, "--new-batch-size must be a finite number > 0, got nan"),
    ],
    ids=str,
)
def test_reports_are_checked(changes: dict, counts: dict, message: str):
    with pytest.raises(ValueError, match=message):
        report(counts, **changes)


def test_a_report_is_plain_values():
    found = report({**TEXT, "new_steps": 40_000.0}).to_dict()
    assert {"efolds", "tau", "advice", "usual_weight_decay", "source", "recipe", "rules", "notes"} < set(found)
    assert found["recipe"]["convention"] == "decoupled" and "lr" not in found["recipe"]
    assert found["recipe"]["peak"] == 6e-4 and len(found["rules"]) == 6


def test_rules_of_a_plan_made_by_hand():
    plan = Plan(lr=np.full(100, 0.1), peak=0.1, weight_decay=0.01, steps=100, new_steps=50.0)
    assert rules(plan)[2].weight_decay == pytest.approx(0.02)


# which parameters decay


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
