"""Transfer rules: the papers' numbers, two routes to each, units that must not mix, and rotation against real optimisers."""

from __future__ import annotations

import doctest
import math
import pickle
import re
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decaycast.core.timescale import efolds
from decaycast.methods.l2 import language_models, recipe, transfer
from decaycast.methods.l2.transfer import OutsideFittedRange, Recipe, convert

SIZES = st.floats(1e-3, 1e6)
FACTORS = st.floats(0.05, 20.0)


# Power Lines


@pytest.mark.parametrize(("tpp", "tau"), [(1, 1.08), (5, 0.46), (20, 0.224), (100, 0.096), (200, 0.066), (1000, 0.028)])
def test_power_lines_give_the_published_times(tpp: float, tau: float):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = transfer.power_lines(tpp)
    assert isinstance(found, float)
    assert found == pytest.approx(tau, rel=0.02, abs=5e-4)
    assert math.log(found) == pytest.approx(math.log(1.084) - 0.527 * math.log(tpp), rel=1e-12)


def test_power_lines_broadcast():
    found = transfer.power_lines(np.array([[1.0], [20.0]]))
    assert found.shape == (2, 1) and found[1, 0] == transfer.power_lines(20.0)


@pytest.mark.parametrize("tpp", [0.5, 3000, [20, 3000]])
def test_outside_its_range_power_lines_warn_with_the_range(tpp):
    with pytest.warns(
        OutsideFittedRange, match="is outside the fitted range, 1 to 1000: this is an extrapolation"
    ) as seen:
        transfer.power_lines(tpp)
    warning = seen[0].message
    assert isinstance(warning, UserWarning)
    assert (warning.low, warning.high, warning.value) == (1, 1000, np.ravel(tpp)[-1])
    assert str(pickle.loads(pickle.dumps(warning))) == str(warning)


def test_the_two_ways_to_the_power_lines_decay_agree():
    """B*TPP**0.527/(1.084*lr*D), and 1/(tau*lr*steps) with steps = D/B."""
    parameters, data, batch, lr = 610e6, 12.2e9, 1_048_576.0, 1.5e-3
    named = transfer.power_lines_weight_decay(
        tokens_per_parameter=20, lr=lr, batch=batch, data=data, batch_unit="tokens", data_unit="tokens"
    )
    steps = round(data / batch)
    assert transfer.weight_decay_from_tau(transfer.power_lines(data / parameters), lr, steps) == pytest.approx(
        named, rel=1e-4
    )
    assert named == pytest.approx(batch * 20**0.527 / (1.084 * lr * data), rel=1e-12)


def test_batch_and_data_in_different_units_are_an_error_or_converted():
    """The mistake of a public script: a batch in sequences over data in tokens, wrong by the sequence length."""
    known = {"tokens_per_parameter": 20, "lr": 6e-4, "data": 2e9}
    with pytest.raises(ValueError, match="batch is in sequences and data in tokens: lambda would be wrong by the seq"):
        transfer.power_lines_weight_decay(**known, batch=256, batch_unit="sequences", data_unit="tokens")
    right = transfer.power_lines_weight_decay(
        **known, batch=256, batch_unit="sequences", data_unit="tokens", sequence_length=1024
    )
    same = transfer.power_lines_weight_decay(**known, batch=262_144, batch_unit="tokens", data_unit="tokens")
    wrong = transfer.power_lines_weight_decay(**known, batch=256, batch_unit="tokens", data_unit="tokens")
    assert right == pytest.approx(same, rel=1e-12) and right == pytest.approx(1024 * wrong, rel=1e-12)
    sequences = transfer.power_lines_weight_decay(
        **{**known, "data": 2e9 / 1024}, batch=256, batch_unit="sequences", data_unit="sequences"
    )
    assert sequences == pytest.approx(same, rel=1e-12)
    other = transfer.power_lines_weight_decay(
        **{**known, "data": 2e9 / 1024}, batch=262_144, batch_unit="tokens", data_unit="sequences", sequence_length=1024
    )
    assert other == pytest.approx(same, rel=1e-12)


def test_optimal_and_critical_batch():
    assert transfer.optimal_batch(40e9) == pytest.approx(0.72e6, rel=0.005)
    assert transfer.optimal_batch(40e9) / 2048 == pytest.approx(0.0306 * math.exp(0.383 * math.log(40e9)))
    ratios = transfer.critical_batch(np.array([1e9, 1e11])) / 2048
    assert ratios[1] / ratios[0] == pytest.approx(100**0.462) and ratios[0] == pytest.approx(0.0471 * 1e9**0.462)


# tau


@settings(deadline=None)
@given(tau=FACTORS, lr=st.floats(1e-5, 1.0), steps=st.integers(1, 300))
def test_tau_is_one_over_the_efolds_of_what_it_gives(tau: float, lr: float, steps: int):
    for rates in (lr, [lr * (1 - k / (2 * steps)) for k in range(steps)], lambda k: lr / (1 + k)):
        found = transfer.weight_decay_from_tau(tau, rates, steps)
        assert 1 / efolds(lr=rates, weight_decay=found, steps=steps, convention="decoupled") == pytest.approx(tau)


def test_tau_of_a_number_is_the_formula_and_arrays_broadcast():
    assert transfer.weight_decay_from_tau(0.25, 1e-3, 10_000) == pytest.approx(0.4)
    assert transfer.weight_decay_from_tau([0.25, 0.5], 1e-3, 10_000) == pytest.approx([0.4, 0.2])


def test_time_scales_count_steps_and_epochs():
    """An average of updates with memory 1/(lr*lambda): after that many steps a weight has kept 1/e."""
    lr, decay, kept, steps = 0.01, 0.2, 1.0, 0
    while kept > math.exp(-1):
        kept, steps = kept * (1 - lr * decay), steps + 1
    assert transfer.tau_iter(lr, decay) == pytest.approx(steps, rel=2e-3)
    assert transfer.tau_epoch(lr, decay, 100) == pytest.approx(5.0)


@settings(deadline=None)
@given(decay=st.floats(1e-6, 10.0), batch=SIZES, samples=SIZES, factor=FACTORS)
def test_what_is_carried_over_keeps_tau_in_epochs(decay: float, batch: float, samples: float, factor: float):
    lr = 0.01
    before = transfer.tau_epoch(lr, decay, samples / batch)
    larger = transfer.across_batch(decay, batch, factor * batch)
    assert transfer.tau_epoch(lr, larger, samples / (factor * batch)) == pytest.approx(before)
    more = transfer.across_data(decay, samples, factor * samples)
    assert transfer.tau_epoch(lr, more, factor * samples / batch) == pytest.approx(before)
    wider = transfer.across_width(decay, 256, 256 * factor)
    assert transfer.tau_epoch(lr / factor, wider, samples / batch) == pytest.approx(before)
    assert transfer.across_width(decay, 256, 256 * factor, "standard") == pytest.approx(decay)


def test_directions_of_the_rules():
    assert transfer.across_batch(0.1, 256, 1024) == pytest.approx(0.4)
    assert transfer.across_data(0.1, 50_000, 200_000) == pytest.approx(0.025)
    assert transfer.across_width(0.1, 256, 1024) == pytest.approx(0.4)
    assert transfer.across_width(np.array([0.1, 0.2]), 256, 1024) == pytest.approx([0.4, 0.8])
    assert transfer.across_budget(1e-4, 200, [50, 800]) == pytest.approx([4e-4, 2.5e-5])


# the length of the run


def test_the_budget_rule_gives_the_papers_prediction():
    """c = 0.00656 epochs: lambda = c/T, the series for T = 50 to 350 epochs."""
    measured = [transfer.across_budget(0.01, 0.656, epochs) for epochs in (50, 100, 150, 200, 250, 300, 350)]
    assert measured == pytest.approx([1.31e-4, 6.56e-5, 4.37e-5, 3.28e-5, 2.62e-5, 2.19e-5, 1.87e-5], rel=3e-3)


def test_normalised_decay_both_ways_and_its_root():
    run = {"batch": 128, "samples": 50_000, "epochs": 100}
    decay = transfer.weight_decay_from_normalised(0.025, **run)
    assert decay == pytest.approx(0.025 / math.sqrt(100 * 50_000 / 128))
    assert transfer.normalised_weight_decay(decay, **run) == pytest.approx(0.025)
    # shrink per step, so relative to the first rate: four times as long a run spends twice the e-folds
    steps = 39_063
    spent = efolds(lr=3e-3, weight_decay=decay, steps=steps, convention="relative")
    longer = transfer.weight_decay_from_normalised(0.025, **{**run, "epochs": 400})
    assert efolds(lr=3e-3, weight_decay=longer, steps=4 * steps, convention="relative") == pytest.approx(2 * spent)
    assert spent == pytest.approx(decay * steps)


@settings(deadline=None)
@given(batch=FACTORS, data=FACTORS)
def test_nanochats_rule_is_equal_efolds_when_lr_goes_with_the_root_of_the_batch(batch: float, data: float):
    steps, lr = 1000.0, 0.01
    new = transfer.nanochat_rule(0.28, batch=2.0, new_batch=2.0 * batch, data=5.0, new_data=5.0 * data)
    spent = lr * math.sqrt(batch) * new * steps * data / batch
    assert spent == pytest.approx(lr * 0.28 * steps)


# rotation


def turns(make, scale_invariant: bool, steps: int) -> float:
    """Root mean square angle per step in equilibrium, of random gradients (for SGD: of a scale-invariant layer)."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1500, generator=rng, dtype=torch.float64))
    optimizer, angles = make([weight]), []
    for step in range(steps):
        gradient = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        if scale_invariant:
            unit = weight.detach() / weight.detach().norm()
            gradient = (gradient - (gradient @ unit) * unit) / weight.detach().norm()
        before, weight.grad = weight.detach().clone(), gradient
        optimizer.step()
        if step > steps // 2:
            cosine = torch.nn.functional.cosine_similarity(before, weight.detach(), dim=0).clamp(max=1.0)
            angles.append(float(torch.arccos(cosine)) ** 2)
    return math.sqrt(sum(angles) / len(angles))


def test_adamw_turns_as_predicted():
    found = turns(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, betas=(0.8, 0.99)), False, 2500)
    assert found == pytest.approx(transfer.rotation_adamw(0.02, 0.1, 0.8), rel=0.03)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_sgd_turns_as_predicted(momentum: float):
    found = turns(lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.004, momentum=momentum), True, 2500)
    assert found == pytest.approx(transfer.rotation_sgd(0.5, 0.004, momentum), rel=0.03)


# from one optimiser to another

SGD = Recipe(lr=0.1, weight_decay=5e-4, steps=10_000, momentum=0.9)


@pytest.mark.parametrize("convention", ["decoupled", "relative", "corrected", "sgd"])
def test_a_converted_recipe_spends_the_same(convention: str):
    falling = [1e-3 * (1 - step / 10_000) for step in range(10_000)]
    new = convert(SGD, convention=convention, lr=falling)
    assert new.efolds == pytest.approx(SGD.efolds) == pytest.approx(5.0)
    assert new.momentum == (0.9 if convention == "sgd" else 0.0)
    back = convert(new, convention="sgd", lr=0.1, momentum=0.9)
    assert back.weight_decay == pytest.approx(5e-4)


def test_conversion_by_hand():
    assert convert(SGD, convention="decoupled", lr=1e-3).weight_decay == pytest.approx(0.5)
    assert convert(SGD, momentum=0.0).weight_decay == pytest.approx(5e-3)
    assert convert(SGD, steps=40_000).weight_decay == pytest.approx(1.25e-4)
    longer = convert(SGD, steps=20_000, lr=lambda step: 0.1 * (1 - step / 20_000))
    assert longer.weight_decay == pytest.approx(5e-4, rel=1e-3)


def test_a_conversion_is_real_shrinking():
    """A weight without gradient ends at the same value in torch's SGD with momentum and in AdamW."""
    sgd = Recipe(lr=0.05, weight_decay=0.01, steps=1000, momentum=0.5)
    adamw = convert(sgd, convention="decoupled", lr=2e-3)
    ends = []
    for recipe_, make in (
        (sgd, lambda p, r: torch.optim.SGD(p, lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)),
        (adamw, lambda p, r: torch.optim.AdamW(p, lr=r.lr, weight_decay=r.weight_decay)),
    ):
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = make([weight], recipe_)
        for _ in range(recipe_.steps):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        ends.append(float(weight.detach()))
    assert ends == pytest.approx([math.exp(-1)] * 2, rel=5e-3)


def test_heavy_balls_cap_is_respected():
    wild = Recipe(lr=0.1, weight_decay=50.0, steps=100)  # 500 e-folds
    with pytest.raises(ValueError, match="heavy ball shrinks weights by at most"):
        convert(wild, momentum=0.9)
    strong = Recipe(lr=0.02, weight_decay=2.0, steps=32, momentum=0.9)
    assert convert(strong, convention="decoupled", lr=1.0).weight_decay == pytest.approx(-0.5 * math.log(0.9))


@pytest.mark.parametrize("convention", ["adam", "Adam", "nadam", "rmsprop"])
def test_coupled_adam_is_refused_with_its_reason(convention: str):
    with pytest.raises(
        ValueError, match="couples weight decay into an adaptive step: the decay of each weight depends on"
    ):
        convert(SGD, convention=convention, lr=1e-3)
    with pytest.raises(ValueError, match="couples weight decay into an adaptive step"):
        Recipe(lr=0.1, weight_decay=0.1, steps=10, convention=convention)


def test_what_a_conversion_needs():
    with pytest.raises(ValueError, match="learning rates of 'sgd' and 'decoupled' optimisers are different quantities"):
        convert(SGD, convention="decoupled")
    falling = Recipe(lr=lambda step: 0.1 / (1 + step), weight_decay=5e-4, steps=10)
    with pytest.raises(
        ValueError, match="the recipe's lr is a schedule over 10 steps; give the one over 20 steps, lr="
    ):
        convert(falling, steps=20)
    assert convert(falling, steps=10).weight_decay == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="unknown convention 'decouple'; did you mean 'decoupled'"):
        Recipe(lr=0.1, weight_decay=0.1, steps=10, convention="decouple")


# bad input

UNITS = {"batch_unit": "tokens", "data_unit": "tokens"}
BAD = [
    (lambda: transfer.power_lines(0), "tokens_per_parameter must be finite and > 0, got 0"),
    (lambda: transfer.power_lines(math.nan), "tokens_per_parameter must be finite and > 0, got nan"),
    (lambda: transfer.power_lines("20"), "tokens_per_parameter must be a number or an array of numbers, got '20'"),
    (lambda: transfer.power_lines(None), "tokens_per_parameter must be a number or an array of numbers, got None"),
    (lambda: transfer.power_lines([[1], [2, 3]]), "tokens_per_parameter must be a number or an array of numbers, got"),
    (lambda: transfer.power_lines(True), "tokens_per_parameter must be a number or an array of numbers, got True"),
    (lambda: transfer.power_lines(torch.tensor(20.0, requires_grad=True)), "must be a number or an array of numbers, got"),
    (lambda: recipe.Recipe(lr=0.1, weight_decay=0.1, steps=10, convention=None), "unknown convention None"),  # type: ignore[arg-type]
    (lambda: transfer.weight_decay_from_tau(0.1, 0.1, math.nan), "steps must be a whole number >= 1, got nan"),
    (lambda: transfer.weight_decay_from_tau(-1, 0.1, 10), "tau must be finite and > 0, got -1"),
    (lambda: transfer.weight_decay_from_tau(0.1, 0.0, 10), "the learning rate is zero at every step"),
    (lambda: transfer.weight_decay_from_tau(0.1, [0.1, 0.1], 3), "lr has shape"),
    (lambda: transfer.weight_decay_from_tau(0.1, 0.1, 0), "steps must be a whole number >= 1, got 0"),
    (lambda: transfer.across_batch(-0.1, 1, 2), "weight_decay must be finite and >= 0, got -0.1"),
    (lambda: transfer.across_batch(0.1, 0, 2), "batch must be finite and > 0, got 0"),
    (lambda: transfer.across_data(0.1, 1, math.inf), "new_samples must be finite and > 0, got inf"),
    (lambda: transfer.across_width(0.1, 1, 2, "mpu"), "unknown parametrisation 'mpu'; did you mean 'mup'"),
    (lambda: transfer.across_budget(0.1, 1, [1, 0]), "new_steps must be finite and > 0, got 0"),
    (lambda: transfer.tau_iter(0.1, 0.0), "weight_decay must be finite and > 0, got 0"),
    (lambda: transfer.rotation_adamw(0.1, 0.1, 1.0), r"beta1 must be in \[0, 1\), got 1"),
    (lambda: transfer.rotation_sgd(0.1, 0.1, -0.1), r"momentum must be in \[0, 1\), got -0.1"),
    (lambda: transfer.in_tokens(5, "sequences", None), "sequences become tokens with sequence_length="),
    (lambda: transfer.in_tokens(5, "samples", 10), "unknown unit 'samples'"),
    (
        lambda: transfer.weight_decay_from_normalised(0.1, batch=100, samples=10, epochs=2),
        r"one batch \(100\) is more than the whole run \(10 samples x 2 epochs\); check units",
    ),
    (
        lambda: transfer.power_lines_weight_decay(tokens_per_parameter=20, lr=0.1, batch=10, data=5, **UNITS),
        r"one batch \(10 tokens\) is more than the whole run \(5 tokens\); check units",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_numbers_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("module", [transfer, language_models, recipe], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings(module):
    done = doctest.testmod(module)
    assert done.attempted > 0 and done.failed == 0


def test_every_rule_states_its_source_and_has_an_example():
    for name in transfer.__all__:
        value = getattr(transfer, name)
        if name not in ("OutsideFittedRange", "Recipe"):
            assert "Source" in value.__doc__ or "as there" in value.__doc__, name
            assert ">>>" in value.__doc__, name


def test_the_numbers_on_the_page_are_right():
    page = (Path(__file__).resolve().parents[3] / "docs" / "transfer.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"dc": types.SimpleNamespace(transfer=transfer), "sgd": SGD}
    names["run"] = eval(re.findall(r"^run = (.*)$", page, re.MULTILINE)[0])
    found = re.findall(r"(dc\.transfer\..*?)\s+# ([\d.]+)$", page, re.MULTILINE)
    assert len(found) == 7
    for call, value in found:
        assert eval(call, names) == pytest.approx(float(value), rel=5e-4), call


def test_the_page_names_every_function():
    page = (Path(__file__).resolve().parents[3] / "docs" / "transfer.md").read_text(encoding="utf-8")
    functions = {name for name in transfer.__all__ if name[0].islower()}
    assert {name for name in functions if f"`{name}`" not in page} == {"in_tokens", "normalised_weight_decay"}


def test_a_single_rate_needs_no_array_of_steps():
    assert transfer.weight_decay_from_tau(0.25, 1e-3, 10**13) == pytest.approx(4e-10)
    assert transfer.weight_decay_from_tau(0.25, 1e-3, 10_000) == 0.4
