"""E-folds and rates, each by two routes: the formula, and an optimiser (or an explicit loop) that decays real weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import decaycast as dc
from decaycast.core.timescale import CONVENTIONS, group_convention, group_rate, learning_rates, shrink_gain, shrink_rate

START = 3.0
DECOUPLED = {
    "AdamW": (torch.optim.AdamW, {}),
    "Adam": (torch.optim.Adam, {"decoupled_weight_decay": True}),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
}


def weight(shape: tuple[int, ...] = (2, 2)) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, START, dtype=torch.float64))


def remaining(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: int) -> list[float]:
    """The weight after each step of pure decay: every gradient is zero."""
    values = []
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        values.append(float(parameter.detach().flatten()[0]))
    return values


def simulated_efolds(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: int) -> float:
    return -math.log(abs(remaining(optimizer, parameter, steps)[-1]) / START)


# pure decay in torch's optimisers


def test_plain_sgd_shrinks_by_its_rate():
    parameter = weight()
    optimizer = torch.optim.SGD([parameter], lr=0.02, weight_decay=0.3)
    (rate,) = dc.effective_rate(optimizer)
    assert rate == pytest.approx(0.006)
    assert remaining(optimizer, parameter, 50)[-1] == pytest.approx(START * (1 - rate) ** 50, rel=1e-12)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.5, 0.0), (0.9, 0.0), (0.9, 0.9), (0.8, 0.3)])
def test_heavy_ball_shrinks_by_its_rate_once_the_buffer_is_warm(momentum: float, dampening: float):
    parameter = weight()
    optimizer = torch.optim.SGD([parameter], lr=0.01, weight_decay=0.01, momentum=momentum, dampening=dampening)
    (rate,) = dc.effective_rate(optimizer)
    assert rate == pytest.approx(1e-4 * (1 - dampening) / (1 - momentum))
    values = remaining(optimizer, parameter, 600)
    assert -math.log(values[599] / values[99]) == pytest.approx(500 * rate, rel=0.01)


def test_dampening_means_nothing_without_momentum_as_in_torch():
    parameter = weight()
    group = {"params": [parameter], "lr": 0.02, "weight_decay": 0.3, "momentum": 0.0, "dampening": 0.7}
    optimizer = torch.optim.SGD([group])
    (rate,) = dc.effective_rate(optimizer)
    assert remaining(optimizer, parameter, 1)[0] == pytest.approx(START * (1 - rate), rel=1e-12)


def test_the_papers_measuring_run_in_torch_units():
    # WRN, eta 0.2, L2 0.01, beta 0.9, 32 steps: E* = 1.28 by the formula, 1.22 when the buffer starts from zero
    formula = dc.efolds(lr=0.02, weight_decay=0.2, steps=32, momentum=0.9)
    parameter = weight()
    simulated = simulated_efolds(torch.optim.SGD([parameter], lr=0.02, weight_decay=0.2, momentum=0.9), parameter, 32)
    assert formula == pytest.approx(1.28, abs=1e-9)
    assert simulated == pytest.approx(1.22, abs=0.005)


def test_heavy_ball_cannot_shrink_faster_than_its_envelope():
    # ten times the decay: 12.8 nominal e-folds, but the weights only oscillate inside an envelope of rate -log(beta)/2
    parameter = weight()
    simulated = simulated_efolds(torch.optim.SGD([parameter], lr=0.02, weight_decay=2.0, momentum=0.9), parameter, 32)
    capped = dc.efolds(lr=0.02, weight_decay=2.0, steps=32, momentum=0.9)
    assert simulated == pytest.approx(1.68, abs=0.005)
    assert capped == pytest.approx(-16 * math.log(0.9)) == pytest.approx(1.686, abs=5e-4)


def test_the_envelope_is_the_roots_modulus():
    # heavy ball under pure decay is w' = (1 + b - lr*lambda) w - b w_previous; its roots' modulus is the true rate
    momentum = 0.9
    for product in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0):
        modulus = np.abs(np.roots([1.0, -(1.0 + momentum - product), momentum])).max()
        rate = float(shrink_rate(product, 1.0, momentum=momentum))
        assert rate == pytest.approx(-math.log(modulus), rel=0.12 if product == 1e-3 else 0.05)


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_optimisers_shrink_by_lr_times_decay(name: str):
    kind, options = DECOUPLED[name]
    parameter = weight()
    optimizer = kind([parameter], lr=0.02, weight_decay=0.3, **options)
    (rate,) = dc.effective_rate(optimizer)
    assert rate == pytest.approx(0.006)
    assert remaining(optimizer, parameter, 40)[-1] == pytest.approx(START * (1 - rate) ** 40, rel=1e-9)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_shrinks_by_lr_times_decay():
    parameter = weight()
    optimizer = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.3)
    (rate,) = dc.effective_rate(optimizer)
    # Muon multiplies in place before its (here zero) orthogonalised update
    assert remaining(optimizer, parameter, 40)[-1] == pytest.approx(START * (1 - rate) ** 40, rel=1e-9)


def test_one_rate_per_group_and_zero_without_decay():
    groups = [
        {"params": [weight()], "weight_decay": 0.1},
        {"params": [weight()], "weight_decay": 0.0},
        {"params": [weight()], "weight_decay": 0.1, "lr": 0.5, "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    assert dc.effective_rate(optimizer) == pytest.approx([0.001, 0.0, 0.1])


def test_corrected_decay_counts_from_the_largest_learning_rate():
    # timm's AdamW with corrected_weight_decay: w <- (1 - lr**2/lr_max*lambda) w, lr_max being the one it was made with
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.02, weight_decay=0.1)
    optimizer.param_groups[0].update(corrected_weight_decay=True, max_lr_snapshot=0.02)
    assert dc.effective_rate(optimizer) == pytest.approx([0.02 * 0.1])
    optimizer.param_groups[0]["lr"] = 0.005
    assert dc.effective_rate(optimizer) == pytest.approx([0.005**2 / 0.02 * 0.1])
    by_formula = dc.efolds(lr=[0.02, 0.005], weight_decay=0.1, steps=2, convention="corrected")
    assert by_formula == pytest.approx(0.02 * 0.1 + dc.effective_rate(optimizer)[0])
    assert shrink_gain(optimizer, optimizer.param_groups[0]) == 0.25
    del optimizer.param_groups[0]["max_lr_snapshot"]
    with pytest.raises(ValueError, match="says corrected_weight_decay but not the largest learning rate"):
        dc.effective_rate(optimizer)


def test_rates_follow_the_current_learning_rate_also_as_a_tensor():
    optimizer = torch.optim.AdamW([weight()], lr=torch.tensor(0.02), weight_decay=0.3, foreach=False)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert dc.effective_rate(optimizer) == pytest.approx([0.003], rel=1e-6)


def test_a_subclass_keeps_its_parents_convention():
    class MySGD(torch.optim.SGD):
        pass

    class MyAdamW(torch.optim.AdamW):
        pass

    for kind, convention in ((MySGD, "sgd"), (MyAdamW, "decoupled")):
        optimizer = kind([weight()], lr=0.1, weight_decay=0.1)
        assert group_convention(optimizer, optimizer.param_groups[0]) == convention


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop])
def test_coupled_l2_in_an_adaptive_optimiser_is_refused(kind):
    optimizer = kind([weight()], lr=0.1, weight_decay=0.1)
    message = f"{kind.__name__} couples weight decay into an adaptive step.*Use AdamW"
    with pytest.raises(ValueError, match=message):
        dc.effective_rate(optimizer)
    # there is nothing to refuse where nothing decays
    assert dc.effective_rate(kind([weight()], lr=0.1, weight_decay=0.0)) == [0.0]


def test_coupled_l2_in_adam_has_no_fixed_shrink():
    # the reason for refusing: the same lr and decay shrink two weights of one optimiser at different rates
    large, small = weight(), weight()
    optimizer = torch.optim.Adam([large, small], lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        for parameter, scale in ((large, 10.0), (small, 0.01)):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = scale * (noise - noise.mean())
        optimizer.step()
    shrinks = [-math.log(float(parameter.detach().mean()) / START) for parameter in (large, small)]
    assert shrinks[1] > 3 * abs(shrinks[0])


def test_an_unknown_optimiser_is_refused_with_the_way_out():
    stranger = SimpleNamespace(param_groups=[{"lr": 0.1, "weight_decay": 0.1}])
    message = r"SimpleNamespace is not known; compute the rate with efolds\(convention=...\).*sgd, decoupled, relative"
    with pytest.raises(ValueError, match=message):
        dc.effective_rate(stranger)


def test_an_unknown_optimiser_that_says_decoupled_is_believed():
    group = {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}
    assert group_rate(SimpleNamespace(param_groups=[group]), group) == pytest.approx(0.01)


# e-folds of a run against the sum of an optimiser's own rates, and against explicit loops


def cosine(step: int) -> float:
    return 0.05 * (1 + math.cos(math.pi * step / 40)) / 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_efolds_add_up_an_optimisers_rates(momentum: float):
    optimizer = torch.optim.SGD([weight()], lr=1.0, weight_decay=0.02, momentum=momentum)
    total = 0.0
    for step in range(40):
        optimizer.param_groups[0]["lr"] = cosine(step)
        total += dc.effective_rate(optimizer)[0]
    by_function = dc.efolds(lr=cosine, weight_decay=0.02, steps=40, momentum=momentum)
    by_values = dc.efolds(lr=[cosine(step) for step in range(40)], weight_decay=0.02, steps=40, momentum=momentum)
    assert by_function == pytest.approx(total, rel=1e-12)
    assert by_values == by_function


def test_what_remains_after_efolds():
    parameter = weight()
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.02)
    for step in range(40):
        optimizer.param_groups[0]["lr"] = cosine(step)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    spent = dc.efolds(lr=cosine, weight_decay=0.02, steps=40, convention="decoupled")
    assert float(parameter.detach()[0, 0]) == pytest.approx(START * math.exp(-spent), rel=1e-3)


def relative_loop(rates: list[float], weight_decay: float) -> float:
    """Composer: weights are multiplied by 1 - lr/lr_0 * weight_decay."""
    remains = 1.0
    for rate in rates:
        remains *= 1 - rate / rates[0] * weight_decay
    return -math.log(remains)


def corrected_loop(rates: list[float], weight_decay: float) -> float:
    """timm's corrected decay: weights are multiplied by 1 - lr * (lr/lr_max * weight_decay)."""
    remains, largest = 1.0, max(rates)
    for rate in rates:
        remains *= 1 - rate * (rate / largest * weight_decay)
    return -math.log(remains)


@pytest.mark.parametrize(
    ("convention", "loop", "weight_decay"), [("relative", relative_loop, 1e-4), ("corrected", corrected_loop, 2e-3)]
)
def test_other_conventions_against_a_loop(convention: str, loop, weight_decay: float):
    warm = [0.3 * min(1.0, (step + 1) / 10) * (1 - step / 200) for step in range(200)]  # lr_0 is not lr_max
    spent = dc.efolds(lr=warm, weight_decay=weight_decay, steps=200, convention=convention)
    assert spent == pytest.approx(loop(warm, weight_decay), rel=1e-3)
    assert spent > 0.01


def test_momentum_counts_only_where_decay_goes_through_the_buffer():
    plain = dc.efolds(lr=0.1, weight_decay=0.01, steps=10, convention="decoupled")
    assert dc.efolds(lr=0.1, weight_decay=0.01, steps=10, convention="decoupled", momentum=0.9) == plain
    assert dc.efolds(lr=0.1, weight_decay=0.01, steps=10, momentum=0.9) == pytest.approx(10 * plain)


# the inverse


@settings(deadline=None)
@given(
    efolds=st.floats(1e-3, 20.0),
    lr=st.floats(1e-4, 1.0),
    steps=st.integers(1, 200),
    momentum=st.floats(0.0, 0.99),
    convention=st.sampled_from(CONVENTIONS),
    shape=st.sampled_from(["constant", "cosine", "zeros"]),
)
def test_weight_decay_for_inverts_efolds(efolds, lr, steps, momentum, convention, shape):
    factors = {
        "constant": np.ones(steps),
        "cosine": (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2,
        "zeros": np.where(np.arange(steps) % 3 == 0, 1.0, 0.0),
    }[shape]
    recipe = {"lr": lr * factors, "steps": steps, "momentum": momentum, "convention": convention}
    reachable = -0.5 * math.log(momentum) * np.count_nonzero(factors) if convention == "sgd" and momentum else math.inf
    if efolds >= reachable * (1 - 1e-9):
        with pytest.raises(ValueError, match="out of reach; use less momentum or more steps"):
            dc.weight_decay_for(efolds=max(efolds, reachable * 1.001), **recipe)
    else:
        weight_decay = dc.weight_decay_for(efolds=efolds, **recipe)
        assert weight_decay > 0
        assert dc.efolds(weight_decay=weight_decay, **recipe) == pytest.approx(efolds, rel=1e-9)


def test_the_inverse_when_some_steps_are_capped():
    # lr falls a hundredfold: at this many e-folds the early steps sit at the cap and the late ones do not
    rates = np.geomspace(1.0, 0.01, 50)
    weight_decay = dc.weight_decay_for(efolds=2.0, lr=rates, steps=50, momentum=0.9)
    cap = -0.5 * math.log(0.9)
    capped = rates * weight_decay / 0.1 > cap
    assert 0 < capped.sum() < 50
    by_hand = capped.sum() * cap + (rates[~capped] * weight_decay / 0.1).sum()
    assert by_hand == pytest.approx(2.0, rel=1e-12)


def test_no_efolds_need_no_decay():
    assert dc.weight_decay_for(efolds=0.0, lr=0.1, steps=10) == 0.0
    assert dc.efolds(lr=0.1, weight_decay=0.0, steps=10) == 0.0


def test_the_papers_prediction_for_200_epochs():
    # c = 0.00656 epochs (48 steps each) at L2 0.01 predicts L2 = 3.28e-5 at 200 epochs; torch's decay is 20 times that
    spent = dc.efolds(lr=0.02, weight_decay=20 * 0.01, steps=32, momentum=0.9)
    predicted = dc.weight_decay_for(efolds=spent, lr=0.02, steps=200 * 48, momentum=0.9)
    assert predicted / 20 == pytest.approx(0.01 * 32 / 9600, rel=1e-12) == pytest.approx(3.28e-5, rel=0.02)


# bad input


@pytest.mark.parametrize("bad", [-1e-3, math.nan, math.inf])
def test_bad_numbers_are_named(bad: float):
    with pytest.raises(ValueError, match=f"weight_decay must be finite and >= 0, got {bad}"):
        dc.efolds(lr=0.1, weight_decay=bad, steps=10)
    with pytest.raises(ValueError, match=f"efolds must be finite and >= 0, got {bad}"):
        dc.weight_decay_for(efolds=bad, lr=0.1, steps=10)
    for lr in (bad, [0.1, bad], lambda step: bad):
        with pytest.raises(ValueError, match=f"lr must be finite and >= 0 at every step, got {bad}"):
            dc.efolds(lr=lr, weight_decay=0.1, steps=2)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_steps_are_a_positive_whole_number(steps):
    with pytest.raises(ValueError, match=f"steps must be a whole number >= 1, got {steps}"):
        dc.efolds(lr=0.1, weight_decay=0.1, steps=steps)


def test_whole_steps_may_come_as_a_float():
    assert learning_rates(0.1, 3.0).tolist() == [0.1, 0.1, 0.1]  # type: ignore[arg-type]


def test_a_learning_rate_per_step_must_fit():
    with pytest.raises(ValueError, match=r"lr has shape \(3,\), but the run has 4 steps; give one value per step"):
        dc.efolds(lr=[0.1] * 3, weight_decay=0.1, steps=4)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_momentum_has_a_range(momentum: float):
    for call in (dc.efolds, dc.weight_decay_for):
        amount = {"weight_decay": 0.1} if call is dc.efolds else {"efolds": 0.1}
        with pytest.raises(ValueError, match=rf"momentum must be in \[0, 1\), got {momentum}"):
            call(lr=0.1, steps=4, momentum=momentum, **amount)


def test_an_unknown_convention_gets_the_nearest():
    with pytest.raises(ValueError, match="unknown convention 'decouple'; did you mean 'decoupled'"):
        dc.efolds(lr=0.1, weight_decay=0.1, steps=4, convention="decouple")


def test_a_learning_rate_of_zero():
    assert dc.efolds(lr=0.0, weight_decay=0.1, steps=4) == 0.0
    with pytest.raises(ValueError, match="zero at every step, so no weight decay has an effect"):
        dc.weight_decay_for(efolds=1.0, lr=0.0, steps=4)
    with pytest.raises(
        ValueError, match="'relative' divides by a learning rate that is zero; start from a positive lr"
    ):
        dc.efolds(lr=[0.0, 0.1], weight_decay=0.1, steps=2, convention="relative")
    with pytest.raises(ValueError, match="'corrected' divides by a learning rate that is zero"):
        dc.efolds(lr=0.0, weight_decay=0.1, steps=2, convention="corrected")


def test_more_efolds_than_heavy_ball_can_spend():
    message = r"at most 0.05268 e-folds per step, 1.686 over 32 steps .* so 2 e-folds are out of reach"
    with pytest.raises(ValueError, match=message):
        dc.weight_decay_for(efolds=2.0, lr=0.02, steps=32, momentum=0.9)


def test_a_product_that_no_float_holds_is_refused():
    with pytest.raises(ValueError, match="multiply to more than a float holds"):
        dc.efolds(lr=1e200, weight_decay=1e200, steps=1)


USUAL = {"lr": 0.1, "weight_decay": 0.01, "steps": 10, "momentum": 0.5}


def test_numbers_of_the_recipe_may_be_of_numpy_or_torch():
    expected = dc.efolds(**USUAL)
    for kind in (np.array, torch.tensor, lambda value: torch.tensor([value], dtype=torch.float64)):
        given_so = {name: kind(value) for name, value in USUAL.items() if name != "lr"}
        assert dc.efolds(lr=0.1, **given_so) == pytest.approx(expected, rel=1e-7)
    assert dc.efolds(**{**USUAL, "lr": torch.tensor(0.1, requires_grad=True)}) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": "0.1"}, "weight_decay must be finite and >= 0, got 0.1"),
        ({"weight_decay": None}, "weight_decay must be finite and >= 0, got None"),
        ({"weight_decay": [0.1]}, "weight_decay must be finite and >= 0, got"),
        ({"momentum": "0.9"}, "momentum must be in"),
        ({"steps": math.nan}, "steps must be a whole number >= 1, got nan"),
        ({"steps": math.inf}, "steps must be a whole number >= 1, got inf"),
        ({"steps": None}, "steps must be a whole number >= 1, got None"),
        ({"lr": "fast"}, "lr must be finite and >= 0 at every step, got fast"),
        ({"lr": lambda step: None}, "lr must be finite and >= 0 at every step, got nan"),
    ],
)
def test_what_is_no_number_is_named(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        dc.efolds(**{**USUAL, **changes})


def test_a_weight_decay_beyond_floats_is_refused():
    with pytest.raises(ValueError, match="lr is so small that 1e.300 e-folds need a weight decay beyond what a float"):
        dc.weight_decay_for(efolds=1e300, lr=1e-300, steps=10)
